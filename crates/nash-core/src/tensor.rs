//! A named, typed, shaped view of bytes, and the tables of tensors that model files are.
//!
//! Shapes are outermost dimension first, elements row-major. Legend: a tensor of shape `[.., n]` is a matrix `[m, n]` of
//! `m = rows()` rows (the product of all dimensions but the last) and `n = cols()` columns; a row is contiguous and, in a
//! block format, made of whole blocks.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::{CoreError, ErrorKind, Result};
use crate::{DType, Region, dequant};

/// A tensor of a model file; cheap to clone (the bytes are shared).
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Outermost dimension first, row-major.
    pub shape: Vec<usize>,
    /// The stored bytes.
    pub data: Region,
}

impl Tensor {
    /// A tensor whose bytes fit its shape.
    ///
    /// # Errors
    /// The size overflows, rows are not whole blocks, or `data` has another length.
    pub fn new(name: impl Into<String>, dtype: DType, shape: Vec<usize>, data: Region) -> Result<Self> {
        let name = name.into();
        let tensor = Self {
            name,
            dtype,
            shape,
            data,
        };
        tensor.check().map_err(|e| e.with_tensor(&tensor.name))?;
        Ok(tensor)
    }

    /// A tensor of `f32` values, stored as such.
    ///
    /// # Errors
    /// The shape has another number of elements.
    pub fn from_f32(name: impl Into<String>, shape: Vec<usize>, values: &[f32]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(name, DType::F32, shape, Region::from(bytes))
    }

    fn check(&self) -> Result<()> {
        let expected = byte_len(self.dtype, &self.shape)?;
        if self.data.len() != expected {
            return Err(ErrorKind::SizeMismatch {
                dtype: self.dtype,
                shape: self.shape.clone(),
                expected: expected as u64,
                found: self.data.len() as u64,
            }
            .into());
        }
        Ok(())
    }

    /// Number of rows: the product of all dimensions but the last; 1 for vectors and scalars.
    pub fn rows(&self) -> usize {
        self.shape
            .split_last()
            .map_or(1, |(_, outer)| outer.iter().product())
    }

    /// Number of columns: the last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Decodes rows `rows` to `out` (`[rows.len(), cols()]`, row-major).
    ///
    /// Bit-identical to ggml's `dequantize_row_*`; integers are rounded to the nearest `f32`.
    ///
    /// # Errors
    /// The rows are outside of the tensor, `out` has another length than `rows.len() · cols()`, or the public fields
    /// were changed so that they contradict each other.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.decode_rows(rows, out).map_err(|e| e.with_tensor(&self.name))
    }

    fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.check()?;
        if rows.start > rows.end || rows.end > self.rows() {
            return Err(ErrorKind::RowRange {
                start: rows.start,
                end: rows.end,
                rows: self.rows(),
            }
            .into());
        }
        let expected = rows.len() * self.cols();
        if out.len() != expected {
            return Err(ErrorKind::BufferLength {
                expected,
                found: out.len(),
            }
            .into());
        }
        if expected == 0 {
            return Ok(());
        }
        // `check` has shown that rows are whole blocks and that their product does not overflow.
        let row_bytes = self.data.len() / self.rows();
        dequant::decode(
            self.dtype,
            &self.data[rows.start * row_bytes..rows.end * row_bytes],
            out,
        );
        Ok(())
    }

    /// All elements as `f32`, row-major.
    ///
    /// # Errors
    /// The public fields were changed so that they contradict each other.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.check().map_err(|e| e.with_tensor(&self.name))?;
        let mut out = vec![0.0; self.elements()];
        self.dequantize_rows(0..self.rows(), &mut out)?;
        Ok(out)
    }
}

/// Bytes of a tensor of this type and shape (a scalar has one element).
///
/// # Errors
/// The size overflows or the rows are not whole blocks.
pub(crate) fn byte_len(dtype: DType, shape: &[usize]) -> Result<usize> {
    let cols = shape.last().copied().unwrap_or(1);
    if !cols.is_multiple_of(dtype.block_len()) {
        return Err(ErrorKind::PartialBlock {
            dtype,
            shape: shape.to_vec(),
        }
        .into());
    }
    // Dimensions of zero are left out of the product, so that they cannot hide the overflow of the others.
    let overflow = || {
        CoreError::from(ErrorKind::SizeOverflow {
            dtype,
            shape: shape.to_vec(),
        })
    };
    let elements = shape
        .iter()
        .filter(|&&dimension| dimension > 0)
        .try_fold(1usize, |product, &dimension| product.checked_mul(dimension))
        .ok_or_else(overflow)?;
    if shape.contains(&0) {
        return Ok(0);
    }
    dtype.bytes(elements).ok_or_else(overflow)
}

