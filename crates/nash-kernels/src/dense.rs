//! Dense f32 matrix products over the `gemm` crate: safe, checked, and with results that do not depend on
//! the number of threads.
//!
//! A product is cut into blocks whose size follows from the shapes alone; each block is one call of `gemm`
//! without threads of its own, so its summation order is fixed on a given CPU. Different CPUs may sum in
//! different orders.
//!
//! Shapes: `T` tokens, `m` rows of a weight (outputs), `n` columns (inputs); row-major.

#![expect(
    unsafe_code,
    reason = "calls of the `gemm` crate, and outputs shared out to threads by blocks"
)]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::pool::{self, Pool};
use crate::transpose::transpose;

/// A borrowed matrix `[rows, cols]`: part of a row-major matrix, or the transpose of one. So one of its strides is 1.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// `data` as a row-major matrix `[rows, cols]`.
    ///
    /// # Panics
    /// If `data` has not `rows · cols` elements.
    pub fn row_major(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            Some(data.len()),
            rows.checked_mul(cols),
            "elements of a matrix [{rows}, {cols}]"
        );
        MatRef {
            data,
            rows,
            cols,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The transposed matrix `[cols, rows]`.
    #[must_use]
    pub fn t(self) -> Self {
        MatRef {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If the range is not inside the matrix.
    #[must_use]
    pub fn rows_range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {}",
            self.rows
        );
        let data = self.data.get(range.start * self.row_stride..).unwrap_or_default();
        MatRef {
            data,
            rows: range.len(),
            ..self
        }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If the range is not inside the matrix.
    #[must_use]
    pub fn cols_range(self, range: Range<usize>) -> Self {
        self.t().rows_range(range).t()
    }
}

impl<'a> MatRef<'a> {
    /// The same matrix with contiguous rows: itself, or a copy in `buffer`.
    fn with_contiguous_rows(self, buffer: &'a mut Vec<f32>) -> Self {
        if self.col_stride == 1 {
            return self;
        }
        // One of the strides is always 1, so the columns are contiguous.
        transpose(self.data, self.col_stride, (self.cols, self.rows), buffer);
        MatRef::row_major(buffer, self.rows, self.cols)
    }
}

/// A mutable row-major matrix `[rows, cols]`, possibly with a distance between its rows.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// `data` as a row-major matrix `[rows, cols]`.
    ///
    /// # Panics
    /// If `data` has not `rows · cols` elements.
    pub fn row_major(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            Some(data.len()),
            rows.checked_mul(cols),
            "elements of a matrix [{rows}, {cols}]"
        );
        MatMut {
            data,
            rows,
            cols,
            row_stride: cols,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If the range is not inside the matrix.
    #[must_use]
    pub fn rows_range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {}",
            self.rows
        );
        let data = self
            .data
            .get_mut(range.start * self.row_stride..)
            .unwrap_or_default();
        MatMut {
            data,
            rows: range.len(),
            ..self
        }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If the range is not inside the matrix.
    #[must_use]
    pub fn cols_range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.cols,
            "columns {range:?} of {}",
            self.cols
        );
        let data = self.data.get_mut(range.start..).unwrap_or_default();
        MatMut {
            data,
            cols: range.len(),
            ..self
        }
    }

    /// As a matrix to read.
    pub fn as_ref(&self) -> MatRef<'_> {
        MatRef {
            data: self.data,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            col_stride: 1,
        }
    }
}

/// `c [m, n] = beta · c + alpha · a [m, k] · b [k, n]`. With `beta = 0`, `c` is not read (it may hold NaN).
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm(alpha: f32, a: MatRef<'_>, b: MatRef<'_>, beta: f32, c: MatMut<'_>) {
    gemm_on(pool::global(), (alpha, a, b), (beta, c));
}

