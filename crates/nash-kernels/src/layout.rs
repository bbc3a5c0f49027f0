//! The packed layout: widths, shapes, and checked views of a packed matrix.
//!
//! Everything here is arithmetic on lengths; a [`PackedRef`] that exists has buffers of exactly the
//! right length, which is the invariant that the kernels rely on for memory safety. Codes, scales and
//! codebook *values* may be anything: hostile values give wrong numbers, never undefined behaviour.

use half::f16;
use thiserror::Error;

/// Columns that share one scale code: the group size.
pub const GROUP: usize = 64;

/// Row scales are stored times 2¹⁴: scale code and codebook are both within ±127, so that without the factor the
/// row scales of ordinary weights would be subnormal in `f16`. A power of two, hence exact.
pub const SCALE_UNIT: f32 = 1.0 / 16384.0;

/// Rows interleaved in one tile of the stream.
pub const TILE_ROWS: usize = 4;

/// Bits of a chain that one value is looked up by: those of its own code and of what follows it.
pub const WINDOW_BITS: usize = 6;

/// Codes in a chain.
pub const CHAIN: usize = 32;

/// Chains of one row in a group.
pub const CHAINS: usize = GROUP / CHAIN;

/// Codes of a chain that lie side by side in a row; they fill `bits` whole bytes.
pub(crate) const RUN: usize = 8;

/// Columns of one row that lie together in a register: a run of each chain. A group holds four such blocks.
pub(crate) const BLOCK: usize = CHAINS * RUN;

/// Weights of a record: four rows of a group.
pub(crate) const TILE_WEIGHTS: usize = TILE_ROWS * GROUP;

/// Chains of a record.
pub(crate) const TILE_CHAINS: usize = TILE_ROWS * CHAINS;

/// Blocks in a group.
pub(crate) const BLOCKS: usize = GROUP / BLOCK;

/// The column of the group whose code is number `symbol` of chain `chain`: `16 · (symbol / 8) + 8 · chain + symbol % 8`.
///
/// # Panics
/// If `chain` is not below [`CHAINS`] or `symbol` not below [`CHAIN`].
#[inline]
pub const fn chain_column(chain: usize, symbol: usize) -> usize {
    assert!(chain < CHAINS && symbol < CHAIN);
    BLOCK * (symbol / RUN) + RUN * chain + symbol % RUN
}

/// Bits per code of a packed matrix: 2, 3, 4, 5, 6 or 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Width(u8);

impl Width {
    /// All widths, ascending.
    pub const ALL: [Width; 6] = [Width(2), Width(3), Width(4), Width(5), Width(6), Width(8)];

    /// The width of `bits` bits, or `None` if codes of that size are not supported.
    pub const fn new(bits: u8) -> Option<Width> {
        match bits {
            2..=6 | 8 => Some(Width(bits)),
            _ => None,
        }
    }

    /// Bits per code.
    pub const fn bits(self) -> usize {
        self.0 as usize
    }

    /// Number of different codes, `2^bits`.
    pub const fn levels(self) -> usize {
        1 << self.0
    }

    /// Entries of the codebook: one for every window, but 0 for 8 bits, whose codes are `value + 128`.
    pub const fn codebook_len(self) -> usize {
        if self.0 == 8 { 0 } else { 1 << WINDOW_BITS }
    }
}

/// What is wrong with the pieces of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The byte size of the matrix does not fit the address space.
    #[error("a packed matrix of {rows} x {cols} at {bits} bits is too large to address")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Bits per code asked for.
        bits: usize,
    },
    /// A buffer has the wrong number of elements.
    #[error("{part} of a packed matrix has {actual} elements, its shape needs {expected}")]
    Length {
        /// Which buffer: `stream`, `row scales`, `codebook`, `codes` or `scale codes`.
        part: &'static str,
        /// Elements that the shape needs.
        expected: usize,
        /// Elements found.
        actual: usize,
    },
    /// A code is not below `2^bits`.
    #[error("code {code} at row {row}, column {col} is not below {levels}")]
    Code {
        /// Row of the code.
        row: usize,
        /// Column of the code.
        col: usize,
        /// The code.
        code: u8,
        /// Number of codes of the width.
        levels: usize,
    },
    /// A codebook holds −128, whose negative does not fit a byte.
    #[error("codebook entry {index} is -128; values are in -127..=127")]
    CodebookValue {
        /// Index of the entry.
        index: usize,
    },
}

