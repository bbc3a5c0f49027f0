//! Between plain codes and the packed stream, and from the stream to floats.
//!
//! Exact inverses: `unpack(pack(u)) == u` for every valid [`Unpacked`], and `pack(unpack(p))` gives `p`
//! back up to the padding, which [`pack`] sets to zero.

use half::f16;

use crate::layout::{
    BLOCK, GROUP, LayoutError, PackedMatrix, PackedRef, PackedShape, SCALE_UNIT, TILE_ROWS, TILE_WEIGHTS,
    Width, check_codebook, check_len,
};

/// The content of a packed matrix, one element per entry; see [`PackedRef`] for their meaning.
#[derive(Clone, Debug, PartialEq)]
pub struct Unpacked {
    /// Codes `[m, n]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// Scale codes `[m, groups]`.
    pub scale_codes: Vec<i8>,
    /// Row scales `[m]`.
    pub row_scales: Vec<f16>,
    /// Values of the codes `[2^bits]`; empty at 8 bits.
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
        match self.codes.iter().position(|&code| usize::from(code) >= levels) {
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
    let groups = shape.groups();
    for (index, record) in stream.chunks_exact_mut(shape.record_bytes()).enumerate() {
        let (tile, group) = (index / groups, index % groups);
        let (planes, scale_codes) = record.split_at_mut(record_code_bytes(shape.width));
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
        encode(&record_codes, shape.width, planes);
    }
    let (row_scales, codebook) = (unpacked.row_scales.clone(), unpacked.codebook.clone());
    Ok(PackedMatrix {
        shape,
        stream,
        row_scales,
        codebook,
    })
}

/// Takes a packed matrix apart.
pub fn unpack(packed: PackedRef<'_>) -> Unpacked {
    let shape = packed.shape();
    let mut codes = Vec::with_capacity(shape.rows * shape.cols);
    let mut scale_codes = Vec::with_capacity(shape.rows * shape.groups());
    for row in 0..shape.rows {
        for (group, (block_codes, scale_code)) in row_groups(packed, row).enumerate() {
            let used = GROUP.min(shape.cols - group * GROUP);
            codes.extend_from_slice(&block_codes[..used]);
            scale_codes.push(scale_code);
        }
    }
    let (row_scales, codebook) = (packed.row_scales().to_vec(), packed.codebook().to_vec());
    Unpacked {
        codes,
        scale_codes,
        row_scales,
        codebook,
    }
}

/// Writes row `row` of the matrix as floats into `out [cols]`.
///
/// Each value is `f32(row_scale) · 2⁻¹⁴ · f32(scale_code · codebook[code])`, rounded once.
///
/// # Panics
/// If `row` is not below the number of rows or `out` has not `cols` elements.
pub fn dequantize_row(packed: PackedRef<'_>, row: usize, out: &mut [f32]) {
    let shape = packed.shape();
    assert_eq!(out.len(), shape.cols, "output of a dequantized row");
    let row_scale = packed.row_scales()[row].to_f32() * SCALE_UNIT;
    let table = packed.table();
    let eight = shape.width.bits() == 8;
    for (out, (codes, scale_code)) in out.chunks_mut(GROUP).zip(row_groups(packed, row)) {
        for (out, code) in out.iter_mut().zip(codes) {
            let value = if eight {
                i32::from(code) - 128
            } else {
                i32::from(table[usize::from(code % 64)])
            };
            *out = row_scale * (i32::from(scale_code) * value) as f32;
        }
    }
}

/// The groups of one row: 64 codes (padding included) and the scale code of each.
fn row_groups(packed: PackedRef<'_>, row: usize) -> impl Iterator<Item = ([u8; GROUP], i8)> {
    let shape = packed.shape();
    let (tile, r) = (row / TILE_ROWS, row % TILE_ROWS);
    let tile_bytes = shape.groups() * shape.record_bytes();
    let records = &packed.stream()[tile * tile_bytes..][..tile_bytes];
    records.chunks_exact(shape.record_bytes()).map(move |record| {
        let (planes, scale_codes) = record.split_at(record_code_bytes(shape.width));
        let all = decode(planes, shape.width);
        let mut codes = [0; GROUP];
        for (q, block) in codes.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            block.copy_from_slice(&all[(q * TILE_ROWS + r) * BLOCK..][..BLOCK]);
        }
        (codes, scale_codes[r].cast_signed())
    })
}

