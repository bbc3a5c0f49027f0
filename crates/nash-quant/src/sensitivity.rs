//! How much the loss of the whole model feels an error in the output of a linear, from one reverse pass over the calibration text.
//!
//! Near the source the KL divergence is a quadratic form in the weights, `½ Σ Δ F Δ`, with the Fisher information F of the model's own
//! predictions: the second moments of gradients of `−ln p(y)` for tokens y drawn from those predictions (Martens 2020, "New insights
//! and perspectives on the natural gradient method", eq. 6). With g the gradient with respect to the linear's outputs and x its input,
//! one token adds `½ (g·Δx)²`. Two things come of it:
//! - the Hessian of the rounding game is `H = E[|g| x xᵀ] / E|g|`: tokens count by how much the loss feels them. Weighting by `|g|²`
//!   would be the Fisher information of one linear, but few tokens (attention sinks) then drown the others;
//! - the predicted divergence of an error Δ is `½ E|g| Σᵢ E[gᵢ²/|g|] Δᵢ H Δᵢᵀ`, outputs i taken as independent.

use std::collections::BTreeMap;

use nash_kernels::dense;
use nash_models::{GradientTap, KvCache, LinearInfo, Site};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;

use crate::QuantError;
use crate::hessian::{regularise, triangle};
use crate::probe::embed;
use crate::session::Session;

/// What a linear's errors cost: KL divergence ≈ `scale · Σᵢ rows[i] Δᵢ H Δᵢᵀ`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct RowSensitivity {
    /// Nats per token.
    pub(crate) scale: f64,
    /// Relative weight of each output, mean 1, `[m]`.
    pub(crate) rows: Vec<f32>,
}

/// Sums over tokens for one linear.
struct Sums {
    /// `Σ |g| x xᵀ`, `[n, n]`.
    gram: Vec<f32>,
    /// `Σ |g|`.
    mass: f64,
    tokens: u64,
    /// `Σ gᵢ² / |g|`, `[m]`.
    rows: Vec<f64>,
}

#[derive(Default)]
struct SensitivityTap(BTreeMap<String, Sums>);

impl GradientTap for SensitivityTap {
    fn linear(&mut self, name: &str, x: &[f32], g: &[f32], tokens: usize) {
        let (n, m) = (x.len() / tokens, g.len() / tokens);
        let sums = self.0.entry(name.to_owned()).or_insert_with(|| Sums {
            gram: vec![0.0; n * n],
            mass: 0.0,
            tokens: 0,
            rows: vec![0.0; m],
        });
        let norms: Vec<f32> = g.par_chunks_exact(m).map(|g| dense::dot(g, g).sqrt()).collect();
        let mut weighted = x.to_vec();
        for ((x, g), &norm) in weighted.chunks_exact_mut(n).zip(g.chunks_exact(m)).zip(&norms) {
            let root = norm.sqrt();
            x.iter_mut().for_each(|x| *x *= root);
            if norm > 0.0 {
                let inverse = 1.0 / norm;
                sums.rows
                    .iter_mut()
                    .zip(g)
                    .for_each(|(r, g)| *r += f64::from(g * g * inverse));
            }
        }
        sums.mass += norms.iter().map(|&v| f64::from(v)).sum::<f64>();
        sums.tokens += tokens as u64;
        dense::gram_accumulate(&weighted, tokens, n, &mut sums.gram);
    }
}

