//! What can go wrong in a measurement, with the values that a reader needs to mend it.

/// An error of a measurement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The text has fewer tokens than one window.
    #[error("the text has {tokens} tokens, one window needs {ctx}; use a longer text or a smaller --ctx")]
    TextTooShort {
        /// Tokens in the text.
        tokens: usize,
        /// Tokens in a window.
        ctx: usize,
    },
    /// A window of this size has no position to score.
    #[error("a context of {ctx} tokens leaves nothing to score; use at least 3")]
    ContextTooSmall {
        /// Tokens in a window.
        ctx: usize,
    },
    /// The number of windows asked for is zero.
    #[error("zero windows were asked for; use --chunks 1 or more")]
    NoWindows,
    /// The window is longer than the model's positions.
    #[error("a context of {ctx} tokens is longer than the {limit} positions of the model")]
    ContextTooLong {
        /// Tokens in a window.
        ctx: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// Two models that are compared have different vocabularies.
    #[error(
        "the model has {model} tokens in its vocabulary, the reference {reference}; they cannot be compared"
    )]
    VocabularyMismatch {
        /// Vocabulary of the model.
        model: usize,
        /// Vocabulary of the reference.
        reference: usize,
    },
    /// A token of the text is not in the model's vocabulary.
    #[error(
        "token {token} of the text is outside the vocabulary of {vocab}: the tokenizer is not the model's"
    )]
    TokenOutOfVocabulary {
        /// The token.
        token: u32,
        /// Vocabulary of the model.
        vocab: usize,
    },
    /// A logit is NaN or infinite.
    #[error(
        "the logit of token {token} at position {position} of window {window} is {value}: the model is damaged"
    )]
    NonFinite {
        /// Window, from 0.
        window: usize,
        /// Position in the window, from 0.
        position: usize,
        /// Token whose logit it is.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// A question, with its examples, is longer than the model's positions.
    #[error(
        "the question of line {line} has {tokens} tokens, its examples included; the model has {limit} positions"
    )]
    PromptTooLong {
        /// Line of the question in its file.
        line: usize,
        /// Tokens to be read.
        tokens: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A question whose prompt has no token that could predict the answer.
    #[error("the question of line {line} is empty for this tokenizer")]
    NothingToScore {
        /// Line of the question in its file.
        line: usize,
    },
    /// A logit that scores an answer is NaN or infinite.
    #[error("the logit of token {token} after the question of line {line} is {value}: the model is damaged")]
    NonFiniteAnswer {
        /// Line of the question in its file.
        line: usize,
        /// Token whose logit it is.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// A speed measurement with nothing to measure.
    #[error(
        "nothing to measure: prompt tokens, generated tokens and repeats are {prompt}, {generate}, {repeats}"
    )]
    NothingToMeasure {
        /// Prompt tokens asked for.
        prompt: usize,
        /// Generated tokens asked for.
        generate: usize,
        /// Repeats asked for.
        repeats: usize,
    },
    /// A game refused its inputs.
    #[error(transparent)]
    Game(#[from] nash_games::GameError),
    /// The caller asked to stop.
    #[error("stopped")]
    Cancelled,
    /// A text cannot be tokenised.
    #[error("cannot tokenise a question")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The model failed.
    #[error("the model failed")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl EvalError {
    /// Wraps an error of a model.
    pub fn model(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Model(Box::new(error))
    }

    /// Wraps an error of a tokenizer.
    pub fn encode(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Encode(Box::new(error))
    }
}
