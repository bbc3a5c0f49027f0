//! Weight matrices behind one trait: a model never knows how a weight is stored.
//!
//! `y[t, r] = Σ_c x[t, c]·W[r, c]`, `W [m, n]`, x `[T, n]`, y `[T, m]`. Results do not depend on the number of
//! threads: work is cut into fixed pieces, and every output is summed in one piece.

use std::cell::{Cell, OnceCell};
use std::sync::Arc;

use nash_core::{DType, PackedTensor, Tensor};
use nash_kernels::dense::{self, MatMut, MatRef};
use nash_kernels::heap::zeros;
use nash_kernels::{Activations, PackedRef, pool};

use crate::error::Result;
use crate::scratch::sized;
use crate::stacked::Stacked;

/// Activations `x [T, n]` on their way into one or several linears.
///
/// The quantized form is made on first use and shared by all linears that read the same input.
pub struct Input<'a> {
    x: &'a [f32],
    tokens: usize,
    cols: usize,
    quantized: OnceCell<Activations>,
    spare: Cell<Option<Activations>>,
}

impl<'a> Input<'a> {
    /// Wraps `x [T, cols]`; T follows from its length.
    #[must_use]
    pub fn new(x: &'a [f32], cols: usize) -> Self {
        Self::with_buffer(x, cols, Activations::default())
    }

    /// Wraps `x` and lends it a buffer for the quantized form; [`Self::into_buffer`] gives it back.
    #[must_use]
    pub fn with_buffer(x: &'a [f32], cols: usize, buffer: Activations) -> Self {
        let tokens = x.len() / cols.max(1);
        debug_assert_eq!(tokens * cols, x.len());
        Self {
            x,
            tokens,
            cols,
            quantized: OnceCell::new(),
            spare: Cell::new(Some(buffer)),
        }
    }

    /// The values, `[T, n]`.
    #[must_use]
    pub fn x(&self) -> &'a [f32] {
        self.x
    }

    /// T.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// n.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values as int8 groups.
    pub fn activations(&self) -> &Activations {
        self.quantized.get_or_init(|| {
            let mut buffer = self.spare.take().unwrap_or_default();
            buffer.quantize(self.x, self.tokens, self.cols);
            buffer
        })
    }

    /// Makes the quantized forms of several inputs as one piece of work.
    pub(crate) fn quantize_each(inputs: &mut [Self]) {
        let all: usize = inputs.iter().map(|input| input.x.len()).sum();
        let together = QUANTIZE_FLOATS * inputs.len() / all.max(1);
        pool::for_each_chunk(inputs, together.max(1), |_, inputs| {
            for input in inputs {
                input.activations();
            }
        });
    }

    /// The buffer, for the next input.
    #[must_use]
    pub fn into_buffer(self) -> Activations {
        self.quantized
            .into_inner()
            .or_else(|| self.spare.take())
            .unwrap_or_default()
    }
}

/// Floats that one task quantizes, about.
const QUANTIZE_FLOATS: usize = 1 << 14;

/// Some rows of a weight as floats, one after the other: `[rows, n]`.
pub fn decode_rows(linear: &dyn Linear, rows: impl ExactSizeIterator<Item = usize>) -> Vec<f32> {
    let n = linear.cols().max(1);
    let rows: Vec<usize> = rows.collect();
    let mut values = zeros(rows.len() * n);
    let part = PART_FLOATS.div_ceil(n);
    pool::for_each_chunk(&mut values, part * n, |i, values| {
        for (&row, out) in rows[i * part..].iter().zip(values.chunks_exact_mut(n)) {
            linear.row(row, out);
        }
    });
    values
}