impl Session<'_> {
    /// Runs the source over the calibration windows and back, and stores every linear's Hessian and sensitivity. The residual stream
    /// between layers waits on disk.
    pub(crate) fn calibrate_with_gradients(&self) -> Result<(), QuantError> {
        let config = self.model.config();
        let (layers, d) = (config.num_layers(), config.hidden_size);
        let windows = &self.options.calibration.windows;
        self.progress.stage("calibrate", 2 * layers as u64 + 1);
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let mut cache = KvCache::new(config, longest);
        let mut x = embed(&self.model, windows.iter().map(Vec::as_slice))?;
        for layer in 0..layers {
            self.check_cancelled()?;
            self.scratch
                .put_bytes(&stream_key(layer), bytemuck::cast_slice(&x))?;
            let mut rest = &mut x[..];
            for tokens in windows {
                let (window, tail) = rest.split_at_mut(tokens.len() * d);
                cache.reset();
                self.model.layer_forward(layer, window, &mut cache, 0, &mut ())?;
                rest = tail;
            }
            self.progress.advance(1);
        }
        let mut g = x;
        self.head_sensitivity(&mut g)?;
        for layer in (0..layers).rev() {
            self.check_cancelled()?;
            self.layer_sensitivity(layer, &mut g)?;
            self.progress.advance(1);
        }
        self.embedding_sensitivity(&g)?;
        self.scratch
            .put("calibrated", &windows.iter().map(Vec::len).sum::<usize>())
    }

    /// Hidden states after the last layer become gradients with respect to them.
    fn head_sensitivity(&self, x: &mut [f32]) -> Result<(), QuantError> {
        let vocab = self.model.config().vocab_size;
        let mut tap = SensitivityTap::default();
        let mut rng = Pcg64Mcg::seed_from_u64(self.options.seed);
        self.model.head_backward(x, &mut tap, |_, logits| {
            let quantiles: Vec<f32> = logits.chunks_exact(vocab).map(|_| rng.random()).collect();
            logits
                .par_chunks_exact_mut(vocab)
                .zip(quantiles)
                .for_each(|(row, quantile)| gradient_of_own_prediction(row, quantile));
        });
        self.progress.advance(1);
        self.store_sensitivities(tap)
    }

    /// Takes the gradients of all windows back through a layer, a few windows at a time.
    fn layer_sensitivity(&self, layer: usize, g: &mut [f32]) -> Result<(), QuantError> {
        const BATCH: usize = 4;
        let d = self.model.config().hidden_size;
        let stream = self.scratch.get_bytes(&stream_key(layer))?.unwrap_or_default();
        let x: Vec<f32> = bytemuck::pod_collect_to_vec(&stream);
        if x.len() != g.len() {
            return Err(QuantError::Mismatch(format!(
                "{}: the stored residual stream of layer {layer} is damaged; remove the folder and start again",
                self.scratch.dir().display()
            )));
        }
        let mut tap = SensitivityTap::default();
        let (mut x, mut rest) = (&x[..], g);
        for windows in self.options.calibration.windows.chunks(BATCH) {
            let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
            let len = lengths.iter().sum::<usize>() * d;
            let (g, tail) = rest.split_at_mut(len);
            self.model
                .layer_backward(layer, &x[..len], &lengths, g, &mut tap)?;
            (x, rest) = (&x[len..], tail);
        }
        self.scratch.remove_entry(&stream_key(layer))?;
        self.store_sensitivities(tap)
    }

    fn store_sensitivities(&self, tap: SensitivityTap) -> Result<(), QuantError> {
        for (name, mut sums) in tap.0 {
            let n = sums.gram.len().isqrt();
            let tokens = sums.tokens.max(1) as f64;
            // Divided by the mass here and by the number of tokens there, the sum becomes a weighted mean.
            let scale = if sums.mass > 0.0 { tokens / sums.mass } else { 1.0 };
            sums.gram.iter_mut().for_each(|v| *v *= scale as f32);
            regularise(&mut sums.gram, n, sums.tokens, self.options.damping);
            self.scratch
                .put_bytes(&hessian_key(&name), &triangle::to_bytes(&sums.gram, n))?;
            let mean = (sums.rows.iter().sum::<f64>() / sums.rows.len() as f64).max(f64::MIN_POSITIVE);
            let sensitivity = RowSensitivity {
                scale: 0.5 * (sums.mass / tokens) * (mean / tokens),
                rows: sums.rows.iter().map(|r| (r / mean) as f32).collect(),
            };
            self.scratch.put(&sensitivity_key(&name), &sensitivity)?;
        }
        Ok(())
    }

    /// An embedding that is only looked up: `g [T, d]` at the embedded tokens, every row and dimension taken as equally likely to matter.
    fn embedding_sensitivity(&self, g: &[f32]) -> Result<(), QuantError> {
        let d = self.model.config().hidden_size;
        let tokens = (g.len() / d).max(1) as f64;
        let norms = g.chunks_exact(d).map(|g| f64::from(dense::dot(g, g).sqrt()));
        let mean = norms.sum::<f64>() / tokens * f64::from(self.model.config().embedding_scale);
        let scale = 0.5 * mean * mean / (d * self.model.config().vocab_size) as f64;
        for info in self.linears.iter().filter(|l| l.site == Site::Embedding) {
            let rows = vec![1.0; info.rows];
            self.scratch
                .put(&sensitivity_key(&info.name), &RowSensitivity { scale, rows })?;
        }
        Ok(())
    }

    /// What errors of this linear cost; `None` where gradients were not asked for.
    pub(crate) fn sensitivity(&self, info: &LinearInfo) -> Result<Option<RowSensitivity>, QuantError> {
        self.scratch.get(&sensitivity_key(&info.name))
    }
}

/// Logits become the gradient of `−ln p(y)`, `p − e_y`, for the token y at this quantile of p.
fn gradient_of_own_prediction(row: &mut [f32], quantile: f32) {
    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    row.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f64 = row.iter().map(|&v| f64::from(v)).sum();
    let mut left = f64::from(quantile) * sum;
    let drawn = row.iter().position(|&v| {
        left -= f64::from(v);
        left < 0.0
    });
    let inverse = (1.0 / sum) as f32;
    row.iter_mut().for_each(|v| *v *= inverse);
    let drawn = drawn.unwrap_or(row.len().saturating_sub(1));
    if let Some(v) = row.get_mut(drawn) {
        *v -= 1.0;
    }
}

pub(crate) fn hessian_key(name: &str) -> String {
    format!("hessian-{name}")
}

fn sensitivity_key(name: &str) -> String {
    format!("sensitivity-{name}")
}

fn stream_key(layer: usize) -> String {
    format!("stream-{layer}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        // p = 0.2, 0.3, 0.5
        let logits = [0.2f32.ln(), 0.3f32.ln(), 0.5f32.ln()];
        for (quantile, drawn) in [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.9999, 2)] {
            let mut row = logits;
            gradient_of_own_prediction(&mut row, quantile);
            for (i, (g, p)) in row.iter().zip([0.2, 0.3, 0.5]).enumerate() {
                let expected = p - f32::from(u8::from(i == drawn));
                assert!((g - expected).abs() < 1e-6, "{quantile}: {row:?}");
            }
        }
    }

    #[test]
    fn tokens_count_by_the_norm_of_their_gradient() {
        let mut tap = SensitivityTap::default();
        tap.linear("a", &[1.0, 0.0, 0.0, 2.0], &[3.0, 4.0, 0.0, 1.0], 2);
        let sums = &tap.0["a"];
        let close = |a: f64, b: f64| (a - b).abs() < 1e-5;
        assert!(close(sums.mass, 6.0) && sums.tokens == 2);
        let gram: Vec<f64> = sums.gram.iter().map(|&v| f64::from(v)).collect();
        for (found, expected) in gram.iter().zip([5.0, 0.0, 0.0, 4.0]) {
            assert!(close(*found, expected), "{gram:?}");
        }
        assert!(close(sums.rows[0], 9.0 / 5.0) && close(sums.rows[1], 16.0 / 5.0 + 1.0));
    }
}
