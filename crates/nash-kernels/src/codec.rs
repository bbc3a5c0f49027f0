//! Between plain codes and the packed stream, and from the stream to floats.
//!
//! `unpack(pack(u)) == u` for every valid [`Unpacked`], and `pack(unpack(p))` gives `p` back up to the padding, which
//! [`pack`] sets to zero; [`PackedRef`] tells which values see the padding.

use half::f16;

use crate::layout::{
    BLOCK, CHAIN, GROUP, LayoutError, PackedMatrix, PackedRef, PackedShape, RUN, SCALE_UNIT, TILE_CHAINS,
    TILE_ROWS, TILE_WEIGHTS, WINDOW_BITS, Width, check_codebook, check_len,
};
use crate::pool;

/// The content of a packed matrix, one element per entry; see [`PackedRef`] for their meaning.
#[derive(Clone, Debug, PartialEq)]
pub struct Unpacked {
    /// Codes `[m, n]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// Scale codes `[m, groups]`.
    pub scale_codes: Vec<i8>,
    /// Row scales `[m]`.
    pub row_scales: Vec<f16>,
    /// Values of the windows `[64]`; empty at 8 bits.
    pub codebook: Vec<i8>,
}

impl Unpacked {
    fn check(&self, shape: PackedShape) -> Result<(), LayoutError> {
        check_len("codes", shape.checked_rows_times(shape.cols)?, self.codes.len())?;
        check_len(
            "scale codes",
            shape.checked_rows_times(shape.groups())?,
            self.scale_codes.len(),
        )?;
        check_len("row scales", shape.rows, self.row_scales.len())?;
        check_codebook(shape.width, &self.codebook)?;
        let levels = shape.width.levels();
        let invalid = |code: &u8| usize::from(*code) >= levels;
        // The largest of all is found many at a time, a place one by one.
        let largest = self.codes.iter().max().filter(|code| invalid(code));
        match largest.and_then(|_| self.codes.iter().position(invalid)) {
            None => Ok(()),
            Some(at) => {
                let (row, col) = (at / shape.cols, at % shape.cols);
                Err(LayoutError::Code {
                    row,
                    col,
                    code: self.codes[at],
                    levels,
                })
            }
        }
    }
}

/// Packs codes and scales into the stream of [`PackedRef`].
///
/// # Errors
/// [`LayoutError`] if a length does not fit `shape`, if a code is not below `2^bits`, or if the codebook
/// holds −128.
pub fn pack(shape: PackedShape, unpacked: &Unpacked) -> Result<PackedMatrix, LayoutError> {
    unpacked.check(shape)?;
    let mut stream = vec![0; shape.checked_stream_bytes()?];
    let tiles = tiles_per_task(shape);
    let task = tiles * shape.groups() * shape.record_bytes();
    pool::for_each_chunk(&mut stream, task.max(1), |index, part| {
        let tile_bytes = shape.groups() * shape.record_bytes();
        for (t, tile) in part.chunks_exact_mut(tile_bytes).enumerate() {
            pack_tile(shape, unpacked, index * tiles + t, tile);
        }
    });
    let (row_scales, codebook) = (unpacked.row_scales.clone(), unpacked.codebook.clone());
    Ok(PackedMatrix {
        shape,
        stream,
        row_scales,
        codebook,
    })
}

/// Weights that one task packs or unpacks, about.
const TASK_WEIGHTS: usize = 1 << 17;

/// Tiles that one task packs or unpacks.
fn tiles_per_task(shape: PackedShape) -> usize {
    TASK_WEIGHTS.div_ceil(TILE_ROWS * shape.cols.max(1))
}

/// Writes the records of a tile.
fn pack_tile(shape: PackedShape, unpacked: &Unpacked, tile: usize, out: &mut [u8]) {
    let groups = shape.groups();
    for (group, record) in out.chunks_exact_mut(shape.record_bytes()).enumerate() {
        let (out, scale_codes) = record.split_at_mut(record_code_bytes(shape.width));
        let mut record_codes = [0; TILE_WEIGHTS];
        for r in 0..TILE_ROWS.min(shape.rows - tile * TILE_ROWS) {
            let row = tile * TILE_ROWS + r;
            let codes = &unpacked.codes[row * shape.cols..][..shape.cols];
            let codes = &codes[group * GROUP..shape.cols.min((group + 1) * GROUP)];
            for (q, block) in codes.chunks(BLOCK).enumerate() {
                record_codes[(q * TILE_ROWS + r) * BLOCK..][..block.len()].copy_from_slice(block);
            }
            scale_codes[r] = unpacked.scale_codes[row * groups + group].cast_unsigned();
        }
        encode(&record_codes, shape.width, out);
    }
}

