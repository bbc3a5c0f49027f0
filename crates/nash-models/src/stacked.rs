//! An expert in a stack that does not keep its rows one after the other, decoded straight from the mapped file.
//!
//! So does gpt-oss in Hugging Face folders. Legend: the expert's matrix is `W [m, n]`; its row r is stored row
//! `first + r·step` of the `m·step` that each of E experts has. Matrices of plain numbers are transposed,
//! `[E, n, m·step]`; MXFP4 (OCP Microscaling Formats 1.0) is codes `[E, m·step, n/32, 16]` and scales
//! `[E, m·step, n/32]`.

use half::{bf16, f16};
use nash_core::{CoreError, DType, Tensor, decode_mxfp4_pairs};

use crate::names::Every;

/// Elements that share a scale in MXFP4, and the bytes of their codes.
pub(crate) const MX_GROUP: usize = 32;
pub(crate) const MX_BYTES: usize = 16;

/// What a stack is made of.
#[derive(Debug, Clone)]
pub(crate) enum Stack {
    /// `[E, m·step, n]`, any element type.
    Rows(Tensor),
    /// `[E, n, m·step]` of plain numbers: F32, F16 or BF16.
    Columns(Tensor),
    /// MXFP4 as bytes.
    Blocks { codes: Tensor, scales: Tensor },
}

/// One expert. The loader has compared the shapes of its tensors with the numbers here.
#[derive(Debug, Clone)]
pub(crate) struct Stacked {
    pub(crate) stack: Stack,
    pub(crate) expert: usize,
    pub(crate) every: Every,
    /// `[m, n]`.
    pub(crate) shape: [usize; 2],
}

impl Stacked {
    /// Whether a transposed stack of this element type can be read.
    pub(crate) fn reads_columns_of(dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape[0]
    }

    pub(crate) fn cols(&self) -> usize {
        self.shape[1]
    }

    pub(crate) fn dtype(&self) -> DType {
        match &self.stack {
            Stack::Rows(tensor) | Stack::Columns(tensor) => tensor.dtype,
            Stack::Blocks { .. } => DType::MXFP4,
        }
    }

    /// Bytes of the expert's weights.
    pub(crate) fn bytes(&self) -> usize {
        let dtype = self.dtype();
        self.rows() * (self.cols() / dtype.block_len()) * dtype.block_bytes()
    }

    /// Lets the system take back the memory of the stack.
    pub(crate) fn release(&self) {
        match &self.stack {
            Stack::Rows(tensor) | Stack::Columns(tensor) => tensor.data.release(),
            Stack::Blocks { codes, scales } => {
                codes.data.release();
                scales.data.release();
            }
        }
    }

    /// Decodes rows from `row` on to `out [.., n]`.
    pub(crate) fn decode(&self, row: usize, out: &mut [f32]) -> Result<(), CoreError> {
        let n = self.cols();
        let stored = |row: usize| (self.expert * self.rows() + row) * self.every.step + self.every.first;
        match &self.stack {
            Stack::Rows(tensor) => {
                for (r, out) in out.chunks_exact_mut(n).enumerate() {
                    let at = stored(row + r);
                    tensor.dequantize_rows(at..at + 1, out)?;
                }
            }
            Stack::Columns(tensor) => match tensor.dtype {
                DType::F16 => self.transpose(tensor, row, out, |b| f16::from_le_bytes(b).to_f32()),
                DType::BF16 => self.transpose(tensor, row, out, |b| bf16::from_le_bytes(b).to_f32()),
                _ => self.transpose(tensor, row, out, f32::from_le_bytes),
            },
            Stack::Blocks { codes, scales } => {
                let groups = n / MX_GROUP;
                for (r, out) in out.chunks_exact_mut(n).enumerate() {
                    let at = stored(row + r) * groups;
                    let scales = &scales.data[at..at + groups];
                    decode_mxfp4_pairs(scales, &codes.data[at * MX_BYTES..(at + groups) * MX_BYTES], out);
                }
            }
        }
        Ok(())
    }

    /// Columns of the stored matrix as rows.
    fn transpose<const B: usize>(
        &self,
        tensor: &Tensor,
        row: usize,
        out: &mut [f32],
        number: impl Fn([u8; B]) -> f32,
    ) {
        let (width, n) = (self.rows() * self.every.step, self.cols());
        let numbers = tensor.data.as_chunks::<B>().0;
        let rows = out.len() / n;
        for (c, line) in numbers
            .chunks_exact(width)
            .skip(self.expert * n)
            .take(n)
            .enumerate()
        {
            let wanted = line[self.every.first..].iter().step_by(self.every.step);
            for (r, bytes) in wanted.skip(row).take(rows).enumerate() {
                out[r * n + c] = number(*bytes);
            }
        }
    }
}
