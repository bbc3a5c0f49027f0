//! A shared, immutable range of bytes: part of a mapped file or of a buffer.
//!
//! Every tensor of a model is a `Region` of the same map, so that opening a model copies nothing and a clone costs
//! a reference count. The map lives as long as any region of it.

use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{CoreError, ErrorKind, Result};

/// Immutable bytes with shared ownership. Dereferences to `[u8]`.
#[derive(Clone)]
pub struct Region {
    backing: Arc<Backing>,
    range: Range<usize>,
}

enum Backing {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Backing {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Region {
    /// Maps a whole file read-only; nothing is read before it is used.
    ///
    /// The file must not be truncated or rewritten in place while it is mapped (replacing it by `rename`, as
    /// [`crate::atomic`] does, is fine): the operating system kills a process that reads a page that is gone.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, is a directory, or is empty.
    pub fn map(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| CoreError::io("open", path, e))?;
        let metadata = file
            .metadata()
            .map_err(|e| CoreError::io("read the size of", path, e))?;
        if metadata.is_dir() {
            return Err(CoreError::new(ErrorKind::IsDirectory).with_path(path));
        }
        if metadata.len() == 0 {
            return Err(CoreError::new(ErrorKind::EmptyFile).with_path(path));
        }
        #[expect(
            unsafe_code,
            reason = "mapping a file is unsafe by nature; this is the only place"
        )]
        // SAFETY: the map is read-only and private to this crate, which hands out `&[u8]` only. What remains is that
        // another process changes the file underneath; that is documented above and the reason we never write a
        // model file in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| CoreError::io("map", path, e))?;
        let range = 0..map.len();
        Ok(Self {
            backing: Arc::new(Backing::Map(map)),
            range,
        })
    }

    /// The bytes `range` of this region, or `None` where it reaches beyond the end.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self {
            backing: Arc::clone(&self.backing),
            range: start..start + (range.end - range.start),
        })
    }

    /// Lets the system take back the memory behind these bytes, where they are part of a mapped file; they are read from the file when they are needed
    /// again. A process that reads a large file once, part by part, stays small so.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Backing::Map(map) = &*self.backing {
            #[expect(unsafe_code, reason = "the advice is unsafe for other kinds of maps")]
            // SAFETY: `MADV_DONTNEED` drops what was written to a private map. This one is read-only, so every page that is dropped has the
            // content of the file, and comes back from there when it is read.
            let advised = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    self.range.start,
                    self.range.len(),
                )
            };
            // An advice that is not taken costs memory, nothing else.
            drop(advised);
        }
    }

    /// Whether the bytes lie in a mapped file (and not in memory of their own).
    pub fn is_mapped(&self) -> bool {
        matches!(*self.backing, Backing::Map(_))
    }
}

impl From<Vec<u8>> for Region {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self {
            backing: Arc::new(Backing::Owned(bytes)),
            range,
        }
    }
}

impl From<&[u8]> for Region {
    fn from(bytes: &[u8]) -> Self {
        Self::from(bytes.to_vec())
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.backing.bytes()[self.range.clone()]
    }
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_mapped() { "mapped" } else { "owned" };
        write!(f, "Region({kind}, {:?})", self.range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_nest_and_refuse_what_is_outside() {
        let region = Region::from((0..10u8).collect::<Vec<_>>());
        let inner = region.slice(2..8).unwrap();
        assert_eq!(&*inner.slice(1..3).unwrap(), [3, 4]);
        assert_eq!(inner.slice(6..6).unwrap().len(), 0);
        assert!(inner.slice(0..7).is_none());
        #[expect(clippy::reversed_empty_ranges, reason = "a malformed range is the point")]
        let reversed = 3..2;
        assert!(inner.slice(reversed).is_none());
    }

    #[test]
    fn a_map_outlives_the_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        std::fs::write(&path, b"nash").unwrap();
        let region = Region::map(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(region.is_mapped());
        assert_eq!(&*region, b"nash");
    }

    #[test]
    fn what_is_released_is_read_from_the_file_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let region = Region::map(file.path()).unwrap();
        // A part that begins and ends within pages.
        let part = region.slice(1000..200_001).unwrap();
        assert_eq!(&*region, bytes);
        part.release();
        region.slice(5..5).unwrap().release();
        assert_eq!(&*region, bytes);
        // Memory of its own is all there is of it.
        let owned = Region::from(bytes.clone());
        owned.release();
        assert_eq!(&*owned, bytes);
    }

    #[test]
    fn an_empty_file_a_directory_and_a_missing_file_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(
            Region::map(&path).unwrap_err().kind(),
            ErrorKind::EmptyFile
        ));
        assert!(matches!(
            Region::map(dir.path()).unwrap_err().kind(),
            ErrorKind::IsDirectory
        ));
        let missing = Region::map(&dir.path().join("missing")).unwrap_err();
        assert!(matches!(missing.kind(), ErrorKind::Io { action: "open", .. }));
        assert!(missing.to_string().contains("missing"), "{missing}");
    }
}