/// Shape and width of a packed matrix `[rows, cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedShape {
    /// Rows `m`: outputs.
    pub rows: usize,
    /// Columns `n`: inputs.
    pub cols: usize,
    /// Bits per code.
    pub width: Width,
}

impl PackedShape {
    /// Groups per row: `ceil(cols / 64)`.
    pub const fn groups(self) -> usize {
        self.cols.div_ceil(GROUP)
    }

    /// Tiles of four rows: `ceil(rows / 4)`.
    pub const fn tiles(self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one record, that is four rows by one group with their scale codes: `32·bits + 4`.
    pub const fn record_bytes(self) -> usize {
        TILE_ROWS * GROUP / 8 * self.width.bits() + TILE_ROWS
    }

    /// Bytes of the stream, `tiles · groups · record_bytes`; `None` if that does not fit a `usize`.
    pub const fn stream_bytes(self) -> Option<usize> {
        match self.tiles().checked_mul(self.groups()) {
            Some(records) => records.checked_mul(self.record_bytes()),
            None => None,
        }
    }

    /// As [`stream_bytes`](Self::stream_bytes), with an error that names the shape.
    pub(crate) fn checked_stream_bytes(self) -> Result<usize, LayoutError> {
        let (rows, cols, bits) = (self.rows, self.cols, self.width.bits());
        self.stream_bytes()
            .ok_or(LayoutError::TooLarge { rows, cols, bits })
    }

    /// `rows · per_row`, or an error that names the shape.
    pub(crate) fn checked_rows_times(self, per_row: usize) -> Result<usize, LayoutError> {
        let (rows, cols, bits) = (self.rows, self.cols, self.width.bits());
        self.rows
            .checked_mul(per_row)
            .ok_or(LayoutError::TooLarge { rows, cols, bits })
    }
}

/// Compares a buffer's length with what the shape needs.
pub(crate) fn check_len(part: &'static str, expected: usize, actual: usize) -> Result<(), LayoutError> {
    if expected == actual {
        Ok(())
    } else {
        Err(LayoutError::Length {
            part,
            expected,
            actual,
        })
    }
}

/// A packed matrix borrowed from memory, usually from a mapped file.
///
/// # Layout (version 2, little-endian)
///
/// The value of a weight is
///
/// ```text
/// weight[r, c] = row_scale[r] (f16) · 2⁻¹⁴ · scale_code[r, c / 64] (i8) · codebook[window[r, c]] (i8)
/// ```
///
/// where a weight's *window* is six bits: its code of `b` bits and, above them, the first `6 − b` bits of what
/// follows the code in its chain. So the values of neighbours depend on each other, which makes the codes a trellis
/// code (the bit-shift trellis of QTIP, Tseng et al. 2024) with `2^b` branches from each of `2^(6−b)` states. The codebook
/// has 64 entries in −127..=127; one that repeats after `2^b` entries ignores the neighbours: a scalar quantizer.
/// At 8 bits there is no codebook and no window: the code is `value + 128`.
///
/// The **stream** is a sequence of records of `32·b + 4` bytes, one per tile of four rows and group of
/// 64 columns: all groups of tile 0 in order, then all groups of tile 1, and so on, without padding
/// between them. A record holds
///
/// * `32·b` bytes of codes: the bits of eight **chains** of 32 codes. Chain `λ = 2·r + h` has columns of row `r` of
///   the tile (`r` in 0..4, `h` in 0..2): code `s = 8·q + i` of it is that of column `16·q + 8·h + i` of the group (`q` in
///   0..4, `i` in 0..8; see [`chain_column`]), at bits `b·s` to `b·s + b` of the chain. Its window is bits
///   `b·s` to `b·s + 6`; beyond the `32·b` bits of the chain they are zero.
///
///   The chains lie in planes. Plane `p` has 64 bytes: byte `8·λ + k` holds bits `64·p + 8·k` to `64·p + 8·k + 8` of chain
///   `λ` (`k` in 0..8). With an odd `b` a last half plane of 32 bytes follows, whose byte `4·λ + k` holds bits
///   `64·p + 8·k` to `64·p + 8·k + 8` of chain `λ` (`k` in 0..4). So a plane is eight 64-bit words of one chain each, and shifts inside
///   of words bring 64 windows into the 64 bytes of a register: 16 columns of all four rows, one row in each
///   128-bit lane. A kernel adds up a group of columns without any horizontal step;
/// * four scale codes, one `i8` for each row.
///
/// Rows beyond `rows` have scale code 0. Columns beyond `cols` may hold any code: the activations are
/// zero there. But windows of columns before them reach into them: those of the last two columns of a chain at 2 bits, and of the
/// last one at 3, 4 and 5 bits. [`pack`](crate::pack) writes code 0 and [`unpack`](crate::unpack) drops what is there; so
/// where another writer has put other codes, these columns can have other values after `pack(unpack(_))`.
///
/// One software prefetch two kilobytes ahead covers weights and scales, because both lie in
/// the same stream.
///
/// Besides the stream there are `rows` row scales and the codebook. In memory and in files the matrix
/// costs `b + 0.125` bits per weight, plus 16 bits per row and 64 bytes.
#[derive(Clone, Copy, Debug)]
pub struct PackedRef<'a> {
    shape: PackedShape,
    stream: &'a [u8],
    row_scales: &'a [f16],
    codebook: &'a [i8],
}

