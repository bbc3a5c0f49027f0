//! Tensors, model files (GGUF, safetensors, packed folders), checksums and atomic writes.
//!
//! Everything that comes from outside is validated once, here, at the boundary; the rest of the program works on values
//! that hold together. Files are mapped, not read: a [`Tensor`] is a view of the mapped file and is decoded row range
//! by row range where it is used.

pub mod atomic;
pub mod error;
pub mod gguf;
pub mod gguf_write;
pub mod hash;
pub mod hf;
pub mod packed;
pub mod packed_write;
pub mod safetensors;

mod dequant;
mod dtype;
mod model_file;
mod region;
mod tensor;

pub use dequant::decode_mxfp4_pairs;
pub use dtype::DType;
pub use error::{CoreError, ErrorKind, Result};
pub use gguf::Gguf;
pub use hf::HfFolder;
pub use model_file::ModelFile;
pub use packed::{PackedFolder, PackedTensor};
pub use region::Region;
pub use safetensors::Safetensors;
pub use tensor::Tensor;
