//! Packed model folders: what compression writes and inference reads.
//!
//! A folder holds
//!
//! * `config.json`: the model's configuration, with a `quantization_config` that lists every packed tensor:
//!   `{"quant_method": "nashswarm", "format_version": 2, "group_size": 64, "tensors": {NAME: {"bits": 3, "shape": [m, n]}}}`;
//! * `model.safetensors`: for a packed tensor `NAME.packed` U8 `[stream bytes]` (see [`PackedRef`]), `NAME.row_scales` F16 `[m]`
//!   and `NAME.codebook` I8 `[64]` (absent at 8 bits); float tensors under their own names;
//! * `nashswarm.json`: the report of the compression, with the SHA-256 of every tensor under `sha256` (one digest for the parts
//!   of a packed tensor);
//! * tokenizer files as in any model folder.
//!
//! `config.json` is written last: a folder without it is not finished and does not open.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use nash_kernels::{GROUP, PackedRef, PackedShape, Width};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{CoreError, ErrorKind, Result};
use crate::hf::{self, CONFIG_FILE, WEIGHTS_FILE};
use crate::safetensors::Safetensors;
use crate::tensor::TensorTable;
use crate::{DType, Region, Tensor, hash};

/// The report of the compression.
pub const REPORT_FILE: &str = "nashswarm.json";
/// Value of `quantization_config.quant_method`.
pub const QUANT_METHOD: &str = "nashswarm";
/// The version of the format that this crate reads and writes.
pub const FORMAT_VERSION: u64 = 2;
/// Key of the report under which the tensors' digests are.
pub const SHA256_KEY: &str = "sha256";
/// Key of `config.json` under which the packed tensors are listed.
pub const QUANTIZATION_KEY: &str = "quantization_config";

/// The `quantization_config` of `config.json`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct QuantizationConfig {
    pub(crate) quant_method: String,
    pub(crate) format_version: u64,
    pub(crate) group_size: usize,
    pub(crate) tensors: BTreeMap<String, PackedEntry>,
}

/// Width and shape of a packed tensor.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct PackedEntry {
    pub(crate) bits: u8,
    pub(crate) shape: [usize; 2],
}

/// The names of the safetensors entries of a packed tensor: stream, row scales, codebook.
pub(crate) fn part_names(name: &str) -> [String; 3] {
    ["packed", "row_scales", "codebook"].map(|part| format!("{name}.{part}"))
}

/// A packed matrix `[m, n]` of a model folder; cheap to clone. The stream stays in the mapped file.
#[derive(Clone, Debug)]
pub struct PackedTensor {
    name: String,
    shape: PackedShape,
    stream: Region,
    row_scales: Arc<[f16]>,
    codebook: Arc<[i8]>,
}

impl PackedTensor {
    /// A packed matrix from its parts: the record stream, the row scales `[m]` and the codebook `[64]` (empty at
    /// 8 bits); see [`PackedRef`].
    ///
    /// # Errors
    /// A part has another length than the shape needs, a dimension is zero, a row scale is not finite or the codebook
    /// holds −128.
    pub fn new(
        name: impl Into<String>,
        shape: PackedShape,
        stream: Region,
        row_scales: impl Into<Arc<[f16]>>,
        codebook: impl Into<Arc<[i8]>>,
    ) -> Result<Self> {
        let tensor = Self {
            name: name.into(),
            shape,
            stream,
            row_scales: row_scales.into(),
            codebook: codebook.into(),
        };
        tensor.check().map_err(|e| e.with_tensor(&tensor.name))?;
        Ok(tensor)
    }

    fn check(&self) -> Result<()> {
        if self.shape.rows == 0 || self.shape.cols == 0 {
            return Err(ErrorKind::ZeroDimension {
                shape: vec![self.shape.rows, self.shape.cols],
            }
            .into());
        }
        PackedRef::new(self.shape, &self.stream, &self.row_scales, &self.codebook)
            .map_err(ErrorKind::Layout)?;
        check_finite(&self.row_scales)
    }