/// Bytes of codes in a record.
pub(crate) const fn record_code_bytes(width: Width) -> usize {
    TILE_WEIGHTS / 8 * width.bits()
}

/// The planes of a width: for each its first bit in the code and its bits.
const fn planes(width: Width) -> &'static [(usize, usize)] {
    match width.bits() {
        2 => &[(0, 2)],
        3 => &[(0, 2), (2, 1)],
        4 => &[(0, 4)],
        5 => &[(0, 4), (4, 1)],
        6 => &[(0, 4), (4, 2)],
        _ => &[(0, 8)],
    }
}

/// Writes 256 codes as the planes of a record.
fn encode(codes: &[u8; TILE_WEIGHTS], width: Width, mut out: &mut [u8]) {
    out.fill(0);
    for &(first, bits) in planes(width) {
        let (plane, rest) = out.split_at_mut(TILE_WEIGHTS / 8 * bits);
        for (field, codes) in codes.chunks_exact(plane.len()).enumerate() {
            for (byte, code) in plane.iter_mut().zip(codes) {
                *byte |= (code >> first & (u8::MAX >> (8 - bits))) << (field * bits);
            }
        }
        out = rest;
    }
}

/// The 256 codes of a record from its planes.
pub(crate) fn decode(mut planes_bytes: &[u8], width: Width) -> [u8; TILE_WEIGHTS] {
    let mut codes = [0; TILE_WEIGHTS];
    for &(first, bits) in planes(width) {
        let (plane, rest) = planes_bytes.split_at(TILE_WEIGHTS / 8 * bits);
        for (field, codes) in codes.chunks_exact_mut(plane.len()).enumerate() {
            for (code, byte) in codes.iter_mut().zip(plane) {
                *code |= (byte >> (field * bits) & (u8::MAX >> (8 - bits))) << first;
            }
        }
        planes_bytes = rest;
    }
    codes
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

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

    /// The prose of the layout, tested bit by bit.
    #[test]
    fn the_bits_of_every_code_are_where_the_layout_says() {
        for width in Width::ALL {
            let shape = PackedShape {
                rows: 6,
                cols: 100,
                width,
            };
            let unpacked = random(shape, 7);
            let packed = pack(shape, &unpacked).unwrap();
            // Bits of the planes, low plane first.
            let planes: &[usize] = [&[2][..], &[2, 1], &[4], &[4, 1], &[4, 2], &[], &[8]][width.bits() - 2];
            for row in 0..6 {
                for col in 0..100 {
                    let record = &packed.stream[(row / 4 * 2 + col / 64) * shape.record_bytes()..];
                    let k = 64 * (col % 64 / 16) + 16 * (row % 4) + col % 16;
                    let (mut code, mut bits_below, mut offset) = (0, 0, 0);
                    for w in planes {
                        let part =
                            record[offset + k % (32 * w)] >> (w * (k / (32 * w))) & ((1u16 << w) - 1) as u8;
                        code |= part << bits_below;
                        bits_below += w;
                        offset += 32 * w;
                    }
                    assert_eq!(
                        code,
                        unpacked.codes[row * 100 + col],
                        "{width:?}, row {row}, column {col}"
                    );
                    assert_eq!(
                        record[offset + row % 4] as i8,
                        unpacked.scale_codes[row * 2 + col / 64]
                    );
                }
            }
            let padding_rows = &packed.stream[packed.stream.len() - 2..];
            assert_eq!(padding_rows, [0, 0], "scale codes of rows 6 and 7");
        }
    }

    #[test]
    fn dequantized_values_follow_the_formula() {
        for width in Width::ALL {
            let shape = PackedShape {
                rows: 5,
                cols: 130,
                width,
            };
            let unpacked = random(shape, 3);
            let packed = pack(shape, &unpacked).unwrap();
            let mut out = vec![0.0; 130];
            for row in 0..5 {
                dequantize_row(packed.as_ref(), row, &mut out);
                for (col, &value) in out.iter().enumerate() {
                    let code = unpacked.codes[row * 130 + col];
                    let entry = match width.bits() {
                        8 => f64::from(code) - 128.0,
                        _ => f64::from(unpacked.codebook[usize::from(code)]),
                    };
                    let scale = f64::from(unpacked.scale_codes[row * 3 + col / 64]);
                    let exact = unpacked.row_scales[row].to_f64() * f64::from(SCALE_UNIT) * scale * entry;
                    assert_eq!(value, exact as f32);
                }
            }
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