impl<'a> PackedRef<'a> {
    /// A view of a packed matrix after checking every length. Constant time.
    ///
    /// # Errors
    /// [`LayoutError`] if a buffer's length is not what `shape` needs, if the size overflows, or if the
    /// codebook holds −128.
    pub fn new(
        shape: PackedShape,
        stream: &'a [u8],
        row_scales: &'a [f16],
        codebook: &'a [i8],
    ) -> Result<Self, LayoutError> {
        check_len("stream", shape.checked_stream_bytes()?, stream.len())?;
        check_len("row scales", shape.rows, row_scales.len())?;
        check_codebook(shape.width, codebook)?;
        Ok(PackedRef {
            shape,
            stream,
            row_scales,
            codebook,
        })
    }

    /// Shape and width.
    pub fn shape(&self) -> PackedShape {
        self.shape
    }

    /// The records; see the layout above.
    pub fn stream(&self) -> &'a [u8] {
        self.stream
    }

    /// One scale per row, `[rows]`.
    pub fn row_scales(&self) -> &'a [f16] {
        self.row_scales
    }

    /// The values of the windows, `[64]`; empty at 8 bits.
    pub fn codebook(&self) -> &'a [i8] {
        self.codebook
    }

    /// Bytes of stream, row scales and codebook together.
    pub fn bytes(&self) -> usize {
        self.stream.len() + size_of_val(self.row_scales) + self.codebook.len()
    }

    /// The four row scales of a tile; 0 for rows beyond the matrix.
    #[inline(always)]
    pub(crate) fn tile_row_scales(&self, tile: usize) -> [f32; TILE_ROWS] {
        let mut scales = [0.0; TILE_ROWS];
        let first = tile * TILE_ROWS;
        for (scale, stored) in scales
            .iter_mut()
            .zip(self.row_scales.get(first..).unwrap_or_default())
        {
            *scale = float(*stored) * SCALE_UNIT;
        }
        scales
    }

    /// The codebook; all zero at 8 bits, where no kernel looks anything up.
    pub(crate) fn table(&self) -> [i8; 1 << WINDOW_BITS] {
        self.codebook.try_into().unwrap_or([0; 1 << WINDOW_BITS])
    }
}

