//! Model folders as Hugging Face publishes them: `config.json`, one or several safetensors files, tokenizer files.
//!
//! A sharded model has `model.safetensors.index.json`, whose `weight_map` says which file holds which tensor. The index
//! is believed only as far as it stays inside of the folder and agrees with the files.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Tensor;
use crate::error::{CoreError, ErrorKind, Result};
use crate::safetensors::Safetensors;
use crate::tensor::TensorTable;

/// The configuration of a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// The weights, where they are in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The index, where they are in several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Largest JSON file read (the index of the largest models takes some 10 MB).
const MAX_JSON_BYTES: u64 = 256 << 20;

/// An open model folder; cheap to clone.
#[derive(Clone, Debug)]
pub struct HfFolder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    config: Value,
    tensors: TensorTable,
    unknown: BTreeMap<String, String>,
    bytes: u64,
}

impl HfFolder {
    /// Opens a folder: reads `config.json`, maps every safetensors file of the model.
    ///
    /// # Errors
    /// A file is missing or invalid, the index names a file outside of the folder or a tensor that is not where it says,
    /// or two files hold a tensor of the same name.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        Self::with_config(dir, read_config(dir)?)
    }

    /// Opens a folder whose `config.json` was read before.
    pub(crate) fn with_config(dir: &Path, config: Value) -> Result<Self> {
        let (files, index) = weight_files(dir)?;
        let mut inner = Inner {
            dir: dir.to_owned(),
            config,
            tensors: TensorTable::default(),
            unknown: BTreeMap::new(),
            bytes: 0,
        };
        for file in &files {
            inner.add(file, index.as_ref())?;
        }
        if let Some(index) = index {
            inner.check_index(&index)?;
        }
        Ok(Self(Arc::new(inner)))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The contents of `config.json`: an object.
    pub fn config(&self) -> &Value {
        &self.0.config
    }

    /// Size of the safetensors files together, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.0.bytes
    }

    /// All tensors of a known element type, file by file.
    pub fn tensors(&self) -> &[Tensor] {
        self.0.tensors.as_slice()
    }

    /// The names of these tensors.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.tensors.names()
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// There is no such tensor, or its element type is unknown.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.0.unknown.get(name) {
            Some(dtype) => {
                Err(CoreError::new(ErrorKind::UnknownDType { dtype: dtype.clone() }).with_tensor(name))
            }
            None => self.0.tensors.get(name).cloned(),
        }
        .map_err(|e| e.with_path(&self.0.dir))
    }

    /// A tensor by name, if it is there and its element type is known.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.tensors.find(name)
    }

    /// The path of another file of the folder, such as `tokenizer.json`, if it exists.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        file_in(&self.0.dir, name)
    }
}

impl Inner {
    /// Adds the tensors of one file.
    fn add(&mut self, path: &Path, index: Option<&Index>) -> Result<()> {
        let file = Safetensors::open(path)?;
        self.bytes += std::fs::metadata(path)
            .map_err(|e| CoreError::io("read the size of", path, e))?
            .len();
        let (tensors, unknown) = file.into_parts();
        let file_name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        for tensor in tensors {
            // A tensor that the index places in another file is a leftover here.
            let elsewhere = index
                .and_then(|i| i.weight_map.get(&tensor.name))
                .is_some_and(|f| f != file_name);
            if !elsewhere {
                self.tensors.insert(tensor).map_err(|e| e.with_path(path))?;
            }
        }
        self.unknown.extend(unknown);
        Ok(())
    }

    /// Every tensor of the index is where it says.
    fn check_index(&self, index: &Index) -> Result<()> {
        for (name, file) in &index.weight_map {
            if self.tensors.find(name).is_none() && !self.unknown.contains_key(name) {
                let kind = ErrorKind::MissingTensor {
                    available: self.tensors.as_slice().len(),
                };
                return Err(CoreError::new(kind)
                    .with_tensor(name)
                    .with_path(self.dir.join(file))
                    .with_hint(format!("{INDEX_FILE} says it is in this file; fetch both again")));
            }
        }
        Ok(())
    }
}

