//! A vocabulary as GGUF metadata (or GPT-2's `vocab.json` and `merges.txt`) gives it, checked once.
//!
//! After [`Vocabulary::check`] every id is in range, every token is distinct and not empty, and every merge
//! joins two tokens into a third; the rest of the crate relies on it.

use crate::TextError;
use crate::pretokenizer::PreTokenizer;
use std::collections::HashMap;
use std::path::PathBuf;

/// The longest token accepted, bytes. The longest in use are runs of 512 spaces.
const MAX_TOKEN_BYTES: usize = 4096;

/// What a token is; the numbering is that of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Text.
    Normal,
    /// Stands for what cannot be spelt.
    Unknown,
    /// A mark that text never produces, such as `<|im_end|>`.
    Control,
    /// Text that is always one token, found before anything else.
    UserDefined,
    /// Fills a gap in the numbering.
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

impl Kind {
    /// The kind numbered `n` in GGUF metadata.
    pub(crate) fn from_gguf(n: i64) -> Option<Kind> {
        Some(match n {
            0 | 1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => return None,
        })
    }

    /// Whether ordinary text can become this token.
    pub(crate) fn is_text(self) -> bool {
        matches!(self, Kind::Normal | Kind::UserDefined | Kind::Unused)
    }
}

/// The algorithm that turns text into tokens.
#[derive(Debug)]
pub(crate) enum Algorithm {
    /// Byte pair encoding with merges in order of rank, over pieces cut by a pre-tokenizer.
    Bpe {
        pre: &'static PreTokenizer,
        merges: Vec<(String, String)>,
    },
    /// SentencePiece's byte pair encoding: the pair whose union has the highest score is joined first.
    SentencePiece,
}

/// Ids of tokens with a role; all in range after [`Vocabulary::check`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Roles {
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) unk: Option<u32>,
    pub(crate) pad: Option<u32>,
}

/// A vocabulary before it becomes a tokenizer.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    /// The file it came from, for messages.
    pub(crate) origin: PathBuf,
    pub(crate) algorithm: Algorithm,
    /// Text of each token, by id.
    pub(crate) tokens: Vec<String>,
    /// Score of each token, or empty where the algorithm needs none.
    pub(crate) scores: Vec<f32>,
    /// Kind of each token.
    pub(crate) kinds: Vec<Kind>,
    pub(crate) roles: Roles,
    /// Further tokens that end a generation, as the file names them.
    pub(crate) stops: Vec<u32>,
    pub(crate) add_bos: bool,
    pub(crate) add_eos: bool,
    /// Whether a space is put before the text (SentencePiece's dummy prefix).
    pub(crate) add_space_prefix: bool,
    pub(crate) chat_template: Option<String>,
}

impl Vocabulary {
    fn invalid(&self, key: &str, problem: String) -> TextError {
        TextError::Invalid {
            file: self.origin.clone(),
            key: key.to_owned(),
            problem,
        }
    }

    /// Checks all invariants and drops the unused tokens that only pad the end.
    ///
    /// # Errors
    /// [`TextError::Invalid`] naming the metadata key at fault.
    pub(crate) fn check(&mut self) -> Result<(), TextError> {
        let n = self.tokens.len();
        if n == 0 || n > crate::MAX_VOCABULARY {
            return Err(self.invalid("tokenizer.ggml.tokens", format!("has {n} entries")));
        }
        if self.kinds.len() != n {
            let problem = format!("has {} entries for {n} tokens", self.kinds.len());
            return Err(self.invalid("tokenizer.ggml.token_type", problem));
        }
        let scored = !matches!(self.algorithm, Algorithm::Bpe { .. });
        if scored && self.scores.len() != n {
            let problem = format!("has {} entries for {n} tokens", self.scores.len());
            return Err(self.invalid("tokenizer.ggml.scores", problem));
        }
        if let Some(i) = self.scores.iter().position(|s| !s.is_finite()) {
            return Err(self.invalid(
                "tokenizer.ggml.scores",
                format!("has {} at entry {i}", self.scores[i]),
            ));
        }
        self.check_roles()?;
        for (i, token) in self.tokens.iter_mut().enumerate().filter(|(_, t)| t.is_empty()) {
            *token = format!("[EMPTY_{i}]"); // llama.cpp's spelling
        }
        let Roles { bos, eos, unk, pad } = self.roles;
        let named = [bos, eos, unk, pad]
            .into_iter()
            .flatten()
            .chain(self.stops.iter().copied());
        let last_named = named.max().map_or(0, |id| id as usize + 1);
        let used = self
            .kinds
            .iter()
            .rposition(|&k| k != Kind::Unused)
            .map_or(n, |last| last + 1)
            .max(last_named);
        self.tokens.truncate(used);
        self.kinds.truncate(used);
        self.scores.truncate(used);
        let ids = self.index()?;
        self.check_merges(&ids)
    }

    /// The id of each token's text.
    ///
    /// # Errors
    /// [`TextError::Invalid`] when two tokens are the same or one is absurdly long.
    pub(crate) fn index(&self) -> Result<HashMap<&str, u32>, TextError> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if token.len() > MAX_TOKEN_BYTES {
                let problem = format!("has a token of {} bytes at entry {id}", token.len());
                return Err(self.invalid("tokenizer.ggml.tokens", problem));
            }
            if let Some(first) = ids.insert(token.as_str(), id as u32) {
                let problem = format!("has {token:?} at entries {first} and {id}");
                return Err(self.invalid("tokenizer.ggml.tokens", problem));
            }
        }
        Ok(ids)
    }

    fn check_roles(&self) -> Result<(), TextError> {
        let Roles { bos, eos, unk, pad } = self.roles;
        let named = [("bos", bos), ("eos", eos), ("unknown", unk), ("padding", pad)];
        let stops = self.stops.iter().map(|&id| ("eot", Some(id)));
        for (role, id) in named.into_iter().chain(stops) {
            if let Some(id) = id.filter(|&id| id as usize >= self.tokens.len()) {
                let problem = format!("is {id}, but there are {} tokens", self.tokens.len());
                return Err(self.invalid(&format!("tokenizer.ggml.{role}_token_id"), problem));
            }
        }
        for (key, wanted, id) in [
            ("add_bos_token", self.add_bos, bos),
            ("add_eos_token", self.add_eos, eos),
        ] {
            if wanted && id.is_none() {
                let problem = "asks for a token that the file does not name".to_owned();
                return Err(self.invalid(&format!("tokenizer.ggml.{key}"), problem));
            }
        }
        Ok(())
    }

    fn check_merges(&self, ids: &HashMap<&str, u32>) -> Result<(), TextError> {
        let Algorithm::Bpe { merges, .. } = &self.algorithm else {
            return Ok(());
        };
        let mut joined = String::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let unknown = [left, right, &joined]
                .into_iter()
                .find(|t| !ids.contains_key(t.as_str()));
            if let Some(token) = unknown {
                let problem =
                    format!("merges {left:?} and {right:?} at entry {rank}, but {token:?} is no token");
                return Err(self.invalid("tokenizer.ggml.merges", problem));
            }
        }
        Ok(())
    }
}
