//! Tensors, model files (GGUF, safetensors, packed folders), checksums and atomic writes.
//!
//! Everything that comes from outside is validated once, here, at the boundary; the rest of the program works on values
//! that hold together. Files are mapped, not read: a [`Tensor`] is a view of the mapped file and is decoded row range
//! by row range where it is used.

pub mod error;
pub mod gguf;

mod dequant;
mod dtype;
mod region;
mod tensor;

pub use dtype::DType;
pub use error::{CoreError, ErrorKind, Result};
pub use gguf::Gguf;
pub use region::Region;
pub use tensor::Tensor;
