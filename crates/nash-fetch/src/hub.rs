//! Models and data sets from the Hugging Face hub, through its own cache (shared with the Python tools).
//!
//! `hf-hub` transfers a file into `blobs/` (resuming a part by byte ranges), renames it and links it from
//! `snapshots/COMMIT/`. Added here: the choice of files, one progress over all of them, a check of size and sha256 after the
//! transfer, and offline use. `config.json` comes last, so that a folder with it is complete.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::reference::is_safe_path;
use crate::select::{self, Selection};
use crate::{FetchError, HubRef, Progress, env_path, transfer, user_cache};

/// Times a broken transfer is taken up again.
const RETRIES: u32 = 4;

/// Where the hub is, and where its files go.
pub(crate) struct Settings {
    /// `None`: the public hub.
    pub(crate) endpoint: Option<String>,
    /// The folder `hub` of the cache.
    pub(crate) cache: PathBuf,
    /// `None`: the stored one, if there is one.
    pub(crate) token: Option<String>,
    pub(crate) offline: bool,
}

impl Settings {
    /// From `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, as the Python client reads them.
    pub(crate) fn from_env() -> Result<Self, FetchError> {
        let text = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = match (env_path("HF_HUB_CACHE"), env_path("HF_HOME")) {
            (Some(cache), _) => cache,
            (None, Some(home)) => home.join("hub"),
            (None, None) => user_cache()?.join("huggingface").join("hub"),
        };
        let offline = text("HF_HUB_OFFLINE")
            .is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
        Ok(Self {
            endpoint: text("HF_ENDPOINT"),
            cache,
            token: text("HF_TOKEN"),
            offline,
        })
    }
}

/// What the hub says of a repository.
#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

/// One file of it.
#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