    /// Its canonical name, without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rows `m`, columns `n` and width.
    pub fn shape(&self) -> PackedShape {
        self.shape
    }

    /// The bytes of the record stream.
    pub fn stream(&self) -> &Region {
        &self.stream
    }

    /// Bytes in the file: stream, row scales and codebook.
    pub fn bytes(&self) -> usize {
        self.as_ref().bytes()
    }

    /// The matrix as the kernels take it. Constant time.
    pub fn as_ref(&self) -> PackedRef<'_> {
        PackedRef::new(self.shape, &self.stream, &self.row_scales, &self.codebook)
            .expect("`new` has checked the lengths of the private fields")
    }
}

/// Row scales are finite: the rest of the program multiplies by them without looking.
pub(crate) fn check_finite(row_scales: &[f16]) -> Result<()> {
    match row_scales.iter().position(|scale| !scale.is_finite()) {
        Some(index) => Err(ErrorKind::NotFinite {
            what: "row scale",
            index,
            value: row_scales[index].to_f32(),
        }
        .into()),
        None => Ok(()),
    }
}

/// An open packed model folder; cheap to clone.
#[derive(Clone, Debug)]
pub struct PackedFolder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: Option<PathBuf>,
    config: Value,
    report: Value,
    floats: TensorTable,
    packed: BTreeMap<String, PackedTensor>,
    bytes: u64,
}

