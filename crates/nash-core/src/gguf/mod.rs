//! GGUF model files, versions 2 and 3, in one file or split.
//!
//! Follows `docs/gguf.md` of ggml: magic, version, counts, metadata, tensor table, padding to `general.alignment`, tensor
//! data. The header is validated once, at opening; afterwards every tensor is a slice of the mapped file. A file is
//! rejected rather than half understood: names are unique, every tensor's bytes are inside of the file, aligned, and its own.

mod read;
mod split;
mod value;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use split::number as part_number;
pub use value::{Array, Value};

use crate::error::{CoreError, ErrorKind, Result};
use crate::tensor::{TensorTable, byte_len};
use crate::{DType, Region, Tensor};
use read::Cursor;

/// The first four bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Metadata key of the alignment of tensor data, in bytes.
pub const KEY_ALIGNMENT: &str = "general.alignment";
/// Alignment where the file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Dimensions a tensor can have.
const MAX_DIMENSIONS: u32 = 8;
/// Bytes of the smallest entry of the metadata: name length, type, one byte of value.
const LEAST_METADATA: usize = 8 + 4 + 1;
/// Bytes of the smallest entry of the tensor table: name length, dimensions, type, offset.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;

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

/// One file of a model.
struct Part {
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<Tensor>,
    bytes: u64,
}

/// An entry of the tensor table.
struct Entry {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    /// Bytes of the tensor data where it starts.
    start: u64,
    /// One past its last byte.
    end: u64,
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        Region::map(path)
            .and_then(Self::parse)
            .map_err(|e| e.with_path(path))
    }

    fn parse(file: Region) -> Result<Self> {
        let mut cursor = Cursor::new(&file);
        let version = version(&mut cursor)?;
        let tensor_count = cursor.count(LEAST_TENSOR, "the number of tensors")?;
        let metadata_count = cursor.count(LEAST_METADATA, "the number of metadata entries")?;
        let metadata = metadata(&mut cursor, metadata_count)?;
        let alignment = alignment(&metadata)?;
        let mut entries = Vec::new();
        for _ in 0..tensor_count {
            entries.push(entry(&mut cursor, alignment)?);
        }
        let header = cursor.position() as u64;
        let data_start = usize::try_from(header.next_multiple_of(alignment))
            .unwrap_or(usize::MAX)
            .min(file.len());
        let bytes = file.len() as u64;
        disjoint(&entries)?;
        let data = file
            .slice(data_start..file.len())
            .unwrap_or_else(|| Region::from(Vec::new()));
        let tensors = entries
            .into_iter()
            .map(|entry| entry.tensor(&data))
            .collect::<Result<_>>()?;
        Ok(Self {
            version,
            metadata,
            tensors,
            bytes,
        })
    }

    /// A count of the split metadata.
    fn count(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let wrong = || ErrorKind::WrongType {
            key: key.to_owned(),
            expected: "a non-negative integer",
            found: value.type_name(),
        };
        value.as_u64().map(Some).ok_or_else(|| wrong().into())
    }
}

impl Entry {
    fn tensor(self, data: &Region) -> Result<Tensor> {
        let range = usize::try_from(self.start)
            .ok()
            .zip(usize::try_from(self.end).ok());
        match range.and_then(|(start, end)| data.slice(start..end)) {
            Some(bytes) => Tensor::new(self.name, self.dtype, self.shape, bytes),
            None => {
                let available = data.len() as u64;
                let kind = ErrorKind::OutOfBounds {
                    start: self.start,
                    end: self.end,
                    available,
                };
                Err(CoreError::new(kind).with_tensor(self.name))
            }
        }
    }
}

/// Reads magic and version.
fn version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let magic = cursor.magic()?;
    if magic != MAGIC {
        let reason = format!(
            "it starts with {:?} and not with \"GGUF\"",
            magic.escape_ascii().to_string()
        );
        return Err(ErrorKind::NotAModel { reason }.into());
    }
    let version = cursor.u32("the version")?;
    let unsupported = |version| {
        CoreError::new(ErrorKind::UnsupportedVersion {
            format: "GGUF",
            version,
        })
    };
    match version {
        2 | 3 => Ok(version),
        _ if version.swap_bytes() <= 3 => Err(unsupported(version.swap_bytes().into())
            .with_hint("the file is big-endian; convert it with gguf-py's gguf_convert_endian.py")),
        _ => Err(unsupported(version.into()).with_hint("convert the model again with a current llama.cpp")),
    }
}

fn metadata(cursor: &mut Cursor<'_>, count: usize) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = cursor.name("a metadata key")?;
        let value = cursor.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(ErrorKind::DuplicateName { name: key }.into());
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    let Some(value) = metadata.get(KEY_ALIGNMENT) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 30 => Ok(alignment),
        _ => Err(CoreError::invalid(
            "GGUF metadata",
            format!("`{KEY_ALIGNMENT}` is {value:?}, not a power of two"),
        )),
    }
}

fn entry(cursor: &mut Cursor<'_>, alignment: u64) -> Result<Entry> {
    let name = cursor.name("a tensor name")?;
    match entry_of(cursor, alignment, &name) {
        Ok((dtype, shape, start, end)) => Ok(Entry {
            name,
            dtype,
            shape,
            start,
            end,
        }),
        Err(error) => Err(error.with_tensor(name)),
    }
}

fn entry_of(cursor: &mut Cursor<'_>, alignment: u64, name: &str) -> Result<(DType, Vec<usize>, u64, u64)> {
    let dimensions = cursor.u32(name)?;
    if dimensions > MAX_DIMENSIONS {
        let (value, limit) = (dimensions.into(), MAX_DIMENSIONS.into());
        return Err(ErrorKind::TooLarge {
            what: "the number of dimensions",
            value,
            limit,
        }
        .into());
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let dimension = cursor.u64(name)?;
        shape.push(usize::try_from(dimension).map_err(|_| ErrorKind::TooLarge {
            what: "a dimension",
            value: dimension,
            limit: usize::MAX as u64,
        })?);
    }
    // The file has the innermost dimension first.
    shape.reverse();
    let id = cursor.u32(name)?;
    let dtype = DType::from_ggml_id(id).ok_or_else(|| ErrorKind::UnknownDType {
        dtype: format!("ggml #{id}"),
    })?;
    let offset = cursor.u64(name)?;
    if !offset.is_multiple_of(alignment) {
        return Err(ErrorKind::Misaligned { offset, alignment }.into());
    }
    if shape.contains(&0) {
        return Err(ErrorKind::ZeroDimension { shape }.into());
    }
    let bytes = byte_len(dtype, &shape)? as u64;
    let Some(end) = offset.checked_add(bytes) else {
        return Err(ErrorKind::SizeOverflow { dtype, shape }.into());
    };
    Ok((dtype, shape, offset, end))
}

/// No two tensors share a byte.
fn disjoint(entries: &[Entry]) -> Result<()> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by_key(|entry| entry.start);
    for pair in sorted.windows(2) {
        if pair[1].start < pair[0].end {
            let kind = ErrorKind::Overlap {
                other: pair[0].name.clone(),
            };
            return Err(CoreError::new(kind).with_tensor(&pair[1].name));
        }
    }
    Ok(())
}
