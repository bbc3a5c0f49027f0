//! Measurements of a [`Model`].

use nash_models::{KvCache, KvType, Model, Site};

use crate::EvalError;
use crate::scorer::{Decoder, PrefixScorer, Scorer};

/// A model with a KV cache of its own.
#[derive(Debug)]
pub struct ModelScorer<'a> {
    model: &'a Model,
    cache: KvCache,
    /// The second half of a sequence is read token by token.
    stepwise: bool,
    /// Logits of the last token, `[V]`.
    last: Vec<f32>,
}

impl<'a> ModelScorer<'a> {
    /// A scorer of this model; memory for the cache is taken when the length of a sequence is known.
    pub fn new(model: &'a Model) -> Self {
        Self::with_cache(model, KvType::default())
    }

    /// [`Self::new`] with a cache of this type. What is read in one call does not come from the cache, except for a single token.
    pub fn with_cache(model: &'a Model, kind: KvType) -> Self {
        Self {
            model,
            cache: KvCache::with_type(model.config(), 0, kind),
            stepwise: false,
            last: Vec::new(),
        }
    }

    /// A scorer that reads the first half of [`Scorer::hidden`]'s sequences at once, as a prompt, and the second, which is the one that
    /// windows score, token by token, so that all its keys and values come from a cache of this type.
    pub fn stepwise(model: &'a Model, kind: KvType) -> Self {
        Self {
            stepwise: true,
            ..Self::with_cache(model, kind)
        }
    }

    /// Weight bytes that one generated token reads: every linear, of the experts the share that is chosen.
    pub fn bytes_per_token(&self) -> u64 {
        let config = self.model.config();
        let share = |layer: Option<usize>| {
            config.moe.as_ref().map_or(1.0, |moe| {
                let top_k = layer
                    .and_then(|layer| config.layers[layer].top_k)
                    .unwrap_or(moe.top_k);
                top_k as f64 / moe.experts as f64
            })
        };
        let bytes = self.model.linears().into_iter().map(|info| {
            let bytes = self
                .model
                .linear(&info.name)
                .map_or(0, |linear| linear.resident_bytes()) as f64;
            match info.site {
                Site::Embedding => 0.0,
                Site::ExpertIn(_) | Site::ExpertDown(_) => bytes * share(info.layer),
                _ => bytes,
            }
        });
        bytes.sum::<f64>() as u64
    }

    /// Bytes of keys and values that one generated token reads on average, when `positions` come before the first of `tokens`.
    pub fn cache_bytes_per_token(&self, positions: usize, tokens: usize) -> u64 {
        let config = self.model.config();
        let bytes = |seen: usize, layer: usize| {
            let seen = config.window(layer).map_or(seen, |window| window.min(seen));
            self.cache.bytes_of(seen) / config.num_layers()
        };
        let of_token = |token: usize| {
            (0..config.num_layers())
                .map(|layer| bytes(positions + token + 1, layer))
                .sum::<usize>()
        };
        (0..tokens).map(of_token).sum::<usize>() as u64 / tokens.max(1) as u64
    }

    fn empty_cache(&mut self, capacity: usize) {
        if self.cache.capacity() < capacity {
            self.cache = KvCache::with_type(self.model.config(), capacity, self.cache.kind());
        }
        self.cache.reset();
    }
}

impl Scorer for ModelScorer<'_> {
    fn vocab(&self) -> usize {
        self.model.config().vocab_size
    }

    fn width(&self) -> usize {
        self.model.config().hidden_size
    }

    fn positions(&self) -> Option<usize> {
        Some(self.model.config().context_length)
    }

    fn hidden(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError> {
        self.empty_cache(tokens.len());
        if !self.stepwise {
            return self.read_on(tokens);
        }
        let (prompt, answer) = tokens.split_at(tokens.len() / 2);
        let mut hidden = self.read_on(prompt)?;
        for token in answer.chunks(1) {
            hidden.extend(self.read_on(token)?);
        }
        Ok(hidden)
    }

    fn logits(&mut self, hidden: &[f32], out: &mut [f32]) -> Result<(), EvalError> {
        self.model.logits(hidden, out, &mut ());
        Ok(())
    }
}

impl PrefixScorer for ModelScorer<'_> {
    fn restart(&mut self, capacity: usize) -> Result<(), EvalError> {
        let limit = self.model.config().context_length;
        if capacity > limit {
            return Err(EvalError::ContextTooLong { ctx: capacity, limit });
        }
        self.empty_cache(capacity);
        Ok(())
    }

    fn keep_common_prefix(&mut self, tokens: &[u32]) -> usize {
        self.cache.keep_common_prefix(tokens)
    }

    fn read_on(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError> {
        self.model
            .forward(tokens, &mut self.cache, &mut ())
            .map_err(EvalError::model)
    }
}

impl Decoder for ModelScorer<'_> {
    fn vocab(&self) -> usize {
        self.model.config().vocab_size
    }

    fn restart(&mut self, capacity: usize) -> Result<(), EvalError> {
        PrefixScorer::restart(self, capacity)
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<(), EvalError> {
        let hidden = self.read_on(tokens)?;
        let width = self.model.config().hidden_size;
        self.last.resize(self.model.config().vocab_size, 0.0);
        self.model
            .logits(&hidden[hidden.len() - width..], &mut self.last, &mut ());
        Ok(())
    }
}
