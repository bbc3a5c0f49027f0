//! Finds and loads what a user named as a model.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, bail};
use nash_core::ModelFile;
use nash_models::{Model, ModelConfig};
use nash_text::{TextError, Tokenizer};

use crate::failure::Hint as _;
use crate::store::Store;
use crate::ui::{Ui, Unit};

/// A model ready to run.
pub(crate) struct Loaded {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What tables call it, if not by its path.
    pub(crate) label: Option<String>,
    /// Its file or folder.
    pub(crate) file: Arc<ModelFile>,
    pub(crate) model: Model,
    tokenizer: Pending,
    /// Seconds to open the file and build the model; the tokenizer may be on its way still.
    pub(crate) load_seconds: f64,
}

/// A tokenizer that a thread reads meanwhile.
struct Pending {
    ready: OnceLock<Tokenizer>,
    reading: Mutex<Option<JoinHandle<Result<Tokenizer, TextError>>>>,
}

impl Pending {
    fn new(file: &Arc<ModelFile>) -> Self {
        let file = Arc::clone(file);
        let read = move || {
            let tokenizer = Tokenizer::from_model(&file);
            nash_kernels::heap::release_free_pages();
            tokenizer
        };
        Self {
            ready: OnceLock::new(),
            reading: Mutex::new(Some(std::thread::spawn(read))),
        }
    }
}

/// The path of a model: the argument itself if it exists, else a model fetched under that name.
pub(crate) fn resolve(name: &Path) -> anyhow::Result<PathBuf> {
    if name.exists() {
        return Ok(name.to_owned());
    }
    let text = name.to_string_lossy();
    if let Some(path) = Store::open().ok().and_then(|store| store.models().remove(&*text)) {
        return Ok(path);
    }
    let missing = format!("there is no file or fetched model `{text}`");
    match text.parse::<nash_fetch::ModelRef>() {
        Ok(_) => Err(anyhow::anyhow!(missing)).hint(format!("fetch it with `nashswarm pull {text}`")),
        Err(_) => Err(anyhow::anyhow!(missing)).hint("check the path; `nashswarm list` shows fetched models"),
    }
}

/// Opens a model file without reading weights.
pub(crate) fn open(name: &Path) -> anyhow::Result<(PathBuf, ModelFile)> {
    let path = resolve(name)?;
    let file = ModelFile::open(&path)?;
    Ok((path, file))
}

/// The configuration of a model file.
pub(crate) fn config(file: &ModelFile) -> anyhow::Result<ModelConfig> {
    Ok(match file {
        ModelFile::Gguf(gguf) => ModelConfig::from_gguf(gguf)?,
        ModelFile::Hf(folder) => ModelConfig::from_hf(folder.config())?,
        ModelFile::Packed(folder) => ModelConfig::from_packed(folder.config())?,
    })
}

/// Loads a model. Its tokenizer is read beside that and by whoever asks for it first waited for.
pub(crate) fn load(name: &Path, ui: &Ui) -> anyhow::Result<Loaded> {
    ui.begin(&format!("loading {}", name.display()), 0, Unit::Steps);
    let start = Instant::now();
    let (path, file) = open(name)?;
    let file = Arc::new(file);
    let tokenizer = Pending::new(&file);
    let model = Model::load(&file).with_context(|| format!("cannot load {}", path.display()))?;
    let load_seconds = start.elapsed().as_secs_f64();
    ui.finish();
    Ok(Loaded {
        path,
        label: None,
        file,
        model,
        tokenizer,
        load_seconds,
    })
}

impl Loaded {
    /// The tokenizer; waits until it is read.
    pub(crate) fn tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        let mut reading = self
            .tokenizer
            .reading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(tokenizer) = self.tokenizer.ready.get() {
            return Ok(tokenizer);
        }
        let Some(thread) = reading.take() else {
            bail!("the tokenizer of {} could not be read", self.path.display());
        };
        let tokenizer = thread
            .join()
            .map_err(|_| anyhow::anyhow!("reading the tokenizer panicked"))?
            .with_context(|| format!("cannot read the tokenizer of {}", self.path.display()))?;
        Ok(self.tokenizer.ready.get_or_init(|| tokenizer))
    }

    /// A short name for tables: that of the file or folder.
    pub(crate) fn name(&self) -> String {
        self.label.clone().unwrap_or_else(|| name(&self.path))
    }
}

/// A short name for tables: that of the file or folder.
pub(crate) fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// Reads a text file; an error for one that is empty or not text.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Ok(text) = String::from_utf8(bytes) else {
        return Err(anyhow::anyhow!("{} is not UTF-8 text", path.display())).hint("give a plain text file");
    };
    if text.trim().is_empty() {
        bail!("{} has no text", path.display());
    }
    if text.contains('\0') {
        return Err(anyhow::anyhow!(
            "{} is not text: it has NUL bytes",
            path.display()
        ))
        .hint("give a plain text file");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_text_is_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read_text(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read(b"a\n"), Ok("a\n".to_owned()));
        assert!(read(b" \n").unwrap_err().contains("no text"));
        assert!(read(b"\xff\xfe").unwrap_err().contains("not UTF-8"));
        assert!(read(b"a\0b").unwrap_err().contains("NUL"));
    }
}
