//! Tokenizers, chat templates and streaming detokenization.
//!
//! A [`Tokenizer`] comes from the metadata of a GGUF file or from a Hugging Face folder, and encodes, decodes and
//! saves itself the same in both cases. [`DecodeStream`] turns tokens into text as they are generated, and
//! [`ChatTemplate`] turns a conversation into a prompt.
//!
//! Invariants:
//! - decoding is the concatenation of the tokens' bytes, so streaming and decoding at once agree exactly;
//! - plain text never becomes a special token ([`Tokenizer::encode`]); only text from a template may
//!   ([`Tokenizer::encode_prompt`]);
//! - whatever a file holds, the outcome is a tokenizer or a [`TextError`], never a panic.

#[cfg(test)]
mod attacks;
mod chat;
mod error;
mod folder;
mod gguf;
mod pipeline;
mod pretokenizer;
mod spelling;
mod spm;
mod stops;
mod stream;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatTemplate, FUEL, Message, RenderOptions};
pub use error::TextError;
pub use stream::DecodeStream;
pub use tokenizer::Tokenizer;

/// The largest vocabulary accepted, tokens; the largest in use have 262 144.
pub(crate) const MAX_VOCABULARY: usize = 1 << 24;
