//! Tokenizers of Hugging Face folders: `tokenizer.json` (or GPT-2's `vocab.json` with `merges.txt`),
//! `tokenizer_config.json`, `generation_config.json` and the chat template, read and written.

use crate::TextError;
use crate::pipeline::Source;
use crate::pretokenizer::PreTokenizer;
use crate::vocabulary::{Algorithm, Kind, Roles, Vocabulary};
use serde::de::{self, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const CONFIG: &str = "tokenizer_config.json";
pub(crate) const GENERATION: &str = "generation_config.json";

/// Classes of `transformers` that put BOS and EOS as `tokenizer_config.json` says, whatever `tokenizer.json` holds.
const FRAMED_BY_CONFIG: &[&str] = &[
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "CohereTokenizer",
];

/// Reads a folder.
///
/// # Errors
/// Any [`TextError`] about reading; it names the file.
pub(crate) fn read(dir: &Path) -> Result<Source, TextError> {
    let mut config = object(&dir.join(CONFIG))?;
    if let Some(template) = chat_template(dir)? {
        config.insert("chat_template".into(), template);
    }
    let mut generation = object(&dir.join(GENERATION))?;
    if generation.is_empty() {
        // Older models keep these in config.json.
        let model = object(&dir.join("config.json"))?;
        let ids = ["bos_token_id", "eos_token_id", "pad_token_id"];
        generation = ids
            .iter()
            .filter_map(|&key| Some((key.to_owned(), model.get(key)?.clone())))
            .collect();
    }
    let path = dir.join(TOKENIZER);
    let Some(text) = optional(&path)? else {
        return gpt2(dir, config, generation);
    };
    let mut pipeline = pipeline(&path, &text)?;
    let refused = |message| TextError::Tokenizer {
        file: path.clone(),
        action: "load",
        message,
    };
    if framed_by_config(&config) {
        let role = |flag: &str, default: bool, token: &str| {
            let wanted = config.get(flag).and_then(Value::as_bool).unwrap_or(default);
            token_text(&config, token)
                .filter(|_| wanted)
                .and_then(|text| pipeline.token_to_id(text))
        };
        let (bos, eos) = (
            role("add_bos_token", true, "bos_token"),
            role("add_eos_token", false, "eos_token"),
        );
        crate::pipeline::frame(&mut pipeline, bos, eos).map_err(|e| refused(e.to_string()))?;
    }
    Ok(Source {
        origin: dir.to_owned(),
        pipeline,
        config,
        generation,
    })
}

/// Writes the three files; see [`crate::Tokenizer::save`].
pub(crate) fn write(source: &Source, dir: &Path) -> Result<(), TextError> {
    let json = source
        .pipeline
        .to_string(false)
        .map_err(|e| TextError::Tokenizer {
            file: source.origin.clone(),
            action: "save",
            message: e.to_string(),
        })?;
    let pretty = |map: &Map<String, Value>| format!("{:#}\n", Value::Object(map.clone()));
    for (name, text) in [
        (TOKENIZER, json),
        (CONFIG, pretty(&source.config)),
        (GENERATION, pretty(&source.generation)),
    ] {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|source| TextError::Write { path, source })?;
    }
    Ok(())
}

/// The text of a role such as `bos_token`, which is a string or an object with `content`.
pub(crate) fn token_text<'a>(config: &'a Map<String, Value>, role: &str) -> Option<&'a str> {
    let value = config.get(role)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Runs the library on input it may not expect; a panic inside becomes a message.
pub(crate) fn caught<T>(load: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the contents contradict each other".into()),
    }
}

fn framed_by_config(config: &Map<String, Value>) -> bool {
    let class = config
        .get("tokenizer_class")
        .and_then(Value::as_str)
        .unwrap_or_default();
    FRAMED_BY_CONFIG.contains(&class.strip_suffix("Fast").unwrap_or(class))
}

fn optional(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// A JSON object, empty when the file does not exist.
fn object(path: &Path) -> Result<Map<String, Value>, TextError> {
    let Some(bytes) = optional(path)? else {
        return Ok(Map::new());
    };
    serde_json::from_slice(&bytes).map_err(|source| TextError::Json {
        path: path.to_owned(),
        source,
    })
}

/// A template kept outside `tokenizer_config.json`, which it overrides.
fn chat_template(dir: &Path) -> Result<Option<Value>, TextError> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = optional(&path)? {
        let text = String::from_utf8(bytes).map_err(|e| TextError::Read {
            path,
            source: std::io::Error::new(ErrorKind::InvalidData, e),
        })?;
        return Ok(Some(text.into()));
    }
    Ok(object(&dir.join("chat_template.json"))?.remove("chat_template"))
}

/// The parts of a JSON object, not read yet.
type Parts<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

/// The settings of a BPE model.
#[derive(Default)]
struct Settings {
    dropout: Option<f32>,
    unk_token: Option<String>,
    prefix: String,
    suffix: Option<String>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
}

