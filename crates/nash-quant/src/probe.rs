//! The judge: KL divergence of the whole model from its source on a few tokens of calibration text.
//!
//! The hidden state before every layer is kept, so that a change in layer l costs only the layers from l on, and the changes of one
//! layer run through the layers above together.

use std::sync::Arc;

use nash_models::{Linear, Model, kl_divergence, log_softmax};
use rayon::prelude::*;

use crate::QuantError;

/// Rows of logits computed at once: bounds memory for vocabularies of a quarter million tokens.
const LOGIT_ROWS: usize = 128;

/// Token windows, one after the other, with the source model's states and log-probabilities.
pub(crate) struct Probe {
    /// Lengths of the windows.
    lengths: Vec<usize>,
    /// Hidden state before each layer and after the last, `[layers + 1][T · d]`.
    states: Vec<Vec<f32>>,
    /// Natural log-probabilities of the source, `[T, vocab]`.
    log_probs: Vec<f32>,
    tokens: Vec<u32>,
}

impl Probe {
    /// Runs the source model over `windows`.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn new(model: &Model, windows: &[Vec<u32>]) -> Result<Self, QuantError> {
        let mut probe = Self {
            lengths: windows.iter().map(Vec::len).collect(),
            states: Vec::new(),
            log_probs: Vec::new(),
            tokens: windows.concat(),
        };
        let mut x = probe.embed(model)?;
        probe.states.push(x.clone());
        for layer in 0..model.config().num_layers() {
            model.layer_forward_sequences(layer, &mut x, &probe.lengths)?;
            probe.states.push(x.clone());
        }
        let vocab = model.config().vocab_size;
        let mut log_probs = Vec::with_capacity(probe.tokens.len() * vocab);
        final_logits(model, &mut x, |logits| {
            logits.par_chunks_mut(vocab).for_each(log_softmax);
            log_probs.extend_from_slice(logits);
        });
        probe.log_probs = log_probs;
        Ok(probe)
    }

    /// The embedded windows, each from position 0.
    fn embed(&self, model: &Model) -> Result<Vec<f32>, QuantError> {
        let mut rest = &self.tokens[..];
        embed(
            model,
            self.lengths.iter().map(|&len| {
                let (window, tail) = rest.split_at(len);
                rest = tail;
                window
            }),
        )
    }

    /// Mean KL divergence in nats per token of `model` from the source.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn kl(&self, model: &Model) -> Result<f64, QuantError> {
        self.kl_from(model, None)
    }

    /// The same for a model that is the source below `layer` (`None`: nowhere).
    fn kl_from(&self, model: &Model, layer: Option<usize>) -> Result<f64, QuantError> {
        let mut x = match layer {
            Some(layer) => self.states[layer].clone(),
            None => self.embed(model)?,
        };
        for layer in layer.unwrap_or(0)..model.config().num_layers() {
            model.layer_forward_sequences(layer, &mut x, &self.lengths)?;
        }
        Ok(self.divergences(model, x)[0])
    }

    /// KL divergence with linears replaced together, none of them below `layer` (`None`: anywhere); the model is as before afterwards.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn kl_of_all(
        &self,
        model: &mut Model,
        layer: Option<usize>,
        mut changes: Vec<(String, Arc<dyn Linear>)>,
    ) -> Result<f64, QuantError> {
        if let Some((name, changed)) = changes.pop() {
            return replaced(model, &name, changed, |model| {
                self.kl_of_all(model, layer, changes)
            });
        }
        self.kl_from(model, layer)
    }

    /// KL divergences with each of some linears of one layer replaced alone; the model is as before afterwards. The layers above run
    /// once for all of them.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn kl_of_changes(
        &self,
        model: &mut Model,
        layer: usize,
        changes: Vec<(&str, Arc<dyn Linear>)>,
    ) -> Result<Vec<f64>, QuantError> {
        let lengths = self.lengths.repeat(changes.len());
        let mut x = Vec::new();
        for (name, changed) in changes {
            let mut own = self.states[layer].clone();
            replaced(model, name, changed, |model| {
                Ok(model.layer_forward_sequences(layer, &mut own, &self.lengths)?)
            })?;
            x.extend(own);
        }
        for layer in layer + 1..model.config().num_layers() {
            model.layer_forward_sequences(layer, &mut x, &lengths)?;
        }
        Ok(self.divergences(model, x))
    }

    /// Mean divergence of each copy of the windows in `x [copies · T, d]`, the states after the last layer.
    fn divergences(&self, model: &Model, mut x: Vec<f32>) -> Vec<f64> {
        let vocab = model.config().vocab_size;
        let mut rows: Vec<f64> = Vec::new();
        final_logits(model, &mut x, |logits| {
            let first = rows.len();
            let block: Vec<f64> = logits
                .par_chunks_mut(vocab)
                .enumerate()
                .map(|(i, row)| {
                    let base = (first + i) % self.tokens.len();
                    log_softmax(row);
                    kl_divergence(&self.log_probs[base * vocab..][..vocab], row)
                })
                .collect();
            rows.extend(block);
        });
        let mean = |rows: &[f64]| rows.iter().sum::<f64>() / rows.len() as f64;
        rows.chunks(self.tokens.len().max(1)).map(mean).collect()
    }
}

/// Embeds windows, each from position 0, one after the other.
pub(crate) fn embed<'w>(
    model: &Model,
    windows: impl Iterator<Item = &'w [u32]>,
) -> Result<Vec<f32>, QuantError> {
    let (mut all, mut x) = (Vec::new(), Vec::new());
    for tokens in windows {
        model.embed(tokens, 0, &mut x)?;
        all.extend_from_slice(&x);
    }
    Ok(all)
}

/// Does something with one linear replaced, and puts it back.
fn replaced<T>(
    model: &mut Model,
    name: &str,
    changed: Arc<dyn Linear>,
    work: impl FnOnce(&mut Model) -> Result<T, QuantError>,
) -> Result<T, QuantError> {
    let before = model.linear(name).cloned();
    model.set_linear(name, changed)?;
    let result = work(model);
    if let Some(before) = before {
        model.set_linear(name, before)?;
    }
    result
}

/// Calls `use_rows(logits)` on blocks of rows of the logits of hidden states `x [T, d]`, in order.
fn final_logits(model: &Model, x: &mut [f32], mut use_rows: impl FnMut(&mut [f32])) {
    let (d, vocab) = (model.config().hidden_size, model.config().vocab_size);
    model.final_norm(x);
    let mut logits = vec![0.0; LOGIT_ROWS.min(x.len() / d) * vocab];
    for hidden in x.chunks(LOGIT_ROWS * d) {
        let out = &mut logits[..hidden.len() / d * vocab];
        model.logits(hidden, out, &mut ());
        use_rows(out);
    }
}
