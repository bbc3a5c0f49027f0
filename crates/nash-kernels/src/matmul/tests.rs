//! Every kernel × width × shape against an oracle that shares no code with them: weights from
//! the prose of the layout, sums in f64.

use half::f16;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::*;
use crate::codec::tests::{random, value};
use crate::{GROUP, PackedMatrix, SCALE_UNIT, Unpacked, Width, pack};

/// Exact result (to f64) and the sum of magnitudes of the terms, for every output.
fn oracle(shape: PackedShape, w: &Unpacked, x: &Activations) -> Vec<(f64, f64)> {
    let groups = shape.groups();
    let mut out = Vec::new();
    for token in 0..x.tokens() {
        for row in 0..shape.rows {
            let (mut exact, mut magnitude) = (0.0, 0.0);
            for col in 0..shape.cols {
                let (codes, scale) = x.group(token, col / GROUP);
                let weight = w.row_scales[row].to_f64()
                    * f64::from(SCALE_UNIT)
                    * f64::from(w.scale_codes[row * groups + col / GROUP])
                    * f64::from(value(shape, w, row, col));
                let term = weight * f64::from(scale) * f64::from(codes[col % GROUP]);
                exact += term;
                magnitude += term.abs();
            }
            out.push((exact, magnitude));
        }
    }
    out
}

/// Checks a result against the oracle, with the bound that the module derives (and 1 % for higher orders).
fn assert_close(shape: PackedShape, w: &Unpacked, x: &Activations, y: &[f32]) {
    for (at, (&y, (exact, magnitude))) in y.iter().zip(oracle(shape, w, x)).enumerate() {
        let bound =
            1.01 * (shape.groups() + 3) as f64 * 2f64.powi(-24) * magnitude + f64::from(f32::MIN_POSITIVE);
        let error = (f64::from(y) - exact).abs();
        assert!(
            error <= bound,
            "output {at} of {shape:?}: {y} is not {exact} (error {error:e} > {bound:e})"
        );
    }
}

fn activations(x: &[f32], tokens: usize) -> Activations {
    let mut activations = Activations::new();
    activations.quantize(x, tokens, x.len() / tokens);
    activations
}

fn product(pool: &Pool, isa: Isa, w: &PackedMatrix, x: &Activations) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.tokens() * w.as_ref().shape().rows];
    let (w, y_of_w) = (w.as_ref(), &mut y);
    multiply_on(pool, isa, [Product { w, x, y: y_of_w }]);
    y
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|v| v.to_bits()).collect()
}

