//! Products against f64 sums, and the same bits for every number of threads.

use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::*;

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

fn at(m: MatRef<'_>, row: usize, col: usize) -> f64 {
    f64::from(m.data[row * m.row_stride + col * m.col_stride])
}

/// Checks `c` against `beta · before + alpha · a · b` in f64. Any order of k products and one or two more
/// operations errs by at most (k + 3) · 2⁻²⁴ of the sum of magnitudes, to first order.
fn assert_product(
    (alpha, a, b): (f32, MatRef<'_>, MatRef<'_>),
    beta: f32,
    before: MatRef<'_>,
    c: MatRef<'_>,
) {
    for row in 0..c.rows {
        for col in 0..c.cols {
            let terms: Vec<f64> = (0..a.cols)
                .map(|k| f64::from(alpha) * at(a, row, k) * at(b, k, col))
                .collect();
            let start = if beta == 0.0 {
                0.0
            } else {
                f64::from(beta) * at(before, row, col)
            };
            let exact = start + terms.iter().sum::<f64>();
            let magnitude = start.abs() + terms.iter().map(|t| t.abs()).sum::<f64>();
            let bound = 1.01 * (a.cols + 3) as f64 * 2f64.powi(-24) * magnitude;
            let error = (at(c, row, col) - exact).abs();
            assert!(error <= bound, "[{row}, {col}]: error {error:e} > {bound:e}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn gemm_of_any_strides_is_right(
        (m, n, k) in (0usize..40, 0usize..40, 0usize..40),
        (ta, tb) in any::<(bool, bool)>(),
        scales in 0usize..6,
        seed: u64,
    ) {
        let (alpha, beta) = [(1.0, 0.0), (1.0, 1.0), (-0.5, 0.25), (2.0, 0.0), (0.0, 0.5), (1.0, -1.0)][scales];
        let (a, b) = (random((m + 3) * (k + 2), seed), random((k + 3) * (n + 2), seed ^ 1));
        let part = |data, rows: usize, cols: usize, transposed| {
            if transposed {
                MatRef::row_major(data, cols + 2, rows + 3).rows_range(1..cols + 1).cols_range(2..rows + 2).t()
            } else {
                MatRef::row_major(data, rows + 3, cols + 2).rows_range(2..rows + 2).cols_range(1..cols + 1)
            }
        };
        let (a, b) = (part(&a, m, k, ta), part(&b, k, n, tb));
        let before = random((m + 2) * (n + 1), seed ^ 2);
        let mut c = before.clone();
        gemm(alpha, a, b, beta, MatMut::row_major(&mut c, m + 2, n + 1).rows_range(1..m + 1).cols_range(0..n));
        let inner = |data| MatRef::row_major(data, m + 2, n + 1).rows_range(1..m + 1).cols_range(0..n);
        assert_product((alpha, a, b), beta, inner(&before), inner(&c));
        // Around the block nothing changes.
        for (i, (&b, &c)) in before.iter().zip(&c).enumerate() {
            let (row, col) = (i / (n + 1), i % (n + 1));
            prop_assert!((1..=m).contains(&row) && col < n || b == c);
        }
    }

    #[test]
    fn dot_is_right(len in 0usize..400, seed: u64) {
        let (a, b) = (random(len, seed), random(len, seed ^ 1));
        let sum = [dot(&a, &b)];
        let (a, b) = (MatRef::row_major(&a, 1, len), MatRef::row_major(&b, 1, len).t());
        assert_product((1.0, a, b), 0.0, MatRef::row_major(&[0.0], 1, 1), MatRef::row_major(&sum, 1, 1));
        prop_assert_eq!(sum[0].to_bits(), dot_body(a.data, b.data).to_bits());
    }
}

#[test]
fn products_are_right_and_the_same_for_every_number_of_threads() {
    // The last one has more rows than are brought into order at a time.
    for (m, n, k) in [(150, 300, 70), (513, 257, 33), (7, 1030, 129), (260, 100, 33_000)] {
        let (a, b, before) = (random(m * k, 1), random(n * k, 2), random(m * n, 3));
        let (a, b) = (MatRef::row_major(&a, m, k), MatRef::row_major(&b, n, k).t());
        let results: Vec<Vec<f32>> = [1, 2, 5]
            .map(|threads| {
                let mut c = before.clone();
                gemm_on(
                    &Pool::new(threads),
                    (0.5, a, b),
                    (2.0, MatMut::row_major(&mut c, m, n)),
                );
                c
            })
            .to_vec();
        assert!(results.iter().all(|c| c == &results[0]));
        let (before, c) = (
            MatRef::row_major(&before, m, n),
            MatRef::row_major(&results[0], m, n),
        );
        assert_product((0.5, a, b), 2.0, before, c);
    }
}

#[test]
fn gram_is_right_symmetric_and_the_same_for_every_number_of_threads() {
    for (tokens, n) in [(1, 1), (5, 31), (40, 130), (33, 600)] {
        let (x, root) = (random(tokens * n, 1), random(n, 2));
        let before: Vec<f32> = (0..n * n).map(|i| root[i / n] * root[i % n]).collect();
        let results: Vec<Vec<f32>> = [1, 2, 5]
            .map(|threads| {
                let mut h = before.clone();
                gram_on(
                    &Pool::new(threads),
                    MatRef::row_major(&x, tokens, n),
                    MatMut::row_major(&mut h, n, n),
                );
                h
            })
            .to_vec();
        assert!(results.iter().all(|h| h == &results[0]));
        let (x, h) = (MatRef::row_major(&x, tokens, n), &results[0]);
        assert_product(
            (1.0, x.t(), x),
            1.0,
            MatRef::row_major(&before, n, n),
            MatRef::row_major(h, n, n),
        );
        assert!((0..n * n).all(|i| h[i] == h[i % n * n + i / n]));
    }
}

#[test]
fn matmul_nt_is_right() {
    for (tokens, rows, cols) in [
        (1, 300, 257),
        (1, 5, 0),
        (2, 9, 65),
        (130, 140, 100),
        (20, 40, 1100),
        (0, 3, 4),
        (37, 8, 600),
        (5, 1, 33),
        (3, 2, 0),
    ] {
        let (x, w) = (random(tokens * cols, 1), random(rows * cols, 2));
        let mut y = vec![f32::NAN; tokens * rows];
        matmul_nt(&x, &w, &mut y, tokens, rows, cols);
        let (x, w) = (
            MatRef::row_major(&x, tokens, cols),
            MatRef::row_major(&w, rows, cols).t(),
        );
        let y = MatRef::row_major(&y, tokens, rows);
        assert_product((1.0, x, w), 0.0, y, y);
    }
}

#[test]
#[should_panic(expected = "shapes [m, n], k")]
fn shapes_that_do_not_fit_are_refused() {
    let a = MatRef::row_major(&[0.0; 6], 2, 3);
    gemm(1.0, a, a, 0.0, MatMut::row_major(&mut [0.0; 6], 2, 3));
}

#[test]
#[should_panic(expected = "columns 1..4 of 3")]
fn ranges_outside_are_refused() {
    let _ = MatMut::row_major(&mut [0.0; 6], 2, 3).cols_range(1..4);
}
