//! Models from the Hugging Face hub, through its own cache (shared with the Python tools).
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
    let revision = model.revision.clone().unwrap_or_else(|| "main".to_owned());
    let repo = Repo::with_revision(model.repo.clone(), RepoType::Model, revision);
    let cache = Cache::new(settings.cache.clone());
    if settings.offline {
        return cached(model, &repo, &cache);
    }
    let root = settings.cache.join(repo.folder_name());
    let mut builder = ApiBuilder::from_cache(cache).with_progress(false);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    if settings.token.is_some() {
        builder = builder.with_token(settings.token.clone());
    }
    let api = builder
        .build()
        .map_err(|error| refused(model, "a connection", error))?
        .repo(repo);
    let info = list(model, &api)?;
    let names: Vec<String> = info
        .siblings
        .iter()
        .map(|sibling| sibling.rfilename.clone())
        .collect();
    let Selection { files, open } = select::select(model, &names)?;
    let chosen: Vec<&Sibling> = files
        .iter()
        .filter_map(|file| info.siblings.iter().find(|sibling| sibling.rfilename == *file))
        .collect();

    let snapshot = root.join("snapshots").join(&info.sha);
    let mut meter = Meter {
        progress,
        done: 0,
        total: chosen.iter().map(|sibling| sibling.size).sum(),
    };
    for sibling in chosen {
        let path = snapshot.join(&sibling.rfilename);
        if !path.metadata().is_ok_and(|meta| meta.len() == sibling.size) {
            let got = download(model, &api, &root, sibling, &mut meter)?;
            if got != path {
                return Err(FetchError::Moved {
                    model: model.to_string(),
                });
            }
            check(&got, sibling)?;
        }
        meter.advance(sibling);
    }
    Ok(open.map_or(snapshot.clone(), |file| snapshot.join(file)))
}

/// The repository's commit and files, with sizes and checksums.
fn list(model: &HubRef, api: &ApiRepo) -> Result<RepoInfo, FetchError> {
    let item = "its list of files";
    let mut response = api
        .info_request()
        .query("blobs", "true")
        .call()
        .map_err(|error| refused(model, item, error))?;
    let info: RepoInfo = response
        .body_mut()
        .read_json()
        .map_err(|error| refused(model, item, error))?;
    if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(refused(model, item, format!("{:?} is not a commit", info.sha)));
    }
    Ok(info)
}

/// Transfers one file, taking a broken transfer up again.
fn download(
    model: &HubRef,
    api: &ApiRepo,
    root: &Path,
    sibling: &Sibling,
    meter: &mut Meter<'_>,
) -> Result<PathBuf, FetchError> {
    if let Some(lfs) = &sibling.lfs {
        // A part that is complete already would be asked to go on at its end, which the hub refuses.
        let part = root.join("blobs").join(&lfs.sha256).with_extension("part");
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
        match api.download_with_progress(&sibling.rfilename, file) {
            // Broken off in the middle: the part is kept, and a new request goes on at its end.
            Err(ApiError::IoError(_)) if attempt < RETRIES => {
                thread::sleep(Duration::from_millis(500 << attempt));
                attempt += 1;
            }
            result => return result.map_err(|error| refused(model, &sibling.rfilename, error)),
        }
    }
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
fn cached(model: &HubRef, repo: &Repo, cache: &Cache) -> Result<PathBuf, FetchError> {
    let missing = || FetchError::Offline {
        model: model.to_string(),
        cache: cache.path().clone(),
    };
    let files = cache.repo(repo.clone());
    match &model.file {
        Some(file) => files.get(file).ok_or_else(missing),
        None => {
            let config = files.get(select::CONFIG).ok_or_else(missing)?;
            Ok(config.parent().ok_or_else(missing)?.to_owned())
        }
    }
}

fn refused(model: &HubRef, item: &str, reason: impl ToString) -> FetchError {
    FetchError::Hub {
        model: model.to_string(),
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
