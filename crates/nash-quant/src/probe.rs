//! The judge: KL divergence of the whole model from its source on a few tokens of calibration text.
//!
//! The hidden state before every layer is kept, so that a change in layer l costs only the layers from l on.

use std::sync::Arc;

use nash_models::{KvCache, Linear, Model};
use rayon::prelude::*;

use crate::QuantError;

/// Rows of logits computed at once: bounds memory for vocabularies of a quarter million tokens.
const LOGIT_ROWS: usize = 64;

/// Token windows with the source model's states and log-probabilities.
pub(crate) struct Probe {
    windows: Vec<Window>,
    vocab: usize,
}

struct Window {
    tokens: Vec<u32>,
    /// Hidden state before each layer and after the last, `[layers + 1][T · d]`.
    states: Vec<Vec<f32>>,
    /// Natural log-probabilities of the source, `[T, vocab]`.
    log_probs: Vec<f32>,
}

impl Probe {
    /// Runs the source model over `windows`.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn new(model: &Model, windows: &[Vec<u32>]) -> Result<Self, QuantError> {
        let vocab = model.config().vocab_size;
        let layers = model.config().num_layers();
        let windows = windows
            .iter()
            .map(|tokens| {
                let mut cache = KvCache::new(model.config(), tokens.len());
                let mut x = Vec::new();
                model.embed(tokens, 0, &mut x)?;
                let mut states = vec![x.clone()];
                for layer in 0..layers {
                    model.layer_forward(layer, &mut x, &mut cache, 0, &mut ())?;
                    states.push(x.clone());
                }
                let mut log_probs = vec![0.0; tokens.len() * vocab];
                final_logits(model, &mut x, tokens.len(), |first, logits| {
                    let out = &mut log_probs[first * vocab..][..logits.len()];
                    out.copy_from_slice(logits);
                    out.par_chunks_mut(vocab).for_each(log_softmax);
                })?;
                Ok(Window {
                    tokens: tokens.clone(),
                    states,
                    log_probs,
                })
            })
            .collect::<Result<_, QuantError>>()?;
        Ok(Self { windows, vocab })
    }

    /// Mean KL divergence in nats per token of `model` from the source. `from_layer`: the first layer that differs; `None`
    /// if the embedding does.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn kl(&self, model: &Model, from_layer: Option<usize>) -> Result<f64, QuantError> {
        let (mut sum, mut count) = (0.0, 0usize);
        for window in &self.windows {
            let tokens = window.tokens.len();
            let mut cache = KvCache::new(model.config(), tokens);
            let mut x = match from_layer {
                Some(layer) => window.states[layer].clone(),
                None => {
                    let mut x = Vec::new();
                    model.embed(&window.tokens, 0, &mut x)?;
                    x
                }
            };
            for layer in from_layer.unwrap_or(0)..model.config().num_layers() {
                model.layer_forward(layer, &mut x, &mut cache, 0, &mut ())?;
            }
            final_logits(model, &mut x, tokens, |first, logits| {
                let base = &window.log_probs[first * self.vocab..][..logits.len()];
                let rows: Vec<f64> = logits
                    .par_chunks_mut(self.vocab)
                    .zip(base.par_chunks(self.vocab))
                    .map(|(row, base)| {
                        log_softmax(row);
                        divergence(base, row)
                    })
                    .collect();
                sum += rows.iter().sum::<f64>();
            })?;
            count += tokens;
        }
        Ok(sum / count.max(1) as f64)
    }

    /// KL divergence with one linear replaced; the model is as before afterwards.
    ///
    /// # Errors
    /// If the model cannot run a window.
    pub(crate) fn kl_of_change(
        &self,
        model: &mut Model,
        name: &str,
        from_layer: Option<usize>,
        changed: Arc<dyn Linear>,
    ) -> Result<f64, QuantError> {
        let before = model.linear(name).cloned();
        model.set_linear(name, changed)?;
        let kl = self.kl(model, from_layer);
        if let Some(before) = before {
            model.set_linear(name, before)?;
        }
        kl
    }
}

/// Calls `use_rows(first position, logits)` on blocks of rows of the logits of hidden states `x [T, d]`.
fn final_logits(
    model: &Model,
    x: &mut [f32],
    tokens: usize,
    mut use_rows: impl FnMut(usize, &mut [f32]),
) -> Result<(), QuantError> {
    let (d, vocab) = (model.config().hidden_size, model.config().vocab_size);
    model.final_norm(x);
    let mut logits = vec![0.0; LOGIT_ROWS.min(tokens) * vocab];
    for (block, hidden) in x.chunks(LOGIT_ROWS * d).enumerate() {
        let out = &mut logits[..hidden.len() / d * vocab];
        model.logits(hidden, out, &mut ());
        use_rows(block * LOGIT_ROWS, out);
    }
    Ok(())
}

/// `x − ln Σ exp x` in place.
fn log_softmax(row: &mut [f32]) {
    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = row
        .chunks(256)
        .map(|c| f64::from(c.iter().map(|&v| (v - max).exp()).sum::<f32>()))
        .sum();
    let shift = max + sum.ln() as f32;
    row.iter_mut().for_each(|v| *v -= shift);
}

/// `Σ p (ln p − ln q)` from log-probabilities.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    p.chunks(256)
        .zip(q.chunks(256))
        .map(|(p, q)| f64::from(p.iter().zip(q).map(|(&p, &q)| p.exp() * (p - q)).sum::<f32>()))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_matches_the_definition() {
        let (mut p, mut q) = (vec![1.0, 2.0, 3.0], vec![2.0, 2.0, 1.0]);
        log_softmax(&mut p);
        log_softmax(&mut q);
        assert!((p.iter().map(|v| v.exp()).sum::<f32>() - 1.0).abs() < 1e-6);
        let expected: f64 = p
            .iter()
            .zip(&q)
            .map(|(&p, &q)| f64::from(p).exp() * f64::from(p - q))
            .sum();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6 && expected > 0.1);
        assert_eq!(divergence(&p, &p), 0.0);
    }
}