/// A weight matrix `W [rows, cols]`.
pub trait Linear: Send + Sync {
    /// Outputs m.
    fn rows(&self) -> usize;
    /// Inputs n.
    fn cols(&self) -> usize;
    /// `y = x·Wᵀ`; x `[T, n]`, y `[T, m]`.
    fn forward(&self, input: &Input<'_>, y: &mut [f32]);
    /// The packed matrix, if it is one: then products with one input can be shared out together.
    fn packed(&self) -> Option<PackedRef<'_>> {
        None
    }
    /// Lets the system take back the memory of weights that can be read from their file again.
    fn release(&self) {}
    /// Decodes row `row` to `out [n]`.
    fn row(&self, row: usize, out: &mut [f32]);
    /// Adds `g·W` to `gx`: the gradient `g [T, m]` of the outputs taken back to the inputs, `gx [T, n]`.
    fn backward(&self, g: &[f32], tokens: usize, gx: &mut [f32]) {
        let (m, n) = (self.rows(), self.cols());
        let step = (TILE_FLOATS / n).clamp(1, m);
        let part = PART_FLOATS.div_ceil(n);
        let mut tile = vec![0.0; step * n];
        for first in (0..m).step_by(step) {
            let rows = step.min(m - first);
            let tile = &mut tile[..rows * n];
            pool::for_each_chunk(tile, part * n, |i, tile| {
                for (r, row) in tile.chunks_exact_mut(n).enumerate() {
                    self.row(first + i * part + r, row);
                }
            });
            let g = MatRef::row_major(g, tokens, m).cols_range(first..first + rows);
            let gx = MatMut::row_major(gx, tokens, n);
            dense::gemm(1.0, g, MatRef::row_major(tile, rows, n), 1.0, gx);
        }
    }
    /// Bytes of the stored weight that a forward pass reads.
    fn resident_bytes(&self) -> usize;
}

/// A weight of any element type, decoded tile by tile straight from the mapped file; there is never a full float
/// copy of it.
#[derive(Debug, Clone)]
pub struct FloatLinear {
    source: Source,
    rows: usize,
    /// The matrix is these columns of those rows; `None` for all.
    columns: Option<Arc<[u32]>>,
}

/// Where the rows of a matrix are.
#[derive(Debug, Clone)]
enum Source {
    /// One after the other, from row `first` on (a slice of fused projections or stacked experts).
    Rows { tensor: Tensor, first: usize },
    /// In a stack of experts that keeps them in another way.
    Stacked(Stacked),
}

/// Floats that one task decodes, in whole rows.
const PART_FLOATS: usize = 1 << 15;
/// Floats of a decoded tile when there are several (4 MiB, in the second-level cache of no machine, but small next
/// to the product that it pays for).
const TILE_FLOATS: usize = 1 << 20;

thread_local! {
    /// The tile buffer. Taken out while in use, so that a nested use would find none and make its own.
    static TILE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl FloatLinear {
    /// The whole tensor as a matrix `[rows, cols]`.
    #[must_use]
    pub fn new(tensor: Tensor) -> Self {
        let rows = tensor.rows();
        Self {
            source: Source::Rows { tensor, first: 0 },
            rows,
            columns: None,
        }
    }

    /// Rows `first..first + rows` of a tensor.
    ///
    /// # Errors
    /// The rows are outside of the tensor.
    pub fn from_rows(tensor: Tensor, first: usize, rows: usize) -> Result<Self> {
        // Decoding nothing checks the range.
        let end = first.saturating_add(rows);
        tensor.dequantize_rows(end..end, &mut [])?;
        Ok(Self {
            source: Source::Rows { tensor, first },
            rows,
            columns: None,
        })
    }

    /// An expert of a stack.
    #[must_use]
    pub(crate) fn stacked(expert: Stacked) -> Self {
        Self {
            rows: expert.rows(),
            source: Source::Stacked(expert),
            columns: None,
        }
    }

    /// These columns of the matrix alone, each below its number of columns.
    #[must_use]
    pub(crate) fn with_columns(self, columns: Arc<[u32]>) -> Self {
        debug_assert!(columns.iter().all(|&c| (c as usize) < self.source_cols()));
        Self {
            columns: Some(columns),
            ..self
        }
    }

    /// Element type in the file.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match &self.source {
            Source::Rows { tensor, .. } => tensor.dtype,
            Source::Stacked(expert) => expert.dtype(),
        }
    }

    /// Columns before any are left out.
    fn source_cols(&self) -> usize {
        match &self.source {
            Source::Rows { tensor, .. } => tensor.cols(),
            Source::Stacked(expert) => expert.cols(),
        }
    }

    fn decode(&self, row: usize, out: &mut [f32]) {
        let Some(columns) = &self.columns else {
            return self.decode_whole(row, out);
        };
        let mut whole = vec![0.0; self.source_cols()];
        for (r, out) in out.chunks_exact_mut(columns.len()).enumerate() {
            self.decode_whole(row + r, &mut whole);
            for (out, &column) in out.iter_mut().zip(&columns[..]) {
                *out = whole[column as usize];
            }
        }
    }

    fn decode_whole(&self, row: usize, out: &mut [f32]) {
        let rows = out.len() / self.source_cols();
        let result = match &self.source {
            Source::Rows { tensor, first } => {
                let start = first + row;
                tensor.dequantize_rows(start..start + rows, out)
            }
            Source::Stacked(expert) => expert.decode(row, out),
        };
        debug_assert!(
            result.is_ok(),
            "rows were checked when the linear was made: {result:?}"
        );
    }
}

