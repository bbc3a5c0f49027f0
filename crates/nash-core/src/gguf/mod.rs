//! GGUF model files, versions 2 and 3, in one file or split.
//!
//! Follows `docs/gguf.md` of ggml: magic, version, counts, metadata, tensor table, padding to `general.alignment`, tensor
//! data. The header is validated once, at opening; afterwards every tensor is a slice of the mapped file. A file is
//! rejected rather than half understood: names are unique, every tensor's bytes are inside of the file, aligned, and its own.

mod part;
mod read;
mod split;
mod value;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use split::number as part_number;
pub use value::{Array, Value};

use crate::error::{CoreError, ErrorKind, Result};
use crate::tensor::TensorTable;
use crate::{Region, Tensor};
use part::Part;

/// The first four bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Metadata key of the alignment of tensor data, in bytes.
pub const KEY_ALIGNMENT: &str = "general.alignment";
/// Alignment where the file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// An open GGUF model; cheap to clone.
#[derive(Clone, Debug)]
pub struct Gguf(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: Option<PathBuf>,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: TensorTable,
    bytes: u64,
}

impl Gguf {
    /// Opens and maps a model. Any part of a split model (`NAME-00001-of-00003.gguf`) opens the whole model.
    ///
    /// # Errors
    /// The file (or another part) cannot be opened, or is not a valid GGUF file; see [`ErrorKind`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let part = Part::open(path)?;
        let (paths, parts) = match split::parts(path, &part).map_err(|e| e.with_path(path))? {
            Some(paths) => split::open_all(path, part, &paths)?,
            None => (vec![path.to_owned()], vec![part]),
        };
        Self::join(paths, parts)
    }

    /// Reads a model from the bytes of a single file.
    ///
    /// # Errors
    /// The bytes are not a valid GGUF file, or only a part of a split one.
    pub fn from_bytes(bytes: impl Into<Region>) -> Result<Self> {
        let part = Part::parse(bytes.into())?;
        if part.count("split.count")?.is_some_and(|count| count > 1) {
            return Err(CoreError::invalid(
                "GGUF file",
                "one part of a split model; open it by its path",
            ));
        }
        Self::join(Vec::new(), vec![part])
    }

    fn join(paths: Vec<PathBuf>, parts: Vec<Part>) -> Result<Self> {
        let mut tensors = TensorTable::default();
        let mut head = None;
        let mut bytes = 0;
        for (i, part) in parts.into_iter().enumerate() {
            bytes += part.bytes;
            for tensor in part.tensors {
                tensors.insert(tensor).map_err(|e| match paths.get(i) {
                    Some(path) => e.with_path(path),
                    None => e,
                })?;
            }
            head.get_or_insert((part.version, part.metadata));
        }
        let (version, metadata) = head.unwrap_or_default();
        let path = paths.into_iter().next();
        Ok(Self(Arc::new(Inner {
            path,
            version,
            metadata,
            tensors,
            bytes,
        })))
    }

    /// The file (the first one of a split model), if it was opened by path.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.0.version
    }

    /// Size of the file (of all parts together) in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.0.bytes
    }

    /// All metadata by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.0.metadata
    }

    /// The value of a key, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.metadata.get(key)
    }

    /// A required integer that is not negative.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.required(key, "a non-negative integer", Value::as_u64)
    }

    /// A required size: an integer that fits `usize`.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.required(key, "a size", |value| {
            value.as_u64().and_then(|v| usize::try_from(v).ok())
        })
    }

    /// A required number.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.required(key, "a number", |value| value.as_f64().map(|v| v as f32))
    }

    /// A required truth value.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.required(key, "a bool", Value::as_bool)
    }

    /// A required string.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.required(key, "a string", Value::as_str)
    }

    /// A required array of strings.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn strings(&self, key: &str) -> Result<&[String]> {
        self.required(key, "an array of strings", |value| {
            value.as_array().and_then(Array::as_strings)
        })
    }

    fn required<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        let place = |kind| {
            let error = CoreError::new(kind);
            match self.path() {
                Some(path) => error.with_path(path),
                None => error,
            }
        };
        let value = self
            .get(key)
            .ok_or_else(|| place(ErrorKind::MissingKey { key: key.to_owned() }))?;
        convert(value).ok_or_else(|| {
            place(ErrorKind::WrongType {
                key: key.to_owned(),
                expected,
                found: value.type_name(),
            })
        })
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        self.0.tensors.as_slice()
    }

    /// The names of all tensors, in the order of the file.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.tensors.names()
    }

    /// A tensor by name. Shapes are outermost dimension first (the reverse of what the file says).
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.0.tensors.get(name).cloned().map_err(|e| match self.path() {
            Some(path) => e.with_path(path),
            None => e,
        })
    }

    /// A tensor by name, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.tensors.find(name)
    }
}
