//! Generation: an iterator over tokens.

use std::collections::BTreeSet;

use crate::cache::KvCache;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::sampler::Sampler;

/// Tokens of a prefill step.
pub const PREFILL_CHUNK: usize = 512;

/// Limits of a generation.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// Tokens that end it; they are not given out.
    pub end_of_generation: BTreeSet<u32>,
    /// Most tokens to give out; `None` for as many as fit.
    pub max_new_tokens: Option<usize>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model ended its text with this token.
    EndOfGeneration(u32),
    /// [`GenerateOptions::max_new_tokens`] were given out.
    MaxTokens,
    /// The KV cache is full.
    ContextFull,
}

/// Prompt tokens done and to do, told after every prefill step.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Generates tokens one by one: `for token in generator { … }`.
///
/// After an error or a finish it gives `None` for ever. The cache holds every token given out except the last one;
/// a later generation on the same cache whose prompt starts with the same tokens computes only what is new.
pub struct Generator<'m> {
    model: &'m Model,
    cache: &'m mut KvCache,
    sampler: Sampler,
    options: GenerateOptions,
    /// Prompt and output so far.
    tokens: Vec<u32>,
    generated: usize,
    /// Logits of the next token.
    logits: Vec<f32>,
    finish: Option<FinishReason>,
    failed: bool,
}

impl<'m> Generator<'m> {
    /// Runs the prompt, in chunks of [`PREFILL_CHUNK`] tokens. Leading tokens that the cache already holds are not
    /// computed again.
    ///
    /// # Errors
    /// The prompt is empty or does not fit into the cache, or a token is outside the vocabulary.
    pub fn new(
        model: &'m Model,
        cache: &'m mut KvCache,
        sampler: Sampler,
        prompt: &[u32],
        options: GenerateOptions,
    ) -> Result<Self> {
        Self::with_progress(model, cache, sampler, prompt, (options, &mut |_, _| {}))
    }

    /// [`Self::new`] that tells how far the prompt is.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_progress(
        model: &'m Model,
        cache: &'m mut KvCache,
        sampler: Sampler,
        prompt: &[u32],
        (options, progress): (GenerateOptions, Progress<'_>),
    ) -> Result<Self> {
        let Some(last) = prompt.len().checked_sub(1) else {
            return Err(ModelError::EmptyPrompt);
        };
        cache.check(model.config(), prompt.len())?;
        // The last token is computed in any case: its logits are needed.
        let reused = cache.keep_common_prefix(&prompt[..last]);
        let mut done = reused;
        let mut generator = Self {
            model,
            cache,
            sampler,
            options,
            tokens: prompt.to_vec(),
            generated: 0,
            logits: Vec::new(),
            finish: None,
            failed: false,
        };
        for chunk in prompt[reused..].chunks(PREFILL_CHUNK) {
            generator.step(chunk)?;
            done += chunk.len();
            progress(done, prompt.len());
        }
        generator.head()?;
        Ok(generator)
    }

    /// Prompt and output so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens given out so far.
    #[must_use]
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Logits `[V]` that the next token is chosen from.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Why it ended, once it has.
    #[must_use]
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// Runs tokens and leaves the last hidden state where [`Self::head`] finds it.
    fn step(&mut self, tokens: &[u32]) -> Result<()> {
        let mut hidden = self.model.forward(tokens, self.cache, &mut ())?;
        let d = self.model.config().hidden_size;
        hidden.drain(..hidden.len() - d);
        self.logits = hidden;
        Ok(())
    }

    /// Turns the last hidden state into logits.
    fn head(&mut self) -> Result<()> {
        let hidden = std::mem::take(&mut self.logits);
        self.logits.resize(self.model.config().vocab_size, 0.0);
        self.model.logits(&hidden, &mut self.logits, &mut ());
        Ok(())
    }

    fn next_token(&mut self) -> Result<Option<u32>> {
        if self.finish.is_some() || self.failed {
            return Ok(None);
        }
        if self
            .options
            .max_new_tokens
            .is_some_and(|max| self.generated >= max)
        {
            self.finish = Some(FinishReason::MaxTokens);
            return Ok(None);
        }
        // The token before was given out but not run yet.
        if self.cache.len() < self.tokens.len() {
            if self.tokens.len() > self.cache.capacity() {
                self.finish = Some(FinishReason::ContextFull);
                return Ok(None);
            }
            let pending = self.tokens[self.cache.len()..].to_vec();
            self.step(&pending)?;
            self.head()?;
        }
        let token = self.sampler.sample(&self.logits, &self.tokens);
        if self.options.end_of_generation.contains(&token) {
            self.finish = Some(FinishReason::EndOfGeneration(token));
            return Ok(None);
        }
        self.tokens.push(token);
        self.generated += 1;
        Ok(Some(token))
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_token();
        self.failed |= next.is_err();
        next.transpose()
    }
}
