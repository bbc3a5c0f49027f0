//! SHA-256, as lower-case hexadecimal.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{CoreError, Result};

/// Bytes hashed between two calls of the progress function.
const CHUNK: usize = 1 << 20;

/// The digest of bytes.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The digest of a file. `progress` is told the bytes done, after every MiB and at the end.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_file(path: impl AsRef<Path>, mut progress: impl FnMut(u64)) -> Result<String> {
    let path = path.as_ref();
    let failed = |e| CoreError::io("read", path, e);
    let mut file = File::open(path).map_err(|e| CoreError::io("open", path, e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    loop {
        let count = file.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
        done += count as u64;
        progress(done);
    }
}

/// A digest of bytes that come piece by piece.
#[derive(Clone, Debug, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// A digest of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes added.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn known_answers() {
        assert_eq!(sha256(b"abc"), ABC);
        let mut hasher = Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        assert_eq!(hasher.finish(), ABC);
    }

    #[test]
    fn a_file_has_the_digest_of_its_bytes_and_reports_progress() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        let bytes = vec![7; CHUNK + 3];
        std::fs::write(&path, &bytes).unwrap();
        let mut last = 0;
        assert_eq!(sha256_file(&path, |done| last = done).unwrap(), sha256(&bytes));
        assert_eq!(last, bytes.len() as u64);
        assert!(sha256_file(dir.path().join("none"), |_| ()).is_err());
    }
}
