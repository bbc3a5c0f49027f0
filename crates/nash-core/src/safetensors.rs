//! One safetensors file: an 8-byte length, a JSON header, tensor data.
//!
//! Follows the specification of `huggingface/safetensors`: names are unique, the tensors cover the data section
//! without holes or overlaps, each has exactly the bytes its shape needs. Element types that this crate does not know are
//! no reason to refuse the file, only the tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::error::{CoreError, ErrorKind, Result};
use crate::tensor::{TensorTable, byte_len};
use crate::{DType, Region, Tensor};

/// Bytes of the length in front of the header.
pub(crate) const LENGTH_BYTES: usize = 8;
/// The specification's limit for the header.
pub(crate) const MAX_HEADER_BYTES: usize = 100_000_000;

/// An open safetensors file.
#[derive(Debug)]
pub struct Safetensors {
    tensors: TensorTable,
    /// Names and types of tensors whose type is unknown.
    unknown: BTreeMap<String, String>,
    metadata: BTreeMap<String, String>,
}

impl Safetensors {
    /// Opens and maps a file.
    ///
    /// # Errors
    /// The file cannot be opened or is not valid; see [`ErrorKind`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Region::map(path)
            .and_then(Self::from_bytes)
            .map_err(|e| e.with_path(path))
    }

    /// Reads a file from its bytes.
    ///
    /// # Errors
    /// The bytes are not a valid safetensors file; see [`ErrorKind`].
    pub fn from_bytes(bytes: impl Into<Region>) -> Result<Self> {
        let bytes = bytes.into();
        let (header, data) = split(&bytes)?;
        let header: Header =
            serde_json::from_slice(header).map_err(|e| CoreError::invalid("safetensors header", e))?;
        header.check_coverage(data.len() as u64)?;
        let mut file = Self {
            tensors: TensorTable::default(),
            unknown: BTreeMap::new(),
            metadata: header.metadata.unwrap_or_default(),
        };
        for (name, info) in header.tensors {
            match DType::from_safetensors_name(&info.dtype) {
                Some(dtype) => {
                    file.tensors.insert(
                        info.tensor(&name, dtype, &data)
                            .map_err(|e| e.with_tensor(&name))?,
                    )?;
                }
                None => {
                    file.unknown.insert(name, info.dtype);
                }
            }
        }
        Ok(file)
    }

    /// The free-form metadata of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors of a known element type, in the order of the header.
    pub fn tensors(&self) -> &[Tensor] {
        self.tensors.as_slice()
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// There is no such tensor, or its element type is unknown.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.unknown.get(name) {
            Some(dtype) => {
                Err(CoreError::new(ErrorKind::UnknownDType { dtype: dtype.clone() }).with_tensor(name))
            }
            None => self.tensors.get(name).cloned(),
        }
    }

    pub(crate) fn into_parts(self) -> (Vec<Tensor>, BTreeMap<String, String>) {
        (self.tensors.into_vec(), self.unknown)
    }
}

/// Splits a file into header and data.
fn split(file: &Region) -> Result<(&[u8], Region)> {
    let truncated = |what: &str, offset: usize, needed: u64| ErrorKind::Truncated {
        what: what.to_owned(),
        offset: offset as u64,
        needed,
        available: file.len().saturating_sub(offset) as u64,
    };
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated("the length of the header", 0, LENGTH_BYTES as u64).into());
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        let limit = MAX_HEADER_BYTES as u64;
        let kind = ErrorKind::TooLarge {
            what: "the length of the header",
            value: length,
            limit,
        };
        return Err(CoreError::new(kind).with_hint("this is not a safetensors file, or it is damaged"));
    }
    // At most 100 MB, so the cast is exact.
    let header = rest
        .get(..length as usize)
        .ok_or_else(|| truncated("the header", LENGTH_BYTES, length))?;
    let start = LENGTH_BYTES + header.len();
    let data = file
        .slice(start..file.len())
        .unwrap_or_else(|| Region::from(Vec::new()));
    Ok((header, data))
}

/// The header, with the tensors in the order of the file and duplicates refused.
struct Header {
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<(String, Info)>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    /// First byte and one past the last, in the data section.
    data_offsets: (u64, u64),
}

impl Header {
    /// The tensors cover `available` bytes exactly, without overlaps.
    fn check_coverage(&self, available: u64) -> Result<()> {
        let mut sorted: Vec<_> = self.tensors.iter().collect();
        sorted.sort_by_key(|(_, info)| info.data_offsets);
        let mut covered = 0;
        let mut previous = "";
        for (name, info) in sorted {
            let (start, end) = info.data_offsets;
            let kind = if start > end || end > available {
                ErrorKind::OutOfBounds {
                    start,
                    end,
                    available,
                }
            } else if start < covered {
                ErrorKind::Overlap {
                    other: previous.to_owned(),
                }
            } else if start > covered {
                ErrorKind::UnusedBytes {
                    start: covered,
                    end: start,
                }
            } else {
                (covered, previous) = (end, name);
                continue;
            };
            return Err(CoreError::new(kind).with_tensor(name));
        }
        if covered < available {
            return Err(ErrorKind::UnusedBytes {
                start: covered,
                end: available,
            }
            .into());
        }
        Ok(())
    }
}

impl Info {
    fn tensor(self, name: &str, dtype: DType, data: &Region) -> Result<Tensor> {
        let (start, end) = self.data_offsets;
        let expected = byte_len(dtype, &self.shape)? as u64;
        if end - start != expected {
            let found = end - start;
            return Err(ErrorKind::SizeMismatch {
                dtype,
                shape: self.shape,
                expected,
                found,
            }
            .into());
        }
        let available = data.len() as u64;
        // Inside of the data section, as `check_coverage` has shown; so the casts are exact.
        match data.slice(start as usize..end as usize) {
            Some(bytes) => Tensor::new(name, dtype, self.shape, bytes),
            None => Err(ErrorKind::OutOfBounds {
                start,
                end,
                available,
            }
            .into()),
        }
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header {
                    metadata: None,
                    tensors: Vec::new(),
                };
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("the name `{name}` occurs twice")));
                    }
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}