/// Two tokens that are joined, written as a pair or as a line with a space between them.
enum Merge {
    Pair(String, String),
    /// A line that is no pair; a comment if it begins with `#version`.
    Line(String),
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Merge;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }
            fn visit_str<E: de::Error>(self, line: &str) -> Result<Merge, E> {
                Ok(match line.split_once(' ') {
                    Some((left, right)) if !line.starts_with("#version") => {
                        Merge::Pair(left.into(), right.into())
                    }
                    _ => Merge::Line(line.into()),
                })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Merge, A::Error> {
                match (pair.next_element()?, pair.next_element()?) {
                    (Some(left), Some(right)) if pair.next_element::<IgnoredAny>()?.is_none() => {
                        Ok(Merge::Pair(left, right))
                    }
                    _ => Err(de::Error::custom("a merge is not of two tokens")),
                }
            }
        }
        json.deserialize_any(Reader)
    }
}

/// The pipeline of a `tokenizer.json`.
fn pipeline(path: &Path, text: &[u8]) -> Result<tokenizers::Tokenizer, TextError> {
    let wrong = |source| wrong(path, source);
    let refused = |message| refused(path, message);
    let mut parts: Parts<'_> = serde_json::from_slice(text).map_err(wrong)?;
    let model = parts.get("model").copied().unwrap_or(RawValue::NULL);
    let model: Option<Parts<'_>> = serde_json::from_str(model.get()).map_err(wrong)?;
    let Some(model) = model.filter(is_bpe) else {
        return caught(|| tokenizers::Tokenizer::from_bytes(text)).map_err(refused);
    };
    let model = byte_pairs(path, &model)?;
    let added = parts.remove("added_tokens").unwrap_or(RawValue::NULL);
    let added: Option<Vec<AddedToken>> = serde_json::from_str(added.get()).map_err(wrong)?;
    // The library reads what is left around an empty model.
    let empty = serde_json::value::to_raw_value(&json!({"type": "BPE", "vocab": {}, "merges": []}));
    let empty = empty.map_err(wrong)?;
    parts.insert("model".into(), &empty);
    let rest = serde_json::to_vec(&parts).map_err(wrong)?;
    let assemble = || {
        let mut pipeline = tokenizers::Tokenizer::from_bytes(&rest)?;
        pipeline.with_model(model);
        pipeline.add_tokens(added.unwrap_or_default())?;
        Ok(pipeline)
    };
    caught(assemble).map_err(refused)
}

fn wrong(path: &Path, source: serde_json::Error) -> TextError {
    TextError::Json {
        path: path.to_owned(),
        source,
    }
}

fn refused(path: &Path, message: String) -> TextError {
    TextError::Tokenizer {
        file: path.to_owned(),
        action: "load",
        message,
    }
}

fn is_bpe(model: &Parts<'_>) -> bool {
    let kind = model.get("type").map(|kind| kind.get());
    model.get("merges").is_some_and(|merges| merges.get() != "null")
        && kind.is_none_or(|kind| kind == "\"BPE\"" || kind == "null")
}

/// A part of the model; its default if it is missing or null.
fn part<'a, T: Deserialize<'a> + Default>(parts: &Parts<'a>, name: &str) -> serde_json::Result<T> {
    let json = parts.get(name).copied().unwrap_or(RawValue::NULL);
    Ok(serde_json::from_str::<Option<T>>(json.get())?.unwrap_or_default())
}

/// A BPE model whose merges each join two tokens into a third. Read here rather than by the library, which goes over every token three
/// times; vocabulary and merges are read side by side.
fn byte_pairs(path: &Path, parts: &Parts<'_>) -> Result<BPE, TextError> {
    let wrong = |source| wrong(path, source);
    let settings = settings(parts).map_err(wrong)?;
    let read_merges = || part::<Vec<Merge>>(parts, "merges");
    let (vocab, merges) = std::thread::scope(|scope| {
        let merges = scope.spawn(read_merges);
        (part::<Vocab>(parts, "vocab"), merges.join())
    });
    let vocab = vocab.map_err(wrong)?;
    let merges = merges.unwrap_or_else(|_| read_merges()).map_err(wrong)?;
    let lines = |merge: &Merge| matches!(merge, Merge::Line(_));
    // The library takes prefixes on trust; without one, it finds what is wrong, and it is looked for here only then.
    if !settings.prefix.is_empty() || merges.iter().any(lines) {
        check_merges(path, &settings.prefix, &vocab, &merges)?;
    }
    let pairs = merges.into_iter().filter_map(|merge| match merge {
        Merge::Pair(left, right) => Some((left, right)),
        Merge::Line(_) => None,
    });
    let builder = settings.apply(BPE::builder().vocab_and_merges(vocab, pairs.collect()));
    caught(|| builder.build()).map_err(|message| {
        let again = || {
            let (vocab, merges) = (part::<Vocab>(parts, "vocab"), read_merges());
            check_merges(path, "", &vocab.map_err(wrong)?, &merges.map_err(wrong)?)
        };
        again().err().unwrap_or_else(|| refused(path, message))
    })
}

