//! A small GGUF writer: metadata and tensors in the order they are added.
//!
//! Writes version 3 (or 2), little-endian, every tensor aligned to 32 bytes. The file appears under its name only when it
//! is complete.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{CoreError, ErrorKind, Result};
use crate::gguf::{Array, DEFAULT_ALIGNMENT, MAGIC, Value};
use crate::{Tensor, atomic};

/// A GGUF file in the making.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    version: Option<u32>,
}

impl GgufWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes another version of the format than 3. The reader accepts 2 and 3.
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = Some(version);
        self
    }

    /// Adds a metadata entry.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.push((key.into(), value.into()));
        self
    }

    /// Adds a tensor.
    #[must_use]
    pub fn tensor(mut self, tensor: Tensor) -> Self {
        self.tensors.push(tensor);
        self
    }

    /// The whole file as bytes.
    ///
    /// # Errors
    /// A tensor has an element type that GGUF does not have.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = self.header()?;
        // Writing to a vector cannot fail.
        let _ = self.write_data(&mut bytes);
        Ok(bytes)
    }

    /// Writes the file, replacing an older one of that name only when the new one is complete and on disk.
    ///
    /// # Errors
    /// A tensor has an element type that GGUF does not have, or the system refuses.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let header = self.header().map_err(|e| e.with_path(path))?;
        atomic::write_with(path, |file| {
            let mut out = BufWriter::new(file);
            out.write_all(&header)?;
            self.write_data(&mut out)?;
            out.flush()
        })
    }

    /// Everything before the tensor data, padded to the alignment.
    fn header(&self) -> Result<Vec<u8>> {
        let mut out = MAGIC.to_vec();
        out.extend(self.version.unwrap_or(3).to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            out.extend(value_type(value).to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            let id = tensor.dtype.ggml_id().ok_or_else(|| {
                let kind = ErrorKind::UnknownDType {
                    dtype: format!("{} (GGUF has no such type)", tensor.dtype),
                };
                CoreError::new(kind)
                    .with_tensor(&tensor.name)
                    .with_hint("store the tensor as F16 or F32")
            })?;
            put_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for &dimension in tensor.shape.iter().rev() {
                out.extend((dimension as u64).to_le_bytes());
            }
            out.extend(id.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (tensor.data.len() as u64).next_multiple_of(DEFAULT_ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        Ok(out)
    }

    fn write_data(&self, out: &mut impl Write) -> io::Result<()> {
        for tensor in &self.tensors {
            out.write_all(&tensor.data)?;
            let end = tensor.data.len();
            out.write_all(
                &[0; DEFAULT_ALIGNMENT as usize][..end.next_multiple_of(DEFAULT_ALIGNMENT as usize) - end],
            )?;
        }
        Ok(())
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn value_type(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::Array(v) => put_array(out, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let mut head = |kind: u32| {
        out.extend(kind.to_le_bytes());
        out.extend((array.len() as u64).to_le_bytes());
    };
    match array {
        Array::U8(v) => {
            head(0);
            out.extend(v)
        }
        Array::I8(v) => {
            head(1);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::U16(v) => {
            head(2);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::I16(v) => {
            head(3);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::U32(v) => {
            head(4);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::I32(v) => {
            head(5);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::F32(v) => {
            head(6);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::Bool(v) => {
            head(7);
            out.extend(v.iter().map(|&v| u8::from(v)))
        }
        Array::String(v) => {
            head(8);
            v.iter().for_each(|v| put_string(out, v))
        }
        Array::Array(v) => {
            head(9);
            v.iter().for_each(|v| put_array(out, v))
        }
        Array::U64(v) => {
            head(10);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::I64(v) => {
            head(11);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
        Array::F64(v) => {
            head(12);
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()))
        }
    }
}
