//! Copying bytes while counting and hashing them, and making the result durable.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::FetchError;

/// Size of the copy buffer in bytes.
const BUFFER: usize = 1 << 20;

/// Bytes seen so far, and their sha256.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) bytes: u64,
    hasher: Sha256,
}

impl Tally {
    /// Copies `from` to `to` until it ends or the tally exceeds `limit` bytes (so a lying archive cannot fill the
    /// disk). `step` gets the tally after each buffer.
    pub(crate) fn copy(
        &mut self,
        from: &mut dyn Read,
        to: &mut dyn Write,
        limit: u64,
        step: &mut dyn FnMut(u64),
    ) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        while self.bytes <= limit {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            to.write_all(&buffer[..n])?;
            self.hasher.update(&buffer[..n]);
            self.bytes += n as u64;
            step(self.bytes);
        }
        Ok(())
    }

    /// Compares with what was promised; `path` and `hint` are for the error.
    pub(crate) fn check(
        self,
        path: &Path,
        bytes: u64,
        sha256: &str,
        hint: &'static str,
    ) -> Result<(), FetchError> {
        let corrupt = |what, got, expected| FetchError::Corrupt {
            path: path.to_owned(),
            what,
            got,
            expected,
            hint,
        };
        if self.bytes != bytes {
            return Err(corrupt("size", self.bytes.to_string(), bytes.to_string()));
        }
        let got: String = self
            .hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        if !got.eq_ignore_ascii_case(sha256) {
            return Err(corrupt("sha256", got, sha256.to_owned()));
        }
        Ok(())
    }
}

/// Checks the size and sha256 of the file at `path`.
pub(crate) fn check_file(
    path: &Path,
    bytes: u64,
    sha256: &str,
    hint: &'static str,
    step: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    let mut file = File::open(path).map_err(FetchError::io(path))?;
    let mut tally = Tally::default();
    tally
        .copy(&mut file, &mut io::sink(), bytes, step)
        .map_err(FetchError::io(path))?;
    tally.check(path, bytes, sha256, hint)
}

/// Gives the finished file at `from` its final name, durably. Both lie in the same file system.
pub(crate) fn publish(file: &File, from: &Path, to: &Path) -> Result<(), FetchError> {
    file.sync_all().map_err(FetchError::io(from))?;
    fs::rename(from, to).map_err(FetchError::io(to))?;
    #[cfg(unix)]
    if let Some(folder) = to.parent() {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(FetchError::io(folder))?;
    }
    Ok(())
}
