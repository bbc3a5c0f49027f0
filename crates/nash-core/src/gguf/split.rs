//! Models split into several files, `NAME-00001-of-00003.gguf` (llama.cpp's `gguf-split`).
//!
//! The first part carries all metadata; every part says its number (`split.no`, from 0) and how many there are
//! (`split.count`); `split.tensors.count` is the number of tensors of all parts.

use std::path::{Path, PathBuf};

use super::part::Part;
use crate::error::{CoreError, ErrorKind, Result};

/// The files of the model that `path` is a part of; `None` if it is whole.
pub(super) fn parts(path: &Path, part: &Part) -> Result<Option<Vec<PathBuf>>> {
    let Some(count) = part.count("split.count")?.filter(|&count| count > 1) else {
        return Ok(None);
    };
    let file = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let stem = stem(file, count).ok_or_else(|| {
        CoreError::invalid("GGUF file", format!("a part of {count}, but not named as one")).with_hint(
            format!("name the parts NAME-00001-of-{count:05}.gguf and so on, in one folder"),
        )
    })?;
    let name = |number| path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf"));
    Ok(Some((1..=count).map(name).collect()))
}

/// The number in the name of a part: 2 for `NAME-00002-of-00003.gguf`.
pub(crate) fn number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = name.rsplit_once("-of-")?;
    stem(path.file_name()?.to_str()?, count.parse().ok()?)?;
    rest.rsplit_once('-')?.1.parse().ok()
}

/// `NAME` of `NAME-00002-of-00003.gguf`, if the file is named as a part of `count`.
fn stem(file: &str, count: u64) -> Option<&str> {
    let rest = file.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (stem, number) = rest.rsplit_once('-')?;
    (number.len() == 5 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(stem)
}

/// Opens all parts; the one at `path` is open already.
pub(super) fn open_all(path: &Path, part: Part, paths: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<Part>)> {
    let mut parts = Vec::new();
    let mut opened = Some(part);
    for (number, part_path) in paths.iter().enumerate() {
        let part = match opened.take_if(|_| part_path == path) {
            Some(part) => part,
            None if !part_path.exists() => return Err(missing(path, part_path)),
            None => Part::open(part_path)?,
        };
        check_number(&part, number, paths.len()).map_err(|e| e.with_path(part_path))?;
        parts.push(part);
    }
    check_total(&parts).map_err(|e| e.with_path(&paths[0]))?;
    Ok((paths.to_vec(), parts))
}

fn missing(path: &Path, part: &Path) -> CoreError {
    let file = part
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    CoreError::new(ErrorKind::MissingFile { file }).with_path(path)
}

fn check_number(part: &Part, number: usize, count: usize) -> Result<()> {
    let found = (part.count("split.no")?, part.count("split.count")?);
    if found != (Some(number as u64), Some(count as u64)) {
        let reason = format!("expected part {number} of {count}, the file says {found:?}");
        return Err(
            CoreError::invalid("split GGUF file", reason).with_hint("the parts are of different models")
        );
    }
    Ok(())
}

fn check_total(parts: &[Part]) -> Result<()> {
    let found: usize = parts.iter().map(|part| part.tensors.len()).sum();
    match parts[0].count("split.tensors.count")? {
        Some(expected) if expected != found as u64 => {
            let reason = format!("the parts hold {found} tensors, not {expected}");
            Err(CoreError::invalid("split GGUF file", reason).with_hint("the parts are of different models"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::stem;

    #[test]
    fn part_names_are_recognised() {
        assert_eq!(stem("llama-2-7b-00002-of-00003.gguf", 3), Some("llama-2-7b"));
        assert_eq!(stem("llama-00002-of-00003.gguf", 4), None);
        assert_eq!(stem("llama-2-of-00003.gguf", 3), None);
        assert_eq!(stem("00002-of-00003.gguf", 3), None);
    }
}