/// Normal-like, flat, ramp and outlier inputs.
fn inputs(kind: usize, len: usize, rng: &mut Pcg64Mcg) -> Vec<f32> {
    (0..len)
        .map(|i| match kind {
            0 => (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum(),
            1 => 1.0,
            2 => i as f32 / len as f32 - 0.25,
            _ => rng.random_range(-1.0f32..1.0) * if i % 37 == 0 { 100.0 } else { 1.0 },
        })
        .collect()
}

/// [`check_packed`] with a codebook in which every window counts, and with one that repeats and so ignores neighbours.
fn check(shape: PackedShape, tokens: usize, kind: usize, seed: u64) {
    let mut unpacked = random(shape, seed);
    check_packed(shape, &unpacked, tokens, kind);
    let levels = shape.width.levels();
    unpacked.codebook = (0..shape.width.codebook_len())
        .map(|i| unpacked.codebook[i % levels])
        .collect();
    check_packed(shape, &unpacked, tokens, kind);
}

/// All available kernels on one problem: within the bound of the oracle, and all bits the same for every kernel
/// and number of threads.
fn check_packed(shape: PackedShape, unpacked: &Unpacked, tokens: usize, kind: usize) {
    let packed = pack(shape, unpacked).unwrap();
    let mut rng = Pcg64Mcg::seed_from_u64(8);
    let mut x = Activations::new();
    x.quantize(&inputs(kind, tokens * shape.cols, &mut rng), tokens, shape.cols);
    let pools = [Pool::new(1), Pool::new(3)];
    let expected = product(&pools[0], Isa::Portable, &packed, &x);
    assert_close(shape, unpacked, &x, &expected);
    for isa in Isa::available() {
        for pool in &pools {
            let y = product(pool, isa, &packed, &x);
            assert_eq!(
                bits(&y),
                bits(&expected),
                "{isa:?}, {} threads, {shape:?}, {tokens} tokens",
                pool.threads()
            );
        }
    }
}

#[test]
fn every_width_row_tail_and_token_count() {
    for width in Width::ALL {
        for rows in 1..=9 {
            for tokens in 1..=9 {
                check(
                    PackedShape {
                        rows,
                        cols: 64 * 2 + 7 * rows,
                        width,
                    },
                    tokens,
                    tokens % 4,
                    1,
                );
            }
        }
    }
}

#[test]
fn every_width_and_column_tail() {
    for width in Width::ALL {
        for cols in [
            0, 1, 15, 16, 17, 31, 33, 47, 63, 64, 65, 127, 128, 129, 1024, 1025, 2100,
        ] {
            for tokens in [1, 3] {
                check(
                    PackedShape {
                        rows: 10,
                        cols,
                        width,
                    },
                    tokens,
                    cols % 4,
                    2,
                );
            }
        }
    }
}

#[test]
fn more_tokens_than_a_chunk_and_more_rows_than_a_task() {
    for width in Width::ALL {
        check(
            PackedShape {
                rows: 37,
                cols: 200,
                width,
            },
            TOKEN_CHUNK * 2 + 5,
            0,
            3,
        );
        check(
            PackedShape {
                rows: 1001,
                cols: 576,
                width,
            },
            1,
            0,
            4,
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape(rows in 0usize..40, cols in 0usize..400, tokens in 0usize..20, w in 0usize..6, seed: u64) {
        check(PackedShape { rows, cols, width: Width::ALL[w] }, tokens, (seed % 4) as usize, seed);
    }
}

/// The largest sums that can occur are exact: all weights and inputs at an end of their range, also with the
/// 8-bit code 0 (value −128), which no encoder writes.
#[test]
fn extreme_values_are_exact() {
    let cols = 256;
    for width in Width::ALL {
        for (code, entry) in [(0, -127i8), ((width.levels() - 1) as u8, 127)] {
            let shape = PackedShape { rows: 4, cols, width };
            let unpacked = Unpacked {
                codes: vec![if width.bits() == 8 && entry < 0 { 0 } else { code }; 4 * cols],
                scale_codes: vec![1; 16],
                row_scales: vec![f16::ONE; 4],
                codebook: vec![entry; width.codebook_len()],
            };
            let value = if width.bits() == 8 {
                f32::from(code) - 128.0
            } else {
                f32::from(entry)
            };
            let packed = pack(shape, &unpacked).unwrap();
            for sign in [1.0, -1.0] {
                for tokens in [1, 2] {
                    let x = activations(&vec![127.0 * sign; cols * tokens], tokens);
                    for isa in Isa::available() {
                        let y = product(&Pool::new(1), isa, &packed, &x);
                        assert_eq!(
                            y,
                            vec![cols as f32 * 127.0 * sign * value * SCALE_UNIT; 4 * tokens],
                            "{isa:?} {width:?}"
                        );
                    }
                }
            }
        }
    }
}

/// A NaN input makes the outputs of its token NaN and leaves the other tokens alone.
#[test]
fn nan_stays_visible_and_in_its_token() {
    for width in Width::ALL {
        let shape = PackedShape {
            rows: 6,
            cols: 100,
            width,
        };
        let packed = pack(shape, &random(shape, 5)).unwrap();
        let clean: Vec<f32> = (0..300).map(|i| (i as f32).sin()).collect();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut dirty = clean.clone();
            dirty[150] = bad;
            for isa in Isa::available() {
                let expected = product(&Pool::new(1), isa, &packed, &activations(&clean, 3));
                let y = product(&Pool::new(1), isa, &packed, &activations(&dirty, 3));
                assert!(y[6..12].iter().all(|v| v.is_nan()));
                assert_eq!((&y[..6], &y[12..]), (&expected[..6], &expected[12..]));
            }
        }
    }
}

/// Kernels read nothing outside the stream: any bytes, in a buffer that ends where the stream ends.
#[test]
fn any_stream_gives_the_same_bits_everywhere() {
    let mut rng = Pcg64Mcg::seed_from_u64(6);
    for width in Width::ALL {
        for rows in [1, 5] {
            let shape = PackedShape {
                rows,
                cols: 70,
                width,
            };
            let stream: Vec<u8> = (0..shape.stream_bytes().unwrap()).map(|_| rng.random()).collect();
            let codebook = random(shape, 7).codebook;
            let packed = PackedMatrix::new(shape, stream, vec![f16::from_f32(0.5); rows], codebook).unwrap();
            for tokens in [1, 2] {
                let x = activations(&inputs(0, 70 * tokens, &mut rng), tokens);
                let expected = product(&Pool::new(1), Isa::Portable, &packed, &x);
                for isa in Isa::available() {
                    assert_eq!(bits(&product(&Pool::new(1), isa, &packed, &x)), bits(&expected));
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "columns of the activations")]
fn other_columns_are_refused() {
    let shape = PackedShape {
        rows: 4,
        cols: 64,
        width: Width::ALL[0],
    };
    let packed = pack(shape, &random(shape, 1)).unwrap();
    matmul(packed.as_ref(), &activations(&[1.0; 65], 1), &mut [0.0; 4]);
}

#[test]
#[should_panic(expected = "outputs [tokens, rows]")]
fn an_output_of_another_length_is_refused() {
    let shape = PackedShape {
        rows: 4,
        cols: 64,
        width: Width::ALL[0],
    };
    let packed = pack(shape, &random(shape, 1)).unwrap();
    matmul(packed.as_ref(), &activations(&[1.0; 64], 1), &mut [0.0; 5]);
}

/// More products than are shared out together, of all widths, tokens and none, give what each gives alone.
#[test]
fn together_they_give_what_each_gives_alone() {
    let mut rng = Pcg64Mcg::seed_from_u64(5);
    let of = |i: usize| {
        let (rows, cols) = ([1, 4, 33, 150][i % 4], [64, 100, 192][i % 3]);
        let width = Width::ALL[i % Width::ALL.len()];
        let shape = PackedShape { rows, cols, width };
        let w = pack(shape, &random(shape, i as u64)).unwrap();
        let tokens = [1, 1, 3, 0][i % 4];
        let mut x = Activations::new();
        x.quantize(&inputs(i % 4, tokens * cols, &mut rng), tokens, cols);
        (w, x)
    };
    let all: Vec<_> = (0..2 * TOGETHER + 3).map(of).collect();
    for threads in [1, 3] {
        let pool = Pool::new(threads);
        for isa in Isa::available() {
            let size = |(w, x): &(PackedMatrix, Activations)| w.as_ref().shape().rows * x.tokens();
            let mut together: Vec<Vec<f32>> = all.iter().map(|one| vec![f32::NAN; size(one)]).collect();
            let products = all.iter().zip(&mut together);
            multiply_on(
                &pool,
                isa,
                products.map(|((w, x), y)| Product { w: w.as_ref(), x, y }),
            );
            for ((w, x), y) in all.iter().zip(&together) {
                assert_eq!(bits(y), bits(&product(&pool, isa, w, x)), "{}", isa.name());
            }
        }
    }
}
