//! Writing packed model folders, tensor by tensor, in bounded memory.
//!
//! The [`PackedLayout`] says which tensors there will be; so the size of the file is known to the byte before anything
//! is compressed, and the tensors can be written in any order, each at its place. Nothing looks finished before it is:
//! the weights have a temporary name until [`PackedWriter::finish`], and `config.json`, without which the folder does not
//! open, comes last.
//!
//! Inside of the file tensors are ordered by the size of their elements, largest first, so that each is aligned to its
//! elements without holes (which safetensors forbids); the data section starts at a multiple of 64 bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use nash_kernels::{GROUP, PackedRef, PackedShape};
use serde_json::{Map, Value, json};

use crate::atomic::{self, AtomicFile};
use crate::error::{CoreError, ErrorKind, Result};
use crate::hash::sha256;
use crate::hf::{CONFIG_FILE, HfFolder, WEIGHTS_FILE};
use crate::packed::{
    FORMAT_VERSION, PackedEntry, QUANT_METHOD, QUANTIZATION_KEY, QuantizationConfig, REPORT_FILE, SHA256_KEY,
    check_finite, packed_digest, part_names,
};
use crate::safetensors::{LENGTH_BYTES, MAX_HEADER_BYTES};
use crate::tensor::byte_len;
use crate::{DType, PackedFolder};

/// Alignment of the data section in the file, in bytes.
const DATA_ALIGNMENT: usize = 64;

/// A tensor to be written.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TensorSpec {
    /// A packed matrix.
    Packed {
        /// Canonical name, without `.weight`.
        name: String,
        /// Rows, columns and width.
        shape: PackedShape,
    },
    /// A float tensor.
    Float {
        /// Canonical name.
        name: String,
        /// `F32` or `F16`.
        dtype: DType,
        /// Outermost dimension first.
        shape: Vec<usize>,
    },
}

/// Where every tensor goes; made before the first one is written.
#[derive(Clone, Debug)]
pub struct PackedLayout {
    /// Header with its length in front, padded.
    header: Vec<u8>,
    entries: BTreeMap<String, Entry>,
    packed: BTreeMap<String, PackedEntry>,
    data_bytes: u64,
}

/// A tensor as stored.
#[derive(Clone, Debug)]
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    /// Position in the data section.
    start: u64,
    bytes: u64,
}

impl PackedLayout {
    /// Lays the tensors out.
    ///
    /// # Errors
    /// A name occurs twice, a size overflows, a packed dimension is zero, or a float tensor is neither `F32` nor `F16`.
    pub fn new(specs: impl IntoIterator<Item = TensorSpec>) -> Result<Self> {
        let mut stored = Vec::new();
        let mut packed = BTreeMap::new();
        for spec in specs {
            match spec {
                TensorSpec::Packed { name, shape } => {
                    stored.extend(parts(&name, shape).map_err(|e| e.with_tensor(&name))?);
                    let entry = PackedEntry {
                        bits: shape.width.bits() as u8,
                        shape: [shape.rows, shape.cols],
                    };
                    packed.insert(name, entry);
                }
                TensorSpec::Float {
                    name,
                    dtype: dtype @ (DType::F32 | DType::F16),
                    shape,
                } => {
                    stored.push((name, dtype, shape));
                }
                TensorSpec::Float { name, dtype, .. } => {
                    let kind = ErrorKind::DTypeMismatch {
                        expected: DType::F16,
                        found: dtype,
                    };
                    return Err(CoreError::new(kind).with_tensor(name));
                }
            }
        }
        // Stable: tensors of one element size stay in the order given.
        stored.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(dtype.block_bytes()));
        let mut layout = Self {
            header: Vec::new(),
            entries: BTreeMap::new(),
            packed,
            data_bytes: 0,
        };
        let mut header = Map::new();
        for (name, dtype, shape) in stored {
            layout.add(name, dtype, shape, &mut header)?;
        }
        layout.header = encode_header(&header)?;
        Ok(layout)
    }

    fn add(
        &mut self,
        name: String,
        dtype: DType,
        shape: Vec<usize>,
        header: &mut Map<String, Value>,
    ) -> Result<()> {
        let bytes = byte_len(dtype, &shape).map_err(|e| e.with_tensor(&name))? as u64;
        let start = self.data_bytes;
        let Some(end) = start.checked_add(bytes) else {
            return Err(CoreError::new(ErrorKind::SizeOverflow { dtype, shape }).with_tensor(name));
        };
        let info = json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [start, end] });
        if header.insert(name.clone(), info).is_some() {
            return Err(ErrorKind::DuplicateName { name }.into());
        }
        self.data_bytes = end;
        self.entries.insert(
            name,
            Entry {
                dtype,
                shape,
                start,
                bytes,
            },
        );
        Ok(())
    }

    /// Size of `model.safetensors` in bytes, header included.
    pub fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes
    }

    fn quantization_config(&self) -> QuantizationConfig {
        QuantizationConfig {
            quant_method: QUANT_METHOD.to_owned(),
            format_version: FORMAT_VERSION,
            group_size: GROUP,
            tensors: self.packed.clone(),
        }
    }
}

