//! Errors of this crate: what went wrong, with the values that a reader needs to act.

use nash_core::CoreError;

/// Anything that can fail while a model is configured, loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file names an architecture that is not in the table.
    #[error("unknown architecture \"{found}\"; known: {known}")]
    UnknownArchitecture {
        /// `model_type` of `config.json` or `general.architecture` of a GGUF file.
        found: String,
        /// The names that would have worked, separated by commas.
        known: String,
    },
    /// The architecture is known, this variant of it is not implemented.
    #[error("{architecture}: {what} is not supported")]
    Unsupported {
        /// Family name.
        architecture: String,
        /// The feature that is missing, with the value found.
        what: String,
    },
    /// A configuration key is missing or has a value that makes no sense.
    #[error("model configuration: {key}: {problem}")]
    Config {
        /// The key, or the keys that were tried.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that the configuration calls for is not in the file.
    #[error("{file}: tensor {tensor} is missing (looked for {tried}); is the download complete?")]
    MissingTensor {
        /// The model file or folder.
        file: String,
        /// Canonical name.
        tensor: String,
        /// Names tried in the file.
        tried: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{file}: tensor {tensor} has shape {found:?}, the configuration needs {expected:?}")]
    WrongShape {
        /// The model file or folder.
        file: String,
        /// Name in the file.
        tensor: String,
        /// Shape that the configuration implies, outermost first.
        expected: Vec<usize>,
        /// Shape found.
        found: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("tensor {tensor}, row {row}, column {col}: {value} is not a finite number; the file is damaged")]
    NotFinite {
        /// Canonical name.
        tensor: String,
        /// Row (0 for vectors).
        row: usize,
        /// Column.
        col: usize,
        /// The value found.
        value: f32,
    },
    /// A linear of this name does not exist.
    #[error("the model has no linear named {name}")]
    NoSuchLinear {
        /// The name asked for.
        name: String,
    },
    /// A float tensor of this name does not exist.
    #[error("the model has no float tensor named {name}")]
    NoSuchFloat {
        /// The name asked for.
        name: String,
    },
    /// A token id is outside the vocabulary.
    #[error("token {id} is outside the vocabulary of {vocab} tokens")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// More tokens than the KV cache holds.
    #[error(
        "{needed} tokens do not fit into a context of {capacity}; shorten the prompt or raise the context size"
    )]
    ContextOverflow {
        /// Positions needed.
        needed: usize,
        /// Positions available.
        capacity: usize,
    },
    /// A call with no tokens.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// A sampling parameter outside its range.
    #[error("sampling: {name} = {value} is outside {range}")]
    BadSampling {
        /// Name of the parameter.
        name: &'static str,
        /// The value given.
        value: f32,
        /// The range allowed.
        range: &'static str,
    },
    /// A KV cache made for another model.
    #[error("the KV cache was made for another model: {problem}")]
    CacheMismatch {
        /// What differs.
        problem: String,
    },
    /// The file could not be read.
    #[error(transparent)]
    Core(#[from] CoreError),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;