impl Linear for FloatLinear {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.columns
            .as_ref()
            .map_or(self.source_cols(), |columns| columns.len())
    }

    fn release(&self) {
        match &self.source {
            Source::Rows { tensor, .. } => tensor.data.release(),
            Source::Stacked(expert) => expert.release(),
        }
    }

    fn forward(&self, input: &Input<'_>, y: &mut [f32]) {
        let (m, n, x) = (self.rows, self.cols(), input.x());
        let part = PART_FLOATS.div_ceil(n);
        if input.tokens() == 1 {
            pool::for_each_chunk(y, part, |i, y| {
                let mut tile = TILE.take();
                self.decode(i * part, sized(&mut tile, y.len() * n));
                for (y, row) in y.iter_mut().zip(tile.chunks_exact(n)) {
                    *y = dense::dot(x, row);
                }
                TILE.set(tile);
            });
            return;
        }
        let mut tile = TILE.take();
        let step = (TILE_FLOATS / n).max(1).min(m);
        sized(&mut tile, step * n);
        for first in (0..m).step_by(step) {
            let rows = step.min(m - first);
            let tile = &mut tile[..rows * n];
            pool::for_each_chunk(tile, part * n, |i, rows| self.decode(first + i * part, rows));
            let x = MatRef::row_major(x, input.tokens(), n);
            let w = MatRef::row_major(tile, rows, n);
            let y = MatMut::row_major(y, input.tokens(), m).cols_range(first..first + rows);
            dense::gemm(1.0, x, w.t(), 0.0, y);
        }
        TILE.set(tile);
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        self.decode(row, out);
    }

    fn resident_bytes(&self) -> usize {
        let whole = match &self.source {
            Source::Rows { tensor, .. } => tensor.data.len() / tensor.rows().max(1) * self.rows,
            Source::Stacked(expert) => expert.bytes(),
        };
        whole / self.source_cols().max(1) * self.cols()
    }
}

/// A weight in plain `f32`, row-major.
#[derive(Debug, Clone)]
pub struct DenseLinear {
    w: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl DenseLinear {
    /// `w [rows, cols]`, row-major.
    ///
    /// # Panics
    /// `w` has another length.
    #[must_use]
    pub fn new(w: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(w.len(), rows * cols, "weights of a dense linear");
        Self { w, rows, cols }
    }
}

impl Linear for DenseLinear {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn forward(&self, input: &Input<'_>, y: &mut [f32]) {
        dense::matmul_nt(input.x(), &self.w, y, input.tokens(), self.rows, self.cols);
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.w[row * self.cols..(row + 1) * self.cols]);
    }

    fn resident_bytes(&self) -> usize {
        4 * self.w.len()
    }
}

/// A packed weight, multiplied without being decoded to floats.
#[derive(Debug, Clone)]
pub struct PackedLinear {
    tensor: PackedTensor,
}

impl PackedLinear {
    /// Wraps a packed tensor.
    #[must_use]
    pub fn new(tensor: PackedTensor) -> Self {
        Self { tensor }
    }

    /// The packed tensor.
    #[must_use]
    pub fn tensor(&self) -> &PackedTensor {
        &self.tensor
    }
}

impl Linear for PackedLinear {
    fn rows(&self) -> usize {
        self.tensor.shape().rows
    }

    fn cols(&self) -> usize {
        self.tensor.shape().cols
    }

    fn forward(&self, input: &Input<'_>, y: &mut [f32]) {
        nash_kernels::matmul(self.tensor.as_ref(), input.activations(), y);
    }

    fn packed(&self) -> Option<PackedRef<'_>> {
        Some(self.tensor.as_ref())
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        nash_kernels::dequantize_row(self.tensor.as_ref(), row, out);
    }

    fn resident_bytes(&self) -> usize {
        self.tensor.bytes()
    }
}