/// The part of the index that matters.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads `config.json`, which has to be an object.
pub(crate) fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG_FILE);
    if !path.is_file() {
        let kind = ErrorKind::MissingFile {
            file: CONFIG_FILE.to_owned(),
        };
        return Err(CoreError::new(kind).with_path(dir));
    }
    let config: Value = read_json(&path)?;
    if !config.is_object() {
        return Err(CoreError::invalid("JSON", "config.json is not an object").with_path(path));
    }
    Ok(config)
}

/// The safetensors files of the folder, and the index if there is one.
fn weight_files(dir: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let index_path = dir.join(INDEX_FILE);
    if index_path.is_file() {
        let index: Index = read_json(&index_path)?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let file = |name: &&String| checked_file(dir, name).map_err(|e| e.with_path(&index_path));
        let files = names.iter().map(file).collect::<Result<Vec<_>>>()?;
        return Ok((files, Some(index)));
    }
    let single = dir.join(WEIGHTS_FILE);
    if single.is_file() {
        return Ok((vec![single], None));
    }
    match list(dir, "safetensors")?.as_slice() {
        [only] => Ok((vec![only.clone()], None)),
        [] => Err(no_weights(dir)),
        _ => Err(CoreError::new(ErrorKind::MissingFile {
            file: INDEX_FILE.to_owned(),
        })
        .with_path(dir)
        .with_hint("there are several safetensors files; the index says which of them belong together")),
    }
}

fn no_weights(dir: &Path) -> CoreError {
    let error = CoreError::new(ErrorKind::MissingFile {
        file: WEIGHTS_FILE.to_owned(),
    })
    .with_path(dir);
    let pickled =
        dir.join("pytorch_model.bin").is_file() || dir.join("pytorch_model.bin.index.json").is_file();
    if pickled {
        return error.with_hint(
            "pickled weights (pytorch_model.bin) can run code and are not read; \
             save the model with `save_pretrained(DIR, safe_serialization=True)`",
        );
    }
    error
}

/// The path of a file that an index names: inside of the folder and there.
fn checked_file(dir: &Path, name: &str) -> Result<PathBuf> {
    if !is_plain(name) {
        return Err(ErrorKind::UnsafePath {
            file: name.to_owned(),
        }
        .into());
    }
    let path = dir.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(ErrorKind::MissingFile {
            file: name.to_owned(),
        }
        .into())
    }
}

/// Whether a name is one component, neither `..` nor a path.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first_is_normal = matches!(components.next(), Some(Component::Normal(_)));
    first_is_normal && components.next().is_none() && !name.contains(['/', '\\'])
}

/// The path of a file of the folder, if the name is plain and the file exists.
pub(crate) fn file_in(dir: &Path, name: &str) -> Option<PathBuf> {
    checked_file(dir, name).ok()
}

/// The files of a folder with this extension, sorted.
pub(crate) fn list(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let failed = |e| CoreError::io("list", dir, e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let matches = path
            .extension()
            .is_some_and(|found| found.eq_ignore_ascii_case(extension));
        if matches && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let file = File::open(path).map_err(|e| CoreError::io("open", path, e))?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| CoreError::io("read", path, e))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        let kind = ErrorKind::TooLarge {
            what: "the file",
            value: bytes.len() as u64,
            limit: MAX_JSON_BYTES,
        };
        return Err(CoreError::new(kind).with_path(path));
    }
    serde_json::from_slice(&bytes).map_err(|e| CoreError::invalid("JSON", e).with_path(path))
}

#[cfg(test)]
mod tests {
    use super::is_plain;

    #[test]
    fn only_names_inside_of_the_folder_are_plain() {
        assert!(is_plain("model-00001-of-00002.safetensors"));
        for name in ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "a/..", "./a"] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