fn gemm_on(pool: &Pool, (alpha, a, b): (f32, MatRef<'_>, MatRef<'_>), (beta, c): (f32, MatMut<'_>)) {
    assert_eq!(
        (c.rows, c.cols, a.cols),
        (a.rows, b.cols, b.rows),
        "shapes [m, n], k of a matrix product"
    );
    let (row_block, col_block) = block_sizes(c.rows, c.cols, a.cols);
    let (row_blocks, col_blocks) = (c.rows.div_ceil(row_block), c.cols.div_ceil(col_block));
    let out = Out::new(c);
    pool.run(row_blocks * col_blocks, &|block| {
        let rows = nth_range(block % row_blocks, row_block, out.rows);
        let cols = nth_range(block / row_blocks, col_block, out.cols);
        let (a, b) = (a.rows_range(rows.clone()), b.cols_range(cols.clone()));
        // SAFETY: the ranges are inside `c`, and no other block shares an element.
        unsafe { out.product((alpha, a, b), beta, (rows, cols)) }
    });
}

/// `y [T, m] = x [T, n] · w [m, n]ᵀ`: `y[t, r] = Σ_c x[t, c] · w[r, c]`.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn matmul_nt(x: &[f32], w: &[f32], y: &mut [f32], tokens: usize, rows: usize, cols: usize) {
    let (x, w) = (
        MatRef::row_major(x, tokens, cols),
        MatRef::row_major(w, rows, cols),
    );
    if tokens == 1 {
        assert_eq!(y.len(), rows, "outputs [1, {rows}]");
        let per_task = (ROW_PRODUCTS / cols.max(1)).max(1);
        pool::for_each_chunk(y, per_task, |task, y| {
            for (r, y) in y.iter_mut().enumerate() {
                *y = dot(x.data, &w.data[(task * per_task + r) * cols..][..cols]);
            }
        });
    } else {
        gemm(1.0, x, w.t(), 0.0, MatMut::row_major(y, tokens, rows));
    }
}

/// Multiplications in one task of a matrix-vector product.
const ROW_PRODUCTS: usize = 16 << 10;

/// `h [n, n] += xᵀ · x` for `x [tokens, n]`. `h` must be symmetric and stays so: only blocks on and above the
/// diagonal are computed, the others are their mirror images.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn gram_accumulate(x: &[f32], tokens: usize, n: usize, h: &mut [f32]) {
    gram_on(
        pool::global(),
        MatRef::row_major(x, tokens, n),
        MatMut::row_major(h, n, n),
    );
}

fn gram_on(pool: &Pool, x: MatRef<'_>, h: MatMut<'_>) {
    let n = x.cols;
    let size = (n / 8).next_multiple_of(64).clamp(128, 512);
    let blocks = n.div_ceil(size);
    let pairs: Vec<_> = (0..blocks)
        .flat_map(|i| (i..blocks).map(move |j| (i, j)))
        .collect();
    let out = Out::new(h);
    pool.run(pairs.len(), &|pair| {
        let (i, j) = (
            nth_range(pairs[pair].0, size, n),
            nth_range(pairs[pair].1, size, n),
        );
        let (a, b) = (x.cols_range(i.clone()).t(), x.cols_range(j.clone()));
        // SAFETY: the ranges are inside `h`. A pair touches the blocks (i, j) and (j, i), and no other pair does.
        unsafe {
            out.product((1.0, a, b), 1.0, (i.clone(), j.clone()));
            out.mirror(i, j);
        }
    });
}

/// `Σ a[i] · b[i]`, in 64 partial sums that are added pairwise; the same bits on every CPU.
///
/// # Panics
/// If the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "vectors of a dot product");
    #[cfg(target_arch = "x86_64")]
    {
        // The same body, compiled again with wider registers.
        #[target_feature(enable = "avx2")]
        fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
            dot_body(a, b)
        }
        if crate::Isa::Avx2.is_available() {
            // SAFETY: this CPU has AVX2.
            return unsafe { dot_avx2(a, b) };
        }
    }
    dot_body(a, b)
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 64;
    let mut sums = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a * b;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// Rows and columns of the blocks that a product `[m, k] · [k, n]` is cut into; from the shapes alone. Rows are cut
/// only where columns do not give enough tasks: a block of `b` is rearranged for each of its tasks.
fn block_sizes(m: usize, n: usize, k: usize) -> (usize, usize) {
    /// Multiplications that are worth a task.
    const TASK: usize = 1 << 18;
    if m.saturating_mul(n).saturating_mul(k) < 2 * TASK {
        return (m.max(1), n.max(1));
    }
    let cols = (n / 8).next_multiple_of(32).clamp(96, 384);
    let rows = if n / cols >= 4 {
        4096
    } else {
        (m / 8).next_multiple_of(32).clamp(96, 384)
    };
    (rows.min(m), cols)
}

/// The inner dimension is brought into the order `gemm` likes in equal panels of at most this.
const DEPTH: usize = 512;

/// The `index`-th piece of `size` elements of `0..end`.
fn nth_range(index: usize, size: usize, end: usize) -> Range<usize> {
    index * size..end.min((index + 1) * size)
}

