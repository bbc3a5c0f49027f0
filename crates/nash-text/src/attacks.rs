//! Files that lie. Each must end in an error that names the key, never in a panic; what loads must work.

use crate::vocabulary::Vocabulary;
use crate::{TextError, Tokenizer, gguf, pipeline};
use nash_core::Gguf;
use nash_core::gguf::{Array, Value};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

type Metadata = BTreeMap<String, Value>;

fn strings(items: &[&str]) -> Value {
    Value::Array(Array::String(items.iter().map(|s| (*s).to_owned()).collect()))
}

/// A small sound SentencePiece vocabulary.
fn spm() -> Metadata {
    let tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "▁"];
    BTreeMap::from([
        ("tokenizer.ggml.model".into(), Value::String("llama".into())),
        ("tokenizer.ggml.tokens".into(), strings(&tokens)),
        (
            "tokenizer.ggml.token_type".into(),
            Value::Array(Array::I32(vec![2, 3, 3, 6, 1, 1, 1, 1])),
        ),
        (
            "tokenizer.ggml.scores".into(),
            Value::Array(Array::F32(vec![0.0; 8])),
        ),
    ])
}

/// A small sound byte-level vocabulary.
fn bpe() -> Metadata {
    BTreeMap::from([
        ("tokenizer.ggml.model".into(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Value::String("gpt-2".into())),
        (
            "tokenizer.ggml.tokens".into(),
            strings(&["a", "b", "ab", "<|endoftext|>"]),
        ),
        (
            "tokenizer.ggml.token_type".into(),
            Value::Array(Array::I32(vec![1, 1, 1, 3])),
        ),
        ("tokenizer.ggml.merges".into(), strings(&["a b"])),
        ("tokenizer.ggml.eos_token_id".into(), Value::U32(3)),
    ])
}

fn load(metadata: &Metadata) -> Result<(), TextError> {
    let vocabulary: Vocabulary = gguf::read(Path::new("evil.gguf"), metadata)?;
    pipeline::build(vocabulary).map(|_| ())
}

fn with(mut metadata: Metadata, key: &str, value: Value) -> Metadata {
    metadata.insert(format!("tokenizer.ggml.{key}"), value);
    metadata
}

#[track_caller]
fn refused(metadata: &Metadata, words: &[&str]) {
    let error = load(metadata).expect_err("must be refused").to_string();
    for word in words.iter().chain(&["evil.gguf"]) {
        assert!(error.contains(word), "{error:?} does not mention {word:?}");
    }
}

#[test]
fn the_sound_vocabularies_load() {
    load(&spm()).unwrap();
    load(&bpe()).unwrap();
}

#[test]
fn missing_keys_are_named() {
    for key in ["model", "tokens", "scores"] {
        let mut metadata = spm();
        metadata.remove(&format!("tokenizer.ggml.{key}"));
        refused(&metadata, &[&format!("`tokenizer.ggml.{key}` is missing")]);
    }
    let mut metadata = bpe();
    metadata.remove("tokenizer.ggml.merges");
    refused(&metadata, &["`tokenizer.ggml.merges` is missing"]);
    refused(&Metadata::new(), &["tokenizer.ggml.model"]);
}

#[test]
fn wrong_types_are_named() {
    refused(&with(spm(), "tokens", Value::U32(7)), &["tokens", "u32"]);
    refused(&with(spm(), "model", Value::Bool(true)), &["model", "bool"]);
    refused(&with(spm(), "scores", strings(&["1"])), &["scores", "floats"]);
    refused(&with(spm(), "add_bos_token", Value::U32(1)), &["add_bos_token"]);
    refused(&with(spm(), "bos_token_id", Value::I32(-1)), &["bos_token_id"]);
}

#[test]
fn arrays_must_have_one_length() {
    refused(
        &with(spm(), "scores", Value::Array(Array::F32(vec![0.0; 7]))),
        &["scores", "7 entries for 8 tokens"],
    );
    refused(
        &with(spm(), "token_type", Value::Array(Array::I32(vec![1; 9]))),
        &["token_type", "9 entries"],
    );
    refused(&with(spm(), "tokens", strings(&[])), &["tokens", "0 entries"]);
}

#[test]
fn values_must_be_in_range() {
    refused(
        &with(spm(), "eos_token_id", Value::U32(8)),
        &["eos_token_id", "is 8", "8 tokens"],
    );
    refused(
        &with(spm(), "eot_token_id", Value::U32(u32::MAX)),
        &["eot_token_id"],
    );
    refused(
        &with(spm(), "token_type", Value::Array(Array::I32(vec![7; 8]))),
        &["token_type", "has 7"],
    );
    refused(
        &with(spm(), "scores", Value::Array(Array::F32(vec![f32::NAN; 8]))),
        &["scores", "NaN"],
    );
    refused(
        &with(bpe(), "add_bos_token", Value::Bool(true)),
        &["add_bos_token"],
    );
}

#[test]
fn merges_must_join_two_tokens_into_a_third() {
    refused(
        &with(bpe(), "merges", strings(&["a c"])),
        &["merges", "\"c\" is no token"],
    );
    refused(
        &with(bpe(), "merges", strings(&["a b", "b a"])),
        &["merges", "entry 1", "\"ba\" is no token"],
    );
    for not_two in ["ab", "a", "", " "] {
        refused(&with(bpe(), "merges", strings(&[not_two])), &["merges"]);
    }
}

#[test]
fn tokens_must_be_distinct_and_of_sane_length() {
    refused(
        &with(bpe(), "tokens", strings(&["a", "b", "ab", "a"])),
        &["tokens", "entries 0 and 3"],
    );
    let long = "x".repeat(100_000);
    refused(
        &with(bpe(), "tokens", strings(&["a", "b", "ab", &long])),
        &["tokens", "100000 bytes"],
    );
}

#[test]
fn what_is_not_supported_lists_what_is() {
    refused(
        &with(bpe(), "model", Value::String("bert".into())),
        &["bert", "gpt2, llama"],
    );
    refused(
        &with(bpe(), "pre", Value::String("no-such".into())),
        &["no-such", "tokenizer.ggml.pre", "qwen2"],
    );
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A folder with one file changed.
fn folder(name: &str, contents: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("gpt-2").join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join(name), contents).unwrap();
    dir
}

#[test]
fn broken_folders_name_the_file() {
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(
        Tokenizer::from_folder(empty.path()),
        Err(TextError::NoTokenizer { .. })
    ));
    let cases: [(&str, &[u8]); 7] = [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xFF\xFE"),
        ("tokenizer_config.json", b"[]"),
        ("generation_config.json", b"{"),
        ("chat_template.jinja", b"\xFF"),
        (
            "tokenizer.json",
            br#"{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}"#,
        ),
    ];
    for (name, contents) in cases {
        let dir = folder(name, contents);
        let error = Tokenizer::from_folder(dir.path()).expect_err(name).to_string();
        let named = error.contains(name) || error.contains("decoder");
        assert!(named, "{error:?} does not mention {name}");
    }
}

