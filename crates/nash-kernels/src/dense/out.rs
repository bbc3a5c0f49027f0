//! The output of a product, written block by block from several threads.

#![expect(unsafe_code, reason = "calls of the `gemm` crate on disjoint blocks")]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::matrix::{MatMut, MatRef};

/// The inner dimension is brought into the order `gemm` likes in equal panels of at most this.
const DEPTH: usize = 512;

/// A mutable matrix whose disjoint blocks several threads write.
pub(super) struct Out<'a> {
    data: *mut f32,
    pub(super) rows: usize,
    pub(super) cols: usize,
    row_stride: usize,
    _data: PhantomData<&'a mut [f32]>,
}

// SAFETY: the methods that touch `data` ask their callers for disjoint blocks.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    /// Takes the matrix over for as long as it is borrowed.
    pub(super) fn new(c: MatMut<'a>) -> Self {
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
    pub(super) unsafe fn product(
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
    pub(super) unsafe fn mirror(&self, i: Range<usize>, j: Range<usize>) {
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