impl PackedFolder {
    /// Opens a folder: reads `config.json` and `nashswarm.json`, maps `model.safetensors` and checks that they agree.
    ///
    /// # Errors
    /// A file is missing or invalid, the format is another one, or a tensor is missing, has another shape or type than
    /// it should, or belongs to nothing. The checksums are not compared; see [`verify`](Self::verify).
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        Self::with_config(dir, hf::read_config(dir)?)
    }

    /// Opens a folder whose `config.json` was read before.
    pub(crate) fn with_config(dir: &Path, config: Value) -> Result<Self> {
        let report_path = dir.join(REPORT_FILE);
        if !report_path.is_file() {
            let kind = ErrorKind::MissingFile {
                file: REPORT_FILE.to_owned(),
            };
            return Err(CoreError::new(kind).with_path(dir));
        }
        let report = hf::read_json(&report_path)?;
        let path = dir.join(WEIGHTS_FILE);
        let weights = Region::map(&path)?;
        Self::join(Some(dir.to_owned()), config, report, weights).map_err(|e| e.with_path(path))
    }

    /// A model from the contents of `config.json`, `nashswarm.json` and `model.safetensors`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(config: &[u8], report: &[u8], weights: impl Into<Region>) -> Result<Self> {
        let json = |bytes, file| {
            serde_json::from_slice(bytes).map_err(|e| CoreError::invalid("JSON", e).with_path(file))
        };
        Self::join(
            None,
            json(config, CONFIG_FILE)?,
            json(report, REPORT_FILE)?,
            weights.into(),
        )
    }

    fn join(dir: Option<PathBuf>, config: Value, report: Value, weights: Region) -> Result<Self> {
        let quantization =
            quantization_config(&config).map_err(|e| e.with_path(config_path(dir.as_deref())))?;
        let bytes = weights.len() as u64;
        let (stored, unknown) = Safetensors::from_bytes(weights)?.into_parts();
        if let Some((name, dtype)) = unknown.into_iter().next() {
            return Err(CoreError::new(ErrorKind::UnknownDType { dtype }).with_tensor(name));
        }
        let mut parts: BTreeMap<&str, &Tensor> = stored.iter().map(|t| (t.name.as_str(), t)).collect();
        let mut packed = BTreeMap::new();
        for (name, entry) in &quantization.tensors {
            packed.insert(name.clone(), take_packed(name, *entry, &mut parts)?);
        }
        let mut floats = TensorTable::default();
        for tensor in stored
            .iter()
            .filter(|tensor| parts.contains_key(tensor.name.as_str()))
        {
            if !matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16) {
                let kind = ErrorKind::NotFloat { dtype: tensor.dtype };
                return Err(CoreError::new(kind).with_tensor(&tensor.name));
            }
            floats.insert(tensor.clone())?;
        }
        Ok(Self(Arc::new(Inner {
            dir,
            config,
            report,

            floats,
            packed,
            bytes,
        })))
    }

    /// Whether this `config.json` is that of a packed model.
    pub(crate) fn is_packed(config: &Value) -> bool {
        config[QUANTIZATION_KEY]["quant_method"] == QUANT_METHOD
    }

    /// The folder, if it was opened by path.
    pub fn dir(&self) -> Option<&Path> {
        self.0.dir.as_deref()
    }

    /// The contents of `config.json`: an object.
    pub fn config(&self) -> &Value {
        &self.0.config
    }

    /// The contents of `nashswarm.json`.
    pub fn report(&self) -> &Value {
        &self.0.report
    }

    /// Size of `model.safetensors` in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.0.bytes
    }

    /// The float tensors (norms, biases, whatever was not packed), in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        self.0.floats.as_slice()
    }

    /// The names of the float tensors.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.floats.names()
    }

    /// A float tensor by name.
    ///
    /// # Errors
    /// There is no such float tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.0.floats.get(name).cloned().map_err(|e| self.place(e))
    }

    /// A float tensor by name, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.floats.find(name)
    }

    /// The packed tensors by name (without `.weight`), sorted.
    pub fn packed_tensors(&self) -> &BTreeMap<String, PackedTensor> {
        &self.0.packed
    }

    /// A packed tensor by name (without `.weight`).
    ///
    /// # Errors
    /// There is no such packed tensor.
    pub fn packed(&self, name: &str) -> Result<PackedTensor> {
        self.0.packed.get(name).cloned().ok_or_else(|| {
            let kind = ErrorKind::MissingTensor {
                available: self.0.packed.len(),
            };
            self.place(CoreError::new(kind).with_tensor(name))
        })
    }

    /// The path of another file of the folder, such as `tokenizer.json`, if it exists.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        hf::file_in(self.dir()?, name)
    }

    /// Compares the SHA-256 of every tensor with the report. `progress` is told the bytes done after every tensor.
    ///
    /// # Errors
    /// A digest differs, or the report has none for a tensor, or one for a tensor that is not there.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<()> {
        let digests = self.0.report[SHA256_KEY].as_object().ok_or_else(|| {
            self.place(
                ErrorKind::MissingKey {
                    key: SHA256_KEY.to_owned(),
                }
                .into(),
            )
        })?;
        let mut done = 0;
        let packed = self
            .0
            .packed
            .iter()
            .map(|(name, t)| (name.as_str(), packed_digest(t.as_ref()), t.bytes()));
        let floats = self
            .tensors()
            .iter()
            .map(|t| (t.name.as_str(), hash::sha256(&t.data), t.data.len()));
        let mut checked = 0;
        for (name, found, bytes) in packed.chain(floats) {
            check_digest(name, found, digests.get(name).and_then(Value::as_str))
                .map_err(|e| self.place(e.with_tensor(name)))?;
            done += bytes as u64;
            checked += 1;
            progress(done);
        }
        if checked == digests.len() {
            return Ok(());
        }
        let known = |name: &String| self.0.packed.contains_key(name) || self.find(name).is_some();
        let name = digests
            .keys()
            .find(|name| !known(name))
            .cloned()
            .unwrap_or_default();
        let kind = ErrorKind::MissingTensor { available: checked };
        Err(self.place(CoreError::new(kind).with_tensor(name)))
    }

    fn place(&self, error: CoreError) -> CoreError {
        match self.dir() {
            Some(dir) => error.with_path(dir.join(WEIGHTS_FILE)),
            None => error,
        }
    }
}

/// SHA-256 over stream, row scales and codebook, as they lie in the file.
pub(crate) fn packed_digest(packed: PackedRef<'_>) -> String {
    let mut hasher = hash::Hasher::new();
    hasher.update(packed.stream());
    packed
        .row_scales()
        .iter()
        .for_each(|scale| hasher.update(&scale.to_le_bytes()));
    hasher.update(bytemuck::cast_slice(packed.codebook()));
    hasher.finish()
}

