//! [`Tokenizer`]: text to token ids and back, with the special tokens and the marks that end a generation.

use crate::pipeline::{self, Source};
use crate::spelling::Spelling;
use crate::{ChatTemplate, DecodeStream, TextError, chat, folder, gguf, stops};
use nash_core::{Gguf, ModelFile};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::{AddedVocabulary, Model as _, OffsetType, PreTokenizer as _};

/// A tokenizer of a model. Cheap to clone; may be shared between threads.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tokenizer = nash_text::Tokenizer::from_folder("model")?;
/// let ids = tokenizer.encode("Hello, world", true)?;
/// assert_eq!(tokenizer.decode(&ids, true), "Hello, world");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    source: Source,
    /// The added tokens without the special ones, for text that must not contain any.
    text_only: AddedVocabulary,
    spelling: Spelling,
    bos: Option<u32>,
    eos: Option<u32>,
    end_of_generation: BTreeSet<u32>,
    adds_bos: bool,
    adds_eos: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.0.source.origin)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer in the metadata of a GGUF file.
    ///
    /// # Errors
    /// A [`TextError`] naming the file and the metadata key that is missing, contradictory or unsupported.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TextError> {
        let origin = file
            .path()
            .map_or_else(|| PathBuf::from("GGUF data"), Path::to_owned);
        let vocabulary = gguf::read(&origin, file.metadata())?;
        let refused = |message| TextError::Tokenizer {
            file: origin.clone(),
            action: "load",
            message,
        };
        // The inner error is ours; only a panic of the library becomes a message here.
        Self::assemble(folder::caught(|| Ok(pipeline::build(vocabulary))).map_err(refused)??)
    }

    /// The tokenizer of a Hugging Face or packed model folder: `tokenizer.json` (or `vocab.json` and `merges.txt`),
    /// with `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja` where they exist.
    ///
    /// # Errors
    /// A [`TextError`] naming the file at fault.
    pub fn from_folder(dir: impl AsRef<Path>) -> Result<Self, TextError> {
        Self::assemble(folder::read(dir.as_ref())?)
    }

    /// The tokenizer that comes with a model.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_gguf`] and [`Tokenizer::from_folder`].
    pub fn from_model(model: &ModelFile) -> Result<Self, TextError> {
        match model {
            ModelFile::Gguf(file) => Self::from_gguf(file),
            folder => Self::from_folder(folder.path().unwrap_or(Path::new("."))),
        }
    }

    fn assemble(mut source: Source) -> Result<Self, TextError> {
        // Fixed-length training settings that some files carry have no place here.
        let cleared = source
            .pipeline
            .with_truncation(None)
            .map(|p| p.with_padding(None))
            .map(|_| ());
        cleared.map_err(|e| source.failed("load", e))?;
        let spelling = Spelling::new(&source.origin, &source.pipeline)?;
        let mut text_only = source.pipeline.get_added_vocabulary().clone();
        text_only.set_encode_special_tokens(true);

        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let role = |token: &str, key: &str| {
            let by_text =
                folder::token_text(&source.config, token).and_then(|t| source.pipeline.token_to_id(t));
            by_text.or_else(|| match source.generation.get(key)? {
                Value::Array(ids) => id(ids.first()?),
                one => id(one),
            })
        };
        let (bos, eos) = (
            role("bos_token", "bos_token_id"),
            role("eos_token", "eos_token_id"),
        );
        let listed = match source.generation.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        };
        let added = source.pipeline.get_added_tokens_decoder();
        let specials = added
            .iter()
            .filter(|(_, t)| t.special)
            .map(|(&id, t)| (id, t.content.as_str()));
        let end_of_generation = stops::end_of_generation(listed.into_iter().chain(eos), specials);

        let mut inner = Inner {
            source,
            text_only,
            spelling,
            bos,
            eos,
            end_of_generation,
            adds_bos: false,
            adds_eos: false,
        };
        let frame = inner.encode("", true, false)?;
        inner.adds_bos = bos.is_some() && frame.first() == bos.as_ref();
        inner.adds_eos =
            eos.is_some() && frame.len() > usize::from(inner.adds_bos) && frame.last() == eos.as_ref();
        Ok(Self(Arc::new(inner)))
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `generation_config.json` into an
    /// existing folder, so that [`Tokenizer::from_folder`] gives this tokenizer back and `transformers` can load it.
    ///
    /// # Errors
    /// [`TextError::Write`] naming the file.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), TextError> {
        folder::write(&self.0.source, dir.as_ref())
    }

    /// The ids of a text. Special tokens written out in the text stay text, so what a user types can never end a
    /// turn; [`Tokenizer::encode_prompt`] is for text from a chat template. With `add_special`, BOS and EOS are put
    /// around it as the model wants them.
    ///
    /// A run of a million whitespace characters exceeds the step limit of the splitting expressions; the text after it
    /// is then split less finely than it should be, and nothing is lost.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`], for instance for a character that a vocabulary without byte tokens lacks.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.0.encode(text, add_special, false)
    }

    /// The ids of a text in which special tokens, written out, become their ids. Chat templates write BOS
    /// themselves: give their output to this with `add_special` false.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.0.encode(text, add_special, true)
    }

    /// The text of some ids. Bytes that are not UTF-8 become U+FFFD; ids that no token has are skipped. With
    /// `skip_special`, special tokens are too. A [`DecodeStream`] over the same ids gives the same text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = self.decode_stream(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.extend(stream.push(id));
        }
        text.extend(stream.flush());
        text
    }

    /// A streaming decoder for a new text.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream {
        DecodeStream::new(self.clone(), skip_special)
    }

    /// The chat template of the model; see [`ChatTemplate`].
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`] when there is none, [`TextError::Template`] when it does not parse.
    pub fn chat_template(&self) -> Result<ChatTemplate, TextError> {
        chat::of_tokenizer(self)
    }

    /// The id of a token by its text as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.source.pipeline.token_to_id(token)
    }

    /// The text of a token as the vocabulary spells it (`Ġworld`, `▁world`, `<0x0A>`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.0
            .spelling
            .get(id)
            .and_then(|_| self.0.source.pipeline.id_to_token(id))
    }

    /// The bytes that a token stands for, special tokens by their written form; for constrained decoding. Bytes of
    /// one token need not be UTF-8. `None` for an id that no token has (models pad their output layer).
    pub fn id_to_bytes(&self, id: u32) -> Option<&[u8]> {
        self.0.spelling.get(id)
    }

    /// Whether a token is a mark rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.spelling.is_special(id)
    }

    /// One more than the largest id; a model's output layer may be longer.
    pub fn vocab_size(&self) -> usize {
        self.0.spelling.size()
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.0.bos
    }

    /// The token that ends a sequence.
    pub fn eos(&self) -> Option<u32> {
        self.0.eos
    }

    /// All tokens after which a model has nothing more to say: EOS, end of turn, and the like.
    pub fn end_of_generation(&self) -> &BTreeSet<u32> {
        &self.0.end_of_generation
    }

    /// Whether encoding with `add_special` puts BOS first.
    pub fn adds_bos(&self) -> bool {
        self.0.adds_bos
    }

    /// Whether encoding with `add_special` puts EOS last.
    pub fn adds_eos(&self) -> bool {
        self.0.adds_eos
    }

    /// The file or folder it came from.
    pub fn origin(&self) -> &Path {
        &self.0.source.origin
    }

    pub(crate) fn config(&self) -> &Map<String, Value> {
        &self.0.source.config
    }

    pub(crate) fn strips_space(&self) -> bool {
        self.0.spelling.strips_space
    }
}

impl Source {
    fn failed(&self, action: &'static str, error: tokenizers::Error) -> TextError {
        TextError::Tokenizer {
            file: self.origin.clone(),
            action,
            message: error.to_string(),
        }
    }
}

impl Inner {
    fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TextError> {
        let pipeline = &self.source.pipeline;
        let added = if parse_special {
            pipeline.get_added_vocabulary()
        } else {
            &self.text_only
        };
        let run = || {
            let mut pieces = added.extract_and_normalize(pipeline.get_normalizer(), text);
            if let Some(pre) = pipeline.get_pre_tokenizer() {
                pre.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| pipeline.get_model().tokenize(piece.get()))?;
            let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
            pipeline.post_process(encoding, None, add_special)
        };
        let encoding = run().map_err(|e| self.source.failed("encode", e))?;
        Ok(encoding.get_ids().to_vec())
    }
}
