//! Measurements of a [`Model`].

use nash_models::{KvCache, Model, Site};

use crate::EvalError;
use crate::scorer::{Decoder, PrefixScorer, Scorer};

/// A model with a KV cache of its own.
#[derive(Debug)]
pub struct ModelScorer<'a> {
    model: &'a Model,
    cache: KvCache,
    /// Logits of the last token, `[V]`.
    last: Vec<f32>,
}

impl<'a> ModelScorer<'a> {
    /// A scorer of this model; memory for the cache is taken when the length of a sequence is known.
    pub fn new(model: &'a Model) -> Self {
        Self {
            model,
            cache: KvCache::new(model.config(), 0),
            last: Vec::new(),
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

    fn empty_cache(&mut self, capacity: usize) {
        if self.cache.capacity() < capacity {
            self.cache = KvCache::new(self.model.config(), capacity);
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
        self.model
            .forward(tokens, &mut self.cache, &mut ())
            .map_err(EvalError::model)
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