/// Takes a packed matrix apart.
pub fn unpack(packed: PackedRef<'_>) -> Unpacked {
    let shape = packed.shape();
    let (cols, groups) = (shape.cols, shape.groups());
    let (mut codes, mut scale_codes) = (vec![0; shape.rows * cols], vec![0; shape.rows * groups]);
    let records = packed
        .stream()
        .chunks_exact((groups * shape.record_bytes()).max(1));
    let parts = codes
        .chunks_mut((TILE_ROWS * cols).max(1))
        .zip(scale_codes.chunks_mut((TILE_ROWS * groups).max(1)));
    let mut tiles: Vec<_> = parts.zip(records).collect();
    pool::for_each_chunk(&mut tiles, tiles_per_task(shape), |_, tiles| {
        for ((codes, scale_codes), records) in tiles {
            unpack_tile(shape, records, codes, scale_codes);
        }
    });
    let (row_scales, codebook) = (packed.row_scales().to_vec(), packed.codebook().to_vec());
    Unpacked {
        codes,
        scale_codes,
        row_scales,
        codebook,
    }
}

/// Reads the records of a tile: codes `[rows, n]`, scale codes `[rows, groups]`.
fn unpack_tile(shape: PackedShape, records: &[u8], codes: &mut [u8], scale_codes: &mut [i8]) {
    let groups = shape.groups();
    for (group, record) in records.chunks_exact(shape.record_bytes()).enumerate() {
        let (packed, scales) = record.split_at(record_code_bytes(shape.width));
        let all = fields(packed, shape.width, shape.width.bits());
        let rows = codes
            .chunks_exact_mut(shape.cols)
            .zip(scale_codes.chunks_exact_mut(groups));
        for (r, (codes, scale_codes)) in rows.enumerate() {
            let codes = &mut codes[group * GROUP..shape.cols.min((group + 1) * GROUP)];
            for (q, block) in codes.chunks_mut(BLOCK).enumerate() {
                block.copy_from_slice(&all[(q * TILE_ROWS + r) * BLOCK..][..block.len()]);
            }
            scale_codes[group] = scales[r].cast_signed();
        }
    }
}

/// Writes row `row` of the matrix as floats into `out [cols]`.
///
/// Each value is `f32(row_scale) · 2⁻¹⁴ · f32(scale_code · codebook[window])`, rounded once.
///
/// # Panics
/// If `row` is not below the number of rows or `out` has not `cols` elements.
pub fn dequantize_row(packed: PackedRef<'_>, row: usize, out: &mut [f32]) {
    let shape = packed.shape();
    assert_eq!(out.len(), shape.cols, "output of a dequantized row");
    let row_scale = packed.row_scales()[row].to_f32() * SCALE_UNIT;
    for (out, (values, scale_code)) in out.chunks_mut(GROUP).zip(row_groups(packed, row)) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = row_scale * (i32::from(scale_code) * i32::from(value)) as f32;
        }
    }
}

/// The groups of one row: values of its 64 columns (padding included), and the scale code.
fn row_groups(packed: PackedRef<'_>, row: usize) -> impl Iterator<Item = ([i8; GROUP], i8)> {
    let (shape, table) = (packed.shape(), packed.table());
    let (tile, r) = (row / TILE_ROWS, row % TILE_ROWS);
    let tile_bytes = shape.groups() * shape.record_bytes();
    let records = &packed.stream()[tile * tile_bytes..][..tile_bytes];
    records.chunks_exact(shape.record_bytes()).map(move |record| {
        let (codes, scale_codes) = record.split_at(record_code_bytes(shape.width));
        let all = values(codes, shape.width, &table);
        let mut found = [0; GROUP];
        for (q, block) in found.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            block.copy_from_slice(&all[(q * TILE_ROWS + r) * BLOCK..][..BLOCK]);
        }
        (found, scale_codes[r].cast_signed())
    })
}