/// Tensors by name, in the order of the file.
#[derive(Debug, Default)]
pub(crate) struct TensorTable {
    tensors: Vec<Tensor>,
    index: HashMap<String, usize>,
}

impl TensorTable {
    /// Adds a tensor; a second one of the same name is an error.
    pub(crate) fn insert(&mut self, tensor: Tensor) -> Result<()> {
        if self.index.contains_key(&tensor.name) {
            return Err(ErrorKind::DuplicateName { name: tensor.name }.into());
        }
        self.index.insert(tensor.name.clone(), self.tensors.len());
        self.tensors.push(tensor);
        Ok(())
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Tensor> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    pub(crate) fn get(&self, name: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| {
            CoreError::new(ErrorKind::MissingTensor {
                available: self.tensors.len(),
            })
            .with_tensor(name)
        })
    }

    pub(crate) fn into_vec(self) -> Vec<Tensor> {
        self.tensors
    }

    pub(crate) fn as_slice(&self) -> &[Tensor] {
        &self.tensors
    }

    pub(crate) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.iter().map(|tensor| tensor.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Tensor {
        Tensor::from_f32("w", vec![2, 3, 2], &(0..12).map(|v| v as f32).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn rows_are_everything_but_the_last_dimension() {
        let tensor = matrix();
        assert_eq!((tensor.rows(), tensor.cols(), tensor.elements()), (6, 2, 12));
        let mut out = [0.0; 4];
        tensor.dequantize_rows(4..6, &mut out).unwrap();
        assert_eq!(out, [8.0, 9.0, 10.0, 11.0]);
        let scalar = Tensor::from_f32("s", vec![], &[7.0]).unwrap();
        assert_eq!(scalar.to_f32().unwrap(), [7.0]);
    }

    #[test]
    fn every_row_range_agrees_with_the_whole() {
        let bytes: Vec<u8> = (0..3 * 2 * 22).map(|i| (i * 37 % 251) as u8).collect();
        let tensor = Tensor::new("w", DType::Q5_0, vec![3, 64], Region::from(bytes)).unwrap();
        let whole = tensor.to_f32().unwrap();
        for start in 0..=3 {
            for end in start..=3 {
                let mut out = vec![f32::NAN; (end - start) * 64];
                tensor.dequantize_rows(start..end, &mut out).unwrap();
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&out), bits(&whole[start * 64..end * 64]));
            }
        }
    }

    #[test]
    fn rows_outside_and_wrong_buffers_are_errors() {
        let tensor = matrix();
        let error = tensor.dequantize_rows(5..7, &mut [0.0; 4]).unwrap_err();
        assert!(
            matches!(
                error.kind(),
                ErrorKind::RowRange {
                    start: 5,
                    end: 7,
                    rows: 6
                }
            ),
            "{error}"
        );
        let error = tensor.dequantize_rows(0..1, &mut [0.0; 3]).unwrap_err();
        assert!(
            matches!(
                error.kind(),
                ErrorKind::BufferLength {
                    expected: 2,
                    found: 3
                }
            ),
            "{error}"
        );
        assert_eq!(error.tensor(), Some("w"));
    }

    #[test]
    fn sizes_are_checked() {
        let new = |dtype, shape: &[usize], bytes: usize| {
            Tensor::new("w", dtype, shape.to_vec(), Region::from(vec![0; bytes])).map_err(|e| e.to_string())
        };
        assert!(new(DType::Q4_0, &[4, 32], 72).is_ok());
        assert!(new(DType::F16, &[0, 5], 0).is_ok());
        assert!(
            new(DType::Q4_0, &[4, 32], 71)
                .unwrap_err()
                .contains("takes 72 bytes, there are 71")
        );
        // 128 elements are whole blocks, but the rows are not.
        assert!(
            new(DType::Q4_0, &[8, 16], 72)
                .unwrap_err()
                .contains("multiples of 32")
        );
        assert!(
            new(DType::F32, &[usize::MAX, 2], 0)
                .unwrap_err()
                .contains("overflows")
        );
        assert!(
            new(DType::F32, &[0, usize::MAX, usize::MAX], 0)
                .unwrap_err()
                .contains("overflows")
        );
        assert!(
            new(DType::F32, &[usize::MAX / 2], 0)
                .unwrap_err()
                .contains("overflows")
        );
    }

    #[test]
    fn fields_that_were_changed_are_noticed() {
        let mut tensor = matrix();
        tensor.shape = vec![100, 2];
        assert!(tensor.dequantize_rows(0..100, &mut [0.0; 200]).is_err());
        assert!(tensor.to_f32().is_err());
    }
}
