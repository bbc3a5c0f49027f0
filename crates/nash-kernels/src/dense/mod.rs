//! Dense f32 matrix products over the `gemm` crate: safe, checked, and with results that do not depend on
//! the number of threads.
//!
//! A product is cut into blocks whose size follows from the shapes alone; each block is one call of `gemm`
//! without threads of its own, so its summation order is fixed on a given CPU. Different CPUs may sum in
//! different orders.
//!
//! Shapes: `T` tokens, `m` rows of a weight (outputs), `n` columns (inputs); row-major.

#![expect(unsafe_code, reason = "outputs are shared out to threads by blocks")]

mod matrix;
mod out;
#[cfg(test)]
mod tests;
mod transpose;

use std::cell::RefCell;
use std::ops::Range;

pub use matrix::{MatMut, MatRef};
use out::Out;

use crate::pool::{self, Pool};

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
    let col_blocks = c.cols.div_ceil(col_block);
    let out = Out::new(c);
    let product = |rows: Range<usize>, a: MatRef<'_>| {
        let row_blocks = rows.len().div_ceil(row_block);
        pool.run(row_blocks * col_blocks, &|block| {
            let part = nth_range(block % row_blocks, row_block, rows.len());
            let cols = nth_range(block / row_blocks, col_block, out.cols);
            let (a, b) = (a.rows_range(part.clone()), b.cols_range(cols.clone()));
            let part = rows.start + part.start..rows.start + part.end;
            // SAFETY: the ranges are inside `c`, and no other block shares an element.
            unsafe { out.product((alpha, a, b), beta, (part, cols)) }
        });
    };
    if a.row_stride == 1 || col_blocks == 1 {
        return product(0..out.rows, a);
    }
    // Every block of columns needs the same rows in the order `gemm` likes: brought into it here, once.
    let mut buffer = SHARED.take();
    let most = (SHARED_FLOATS / a.cols.max(1)).max(SHARED_ROWS);
    let at_once = if most < row_block {
        most
    } else {
        most - most % row_block
    };
    for first in (0..out.rows).step_by(at_once) {
        let rows = first..out.rows.min(first + at_once);
        let part = a.rows_range(rows.clone()).t();
        buffer.resize(part.rows * part.cols, 0.0);
        pool.for_each_chunk(&mut buffer, SHARED_ROWS * part.cols, |index, chunk| {
            part.rows_range(nth_range(index, SHARED_ROWS, part.rows))
                .write_rows(chunk);
        });
        product(rows, MatRef::row_major(&buffer, part.rows, part.cols).t());
    }
    SHARED.set(buffer);
}

thread_local! {
    /// The transposed left factor. Taken out while in use.
    static SHARED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}
/// Floats of a left factor that are transposed at a time: 32 MiB.
const SHARED_FLOATS: usize = 8 << 20;
/// Rows of its transpose that are one task.
const SHARED_ROWS: usize = 64;

/// `y [T, m] = x [T, n] · w [m, n]ᵀ`: `y[t, r] = Σ_c x[t, c] · w[r, c]`.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn matmul_nt(x: &[f32], w: &[f32], y: &mut [f32], tokens: usize, rows: usize, cols: usize) {
    let (x, w) = (
        MatRef::row_major(x, tokens, cols),
        MatRef::row_major(w, rows, cols),
    );
    assert_eq!(y.len(), tokens * rows, "outputs [{tokens}, {rows}]");
    // The outputs of one token are those of its matrix as tokens and its input as the only row.
    let (many, few) = if tokens == 1 { (w, x) } else { (x, w) };
    if (1..=FEW_ROWS).contains(&few.rows) && cols > 0 {
        let per_task = (ROW_PRODUCTS / (few.rows * cols)).max(1);
        pool::for_each_chunk(y, per_task * few.rows, |task, y| {
            let many = many.data[task * per_task * cols..].chunks_exact(cols);
            for (y, many) in y.chunks_exact_mut(few.rows).zip(many) {
                let few = few.data.chunks_exact(cols);
                y.iter_mut().zip(few).for_each(|(y, few)| *y = dot(many, few));
            }
        });
    } else {
        gemm(1.0, x, w.t(), 0.0, MatMut::row_major(y, tokens, rows));
    }
}

/// Rows of a weight up to which dot products are faster than bringing its inputs into another order: routers of few experts.
const FEW_ROWS: usize = 8;

/// Multiplications in one task of dot products.
const ROW_PRODUCTS: usize = 16 << 10;

/// `h [n, n] += xᵀ · x` for `x [tokens, n]`. `h` must be symmetric and stays so: only blocks on and above the
/// diagonal are computed, the others are their mirror images.
///
/// # Panics
/// If a slice has another length than its shape.
pub fn gram_accumulate(x: &[f32], tokens: usize, n: usize, h: &mut [f32]) {
    gram(MatRef::row_major(x, tokens, n), MatMut::row_major(h, n, n));
}

/// [`gram_accumulate`] of any view.
///
/// # Panics
/// If `h` is not square with a side of as many columns as `x` has.
pub fn gram(x: MatRef<'_>, h: MatMut<'_>) {
    assert_eq!((h.rows, h.cols), (x.cols, x.cols), "shape of a Gram matrix");
    gram_on(pool::global(), x, h);
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

/// The `index`-th piece of `size` elements of `0..end`.
fn nth_range(index: usize, size: usize, end: usize) -> Range<usize> {
    index * size..end.min((index + 1) * size)
}
