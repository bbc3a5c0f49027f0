//! Checks against real files, which are too large for the repository. Each test says when it had nothing to run on.
//!
//! `NASHSWARM_MODELS` names a folder with GGUF files. Next to a file `NAME.gguf`, llama.cpp's published vectors
//! `NAME.gguf.inp` and `NAME.gguf.out` (its `models/ggml-vocab-*`) are compared where they exist.

use nash_core::Gguf;
use nash_text::{TextError, Tokenizer};
use std::path::{Path, PathBuf};

fn models(test: &str) -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("NASHSWARM_MODELS") else {
        println!("{test}: nothing checked: set NASHSWARM_MODELS to a folder with GGUF files");
        return Vec::new();
    };
    let entries = std::fs::read_dir(&folder).expect("NASHSWARM_MODELS names a readable folder");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable entry").path())
        .collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "gguf"));
    files.sort();
    println!(
        "{test}: {} files in {}",
        files.len(),
        Path::new(&folder).display()
    );
    files
}

fn open(path: &Path) -> Option<Tokenizer> {
    match Tokenizer::from_gguf(&Gguf::open(path).expect("a sound GGUF file")) {
        Ok(tokenizer) => Some(tokenizer),
        Err(TextError::Unsupported { name, what, .. }) => {
            println!("  {}: {what} {name} is not supported", path.display());
            None
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn published_vectors_of_llama_cpp() {
    for path in models("published_vectors_of_llama_cpp") {
        let beside = |suffix: &str| std::fs::read_to_string(format!("{}{suffix}", path.display()));
        let (Ok(inputs), Ok(outputs)) = (beside(".inp"), beside(".out")) else {
            continue;
        };
        let Some(tokenizer) = open(&path) else { continue };
        let texts: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
        let expected: Vec<Vec<u32>> = outputs
            .lines()
            .map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect())
            .collect();
        for (text, ids) in texts.iter().zip(&expected) {
            assert_eq!(
                tokenizer.encode(text, false).unwrap(),
                *ids,
                "{}: {text:?}",
                path.display()
            );
        }
        println!("  {}: {} texts agree", path.display(), expected.len());
    }
}

#[test]
fn saving_keeps_every_token_and_every_text() {
    let texts = include_str!("fixtures/texts.json");
    let texts: Vec<String> = serde_json::from_str(texts).unwrap();
    for path in models("saving_keeps_every_token_and_every_text") {
        let Some(tokenizer) = open(&path) else { continue };
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let loaded = Tokenizer::from_folder(dir.path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), loaded.vocab_size());
        assert_eq!(tokenizer.end_of_generation(), loaded.end_of_generation());
        assert!((tokenizer.bos(), tokenizer.eos()) == (loaded.bos(), loaded.eos()));
        for id in 0..tokenizer.vocab_size() as u32 {
            assert_eq!(
                tokenizer.id_to_bytes(id),
                loaded.id_to_bytes(id),
                "{}: token {id}",
                path.display()
            );
        }
        for text in &texts {
            let ids = tokenizer.encode_prompt(text, true).unwrap();
            assert_eq!(
                ids,
                loaded.encode_prompt(text, true).unwrap(),
                "{}: {text:?}",
                path.display()
            );
            let plain = tokenizer.encode(text, false).unwrap();
            assert!(
                plain
                    .iter()
                    .all(|&id| !tokenizer.end_of_generation().contains(&id)),
                "{text:?}"
            );
        }
        println!("  {}: {} tokens kept", path.display(), tokenizer.vocab_size());
    }
}