/// Bytes of codes in a record.
pub(crate) const fn record_code_bytes(width: Width) -> usize {
    TILE_WEIGHTS / 8 * width.bits()
}

/// The 256 values of a record, `[block][row][16]`, from its codes.
pub(crate) fn values(codes: &[u8], width: Width, table: &[i8; 1 << WINDOW_BITS]) -> [i8; TILE_WEIGHTS] {
    if width.bits() == 8 {
        // `code - 128`
        fields(codes, width, 8).map(|code| (code ^ 0x80).cast_signed())
    } else {
        fields(codes, width, WINDOW_BITS).map(|window| table[usize::from(window)])
    }
}

/// Bytes of a chain at the largest width; a chain of fewer is followed by zeros.
const CHAIN_BYTES: usize = CHAIN;

/// Bytes of a chain in a plane.
const WORD: usize = 8;

/// Writes 256 codes, `[block][row][16]`, as those of a record.
fn encode(codes: &[u8; TILE_WEIGHTS], width: Width, out: &mut [u8]) {
    let bits = width.bits();
    let mut chains = [[0; CHAIN_BYTES]; TILE_CHAINS];
    for (run, codes) in codes.as_chunks::<RUN>().0.iter().enumerate() {
        let (q, chain) = (run / TILE_CHAINS, run % TILE_CHAINS);
        let word = codes
            .iter()
            .rev()
            .fold(0, |word, &code| word << bits | u64::from(code));
        chains[chain][bits * q..][..bits].copy_from_slice(&word.to_le_bytes()[..bits]);
    }
    for (p, plane) in out.chunks_mut(WORD * TILE_CHAINS).enumerate() {
        let bytes = plane.len() / TILE_CHAINS;
        for (chain, part) in chains.iter().zip(plane.chunks_exact_mut(bytes)) {
            part.copy_from_slice(&chain[WORD * p..][..bytes]);
        }
    }
}

/// The `count` bits from the begin of each code on, `[block][row][16]`: codes or windows. Zeros follow a chain.
fn fields(codes: &[u8], width: Width, count: usize) -> [u8; TILE_WEIGHTS] {
    // One plane more than there can be: the zeros.
    let mut planes = [[0; TILE_CHAINS]; CHAIN_BYTES / WORD + 1];
    let (full, half) = codes.as_chunks::<{ WORD * TILE_CHAINS }>();
    for (plane, bytes) in planes.iter_mut().zip(full) {
        *plane = std::array::from_fn(|chain| u64::from_le_bytes(bytes.as_chunks().0[chain]));
    }
    for (word, bytes) in planes[full.len()].iter_mut().zip(half.as_chunks().0) {
        *word = u64::from(u32::from_le_bytes(*bytes));
    }
    let bits = width.bits();
    let mut found = [0; TILE_WEIGHTS];
    for (q, found) in found
        .as_chunks_mut::<{ RUN * TILE_CHAINS }>()
        .0
        .iter_mut()
        .enumerate()
    {
        let (plane, shift) = (RUN * bits * q / 64, RUN * bits * q % 64);
        for (chain, found) in found.as_chunks_mut().0.iter_mut().enumerate() {
            let two = u128::from(planes[plane + 1][chain]) << 64 | u128::from(planes[plane][chain]);
            *found = spread((two >> shift) as u64, bits, count).to_le_bytes();
        }
    }
    found
}

