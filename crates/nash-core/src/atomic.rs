//! Files that are either complete or not there.
//!
//! A file is written under a temporary name in the same folder, flushed to disk, and then renamed; the folder is flushed
//! too. A process killed at any moment leaves the old file (or none) under the final name, and at worst a hidden
//! `.NAME.*.partial` beside it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{CoreError, Result};

/// Ending of temporary files.
const SUFFIX: &str = ".partial";

/// A file under a temporary name, until [`AtomicFile::commit`]. Dropping it removes it.
#[derive(Debug)]
pub struct AtomicFile {
    file: NamedTempFile,
    path: PathBuf,
}

impl AtomicFile {
    /// Starts the file that is to become `path`. Its folder must exist.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written to.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{name}.");
        builder.prefix(&prefix).suffix(SUFFIX);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // What `File::create` asks for; the umask still applies. The default of temporary files is 0600.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let file = builder
            .tempfile_in(folder(path))
            .map_err(|e| CoreError::io("create", path, e))?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// The file, for writing and seeking.
    pub fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes the file to disk and gives it its final name, replacing an older file.
    ///
    /// # Errors
    /// The system refuses; then the older file is still there.
    pub fn commit(self) -> Result<()> {
        let Self { file, path } = self;
        file.as_file()
            .sync_all()
            .map_err(|e| CoreError::io("flush", &path, e))?;
        file.persist(&path)
            .map_err(|e| CoreError::io("rename to", &path, e.error))?;
        sync_folder(folder(&path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes a file with what `write` puts into it.
///
/// # Errors
/// `write` or the system fails; then the older file is still there.
pub fn write_with(path: impl AsRef<Path>, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    let mut file = AtomicFile::create(path)?;
    write(file.file()).map_err(|e| CoreError::io("write", path, e))?;
    file.commit()
}

/// Writes a file with these contents.
///
/// # Errors
/// The system refuses; then the older file is still there.
pub fn write(path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> Result<()> {
    write_with(path, |file| file.write_all(contents.as_ref()))
}

/// Removes temporary files that killed processes left for `path`; gives their number.
///
/// Only for a path that no other process is writing at the same time.
///
/// # Errors
/// The folder cannot be listed or a file not be removed.
pub fn remove_leftovers(path: impl AsRef<Path>) -> Result<usize> {
    let path = path.as_ref();
    let prefix = format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let failed = |e| CoreError::io("clean up after", path, e);
    let mut removed = 0;
    for entry in fs::read_dir(folder(path)).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&prefix) && name.ends_with(SUFFIX) {
            fs::remove_file(entry.path()).map_err(failed)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The folder of a path; `.` for a bare name.
fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Makes a rename in this folder survive a power failure.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    // Folders cannot be opened as files on Windows, where renames are journalled.
    if cfg!(unix) {
        File::open(folder)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| CoreError::io("flush", folder, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_name_appears_with_the_contents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, "old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        file.commit().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, "old").unwrap();
        let error = write_with(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(error.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_killed_process_leaves_only_what_can_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        // A killed process runs no destructors.
        std::mem::forget(file);
        fs::write(dir.path().join(".ab.x.partial"), "of another file").unwrap();
        assert!(!path.exists());
        assert_eq!(remove_leftovers(&path).unwrap(), 1);
        assert_eq!(names(dir.path()), [".ab.x.partial"]);
    }

    #[cfg(unix)]
    #[test]
    fn others_can_read_the_file_as_if_it_were_created_plainly() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        write(dir.path().join("atomic"), "").unwrap();
        fs::write(dir.path().join("plain"), "").unwrap();
        let mode = |name| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("atomic"), mode("plain"));
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let error = write("/nonexistent/folder/file", "x").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/nonexistent/folder/file: cannot create"),
            "{error}"
        );
    }
}
