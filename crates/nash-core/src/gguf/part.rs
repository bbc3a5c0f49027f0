//! One GGUF file: header, metadata, tensor table, and the slices of the file that the tensors are.

use std::collections::BTreeMap;
use std::path::Path;

use super::read::Cursor;
use super::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT, MAGIC, Value};
use crate::error::{CoreError, ErrorKind, Result};
use crate::tensor::byte_len;
use crate::{DType, Region, Tensor};

/// Dimensions a tensor can have.
const MAX_DIMENSIONS: u32 = 8;
/// Tensors (and metadata entries) a model can have; the largest have some thousands.
const MAX_ENTRIES: usize = 1 << 20;
/// Bytes of the smallest entry of the metadata: name length, type, one byte of value.
const LEAST_METADATA: usize = 8 + 4 + 1;
/// Bytes of the smallest entry of the tensor table: name length, dimensions, type, offset.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;

/// One file of a model.
pub(super) struct Part {
    pub(super) version: u32,
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<Tensor>,
    pub(super) bytes: u64,
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
    pub(super) fn open(path: &Path) -> Result<Self> {
        Region::map(path)
            .and_then(Self::parse)
            .map_err(|e| e.with_path(path))
    }

    pub(super) fn parse(file: Region) -> Result<Self> {
        let mut cursor = Cursor::new(&file);
        let version = version(&mut cursor)?;
        let tensor_count = limited(cursor.count(LEAST_TENSOR, "the number of tensors")?)?;
        let metadata_count = limited(cursor.count(LEAST_METADATA, "the number of metadata entries")?)?;
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
    pub(super) fn count(&self, key: &str) -> Result<Option<u64>> {
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

fn limited(count: usize) -> Result<usize> {
    if count > MAX_ENTRIES {
        let (value, limit) = (count as u64, MAX_ENTRIES as u64);
        return Err(ErrorKind::TooLarge {
            what: "the number of tensors or metadata entries",
            value,
            limit,
        }
        .into());
    }
    Ok(count)
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
