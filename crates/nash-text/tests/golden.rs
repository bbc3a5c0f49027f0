//! Golden tests: ids and texts that Hugging Face `transformers` and Google's `sentencepiece` gave for small
//! tokenizers of each family (`fixtures/make_fixtures.py`), and prompts that `transformers` rendered.

use nash_core::Gguf;
use nash_text::{ChatTemplate, RenderOptions, Tokenizer};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

const FAMILIES: [&str; 9] = [
    "gpt-2",
    "smollm",
    "llama-bpe",
    "qwen2",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "spm-llama",
    "spm-gemma",
];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn json<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    let path = fixture(name);
    let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[derive(Deserialize)]
struct Expected {
    plain: Vec<Plain>,
    prompts: Vec<Prompt>,
    framed: Prompt,
}

#[derive(Deserialize)]
struct Plain {
    ids: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    ids: Vec<u32>,
}

/// Every way to one tokenizer: from GGUF, from the folder, and saved and loaded from each.
fn ways(family: &str) -> Vec<(&'static str, Tokenizer)> {
    let gguf =
        Tokenizer::from_gguf(&Gguf::open(fixture(family).join("vocab.gguf")).expect("sound")).expect("sound");
    let folder = Tokenizer::from_folder(fixture(family)).expect("sound");
    let saved = |tokenizer: &Tokenizer| {
        let dir = tempfile::tempdir().expect("a folder");
        tokenizer.save(dir.path()).expect("saved");
        Tokenizer::from_folder(dir.path()).expect("sound")
    };
    let (gguf_saved, folder_saved) = (saved(&gguf), saved(&folder));
    vec![
        ("gguf", gguf),
        ("folder", folder),
        ("gguf, saved", gguf_saved),
        ("folder, saved", folder_saved),
    ]
}

