//! Which files of a repository make up a model.

use crate::reference::is_safe_path;
use crate::{FetchError, HubRef};

/// Text files of a model, besides its weights; those that a repository has are fetched.
const TEXTS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "nashswarm.json",
];

/// A folder counts as complete when it has this file; it is fetched last.
pub(crate) const CONFIG: &str = "config.json";

/// What to fetch, in this order, and what to open afterwards.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) files: Vec<String>,
    /// The file to open; `None`: the folder.
    pub(crate) open: Option<String>,
}

/// Chooses from a repository's `files`: the named GGUF file with the other parts of its split; or `config.json` with
/// safetensors and tokenizer; or the only GGUF file.
pub(crate) fn select(model: &HubRef, files: &[String]) -> Result<Selection, FetchError> {
    let files: Vec<&String> = files.iter().filter(|file| is_safe_path(file)).collect();
    let has = |name: &str| files.iter().any(|file| *file == name);
    let mut weights: Vec<&String> = files
        .iter()
        .copied()
        .filter(|file| file.ends_with(".safetensors") && !file.contains('/'))
        .collect();
    if model.file.is_none() && has(CONFIG) && !weights.is_empty() {
        // Some repositories hold the same weights again in another arrangement, under another name.
        if weights.iter().any(|file| file.starts_with("model")) {
            weights.retain(|file| file.starts_with("model"));
        }
        let index = "model.safetensors.index.json";
        let texts = TEXTS
            .into_iter()
            .chain([index])
            .filter(|name| has(name))
            .map(str::to_owned);
        let files = weights
            .into_iter()
            .cloned()
            .chain(texts)
            .chain([CONFIG.to_owned()])
            .collect();
        return Ok(Selection { files, open: None });
    }

    let ggufs: Vec<&String> = files
        .iter()
        .copied()
        .filter(|file| file.ends_with(".gguf"))
        .collect();
    let firsts: Vec<&String> = ggufs
        .iter()
        .copied()
        .filter(|file| split_part(file).is_none_or(|(_, part, _)| part == 1))
        .collect();
    let first = match (&model.file, firsts.as_slice()) {
        (Some(wanted), _) => ggufs.iter().copied().find(|file| *file == wanted),
        (None, []) => {
            let files = files
                .iter()
                .take(12)
                .map(|file| file.as_str())
                .collect::<Vec<_>>()
                .join(", ");
            return Err(FetchError::NoWeights {
                model: model.to_string(),
                files,
            });
        }
        (None, [only]) => Some(*only),
        (None, _) => None,
    };
    let Some(first) = first else {
        let files = firsts
            .iter()
            .map(|file| file.as_str())
            .collect::<Vec<_>>()
            .join(", ");
        return Err(FetchError::ChooseFile {
            model: model.to_string(),
            files,
        });
    };
    let mut parts = vec![first.clone()];
    if let Some((base, part, count)) = split_part(first) {
        let others = ggufs
            .iter()
            .filter(|file| split_part(file).is_some_and(|(b, p, c)| (b, c) == (base, count) && p != part));
        parts.extend(others.map(|file| (*file).clone()));
        parts.sort();
    }
    Ok(Selection {
        open: parts.first().cloned(),
        files: parts,
    })
}

/// `base-00002-of-00005.gguf` as (base, 2, 5).
fn split_part(file: &str) -> Option<(&str, u32, u32)> {
    let (head, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (base, part) = head.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse().ok())?;
    Some((base, number(part)?, number(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(file: Option<&str>, files: &[&str]) -> Result<Selection, FetchError> {
        let model = HubRef {
            repo: "a/b".into(),
            revision: None,
            file: file.map(Into::into),
        };
        select(
            &model,
            &files.iter().map(|file| (*file).to_owned()).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn a_folder_takes_one_arrangement_of_the_weights_and_its_config_last() {
        let files = [
            "config.json",
            "README.md",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "onnx/model.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "pytorch_model.bin",
            "x.gguf",
        ];
        let expected = [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "tokenizer.json",
            "model.safetensors.index.json",
            "config.json",
        ];
        let selection = choose(None, &files).unwrap();
        assert_eq!(
            (selection.files.as_slice(), selection.open),
            (expected.map(String::from).as_slice(), None)
        );
        assert_eq!(choose(Some("x.gguf"), &files).unwrap().files, ["x.gguf"]);
    }

    #[test]
    fn a_split_file_comes_with_all_its_parts() {
        let files = [
            "q/m-00002-of-00002.gguf",
            "q/m-00001-of-00002.gguf",
            "q/other-00001-of-00002.gguf",
            "z.gguf",
        ];
        let selection = choose(Some("q/m-00001-of-00002.gguf"), &files).unwrap();
        assert_eq!(
            selection.files,
            ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"]
        );
        assert_eq!(selection.open.as_deref(), Some("q/m-00001-of-00002.gguf"));
        let selection = choose(None, &files[..2]).unwrap();
        assert_eq!(selection.files.len(), 2, "one split model is the only one");
    }

    #[test]
    fn the_choice_is_left_to_the_user() {
        let error = choose(None, &["a-q4.gguf", "a-q8.gguf"]).unwrap_err();
        assert!(
            matches!(&error, FetchError::ChooseFile { files, .. } if files == "a-q4.gguf, a-q8.gguf"),
            "{error}"
        );
        assert!(matches!(
            choose(Some("b.gguf"), &["a.gguf"]).unwrap_err(),
            FetchError::ChooseFile { .. }
        ));
        assert!(matches!(
            choose(None, &["pytorch_model.bin"]).unwrap_err(),
            FetchError::NoWeights { .. }
        ));
        assert!(matches!(
            choose(None, &["../../x.gguf"]).unwrap_err(),
            FetchError::NoWeights { .. }
        ));
    }
}