/// The stored tensors of a packed one.
fn parts(name: &str, shape: PackedShape) -> Result<Vec<(String, DType, Vec<usize>)>> {
    let (rows, cols, width) = (shape.rows, shape.cols, shape.width);
    if rows == 0 || cols == 0 {
        return Err(ErrorKind::ZeroDimension {
            shape: vec![rows, cols],
        }
        .into());
    }
    let stream = shape.stream_bytes().ok_or_else(|| ErrorKind::SizeOverflow {
        dtype: DType::U8,
        shape: vec![rows, cols],
    })?;
    let [stream_name, scales_name, codebook_name] = part_names(name);
    let mut parts = vec![
        (stream_name, DType::U8, vec![stream]),
        (scales_name, DType::F16, vec![rows]),
    ];
    if width.codebook_len() > 0 {
        parts.push((codebook_name, DType::I8, vec![width.codebook_len()]));
    }
    Ok(parts)
}

/// Length and JSON, padded with spaces so that the data section is aligned.
fn encode_header(header: &Map<String, Value>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; LENGTH_BYTES];
    // Writing a map of strings and numbers to a vector cannot fail.
    serde_json::to_writer(&mut bytes, header).map_err(|e| CoreError::invalid("safetensors header", e))?;
    bytes.resize(bytes.len().next_multiple_of(DATA_ALIGNMENT), b' ');
    let length = bytes.len() - LENGTH_BYTES;
    if length > MAX_HEADER_BYTES {
        let (value, limit) = (length as u64, MAX_HEADER_BYTES as u64);
        return Err(ErrorKind::TooLarge {
            what: "the length of the header",
            value,
            limit,
        }
        .into());
    }
    bytes[..LENGTH_BYTES].copy_from_slice(&(length as u64).to_le_bytes());
    Ok(bytes)
}

/// A packed model folder in the making. Dropped before [`finish`](Self::finish), it leaves nothing.
#[derive(Debug)]
pub struct PackedWriter {
    dir: PathBuf,
    layout: PackedLayout,
    file: AtomicFile,
    written: BTreeSet<String>,
    digests: BTreeMap<String, String>,
}

