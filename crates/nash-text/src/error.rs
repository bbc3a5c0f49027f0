//! Everything that can go wrong with a tokenizer or a chat template: which file, which key, what to do.

use std::path::PathBuf;

/// An error of this crate. Every variant names the file it came from and says what can be done about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A metadata key or JSON field that the tokenizer cannot do without.
    #[error("{file}: `{key}` is missing: the file carries no usable tokenizer; {hint}")]
    Missing {
        /// The model file or folder.
        file: PathBuf,
        /// The GGUF metadata key or the JSON field.
        key: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A metadata key or JSON field whose value contradicts the rest of the file.
    #[error(
        "{file}: `{key}` {problem}; the file is damaged or was converted wrongly, download or convert it again"
    )]
    Invalid {
        /// The model file or folder.
        file: PathBuf,
        /// The GGUF metadata key or the JSON field.
        key: String,
        /// What is wrong with it, with the offending values.
        problem: String,
    },
    /// A tokenizer algorithm, pre-tokenizer or decoder that this crate does not implement.
    #[error("{file}: {what} `{name}` is not supported; supported are {supported}")]
    Unsupported {
        /// The model file or folder.
        file: PathBuf,
        /// The kind of thing: "tokenizer model", "pre-tokenizer", "decoder".
        what: &'static str,
        /// Its name in the file.
        name: String,
        /// The names that would have worked.
        supported: String,
    },
    /// A folder in which no tokenizer was found.
    #[error(
        "{dir}: found neither tokenizer.json nor vocab.json with merges.txt; download the tokenizer files of the \
         model too, or convert a tokenizer.model with transformers' `AutoTokenizer(..).save_pretrained(..)`"
    )]
    NoTokenizer {
        /// The folder searched.
        dir: PathBuf,
    },
    /// A file could not be read.
    #[error("{path}: cannot be read: {source}; check that it exists and that you may read it")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("{path}: cannot be written: {source}; check the free space and the permissions of the folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A JSON file that is not JSON, or not of the expected shape.
    #[error("{path}: is not valid: {source}; download the file again")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },
    /// The `tokenizers` library refused a tokenizer or a text.
    #[error("{file}: the tokenizer failed to {action}: {message}")]
    Tokenizer {
        /// The model file or folder.
        file: PathBuf,
        /// "load", "encode" or "save".
        action: &'static str,
        /// The library's message.
        message: String,
    },
    /// The model has no chat template, and its vocabulary does not suggest one.
    #[error(
        "{file}: the model has no chat template, so it is probably a base model that continues text; \
         give it plain text, or choose a template yourself (ChatML is the most common)"
    )]
    NoChatTemplate {
        /// The model file or folder.
        file: PathBuf,
    },
    /// The chat template does not parse, refused the messages, or ran past its limits.
    #[error("{file}: the chat template failed: {message}")]
    Template {
        /// The model file or folder.
        file: PathBuf,
        /// The template engine's message with line number, or the template's own `raise_exception` text.
        message: String,
    },
}
