//! Borrowed matrices with checked shapes.
//!
//! Invariant: every element of a matrix is inside its slice, and one stride of a [`MatRef`] is 1.

use std::ops::Range;

use super::transpose::transpose;

/// A borrowed matrix `[rows, cols]`: part of a row-major matrix, or the transpose of one. So one of its strides is 1.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
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
    pub(super) fn with_contiguous_rows(self, buffer: &'a mut Vec<f32>) -> Self {
        if self.col_stride == 1 {
            return self;
        }
        // Every element is written.
        buffer.resize(self.rows * self.cols, 0.0);
        self.write_rows(buffer);
        MatRef::row_major(buffer, self.rows, self.cols)
    }

    /// Writes the rows of a matrix with contiguous columns to `out`, one after the other.
    pub(super) fn write_rows(self, out: &mut [f32]) {
        debug_assert_eq!(self.row_stride, 1, "contiguous columns");
        transpose(self.data, self.col_stride, (self.cols, self.rows), out);
    }
}

/// A mutable row-major matrix `[rows, cols]`, possibly with a distance between its rows.
#[derive(Debug)]
pub struct MatMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
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
