//! The vocabulary in the metadata of a GGUF file (`tokenizer.*` keys).
//!
//! Defaults where a key is absent are llama.cpp's (`llama_vocab::impl::load`).

use crate::TextError;
use crate::pretokenizer::PreTokenizer;
use crate::vocabulary::{Algorithm, Kind, Roles, Vocabulary};
use nash_core::gguf::{Array, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const KINDS: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const MODELS: &str = "gpt2, llama, gemma4";

/// Reads the vocabulary, unchecked.
///
/// # Errors
/// [`TextError::Missing`], [`TextError::Invalid`] or [`TextError::Unsupported`], naming the key.
pub(crate) fn read(origin: &Path, metadata: &BTreeMap<String, Value>) -> Result<Vocabulary, TextError> {
    let keys = Keys {
        file: origin.to_owned(),
        metadata,
    };
    let model = keys
        .string("tokenizer.ggml.model")?
        .ok_or_else(|| keys.missing("tokenizer.ggml.model"))?;
    let tokens = keys
        .strings(TOKENS)?
        .ok_or_else(|| keys.missing(TOKENS))?
        .to_vec();
    let algorithm = match model {
        "gpt2" | "gemma4" => {
            let name = if model == "gemma4" {
                "gemma4"
            } else {
                keys.string("tokenizer.ggml.pre")?.unwrap_or("default")
            };
            Algorithm::Bpe {
                pre: keys.pre_tokenizer(name)?,
                merges: keys.merges()?,
            }
        }
        "llama" => Algorithm::SentencePiece,
        other => return Err(keys.unsupported("tokenizer model", other, MODELS.into())),
    };
    let kinds = match keys.integers(KINDS)? {
        None => vec![Kind::Normal; tokens.len()],
        Some(numbers) => keys.kinds(&numbers)?,
    };
    let scores = match keys.floats(SCORES)? {
        None if matches!(algorithm, Algorithm::Bpe { .. }) => Vec::new(),
        None => return Err(keys.missing(SCORES)),
        Some(scores) => scores,
    };
    let (add_bos, add_eos) = match &algorithm {
        Algorithm::Bpe { pre, .. } => (pre.add_bos, false),
        Algorithm::SentencePiece => (true, false),
    };
    let spaced = !matches!(algorithm, Algorithm::Bpe { .. });
    let roles = keys.roles(&algorithm, tokens.len())?;
    // A default that has no token to add is no request; an explicit flag without a token is an error.
    let add_bos = keys
        .flag("tokenizer.ggml.add_bos_token")?
        .unwrap_or(add_bos && roles.bos.is_some());
    let add_eos = keys
        .flag("tokenizer.ggml.add_eos_token")?
        .unwrap_or(add_eos && roles.eos.is_some());
    Ok(Vocabulary {
        algorithm,
        scores,
        kinds,
        roles,
        stops: keys.ids(&["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"])?,
        // llama.cpp knows no Gemma 4 without one, whatever the file says.
        add_bos: add_bos || (model == "gemma4" && roles.bos.is_some()),
        add_eos,
        add_space_prefix: keys.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(spaced),
        chat_template: keys.string("tokenizer.chat_template")?.map(str::to_owned),
        tokens,
        origin: keys.file,
    })
}

/// The metadata with errors that name the file and the key.
struct Keys<'a> {
    file: PathBuf,
    metadata: &'a BTreeMap<String, Value>,
}

impl<'a> Keys<'a> {
    fn missing(&self, key: &str) -> TextError {
        let hint = "convert the model again with its tokenizer, or use a file that has it";
        TextError::Missing {
            file: self.file.clone(),
            key: key.to_owned(),
            hint,
        }
    }

    fn invalid(&self, key: &str, problem: String) -> TextError {
        TextError::Invalid {
            file: self.file.clone(),
            key: key.to_owned(),
            problem,
        }
    }