#[test]
fn ids_and_texts_are_those_of_the_oracles() {
    let texts: Vec<String> = json("texts.json");
    let mut wrong = Vec::new();
    let mut check = |what: String, same: bool| {
        if !same {
            wrong.push(what);
        }
    };
    for family in FAMILIES {
        let expected: Expected = json(&format!("{family}/expected.json"));
        assert_eq!(texts.len(), expected.plain.len());
        for (way, tokenizer) in ways(family) {
            for (text, plain) in texts.iter().zip(&expected.plain) {
                let ids = tokenizer.encode(text, false).unwrap();
                check(
                    format!("{family} ({way}): {text:?}: {:?} but {ids:?}", plain.ids),
                    ids == plain.ids,
                );
                let back = tokenizer.decode(&plain.ids, true);
                check(
                    format!("{family} ({way}): {:?} but decoded {back:?}", plain.decoded),
                    back == plain.decoded,
                );
            }
            for Prompt { text, ids } in &expected.prompts {
                let got = tokenizer.encode_prompt(text, false).unwrap();
                check(
                    format!("{family} ({way}): prompt {text:?}: {ids:?} but {got:?}"),
                    got == *ids,
                );
            }
            let Prompt { text, ids } = &expected.framed;
            let got = tokenizer.encode(text, true).unwrap();
            check(
                format!("{family} ({way}): framed {ids:?} but {got:?}"),
                got == *ids,
            );
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differences:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn all_ways_agree_on_roles_and_bytes() {
    for family in FAMILIES {
        let ways = ways(family);
        let (_, first) = &ways[0];
        for (way, other) in &ways[1..] {
            assert_eq!(first.bos(), other.bos(), "{family} ({way})");
            assert_eq!(first.eos(), other.eos(), "{family} ({way})");
            assert_eq!(first.adds_bos(), other.adds_bos(), "{family} ({way})");
            assert_eq!(first.adds_eos(), other.adds_eos(), "{family} ({way})");
            assert_eq!(
                first.end_of_generation(),
                other.end_of_generation(),
                "{family} ({way})"
            );
            assert_eq!(first.vocab_size(), other.vocab_size(), "{family} ({way})");
            for id in 0..first.vocab_size() as u32 + 2 {
                assert_eq!(
                    first.id_to_bytes(id),
                    other.id_to_bytes(id),
                    "{family} ({way}): token {id}"
                );
                assert_eq!(
                    first.is_special(id),
                    other.is_special(id),
                    "{family} ({way}): token {id}"
                );
            }
        }
        assert!(!first.end_of_generation().is_empty(), "{family}");
    }
}

#[test]
fn streaming_gives_the_decoded_text_and_only_whole_characters() {
    let texts: Vec<String> = json("texts.json");
    for family in FAMILIES {
        for (way, tokenizer) in ways(family).into_iter().take(1) {
            for text in &texts {
                let ids = tokenizer.encode(text, true).unwrap();
                for skip_special in [false, true] {
                    let mut stream = tokenizer.decode_stream(skip_special);
                    let mut streamed = String::new();
                    for &id in &ids {
                        let piece = stream.push(id);
                        assert_ne!(piece.as_deref(), Some(""));
                        streamed.extend(piece);
                    }
                    let complete = !streamed.contains('\u{FFFD}') || text.contains('\u{FFFD}');
                    assert!(complete, "{family} ({way}): {text:?} streamed as {streamed:?}");
                    streamed.extend(stream.flush());
                    assert_eq!(streamed, tokenizer.decode(&ids, skip_special), "{family} ({way})");
                }
            }
        }
    }
}

#[test]
fn a_stream_that_continues_a_prompt_keeps_its_first_space() {
    let tokenizer = Tokenizer::from_folder(fixture("spm-llama")).unwrap();
    let the = tokenizer.token_to_id("▁the").unwrap();
    assert_eq!(tokenizer.decode_stream(true).push(the).as_deref(), Some("the"));
    assert_eq!(
        tokenizer.decode_stream(true).continuing().push(the).as_deref(),
        Some(" the")
    );
}

#[test]
fn plain_text_never_becomes_a_special_token() {
    for family in FAMILIES {
        for (way, tokenizer) in ways(family) {
            let specials: Vec<u32> = (0..tokenizer.vocab_size() as u32)
                .filter(|&id| tokenizer.is_special(id))
                .collect();
            assert!(specials.len() >= 2, "{family} ({way})");
            for &id in &specials {
                let mark = tokenizer.id_to_token(id).unwrap();
                let unknown = ["<unk>", "▁⁇▁"].contains(&mark.as_str());
                let ids = tokenizer.encode(&format!("a {mark}b{mark}"), false).unwrap();
                let slipped = ids.iter().any(|&id| {
                    tokenizer.is_special(id) && tokenizer.id_to_token(id).as_deref() != Some("<unk>")
                });
                assert!(
                    !slipped || unknown,
                    "{family} ({way}): {mark} became special in {ids:?}"
                );
                let parsed = tokenizer.encode_prompt(&mark, false).unwrap();
                assert_eq!(parsed, [id], "{family} ({way}): {mark}");
            }
        }
    }
}

#[derive(Deserialize)]
struct Chats {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<Value>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn prompts_are_those_of_transformers() {
    let chats: Chats = json("chats.json");
    let mut refused = 0;
    for case in chats.cases {
        let template = ChatTemplate::new(&case.template, &chats.templates[&case.template]).unwrap();
        let template = template
            .with_token("bos_token", "<s>")
            .with_token("eos_token", "</s>");
        let options = RenderOptions {
            add_generation_prompt: case.add_generation_prompt,
            tools: case.tools,
            ..RenderOptions::default()
        };
        let rendered = template.render(&case.messages, &options);
        let conversation = serde_json::to_string(&case.messages).unwrap();
        match (case.text, case.error) {
            (Some(text), _) => assert_eq!(rendered.unwrap(), text, "{}: {conversation}", case.template),
            (None, error) => {
                refused += 1;
                let (got, error) = (rendered.unwrap_err().to_string(), error.unwrap());
                // Refusals are worded by the template; failures of Jinja itself are not.
                if error.contains("must alternate") || error.contains("single tool-calls") {
                    assert!(got.contains(&error), "{got} instead of {error}");
                }
            }
        }
    }
    assert!(refused > 0);
}
