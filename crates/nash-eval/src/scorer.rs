//! What a measurement needs of a model.

use crate::EvalError;

/// A model whose predictions can be scored.
pub trait Scorer {
    /// Tokens in the vocabulary, V.
    fn vocab(&self) -> usize;

    /// Width of the hidden states, d.
    fn width(&self) -> usize;

    /// The most tokens of a sequence, `None` for no limit.
    fn positions(&self) -> Option<usize>;

    /// Final hidden states `[T, d]`, row-major, of `tokens` as a sequence of its own.
    ///
    /// # Errors
    /// [`EvalError::Model`] if the model fails.
    fn hidden(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError>;

    /// Logits `[rows, V]`, row-major, of hidden states `[rows, d]`.
    ///
    /// # Errors
    /// [`EvalError::Model`] if the model fails.
    fn logits(&mut self, hidden: &[f32], out: &mut [f32]) -> Result<(), EvalError>;
}

/// A [`Scorer`] that remembers what it has read, so that sequences with the same beginning cost that beginning once.
pub trait PrefixScorer: Scorer {
    /// Forgets the sequence so far and makes room for `capacity` tokens.
    ///
    /// # Errors
    /// If the model has fewer positions.
    fn restart(&mut self, capacity: usize) -> Result<(), EvalError>;

    /// Forgets what does not agree with `tokens`, and what follows them; the number of tokens that are kept.
    fn keep_common_prefix(&mut self, tokens: &[u32]) -> usize;

    /// Appends `tokens` to the sequence; their final hidden states `[T, d]`, row-major.
    ///
    /// # Errors
    /// [`EvalError::Model`] if the model fails.
    fn read_on(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError>;
}

/// A model that generates, for speed measurements.
pub trait Decoder {
    /// Tokens in the vocabulary.
    fn vocab(&self) -> usize;

    /// Forgets the sequence so far and makes room for `capacity` tokens.
    ///
    /// # Errors
    /// If the model has fewer positions.
    fn restart(&mut self, capacity: usize) -> Result<(), EvalError>;

    /// Appends `tokens` to the sequence and computes the logits after the last one, from which a sampler would choose.
    ///
    /// # Errors
    /// [`EvalError::Model`] if the model fails.
    fn feed(&mut self, tokens: &[u32]) -> Result<(), EvalError>;
}