#[test]
fn a_merge_that_would_trip_the_library_is_refused() {
    let text = std::fs::read_to_string(fixture("gpt-2").join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let longest = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .keys()
        .max_by_key(|k| k.len())
        .unwrap()
        .clone();
    for merge in [
        serde_json::json!([longest, longest]),
        serde_json::json!("nonsense"),
        serde_json::json!(["a", "zzz"]),
    ] {
        json["model"]["merges"][0] = merge;
        let dir = folder("tokenizer.json", json.to_string().as_bytes());
        let error = Tokenizer::from_folder(dir.path()).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("model.merges") || said.contains("tokenizer.json"),
            "{said}"
        );
    }
}

#[test]
fn gpt2_files_load_and_lies_in_them_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    put("vocab.json", r#"{"</s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}"#);
    put("merges.txt", "#version: 0.2\na b\n");
    put(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "</s>"}, "eos_token": "</s>", "add_bos_token": true}"#,
    );
    let tokenizer = Tokenizer::from_folder(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("ab a", true).unwrap(), [0, 3, 4, 1]);
    assert_eq!(
        tokenizer.end_of_generation().iter().copied().collect::<Vec<_>>(),
        [0]
    );
    for (name, text) in [
        ("vocab.json", r#"{"a": 1}"#),
        ("merges.txt", "a b c d\nx"),
        ("vocab.json", "7"),
    ] {
        let before = std::fs::read_to_string(dir.path().join(name)).unwrap();
        put(name, text);
        assert!(Tokenizer::from_folder(dir.path()).is_err(), "{name}: {text}");
        put(name, &before);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_gguf_files_do_not_panic(
        at in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        family in prop::sample::select(vec!["gpt-2", "spm-llama", "spm-gemma"]),
    ) {
        let mut bytes = std::fs::read(fixture(family).join("vocab.gguf")).unwrap();
        for (index, byte) in at {
            let i = index.index(bytes.len());
            bytes[i] = byte;
        }
        if let Ok(file) = Gguf::from_bytes(bytes)
            && let Ok(tokenizer) = Tokenizer::from_gguf(&file)
        {
            let ids = tokenizer.encode_prompt("Hello, wörld\n\n<|im_end|> 🙂", true);
            prop_assert!(ids.is_ok());
            tokenizer.decode(&ids.unwrap(), false);
        }
    }

    #[test]
    fn damaged_folders_do_not_panic(
        at in prop::collection::vec((any::<prop::sample::Index>(), b' '..b'~'), 1..4),
        family in prop::sample::select(vec!["gpt-2", "spm-llama"]),
    ) {
        let mut bytes = std::fs::read(fixture(family).join("tokenizer.json")).unwrap();
        for (index, byte) in at {
            let i = index.index(bytes.len());
            bytes[i] = byte;
        }
        let dir = folder("tokenizer.json", &bytes);
        if let Ok(tokenizer) = Tokenizer::from_folder(dir.path()) {
            // A vocabulary that lost a letter may refuse a text; it must only not panic.
            if let Ok(ids) = tokenizer.encode_prompt("Hello, wörld\n\n 🙂", true) {
                tokenizer.decode(&ids, false);
            }
        }
    }
}
