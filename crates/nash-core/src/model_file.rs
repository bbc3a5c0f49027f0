//! Any model a user can point at.

use std::path::Path;

use crate::error::{CoreError, ErrorKind, Result};
use crate::hf::{self, CONFIG_FILE};
use crate::{Gguf, HfFolder, PackedFolder, Tensor};

/// An open model; cheap to clone.
#[derive(Clone, Debug)]
pub enum ModelFile {
    /// A GGUF file.
    Gguf(Gguf),
    /// A Hugging Face folder.
    Hf(HfFolder),
    /// A packed model folder.
    Packed(PackedFolder),
}

impl ModelFile {
    /// Opens what `path` turns out to be: a GGUF file (or one part of a split one), a model folder, a safetensors file
    /// or the `config.json` of a folder, or a folder with one GGUF model in it.
    ///
    /// # Errors
    /// It is no model, or not a valid one; the message says what was looked for.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|e| CoreError::io("open", path, e))?;
        if metadata.is_dir() {
            return Self::open_dir(path);
        }
        let in_folder = path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
            || path.file_name().is_some_and(|name| name == CONFIG_FILE);
        if in_folder {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            return Self::open_folder(parent.unwrap_or(Path::new(".")));
        }
        Gguf::open(path).map(Self::Gguf)
    }

    fn open_dir(dir: &Path) -> Result<Self> {
        if dir.join(CONFIG_FILE).is_file() {
            return Self::open_folder(dir);
        }
        let files = hf::list(dir, "gguf")?;
        let is_later_part = |path: &Path| crate::gguf::part_number(path).is_some_and(|number| number > 1);
        let models: Vec<_> = files.iter().filter(|path| !is_later_part(path)).collect();
        match models.as_slice() {
            [only] => Gguf::open(only).map(Self::Gguf),
            [] => {
                let reason = format!("the folder has neither {CONFIG_FILE} nor a .gguf file");
                Err(CoreError::new(ErrorKind::NotAModel { reason }).with_path(dir))
            }
            [first, ..] => {
                let reason = format!("the folder has {} .gguf models", models.len());
                Err(CoreError::new(ErrorKind::NotAModel { reason })
                    .with_path(dir)
                    .with_hint(format!("name one of them, for example {}", first.display())))
            }
        }
    }

    fn open_folder(dir: &Path) -> Result<Self> {
        let config = hf::read_config(dir)?;
        if PackedFolder::is_packed(&config) {
            return PackedFolder::with_config(dir, config).map(Self::Packed);
        }
        HfFolder::with_config(dir, config).map(Self::Hf)
    }

    /// The file or folder.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Hf(folder) => Some(folder.dir()),
            Self::Packed(folder) => folder.dir(),
        }
    }

    /// Size of the weight files in bytes.
    pub fn file_bytes(&self) -> u64 {
        match self {
            Self::Gguf(gguf) => gguf.file_bytes(),
            Self::Hf(folder) => folder.file_bytes(),
            Self::Packed(folder) => folder.file_bytes(),
        }
    }

    /// The names of all float tensors, as the file has them (packed ones: [`PackedFolder::packed_tensors`]).
    pub fn names(&self) -> Vec<&str> {
        match self {
            Self::Gguf(gguf) => gguf.names().collect(),
            Self::Hf(folder) => folder.names().collect(),
            Self::Packed(folder) => folder.names().collect(),
        }
    }

    /// A float tensor by the file's name.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        match self {
            Self::Gguf(gguf) => gguf.tensor(name),
            Self::Hf(folder) => folder.tensor(name),
            Self::Packed(folder) => folder.tensor(name),
        }
    }

    /// A float tensor by the file's name, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        match self {
            Self::Gguf(gguf) => gguf.find(name),
            Self::Hf(folder) => folder.find(name),
            Self::Packed(folder) => folder.find(name),
        }
    }
}