/// Bits `bits · i` to `bits · i + count` of the word into its byte `i`. Halves, then their halves, then their bytes
/// are taken apart, each with what it shares with the next one.
fn spread(word: u64, bits: usize, count: usize) -> u64 {
    const BYTES: u64 = 0x0001_0001_0001_0001;
    const HALVES: u64 = 0x0000_ffff_0000_ffff;
    let word = word & 0xffff_ffff | word >> (4 * bits) << 32;
    let word = word & HALVES | (word >> (2 * bits) & HALVES) << 16;
    let mask = BYTES * (0xff >> (8 - count));
    word & mask | (word >> bits & mask) << 8
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::layout::chain_column;

    /// Random content of a matrix: every code, every scale code, awkward row scales.
    pub(crate) fn random(shape: PackedShape, seed: u64) -> Unpacked {
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let levels = shape.width.levels() as u32;
        Unpacked {
            codes: (0..shape.rows * shape.cols)
                .map(|_| rng.random_range(0..levels) as u8)
                .collect(),
            scale_codes: (0..shape.rows * shape.groups())
                .map(|_| rng.random_range(-128..=127))
                .collect(),
            row_scales: (0..shape.rows)
                .map(|_| f16::from_f32(rng.random_range(-2.0f32..2.0)))
                .collect(),
            codebook: (0..shape.width.codebook_len())
                .map(|_| rng.random_range(-127..=127))
                .collect(),
        }
    }

    fn any_shape() -> impl Strategy<Value = PackedShape> {
        (0usize..14, 0usize..200, 0usize..6).prop_map(|(rows, cols, w)| PackedShape {
            rows,
            cols,
            width: Width::ALL[w],
        })
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(shape in any_shape(), seed: u64) {
            let unpacked = random(shape, seed);
            let packed = pack(shape, &unpacked).unwrap();
            prop_assert_eq!(packed.stream.len(), shape.stream_bytes().unwrap());
            prop_assert_eq!(unpack(packed.as_ref()), unpacked);
        }

        #[test]
        fn any_stream_is_unpacked_without_panic(shape in any_shape(), seed: u64) {
            let mut rng = Pcg64Mcg::seed_from_u64(seed);
            let stream: Vec<u8> = (0..shape.stream_bytes().unwrap()).map(|_| rng.random()).collect();
            let scales = vec![f16::NAN; shape.rows];
            let codebook = vec![1; shape.width.codebook_len()];
            let packed = PackedRef::new(shape, &stream, &scales, &codebook).unwrap();
            let mut row = vec![0.0; shape.cols];
            for r in 0..shape.rows {
                dequantize_row(packed, r, &mut row);
                prop_assert!(row.iter().all(|v| v.is_nan()));
            }
            prop_assert_eq!(unpack(packed).codes.len(), shape.rows * shape.cols);
        }
    }

    /// The value of a weight by the prose of the layout, bit by bit: what everything is compared with.
    pub(crate) fn value(shape: PackedShape, w: &Unpacked, row: usize, col: usize) -> i32 {
        let (group, h, bits) = (col / 64, col % 16 / 8, shape.width.bits());
        let code = |s: usize| {
            let col = 64 * group + 16 * (s / 8) + 8 * h + s % 8;
            if s < 32 && col < shape.cols {
                w.codes[row * shape.cols + col]
            } else {
                0
            }
        };
        let s = 8 * (col % 64 / 16) + col % 8;
        if bits == 8 {
            return i32::from(code(s)) - 128;
        }
        let bit = |at: usize| usize::from(code(at / bits) >> (at % bits) & 1);
        let window = (0..6).map(|k| bit(bits * s + k) << k).sum::<usize>();
        i32::from(w.codebook[window])
    }

    #[test]
    fn a_chain_has_every_second_run_of_eight_columns() {
        let columns = |chain| (0..CHAIN).map(move |symbol| chain_column(chain, symbol));
        assert_eq!(columns(0).skip(6).step_by(8).collect::<Vec<_>>(), [6, 22, 38, 54]);
        assert_eq!(
            columns(1).take(10).collect::<Vec<_>>(),
            [8, 9, 10, 11, 12, 13, 14, 15, 24, 25]
        );
        let mut all: Vec<usize> = columns(0).chain(columns(1)).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..GROUP));
    }

    /// The prose of the layout, tested bit by bit.
    #[test]
    fn the_bits_of_every_code_are_where_the_layout_says() {
        for width in Width::ALL {
            let (rows, cols, b) = (6, 100, width.bits());
            let shape = PackedShape { rows, cols, width };
            let unpacked = random(shape, 7);
            let packed = pack(shape, &unpacked).unwrap();
            for row in 0..8 {
                for col in 0..128 {
                    let record = &packed.stream[(row / 4 * 2 + col / 64) * (32 * b + 4)..];
                    let (q, h, i) = (col % 64 / 16, col % 16 / 8, col % 8);
                    let (chain, symbol) = (2 * (row % 4) + h, 8 * q + i);
                    let bit = |at: usize| {
                        let (p, k) = (at / 64, at % 64 / 8);
                        let half = b % 2 == 1 && p == b / 2;
                        record[64 * p + if half { 4 } else { 8 } * chain + k] >> (at % 8) & 1
                    };
                    let found = (0..b).map(|k| bit(b * symbol + k) << k).sum::<u8>();
                    let exists = row < rows && col < cols;
                    let (code, scale_code) = match exists {
                        true => (
                            unpacked.codes[row * cols + col],
                            unpacked.scale_codes[row * 2 + col / 64],
                        ),
                        false if row < rows => (0, unpacked.scale_codes[row * 2 + col / 64]),
                        false => (0, 0),
                    };
                    assert_eq!(found, code, "{width:?}, row {row}, column {col}");
                    assert_eq!(record[32 * b + row % 4] as i8, scale_code);
                }
            }
        }
    }

    #[test]
    fn dequantized_values_follow_the_formula() {
        for width in Width::ALL {
            for cols in [1, 9, 20, 64, 130, 191] {
                let shape = PackedShape { rows: 5, cols, width };
                let unpacked = random(shape, 3);
                let packed = pack(shape, &unpacked).unwrap();
                let mut out = vec![0.0; cols];
                for row in 0..5 {
                    dequantize_row(packed.as_ref(), row, &mut out);
                    for (col, &found) in out.iter().enumerate() {
                        let scale = f64::from(unpacked.scale_codes[row * shape.groups() + col / 64]);
                        let exact = unpacked.row_scales[row].to_f64()
                            * f64::from(SCALE_UNIT)
                            * scale
                            * f64::from(value(shape, &unpacked, row, col));
                        assert_eq!(found, exact as f32, "{shape:?}, row {row}, column {col}");
                    }
                }
            }
        }
    }

    /// The documentation names the columns whose values see the padding.
    #[test]
    fn padding_is_seen_by_the_last_columns_of_a_chain_only() {
        for (width, per_chain) in Width::ALL.into_iter().zip([2, 1, 1, 1, 0, 0]) {
            let shape = PackedShape {
                rows: 1,
                cols: 84,
                width,
            };
            let mut unpacked = random(shape, 9);
            unpacked.codebook = (0..width.codebook_len() as i8).collect();
            unpacked.scale_codes = vec![1; 2];
            unpacked.row_scales = vec![f16::ONE];
            let packed = pack(shape, &unpacked).unwrap();
            let wide = PackedShape { cols: 128, ..shape };
            let mut padded = unpacked.clone();
            padded.codes.resize(128, (width.levels() - 1) as u8);
            let other = PackedMatrix {
                shape,
                ..pack(wide, &padded).unwrap()
            };
            assert_eq!(unpack(other.as_ref()), unpacked);
            let (mut a, mut b) = (vec![0.0; 84], vec![0.0; 84]);
            dequantize_row(packed.as_ref(), 0, &mut a);
            dequantize_row(other.as_ref(), 0, &mut b);
            let differ: Vec<usize> = (0..84).filter(|&col| a[col] != b[col]).collect();
            let expected = [80 - per_chain..80, 84 - per_chain..84];
            assert_eq!(
                differ,
                expected.into_iter().flatten().collect::<Vec<_>>(),
                "{width:?}"
            );
        }
    }

    #[test]
    fn invalid_contents_are_errors() {
        let shape = PackedShape {
            rows: 2,
            cols: 3,
            width: Width::ALL[0],
        };
        let good = random(shape, 1);
        let mut bad = good.clone();
        bad.codes[4] = 4;
        assert_eq!(
            pack(shape, &bad),
            Err(LayoutError::Code {
                row: 1,
                col: 1,
                code: 4,
                levels: 4
            })
        );
        let mut bad = good.clone();
        bad.codes.pop();
        assert_eq!(
            pack(shape, &bad),
            Err(LayoutError::Length {
                part: "codes",
                expected: 6,
                actual: 5
            })
        );
        let mut bad = good.clone();
        bad.scale_codes.push(0);
        assert_eq!(
            pack(shape, &bad),
            Err(LayoutError::Length {
                part: "scale codes",
                expected: 2,
                actual: 3
            })
        );
        let mut bad = good;
        bad.codebook[0] = -128;
        assert_eq!(pack(shape, &bad), Err(LayoutError::CodebookValue { index: 0 }));
    }
}