/// A mutable matrix whose disjoint blocks several threads write.
struct Out<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    _data: PhantomData<&'a mut [f32]>,
}

// SAFETY: the methods that touch `data` ask their callers for disjoint blocks.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    fn new(c: MatMut<'a>) -> Self {
        let MatMut {
            data,
            rows,
            cols,
            row_stride,
        } = c;
        // Invariant of `MatMut`: the last element is inside the slice.
        debug_assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len());
        Out {
            data: data.as_mut_ptr(),
            rows,
            cols,
            row_stride,
            _data: PhantomData,
        }
    }

    /// `block = beta · block + alpha · a · b`. Factors whose inner dimension is the contiguous one are transposed first,
    /// panel by panel: `gemm` is several times slower if it has to gather its vectors.
    ///
    /// # Safety
    /// The ranges are inside the matrix and as long as `a` and `b` say, and no other thread uses the block.
    unsafe fn product(
        &self,
        (alpha, a, b): (f32, MatRef<'_>, MatRef<'_>),
        beta: f32,
        (rows, cols): (Range<usize>, Range<usize>),
    ) {
        /// Rows or columns of the block from which on the copies pay.
        const WORTH: usize = 8;
        thread_local!(static PANELS: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) });
        let gathers = a.row_stride != 1 || b.col_stride != 1;
        if !gathers || a.rows.min(b.cols) < WORTH || a.cols == 0 {
            // SAFETY: passed on.
            return unsafe { self.plain_product((alpha, a, b), beta, (rows, cols)) };
        }
        // Taken out while in use: `gemm` could not come back here, but nothing needs to rely on that.
        let (mut a_panel, mut b_panel) = PANELS.take();
        let panel = a.cols.div_ceil(a.cols.div_ceil(DEPTH));
        for first in (0..a.cols).step_by(panel) {
            let depth = first..a.cols.min(first + panel);
            let a = a
                .cols_range(depth.clone())
                .t()
                .with_contiguous_rows(&mut a_panel)
                .t();
            let b = b.rows_range(depth).with_contiguous_rows(&mut b_panel);
            let beta = if first == 0 { beta } else { 1.0 };
            // SAFETY: passed on.
            unsafe { self.plain_product((alpha, a, b), beta, (rows.clone(), cols.clone())) }
        }
        PANELS.set((a_panel, b_panel));
    }

    /// [`product`](Self::product) by one call of `gemm`.
    ///
    /// # Safety
    /// As there.
    unsafe fn plain_product(
        &self,
        (alpha, a, b): (f32, MatRef<'_>, MatRef<'_>),
        beta: f32,
        (rows, cols): (Range<usize>, Range<usize>),
    ) {
        debug_assert!(rows.end <= self.rows && cols.end <= self.cols);
        debug_assert_eq!((rows.len(), cols.len(), a.cols), (a.rows, b.cols, b.rows));
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        // SAFETY: for the inputs, `MatRef` keeps every element inside its slice; strides of a slice's elements
        // fit `isize`. For the output the caller vouches. Neither overlaps: one is borrowed mutably.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                a.cols,
                self.data.add(rows.start * self.row_stride + cols.start),
                1,
                self.row_stride.cast_signed(),
                beta != 0.0,
                a.data.as_ptr(),
                a.col_stride.cast_signed(),
                a.row_stride.cast_signed(),
                b.data.as_ptr(),
                b.col_stride.cast_signed(),
                b.row_stride.cast_signed(),
                beta,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }

    /// Copies the block `[i, j]` of a square matrix to `[j, i]`, transposed.
    ///
    /// # Safety
    /// The matrix is square, the ranges are inside it, and no other thread uses the two blocks.
    unsafe fn mirror(&self, i: Range<usize>, j: Range<usize>) {
        /// Side of the squares in which is copied, so that reads and writes stay in the first-level cache.
        const SIDE: usize = 32;
        for first_col in j.clone().step_by(SIDE) {
            for first_row in i.clone().step_by(SIDE) {
                for col in first_col..j.end.min(first_col + SIDE) {
                    for row in first_row..i.end.min(first_row + SIDE).min(col) {
                        // SAFETY: both elements are inside the matrix, in blocks that are this thread's.
                        unsafe {
                            let value = self.data.add(row * self.row_stride + col).read();
                            self.data.add(col * self.row_stride + row).write(value);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        for (m, n, k) in [(150, 300, 70), (513, 257, 33), (7, 1030, 129)] {
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
}
