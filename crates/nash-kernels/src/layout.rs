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

/// Columns of one row that lie together in the stream; a group holds four such blocks.
pub(crate) const BLOCK: usize = 16;

/// Weights of a record: four rows of a group.
pub(crate) const TILE_WEIGHTS: usize = TILE_ROWS * GROUP;

/// Blocks in a group.
pub(crate) const BLOCKS: usize = GROUP / BLOCK;

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

    /// Entries of the codebook: [`levels`](Self::levels), but 0 for 8 bits, whose codes are `value + 128`.
    pub const fn codebook_len(self) -> usize {
        if self.0 == 8 { 0 } else { self.levels() }
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
/// # Layout (version 1, little-endian)
///
/// The value of a weight is
///
/// ```text
/// weight[r, c] = row_scale[r] (f16) · 2⁻¹⁴ · scale_code[r, c / 64] (i8) · codebook[code[r, c]] (i8)
/// ```
///
/// with codes of `b` bits. The codebook has `2^b` entries in −127..=127. At 8 bits there is no codebook:
/// the code is `value + 128`.
///
/// The **stream** is a sequence of records of `32·b + 4` bytes, one per tile of four rows and group of
/// 64 columns: all groups of tile 0 in order, then all groups of tile 1, and so on, without padding
/// between them. A record holds
///
/// * `32·b` bytes of codes, in planes: one plane of `b` bits at 2, 4 and 8 bits, else a plane of the low 2 or 4
///   bits and then one of the others (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2). Code `k = 64·q + 16·r + j` of the record is
///   that of row `r` of the tile and column `16·q + j` of the group (`q`, `r` in 0..4, `j` in 0..16). A plane of
///   `w` bits has `32·w` bytes and holds its part of code `k` in byte `k mod 32·w`, at the bits from
///   `w · (k div 32·w)` on. So a shift, and no movement of bytes, brings 64 codes into the low bits of 64 bytes:
///   16 columns of all four rows, one row in each 128-bit lane of a register. A kernel adds up a group of columns
///   without any horizontal step;
/// * four scale codes, one `i8` for each row.
///
/// Rows beyond `rows` have scale code 0. Columns beyond `cols` may hold any code: the activations are
/// zero there. One software prefetch two kilobytes ahead covers weights and scales, because both lie in
/// the same stream.
///
/// Besides the stream there are `rows` row scales and the codebook. In memory and in files the matrix
/// costs `b + 0.125` bits per weight, plus 16 bits per row and `2^b` bytes.
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

    /// The values of the codes, `[2^bits]`; empty at 8 bits.
    pub fn codebook(&self) -> &'a [i8] {
        self.codebook
    }

    /// Bytes of stream, row scales and codebook together.
    pub fn bytes(&self) -> usize {
        self.stream.len() + size_of_val(self.row_scales) + self.codebook.len()
    }

    /// The four row scales of a tile; 0 for rows beyond the matrix.
    pub(crate) fn tile_row_scales(&self, tile: usize) -> [f32; TILE_ROWS] {
        let mut scales = [0.0; TILE_ROWS];
        let first = tile * TILE_ROWS;
        for (scale, stored) in scales
            .iter_mut()
            .zip(self.row_scales.get(first..).unwrap_or_default())
        {
            *scale = stored.to_f32() * SCALE_UNIT;
        }
        scales
    }

    /// The codebook repeated to 64 entries, so that bits of an index above the code's width do not
    /// matter. All zero at 8 bits, where no kernel looks anything up.
    pub(crate) fn table(&self) -> [i8; 64] {
        let mut table = [0; 64];
        if !self.codebook.is_empty() {
            for (i, value) in table.iter_mut().enumerate() {
                *value = self.codebook[i % self.codebook.len()];
            }
        }
        table
    }
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
        assert_eq!(Width::ALL.map(Width::codebook_len), [4, 8, 16, 32, 64, 0]);
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
        let error = PackedRef::new(huge, &[], &[], &[0; 4]).unwrap_err();
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
        let (stream, scales, codebook) = (vec![0; 68], vec![f16::ONE; 4], vec![0; 4]);
        assert!(PackedRef::new(shape, &stream, &scales, &codebook).is_ok());
        for (s, r, c, part) in [
            (67, 4, 4, "stream"),
            (68, 3, 4, "row scales"),
            (68, 4, 3, "codebook"),
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
        let error = PackedRef::new(shape(0, 0, 2), &[], &[], &[0, 1, -128, 3]).unwrap_err();
        assert_eq!(error, LayoutError::CodebookValue { index: 2 });
    }
}
