//! The models that `pull` has fetched, by the name they were fetched under.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The folder of fetched files and the list of what is where.
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// The user's store; nothing is created yet.
    pub(crate) fn open() -> anyhow::Result<Self> {
        Ok(Self {
            dir: nash_fetch::cache_dir()?,
        })
    }

    /// Its folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name and path of every model that is still there.
    pub(crate) fn models(&self) -> BTreeMap<String, PathBuf> {
        let listed = std::fs::read(self.list())
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let mut models: BTreeMap<String, PathBuf> = listed.unwrap_or_default();
        models.retain(|_, path| path.exists());
        models
    }

    /// Remembers where a model is.
    pub(crate) fn remember(&self, name: &str, path: &Path) -> anyhow::Result<()> {
        let mut models = self.models();
        models.insert(name.to_owned(), path.to_owned());
        let text = serde_json::to_vec_pretty(&models)?;
        std::fs::create_dir_all(&self.dir)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(nash_core::atomic::write(self.list(), &text)?))
            .with_context(|| format!("cannot note the model in {}", self.list().display()))
    }

    fn list(&self) -> PathBuf {
        self.dir.join("models.json")
    }
}