/// A half as the float it is. Inlined everywhere: the library's conversion asks for the CPU's features each time, a tenth of
/// the time of a small matrix.
#[inline(always)]
pub(crate) fn float(half: f16) -> f32 {
    let bits = u32::from(half.to_bits());
    if bits & 0x7C00 == 0x7C00 {
        return half.to_f32();
    }
    // Exponent and fraction in their places, of a number that is 2⁻¹¹² times too small; exact for subnormal ones, too.
    let magnitude = f32::from_bits((bits & 0x7FFF) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// Checks the number of entries of a codebook and their range.
pub(crate) fn check_codebook(width: Width, codebook: &[i8]) -> Result<(), LayoutError> {
    check_len("codebook", width.codebook_len(), codebook.len())?;
    match codebook.iter().position(|&value| value == i8::MIN) {
        Some(index) => Err(LayoutError::CodebookValue { index }),
        None => Ok(()),
    }
}

/// A packed matrix that owns its buffers; made by [`pack`](crate::pack).
#[derive(Clone, Debug, PartialEq)]
pub struct PackedMatrix {
    pub(crate) shape: PackedShape,
    pub(crate) stream: Vec<u8>,
    pub(crate) row_scales: Vec<f16>,
    pub(crate) codebook: Vec<i8>,
}

impl PackedMatrix {
    /// A packed matrix from its buffers; see [`PackedRef`] for what they hold.
    ///
    /// # Errors
    /// Those of [`PackedRef::new`].
    pub fn new(
        shape: PackedShape,
        stream: Vec<u8>,
        row_scales: Vec<f16>,
        codebook: Vec<i8>,
    ) -> Result<Self, LayoutError> {
        PackedRef::new(shape, &stream, &row_scales, &codebook)?;
        Ok(PackedMatrix {
            shape,
            stream,
            row_scales,
            codebook,
        })
    }

    /// The matrix as the kernels take it.
    pub fn as_ref(&self) -> PackedRef<'_> {
        PackedRef {
            shape: self.shape,
            stream: &self.stream,
            row_scales: &self.row_scales,
            codebook: &self.codebook,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rows: usize, cols: usize, bits: u8) -> PackedShape {
        PackedShape {
            rows,
            cols,
            width: Width::new(bits).unwrap(),
        }
    }

    #[test]
    fn widths_are_the_six_supported_ones() {
        let found: Vec<usize> = (0..=255).filter_map(Width::new).map(Width::bits).collect();
        assert_eq!(found, [2, 3, 4, 5, 6, 8]);
        assert_eq!(Width::ALL.map(Width::bits).to_vec(), found);
        assert_eq!(Width::ALL.map(Width::codebook_len), [64, 64, 64, 64, 64, 0]);
    }

    #[test]
    fn sizes_of_a_small_matrix() {
        let shape = shape(5, 65, 3);
        assert_eq!((shape.tiles(), shape.groups(), shape.record_bytes()), (2, 2, 100));
        assert_eq!(shape.stream_bytes(), Some(400));
    }

    #[test]
    fn a_size_that_overflows_is_an_error() {
        let huge = shape(usize::MAX, usize::MAX, 2);
        assert_eq!(huge.stream_bytes(), None);
        let error = PackedRef::new(huge, &[], &[], &[0; 64]).unwrap_err();
        assert_eq!(
            error,
            LayoutError::TooLarge {
                rows: usize::MAX,
                cols: usize::MAX,
                bits: 2
            }
        );
    }

    #[test]
    fn every_wrong_length_is_an_error() {
        let shape = shape(4, 64, 2);
        let (stream, scales, codebook) = (vec![0; 68], vec![f16::ONE; 4], vec![0; 64]);
        assert!(PackedRef::new(shape, &stream, &scales, &codebook).is_ok());
        for (s, r, c, part) in [
            (67, 4, 64, "stream"),
            (68, 3, 64, "row scales"),
            (68, 4, 4, "codebook"),
        ] {
            let error = PackedRef::new(shape, &stream[..s], &scales[..r], &codebook[..c]).unwrap_err();
            assert!(
                matches!(error, LayoutError::Length { part: p, .. } if p == part),
                "{error}"
            );
        }
    }

    #[test]
    fn a_codebook_with_minus_128_is_an_error() {
        let mut codebook = [-127; 64];
        codebook[2] = -128;
        let error = PackedRef::new(shape(0, 0, 2), &[], &[], &codebook).unwrap_err();
        assert_eq!(error, LayoutError::CodebookValue { index: 2 });
    }
}