fn check_digest(name: &str, found: String, expected: Option<&str>) -> Result<()> {
    let missing = || ErrorKind::MissingKey {
        key: format!("{SHA256_KEY}.{name}"),
    };
    let expected = expected.ok_or_else(missing)?;
    if found != expected {
        return Err(ErrorKind::Checksum {
            expected: expected.to_owned(),
            found,
        }
        .into());
    }
    Ok(())
}

fn config_path(dir: Option<&Path>) -> PathBuf {
    dir.unwrap_or(Path::new("")).join(CONFIG_FILE)
}

/// Reads and checks `quantization_config`.
fn quantization_config(config: &Value) -> Result<QuantizationConfig> {
    let Some(value) = config.get(QUANTIZATION_KEY) else {
        return Err(ErrorKind::MissingKey {
            key: QUANTIZATION_KEY.to_owned(),
        }
        .into());
    };
    let invalid = |reason: String| CoreError::invalid(QUANTIZATION_KEY, reason);
    let method = &value["quant_method"];
    if method != QUANT_METHOD {
        return Err(invalid(format!("quant_method is {method}, not {QUANT_METHOD:?}")));
    }
    let version = value["format_version"]
        .as_u64()
        .ok_or_else(|| invalid("no format_version".to_owned()))?;
    if version != FORMAT_VERSION {
        let kind = ErrorKind::UnsupportedVersion {
            format: "nashswarm",
            version,
        };
        let hint = if version < FORMAT_VERSION {
            "an older version of this program wrote it; compress the model again"
        } else {
            "a newer version of this program reads it"
        };
        return Err(CoreError::new(kind).with_hint(hint));
    }
    let parsed = QuantizationConfig::deserialize(value).map_err(|e| invalid(e.to_string()))?;
    if parsed.group_size != GROUP {
        return Err(invalid(format!(
            "group_size is {}, not {GROUP}",
            parsed.group_size
        )));
    }
    Ok(parsed)
}

/// Takes the parts of a packed tensor out of `parts`.
fn take_packed(name: &str, entry: PackedEntry, parts: &mut BTreeMap<&str, &Tensor>) -> Result<PackedTensor> {
    let PackedEntry {
        bits,
        shape: [rows, cols],
    } = entry;
    let width = Width::new(bits).ok_or_else(|| {
        let reason = format!("{bits} bits; supported are {:?}", Width::ALL.map(Width::bits));
        CoreError::invalid(QUANTIZATION_KEY, reason).with_tensor(name)
    })?;
    let [stream_name, scales_name, codebook_name] = part_names(name);
    let shape = PackedShape { rows, cols, width };
    let stream = take(parts, &stream_name, DType::U8)?.data.clone();
    let scales = take(parts, &scales_name, DType::F16)?;
    let scales: Arc<[f16]> = scales
        .data
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| f16::from_le_bytes(bytes))
        .collect();
    let codebook: Arc<[i8]> = match width.codebook_len() {
        0 => Arc::default(),
        _ => take(parts, &codebook_name, DType::I8)?
            .data
            .iter()
            .map(|&byte| byte as i8)
            .collect(),
    };
    PackedTensor::new(name, shape, stream, scales, codebook)
}

/// Takes a vector of this type out of `parts`.
fn take<'a>(parts: &mut BTreeMap<&str, &'a Tensor>, name: &str, expected: DType) -> Result<&'a Tensor> {
    let available = parts.len();
    let tensor = parts
        .remove(name)
        .ok_or_else(|| CoreError::new(ErrorKind::MissingTensor { available }).with_tensor(name))?;
    if tensor.dtype != expected {
        let kind = ErrorKind::DTypeMismatch {
            expected,
            found: tensor.dtype,
        };
        return Err(CoreError::new(kind).with_tensor(name));
    }
    if tensor.shape.len() != 1 {
        let kind = ErrorKind::ShapeMismatch {
            expected: vec![tensor.elements()],
            found: tensor.shape.clone(),
        };
        return Err(CoreError::new(kind).with_tensor(name));
    }
    Ok(tensor)
}