impl PackedWriter {
    /// Creates the folder if need be and starts a file of weights in it under a temporary name. What the folder holds
    /// stays as it is until [`finish`](Self::finish).
    ///
    /// # Errors
    /// The folder cannot be created or written to.
    pub fn create(dir: impl AsRef<Path>, layout: PackedLayout) -> Result<Self> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(|e| CoreError::io("create", dir, e))?;
        let mut file = AtomicFile::create(dir.join(WEIGHTS_FILE))?;
        let failed = |e| CoreError::io("write", dir, e);
        file.file().set_len(layout.file_bytes()).map_err(failed)?;
        file.write_all(&layout.header).map_err(failed)?;
        Ok(Self {
            dir: dir.to_owned(),
            layout,
            file,
            written: BTreeSet::new(),
            digests: BTreeMap::new(),
        })
    }

    /// The folder, in which the caller may put further files (tokenizer) before [`finish`](Self::finish).
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a packed matrix.
    ///
    /// # Errors
    /// The layout has no such packed tensor or another shape, it was written before, a row scale is not finite, or the
    /// system refuses.
    pub fn packed(&mut self, name: &str, matrix: PackedRef<'_>) -> Result<()> {
        self.write_packed(name, matrix)
            .map_err(|e| e.with_tensor(name).with_path(self.file.path()))
    }

    fn write_packed(&mut self, name: &str, matrix: PackedRef<'_>) -> Result<()> {
        let available = self.layout.packed.len();
        let planned = self
            .layout
            .packed
            .get(name)
            .ok_or(ErrorKind::MissingTensor { available })?;
        let shape = matrix.shape();
        if planned.shape != [shape.rows, shape.cols] || usize::from(planned.bits) != shape.width.bits() {
            let expected = vec![planned.shape[0], planned.shape[1], planned.bits.into()];
            let found = vec![shape.rows, shape.cols, shape.width.bits()];
            return Err(CoreError::new(ErrorKind::ShapeMismatch { expected, found })
                .with_hint("the shapes are [rows, columns, bits]"));
        }
        check_finite(matrix.row_scales())?;
        let [stream, scales, codebook] = part_names(name);
        self.store(&stream, matrix.stream())?;
        let bytes: Vec<u8> = matrix
            .row_scales()
            .iter()
            .flat_map(|scale| scale.to_le_bytes())
            .collect();
        self.store(&scales, &bytes)?;
        if !matrix.codebook().is_empty() {
            self.store(&codebook, bytemuck::cast_slice(matrix.codebook()))?;
        }
        self.digests.insert(name.to_owned(), packed_digest(matrix));
        Ok(())
    }

    /// Writes a float tensor, rounded to the type of the layout.
    ///
    /// # Errors
    /// The layout has no such float tensor or another number of elements, it was written before, a value is not finite
    /// (after rounding), or the system refuses.
    pub fn float(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.write_float(name, values)
            .map_err(|e| e.with_tensor(name).with_path(self.file.path()))
    }

    fn write_float(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let available = self.layout.entries.len();
        let entry = self
            .layout
            .entries
            .get(name)
            .ok_or(ErrorKind::MissingTensor { available })?;
        let half = match entry.dtype {
            DType::F32 => false,
            DType::F16 => true,
            dtype => return Err(ErrorKind::NotFloat { dtype }.into()),
        };
        let finite = |value: f32| {
            if half {
                f16::from_f32(value).is_finite()
            } else {
                value.is_finite()
            }
        };
        if let Some(index) = values.iter().position(|&value| !finite(value)) {
            let value = values[index];
            return Err(CoreError::new(ErrorKind::NotFinite {
                what: "element",
                index,
                value,
            })
            .with_hint("the source model holds NaN or infinity, or a value too large for F16"));
        }
        let bytes: Vec<u8> = if half {
            values
                .iter()
                .flat_map(|&value| f16::from_f32(value).to_le_bytes())
                .collect()
        } else {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        self.store(name, &bytes)?;
        self.digests.insert(name.to_owned(), sha256(&bytes));
        Ok(())
    }

    /// Writes a stored tensor at its place and remembers that it did.
    fn store(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let available = self.layout.entries.len();
        let entry = self
            .layout
            .entries
            .get(name)
            .ok_or(ErrorKind::MissingTensor { available })?;
        if entry.bytes != bytes.len() as u64 {
            let (dtype, shape) = (entry.dtype, entry.shape.clone());
            return Err(ErrorKind::SizeMismatch {
                dtype,
                shape,
                expected: entry.bytes,
                found: bytes.len() as u64,
            }
            .into());
        }
        if self.written.contains(name) {
            return Err(ErrorKind::DuplicateName {
                name: name.to_owned(),
            }
            .into());
        }
        let at = self.layout.header.len() as u64 + entry.start;
        let write = |file: &mut fs::File| -> io::Result<()> {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)
        };
        write(self.file.file()).map_err(|e| CoreError::io("write", self.file.path(), e))?;
        self.written.insert(name.to_owned());
        Ok(())
    }

    /// Makes the folder a model: weights, then `nashswarm.json`, then `config.json`; all flushed to disk. Then opens it.
    ///
    /// `quantization_config` is added to `config`, the digests of all tensors to `report` (as `sha256`). An older model in
    /// the folder is replaced; a process killed here leaves the old model, the new one, or a folder that does not open.
    ///
    /// # Errors
    /// A tensor of the layout was not written, or the system refuses.
    pub fn finish(
        self,
        mut config: Map<String, Value>,
        mut report: Map<String, Value>,
    ) -> Result<PackedFolder> {
        config.insert(
            QUANTIZATION_KEY.to_owned(),
            json!(self.layout.quantization_config()),
        );
        report.insert(SHA256_KEY.to_owned(), json!(self.digests));
        let dir = self.commit(config, Some(report))?;
        PackedFolder::open(dir)
    }

    /// Makes the folder a model of floats alone, as Hugging Face publishes them, and opens it. It has no packed tensors, no digests and no report.
    ///
    /// # Errors
    /// A tensor of the layout was not written, one is packed, or the system refuses.
    pub fn finish_floats(self, config: Map<String, Value>) -> Result<HfFolder> {
        if let Some(name) = self.layout.packed.keys().next() {
            return Err(ErrorKind::NotFloat { dtype: DType::U8 }.into())
                .map_err(|e: CoreError| e.with_tensor(name));
        }
        let dir = self.commit(config, None)?;
        HfFolder::open(dir)
    }

    fn commit(self, config: Map<String, Value>, report: Option<Map<String, Value>>) -> Result<PathBuf> {
        let Self {
            dir,
            layout,
            file,
            written,
            ..
        } = self;
        if let Some(name) = layout.entries.keys().find(|name| !written.contains(*name)) {
            let kind = ErrorKind::MissingTensor {
                available: written.len(),
            };
            return Err(CoreError::new(kind).with_tensor(name).with_path(file.path()));
        }
        let config_path = dir.join(CONFIG_FILE);
        match fs::remove_file(&config_path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(CoreError::io("remove", &config_path, e));
            }
            _ => atomic::sync_folder(&dir)?,
        }
        file.commit()?;
        if let Some(report) = report {
            atomic::write(dir.join(REPORT_FILE), compact(report))?;
        }
        atomic::write(config_path, compact(config))?;
        Ok(dir)
    }
}

/// Compact JSON with a newline at the end: these files count towards the size of the model.
fn compact(object: Map<String, Value>) -> String {
    format!("{}\n", Value::Object(object))
}
