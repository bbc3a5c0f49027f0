//! Intermediate results on disk: what makes a compression resumable and lets several budgets share their calibration.
//!
//! A scratch folder belongs to one source model and one set of options that matter for its content (its *fingerprint*). Every entry is a
//! file written to a temporary name and renamed, so an entry that exists is whole. Entries are never changed.

use std::fs;
use std::path::{Path, PathBuf};

use nash_core::atomic;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::QuantError;

/// A folder of finished intermediate results.
#[derive(Debug, Clone)]
pub struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    /// Opens or creates `dir` for `fingerprint`. A folder of another fingerprint is emptied first.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn open(dir: &Path, fingerprint: &str) -> Result<Self, QuantError> {
        let stamp = dir.join("fingerprint");
        if dir.exists() && fs::read_to_string(&stamp).ok().as_deref() != Some(fingerprint) {
            // Only what this type wrote is removed: a stranger's folder is refused.
            let ours = stamp.exists()
                || fs::read_dir(dir)
                    .map_err(|e| QuantError::io(dir, e))?
                    .next()
                    .is_none();
            if !ours {
                return Err(QuantError::NotAScratchFolder { path: dir.into() });
            }
            fs::remove_dir_all(dir).map_err(|e| QuantError::io(dir, e))?;
        }
        fs::create_dir_all(dir).map_err(|e| QuantError::io(dir, e))?;
        atomic::write(&stamp, fingerprint.as_bytes())?;
        Ok(Self { dir: dir.into() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, key: &str) -> PathBuf {
        // Keys are made of tensor names: keep them readable, and one file each.
        let safe: String = key
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || ".-_".contains(c) {
                    c
                } else {
                    '_'
                }
            })
            .collect();
        self.dir.join(safe)
    }

    /// Whether an entry exists.
    pub fn has(&self, key: &str) -> bool {
        self.path(key).exists()
    }

    /// Bytes of an entry, `None` if there is none.
    ///
    /// # Errors
    /// If it exists and cannot be read.
    pub fn get_bytes(&self, key: &str) -> Result<Option<Vec<u8>>, QuantError> {
        let path = self.path(key);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(QuantError::io(&path, e)),
        }
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put_bytes(&self, key: &str, bytes: &[u8]) -> Result<(), QuantError> {
        Ok(atomic::write(self.path(key), bytes)?)
    }

    /// Removes an entry that is not needed any more.
    ///
    /// # Errors
    /// If it exists and cannot be removed.
    pub fn remove_entry(&self, key: &str) -> Result<(), QuantError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(QuantError::io(&path, e)),
            _ => Ok(()),
        }
    }

    /// Reads a JSON entry; one that does not parse counts as missing.
    ///
    /// # Errors
    /// If it exists and cannot be read.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, QuantError> {
        Ok(self.get_bytes(key)?.and_then(|b| serde_json::from_slice(&b).ok()))
    }

    /// Writes a JSON entry.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put<T: Serialize>(&self, key: &str, value: &T) -> Result<(), QuantError> {
        self.put_bytes(
            key,
            &serde_json::to_vec(value).map_err(|e| QuantError::Json {
                what: key.into(),
                source: e,
            })?,
        )
    }

    /// Deletes the folder.
    ///
    /// # Errors
    /// If it cannot be deleted.
    pub fn remove(self) -> Result<(), QuantError> {
        fs::remove_dir_all(&self.dir).map_err(|e| QuantError::io(&self.dir, e))
    }
}