fn settings(parts: &Parts<'_>) -> serde_json::Result<Settings> {
    Ok(Settings {
        dropout: part(parts, "dropout")?,
        unk_token: part(parts, "unk_token")?,
        prefix: part(parts, "continuing_subword_prefix")?,
        suffix: part(parts, "end_of_word_suffix")?,
        fuse_unk: part(parts, "fuse_unk")?,
        byte_fallback: part(parts, "byte_fallback")?,
        ignore_merges: part(parts, "ignore_merges")?,
    })
}

impl Settings {
    fn apply(self, mut builder: BpeBuilder) -> BpeBuilder {
        builder = builder
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        if let Some(dropout) = self.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(unk) = self.unk_token {
            builder = builder.unk_token(unk);
        }
        if !self.prefix.is_empty() {
            builder = builder.continuing_subword_prefix(self.prefix);
        }
        match self.suffix {
            Some(suffix) => builder.end_of_word_suffix(suffix),
            None => builder,
        }
    }
}

/// Looks for the first merge that does not join two tokens into a third.
fn check_merges(path: &Path, prefix: &str, vocab: &Vocab, merges: &[Merge]) -> Result<(), TextError> {
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let sound = match merge {
            Merge::Pair(left, right) => {
                joined.clear();
                joined.push_str(left);
                right
                    .strip_prefix(prefix)
                    .inspect(|rest| joined.push_str(rest))
                    .is_some_and(|_| {
                        [left, right, &joined]
                            .into_iter()
                            .all(|token| vocab.contains_key(token))
                    })
            }
            Merge::Line(line) => line.starts_with("#version"),
        };
        if !sound {
            let problem = format!("has an entry {rank} that does not join two tokens into a third");
            return Err(TextError::Invalid {
                file: path.to_owned(),
                key: "model.merges".into(),
                problem,
            });
        }
    }
    Ok(())
}

/// GPT-2's two files (GPT-2, OPT): byte-level BPE with GPT-2's pre-tokenizer.
fn gpt2(dir: &Path, config: Map<String, Value>, generation: Map<String, Value>) -> Result<Source, TextError> {
    let (vocab_path, merges_path) = (dir.join("vocab.json"), dir.join("merges.txt"));
    let (Some(vocab), Some(merges)) = (optional(&vocab_path)?, optional(&merges_path)?) else {
        return Err(TextError::NoTokenizer { dir: dir.to_owned() });
    };
    let ids: BTreeMap<String, u32> = serde_json::from_slice(&vocab).map_err(|source| TextError::Json {
        path: vocab_path.clone(),
        source,
    })?;
    let invalid = |path: &Path, problem: String| TextError::Invalid {
        file: path.to_owned(),
        key: "entries".into(),
        problem,
    };
    let mut tokens = vec![None; ids.len()];
    for (token, id) in ids {
        match tokens.get_mut(id as usize) {
            Some(slot @ None) => *slot = Some(token),
            _ => {
                return Err(invalid(
                    &vocab_path,
                    format!("give {token:?} the id {id}, out of range or taken"),
                ));
            }
        }
    }
    let tokens: Vec<String> = tokens.into_iter().flatten().collect();
    let merges = String::from_utf8_lossy(&merges);
    let merges = merges
        .lines()
        .filter(|l| !l.starts_with("#version") && !l.is_empty())
        .map(|line| {
            let pair = line.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned()));
            pair.ok_or_else(|| invalid(&merges_path, format!("include {line:?}, which is not two tokens")))
        });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    let pre = PreTokenizer::by_name("gpt-2").ok_or_else(|| TextError::NoTokenizer { dir: dir.to_owned() })?;
    let id = |role: &str| {
        token_text(&config, role)
            .and_then(|t| tokens.iter().position(|x| x == t))
            .map(|i| i as u32)
    };
    let roles = Roles {
        bos: id("bos_token"),
        eos: id("eos_token"),
        unk: id("unk_token"),
        pad: id("pad_token"),
    };
    let marks = [roles.bos, roles.eos, roles.unk, roles.pad];
    let kind = |i: usize| {
        if marks.contains(&Some(i as u32)) {
            Kind::Control
        } else {
            Kind::Normal
        }
    };
    let flag = |name: &str| config.get(name).and_then(Value::as_bool).unwrap_or(false);
    let vocabulary = Vocabulary {
        origin: dir.to_owned(),
        algorithm: Algorithm::Bpe { pre, merges },
        kinds: (0..tokens.len()).map(kind).collect(),
        scores: Vec::new(),
        stops: Vec::new(),
        add_bos: flag("add_bos_token") && roles.bos.is_some(),
        add_eos: flag("add_eos_token") && roles.eos.is_some(),
        add_space_prefix: false,
        chat_template: None,
        tokens,
        roles,
    };
    let built = crate::pipeline::build(vocabulary)?;
    Ok(Source {
        config,
        generation,
        ..built
    })
}
