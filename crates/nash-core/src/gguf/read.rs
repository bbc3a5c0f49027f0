//! The bytes of a GGUF header, read with every length checked before it is believed.
//!
//! Counts and lengths come from the file and may lie. Two rules keep a lying file harmless: nothing is read beyond the
//! bytes that are there, and memory is reserved only as elements are really found (at most [`RESERVE`] ahead), so that
//! memory use stays proportional to the bytes of the header, which is at most [`MAX_HEADER_BYTES`].

use crate::error::{CoreError, ErrorKind, Result};
use crate::gguf::value::{Array, Value};

/// Metadata and tensor table together; the largest vocabularies take some 20 MB.
const MAX_HEADER_BYTES: usize = 128 << 20;
/// Elements reserved before they are found.
const RESERVE: usize = 4096;
/// Arrays in arrays in arrays …
const MAX_NESTING: usize = 8;
/// Longest name of a key or tensor; the specification allows keys of 65535 bytes.
const MAX_NAME_BYTES: u64 = 65535;

/// A position in the header.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Starts at the first byte of a file.
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self {
            bytes: &file[..file.len().min(MAX_HEADER_BYTES)],
            at: 0,
        }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn truncated(&self, what: &str, needed: u64) -> CoreError {
        if self.bytes.len() == MAX_HEADER_BYTES {
            let limit = MAX_HEADER_BYTES as u64;
            let value = (self.at as u64).saturating_add(needed);
            return ErrorKind::TooLarge {
                what: "the size of the header",
                value,
                limit,
            }
            .into();
        }
        let (offset, available) = (self.at as u64, self.left() as u64);
        ErrorKind::Truncated {
            what: what.to_owned(),
            offset,
            needed,
            available,
        }
        .into()
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        match usize::try_from(count) {
            Ok(length) if length <= self.left() => {
                let bytes = &self.bytes[self.at..self.at + length];
                self.at += length;
                Ok(bytes)
            }
            _ => Err(self.truncated(what, count)),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn magic(&mut self) -> Result<[u8; 4]> {
        self.array("the magic number")
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least` bytes each.
    pub(super) fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let needed = count.saturating_mul(least as u64);
        match usize::try_from(needed) {
            Ok(needed) if needed <= self.left() => Ok(count as usize),
            _ => Err(self.truncated(&format!("{what} ({count})"), needed)),
        }
    }

    /// A string: length, then UTF-8.
    fn string(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(ErrorKind::NotUtf8 {
                what: format!("{what} ({:?})", preview(bytes)),
            }
            .into()),
        }
    }

    /// The name of a key or a tensor.
    pub(super) fn name(&mut self, what: &'static str) -> Result<String> {
        let name = self.string(what)?;
        if name.len() as u64 > MAX_NAME_BYTES {
            let (value, limit) = (name.len() as u64, MAX_NAME_BYTES);
            return Err(ErrorKind::TooLarge {
                what: "the length of a name",
                value,
                limit,
            }
            .into());
        }
        Ok(name)
    }

    /// A value of metadata, with its type in front.
    pub(super) fn value(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(key)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.array_value(key, 1)?),
            10 => Value::U64(u64::from_le_bytes(self.array(key)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(unknown_type(key, kind)),
        })
    }

    fn array_value(&mut self, key: &str, depth: usize) -> Result<Array> {
        if depth > MAX_NESTING {
            let (value, limit) = (depth as u64, MAX_NESTING as u64);
            return Err(ErrorKind::TooLarge {
                what: "the nesting of metadata arrays",
                value,
                limit,
            }
            .into());
        }
        let kind = self.u32(key)?;
        Ok(match kind {
            0 => Array::U8(self.numbers(key, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(key, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(key, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(key, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(key, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, f32::from_le_bytes)?),
            7 => Array::Bool(self.numbers(key, |[byte]| byte != 0)?),
            8 => Array::String(self.elements(key, 8, |cursor| cursor.string(key))?),
            9 => Array::Array(self.elements(key, 12, |cursor| cursor.array_value(key, depth + 1))?),
            10 => Array::U64(self.numbers(key, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, f64::from_le_bytes)?),
            _ => return Err(unknown_type(key, kind)),
        })
    }

    fn numbers<T, const N: usize>(&mut self, key: &str, number: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let count = self.count(N, key)?;
        let bytes = self.take((count * N) as u64, key)?;
        Ok(bytes
            .as_chunks::<N>()
            .0
            .iter()
            .map(|&bytes| number(bytes))
            .collect())
    }

    fn elements<T>(
        &mut self,
        key: &str,
        least: usize,
        mut element: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.count(least, key)?;
        let mut elements = Vec::with_capacity(count.min(RESERVE));
        for _ in 0..count {
            elements.push(element(self)?);
        }
        Ok(elements)
    }
}

fn unknown_type(key: &str, kind: u32) -> CoreError {
    CoreError::invalid(
        "GGUF metadata",
        format!("the value of `{key}` has the unknown type {kind}"),
    )
}

/// The readable beginning of bytes that are not UTF-8.
fn preview(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned()
}