    fn unsupported(&self, what: &'static str, name: &str, supported: String) -> TextError {
        TextError::Unsupported {
            file: self.file.clone(),
            what,
            name: name.to_owned(),
            supported,
        }
    }

    /// The value of `key` as seen by `view`; present with another type is an error.
    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        view: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, TextError> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let found = view(value);
        match found {
            Some(found) => Ok(Some(found)),
            None => Err(self.invalid(key, format!("should be {wanted}, but is {}", value.type_name()))),
        }
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, TextError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, TextError> {
        self.typed(key, "a bool", Value::as_bool)
    }

    fn id(&self, key: &str) -> Result<Option<u32>, TextError> {
        self.typed(key, "a token id", |v| {
            v.as_i64().and_then(|id| u32::try_from(id).ok())
        })
    }

    fn ids(&self, keys: &[&str]) -> Result<Vec<u32>, TextError> {
        keys.iter().filter_map(|key| self.id(key).transpose()).collect()
    }

    fn strings(&self, key: &str) -> Result<Option<&'a [String]>, TextError> {
        self.typed(key, "an array of strings", |v| match v.as_array()? {
            Array::String(strings) => Some(strings.as_slice()),
            _ => None,
        })
    }

    fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, TextError> {
        self.typed(key, "an array of integers", |v| match v.as_array()? {
            Array::I32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::I64(v) => Some(v.clone()),
            _ => None,
        })
    }

    fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, TextError> {
        self.typed(key, "an array of floats", |v| match v.as_array()? {
            Array::F32(v) => Some(v.clone()),
            Array::F64(v) => Some(v.iter().map(|&x| x as f32).collect()),
            Array::I32(v) => Some(v.iter().map(|&x| x as f32).collect()),
            _ => None,
        })
    }

    fn pre_tokenizer(&self, name: &str) -> Result<&'static PreTokenizer, TextError> {
        PreTokenizer::by_name(name).ok_or_else(|| {
            self.unsupported(
                "pre-tokenizer (`tokenizer.ggml.pre`)",
                name,
                PreTokenizer::names(),
            )
        })
    }

    fn merges(&self) -> Result<Vec<(String, String)>, TextError> {
        let lines = self.strings(MERGES)?.ok_or_else(|| self.missing(MERGES))?;
        let split = |(rank, line): (usize, &String)| {
            // The left token may itself begin with a space; the separator is the next one.
            let first = line.chars().next().map_or(0, char::len_utf8);
            match line[first..].split_once(' ') {
                Some((rest, right)) => Ok((line[..first + rest.len()].to_owned(), right.to_owned())),
                None => Err(self.invalid(
                    MERGES,
                    format!("has {line:?} at entry {rank}, which is not two tokens"),
                )),
            }
        };
        lines.iter().enumerate().map(split).collect()
    }

    fn kinds(&self, numbers: &[i64]) -> Result<Vec<Kind>, TextError> {
        let kind = |(entry, &number): (usize, &i64)| {
            Kind::from_gguf(number).ok_or_else(|| {
                self.invalid(KINDS, format!("has {number} at entry {entry}; kinds are 0 to 6"))
            })
        };
        numbers.iter().enumerate().map(kind).collect()
    }

    fn roles(&self, algorithm: &Algorithm, tokens: usize) -> Result<Roles, TextError> {
        let default = match algorithm {
            Algorithm::Bpe { .. } => Roles::default(),
            Algorithm::SentencePiece => Roles {
                bos: Some(1),
                eos: Some(2),
                unk: Some(0),
                pad: None,
            },
        };
        let role = |name: &str, default: Option<u32>| {
            let named = self.id(&format!("tokenizer.ggml.{name}_token_id"))?;
            Ok(named.or(default.filter(|&id| (id as usize) < tokens)))
        };
        Ok(Roles {
            bos: role("bos", default.bos)?,
            eos: role("eos", default.eos)?,
            unk: role("unknown", default.unk)?,
            pad: role("padding", default.pad)?,
        })
    }
}