/// A large file's checksum.
#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// Fetches `model` into the cache; see [`crate::fetch`].
pub(crate) fn fetch(
    model: &HubRef,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, FetchError> {
    let repo = repo(model, RepoType::Model);
    if settings.offline {
        return cached(model, &repo, settings);
    }
    let remote = Remote::connect(model, repo, settings)?;
    let Selection { files, open } = select::select(model, &remote.names())?;
    let snapshot = remote.get(&files, progress)?;
    Ok(open.map_or(snapshot.clone(), |file| snapshot.join(file)))
}

/// Fetches files of a data set into the cache; see [`crate::fetch_dataset`].
pub(crate) fn fetch_dataset(
    dataset: &HubRef,
    files: &[&str],
    settings: &Settings,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, FetchError> {
    let missing = |file: &str| FetchError::NoFile {
        dataset: dataset.to_string(),
        file: file.to_owned(),
    };
    if let Some(file) = files.iter().find(|file| !is_safe_path(file)) {
        return Err(missing(file));
    }
    let repo = repo(dataset, RepoType::Dataset);
    if let Some(snapshot) = held(&repo, files, settings) {
        return Ok(snapshot);
    }
    if settings.offline {
        return Err(offline(dataset, settings));
    }
    let remote = Remote::connect(dataset, repo, settings)?;
    let names = remote.names();
    match files.iter().find(|file| !names.iter().any(|name| name == *file)) {
        Some(file) => Err(missing(file)),
        None => remote.get(files, progress),
    }
}

fn repo(id: &HubRef, kind: RepoType) -> Repo {
    let revision = id.revision.clone().unwrap_or_else(|| "main".to_owned());
    Repo::with_revision(id.repo.clone(), kind, revision)
}

/// A repository on the hub, at the commit that it was found at.
struct Remote<'a> {
    /// What it was asked for as.
    id: &'a HubRef,
    api: ApiRepo,
    /// Its folder in the cache.
    root: PathBuf,
    info: RepoInfo,
}

impl<'a> Remote<'a> {
    /// Asks for the repository's commit and files, with sizes and checksums.
    fn connect(id: &'a HubRef, repo: Repo, settings: &Settings) -> Result<Self, FetchError> {
        let root = settings.cache.join(repo.folder_name());
        let cache = Cache::new(settings.cache.clone());
        let mut builder = ApiBuilder::from_cache(cache).with_progress(false);
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        if settings.token.is_some() {
            builder = builder.with_token(settings.token.clone());
        }
        let api = builder
            .build()
            .map_err(|error| refused(id, "a connection", error))?
            .repo(repo);
        let info = list(id, &api)?;
        Ok(Self { id, api, root, info })
    }

    /// Names of all files.
    fn names(&self) -> Vec<String> {
        let names = self.info.siblings.iter().map(|sibling| &sibling.rfilename);
        names.cloned().collect()
    }

    /// Gets those of the `files` that are not here yet, in this order, and returns the folder that holds them.
    fn get(
        &self,
        files: &[impl AsRef<str>],
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, FetchError> {
        let siblings = &self.info.siblings;
        let chosen: Vec<&Sibling> = files
            .iter()
            .filter_map(|file| siblings.iter().find(|sibling| sibling.rfilename == file.as_ref()))
            .collect();
        let snapshot = self.root.join("snapshots").join(&self.info.sha);
        let mut meter = Meter {
            progress,
            done: 0,
            total: chosen.iter().map(|sibling| sibling.size).sum(),
        };
        for sibling in chosen {
            let path = snapshot.join(&sibling.rfilename);
            if !path.metadata().is_ok_and(|meta| meta.len() == sibling.size) {
                let got = self.download(sibling, &mut meter)?;
                if got != path {
                    return Err(FetchError::Moved {
                        model: self.id.to_string(),
                    });
                }
                check(&got, sibling)?;
            }
            meter.advance(sibling);
        }
        Ok(snapshot)
    }

    /// Transfers one file, taking a broken transfer up again.
    fn download(&self, sibling: &Sibling, meter: &mut Meter<'_>) -> Result<PathBuf, FetchError> {
        if let Some(lfs) = &sibling.lfs {
            // A part that is complete already would be asked to go on at its end, which the hub refuses.
            let part = self.root.join("blobs").join(&lfs.sha256).with_extension("part");
            if part.metadata().is_ok_and(|meta| meta.len() >= sibling.size) {
                fs::remove_file(&part).map_err(FetchError::io(&part))?;
            }
        }
        let mut attempt = 0;
        loop {
            let file = FileMeter {
                meter: &mut *meter,
                item: &sibling.rfilename,
                bytes: 0,
            };
            match self.api.download_with_progress(&sibling.rfilename, file) {
                // Broken off in the middle: the part is kept, and a new request goes on at its end.
                Err(ApiError::IoError(_)) if attempt < RETRIES => {
                    thread::sleep(Duration::from_millis(500 << attempt));
                    attempt += 1;
                }
                result => return result.map_err(|error| refused(self.id, &sibling.rfilename, error)),
            }
        }
    }
}

/// The repository's commit and files, with sizes and checksums.
fn list(id: &HubRef, api: &ApiRepo) -> Result<RepoInfo, FetchError> {
    let item = "its list of files";
    let mut response = api
        .info_request()
        .query("blobs", "true")
        .call()
        .map_err(|error| refused(id, item, error))?;
    let info: RepoInfo = response
        .body_mut()
        .read_json()
        .map_err(|error| refused(id, item, error))?;
    if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(refused(id, item, format!("{:?} is not a commit", info.sha)));
    }
    Ok(info)
}

/// Compares with the hub's list; a file that differs is removed from the cache.
fn check(path: &Path, sibling: &Sibling) -> Result<(), FetchError> {
    let hint = "it was discarded; try again";
    let result = match &sibling.lfs {
        Some(lfs) => transfer::check_file(path, sibling.size, &lfs.sha256, hint, &mut |_| ()),
        None => {
            let got = path.metadata().map_err(FetchError::io(path))?.len();
            let expected = sibling.size.to_string();
            (got == sibling.size)
                .then_some(())
                .ok_or_else(|| FetchError::Corrupt {
                    path: path.to_owned(),
                    what: "size",
                    got: got.to_string(),
                    expected,
                    hint,
                })
        }
    };
    if result.is_err() {
        if let Ok(blob) = fs::canonicalize(path) {
            let _ = fs::remove_file(blob); // the error at hand says more
        }
        let _ = fs::remove_file(path);
    }
    result
}

/// What the cache holds of `model`, without the network.
fn cached(model: &HubRef, repo: &Repo, settings: &Settings) -> Result<PathBuf, FetchError> {
    let missing = || offline(model, settings);
    let files = Cache::new(settings.cache.clone()).repo(repo.clone());
    match &model.file {
        Some(file) => files.get(file).ok_or_else(missing),
        None => held(repo, &[select::CONFIG], settings).ok_or_else(missing),
    }
}

/// The folder of the cache that holds all of the `files`, as they were when the revision was last asked for.
fn held(repo: &Repo, files: &[&str], settings: &Settings) -> Option<PathBuf> {
    let cache = Cache::new(settings.cache.clone()).repo(repo.clone());
    let paths = files.iter().map(|file| cache.get(file));
    let first = paths.collect::<Option<Vec<_>>>()?.into_iter().next()?;
    // Above the file are the folders in its name.
    let folder = first.ancestors().nth(files[0].split('/').count())?;
    Some(folder.to_owned())
}

fn offline(id: &HubRef, settings: &Settings) -> FetchError {
    FetchError::Offline {
        model: id.to_string(),
        cache: settings.cache.clone(),
    }
}

fn refused(id: &HubRef, item: &str, reason: impl ToString) -> FetchError {
    FetchError::Hub {
        model: id.to_string(),
        item: item.to_owned(),
        reason: reason.to_string(),
    }
}

/// Progress over all files.
struct Meter<'a> {
    progress: &'a mut dyn FnMut(Progress<'_>),
    /// Bytes of the files that are complete.
    done: u64,
    total: u64,
}

impl Meter<'_> {
    /// `sibling` is complete.
    fn advance(&mut self, sibling: &Sibling) {
        self.done += sibling.size;
        (self.progress)(Progress {
            item: &sibling.rfilename,
            bytes: self.done,
            total: self.total,
        });
    }
}

/// Progress within one file, as `hf-hub` reports it.
struct FileMeter<'a, 'b> {
    meter: &'a mut Meter<'b>,
    item: &'a str,
    bytes: u64,
}

impl hf_hub::api::Progress for FileMeter<'_, '_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.bytes = 0;
    }

    fn update(&mut self, size: usize) {
        self.bytes += size as u64;
        let bytes = (self.meter.done + self.bytes).min(self.meter.total);
        (self.meter.progress)(Progress {
            item: self.item,
            bytes,
            total: self.meter.total,
        });
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
