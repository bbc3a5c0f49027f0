//! Tuning of what stays in float: gains and biases of norms and biases of linears learn to live with the rounded weights.
//!
//! Rounding changes what norms and biases were trained for. With everything packed, they minimise the mean over the tokens of the
//! calibration windows of the KL divergence of the packed model from its source (Hinton et al. 2015, "Distilling the knowledge in a neural
//! network"; of norms alone: Li et al. 2024, "Norm tweaking"). Forward passes run the packed kernels, with activations rounded as in use;
//! gradients take that rounding for the identity. After every epoch the values are rounded to `f16`, as the file has them, and judged on the
//! held-back windows: the best are kept, and untuned ones are a candidate like any other.
//!
//! Nothing packed changes, so certificates stay what they are. Batches come in the order of the text: equal input gives equal values.

use std::collections::BTreeMap;

use half::f16;
use nash_core::ModelFile;
use nash_core::hash::Hasher;
use nash_models::{GradientTap, Model, log_softmax};
use rayon::prelude::*;

use crate::QuantError;
use crate::packed::packed_model;
use crate::probe::{Probe, embed};
use crate::report::{Tuning, four_digits};
use crate::session::{Session, Solved};

/// Windows of one step.
const BATCH: usize = 2;
/// Size of the first steps, as a share of a value; it falls linearly to 0.
const RATE: f32 = 3e-3;
/// Decay of the mean of gradients and of their squares (Kingma & Ba 2015, "Adam"); the second is short because there are few steps.
const MOMENTS: [f32; 2] = [0.9, 0.99];

/// The values that won, by name of the tensor, and what is known about them.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Tuned {
    pub(crate) floats: BTreeMap<String, Vec<f32>>,
    pub(crate) record: Tuning,
}

/// A float tensor on its way. Its values are `start + unit ∘ change`.
struct Variable {
    start: Vec<f32>,
    /// What a change of 1 is: a gain's own size, for biases their root mean square.
    unit: Vec<f32>,
    change: Vec<f32>,
    /// Gradient of the loss with respect to the values, and the running means of that with respect to the changes and of its square.
    gradient: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Variable {
    fn new(name: &str, start: Vec<f32>) -> Self {
        let unit = if name.ends_with(".bias") {
            let energy: f32 = start.iter().map(|v| v * v).sum();
            vec![(energy / start.len() as f32).sqrt(); start.len()]
        } else {
            start.iter().map(|v| v.abs()).collect()
        };
        let zero = vec![0.0; start.len()];
        Self {
            start,
            unit,
            change: zero.clone(),
            gradient: zero.clone(),
            mean: zero.clone(),
            square: zero,
        }
    }

    /// The values as the file has them.
    fn rounded(&self) -> Vec<f32> {
        let values = self.start.iter().zip(&self.unit).zip(&self.change);
        values
            .map(|((s, u), c)| f16::from_f32(s + u * c).to_f32())
            .collect()
    }

    /// Step number `step`, from 0, of Adam; forgets the gradient.
    fn step(&mut self, step: usize, rate: f32) {
        let [keep, keep_square] = MOMENTS;
        let [first, second] = MOMENTS.map(|keep| 1.0 - keep.powf(step as f32 + 1.0));
        for i in 0..self.change.len() {
            let g = std::mem::take(&mut self.gradient[i]) * self.unit[i];
            self.mean[i] = keep * self.mean[i] + (1.0 - keep) * g;
            self.square[i] = keep_square * self.square[i] + (1.0 - keep_square) * g * g;
            // The gradient of a unit of 0 is 0: nothing moves, and nothing divides by 0.
            let size = (self.square[i] / second).sqrt().max(f32::MIN_POSITIVE);
            self.change[i] -= rate * (self.mean[i] / first) / size;
        }
    }
}

/// The float tensors that have gradients.
struct Variables(BTreeMap<String, Variable>);

impl GradientTap for Variables {
    fn float(&mut self, name: &str, g: &[f32]) {
        if let Some(variable) = self.0.get_mut(name) {
            variable.gradient.iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
        }
    }
}

impl Variables {
    /// Norms and biases; a table of positions is left as it is.
    fn of(model: &Model) -> Self {
        let floats = model.float_tensors().into_iter();
        let tuned = floats.filter(|(_, shape, _)| shape.len() == 1);
        Self(
            tuned
                .map(|(name, _, values)| (name.clone(), Variable::new(&name, values)))
                .collect(),
        )
    }

    fn step(&mut self, step: usize, rate: f32) {
        self.0.values_mut().for_each(|variable| variable.step(step, rate));
    }

    fn rounded(&self) -> BTreeMap<String, Vec<f32>> {
        let values = self.0.iter().map(|(name, v)| (name.clone(), v.rounded()));
        values.collect()
    }
}

/// A window of text and what the source makes of it.
struct Lesson<'a> {
    tokens: &'a [u32],
    /// The source's hidden states after the final norm, `[T, d]`: its logits are computed again when needed, for they are a hundred times as
    /// large.
    target: Vec<f32>,
}

impl Session<'_> {
    /// Tunes the float tensors for these solved tensors. `None` where it was not asked for, there is no text to judge it on, or the model has no
    /// reverse pass.
    pub(crate) fn tune(
        &self,
        source: &ModelFile,
        solved: &[Solved],
        held_back: &[Vec<u32>],
    ) -> Result<Option<Tuned>, QuantError> {
        let epochs = self.options.tune_epochs;
        if epochs == 0 || held_back.is_empty() || !self.model.has_backward() {
            return Ok(None);
        }
        let key = self.tuned_key(solved, held_back);
        if let Some(tuned) = self.scratch.get(&key)? {
            return Ok(Some(tuned));
        }
        let windows = &self.options.calibration.windows;
        let batches = windows.len().div_ceil(BATCH);
        let steps = epochs * batches;
        self.progress.stage("tune", (batches + steps) as u64);
        let lessons = self.lessons()?;
        let probe = Probe::new(&self.model, held_back)?;
        let mut packed = packed_model(self, source, solved)?;
        let mut variables = Variables::of(&packed);
        let mut best = variables.rounded();
        set(&mut packed, &best)?;
        let before = probe.kl(&packed)?;
        let (mut after, mut best_epoch) = (before, 0);
        for (step, batch) in (0..epochs).flat_map(|_| lessons.chunks(BATCH)).enumerate() {
            self.check_cancelled()?;
            self.gradients(&packed, batch, &mut variables)?;
            variables.step(step, RATE * (1.0 - step as f32 / steps as f32));
            set(&mut packed, &variables.rounded())?;
            if (step + 1).is_multiple_of(batches) {
                let kl = probe.kl(&packed)?;
                if kl < after {
                    (after, best_epoch) = (kl, (step + 1) / batches);
                    best = variables.rounded();
                }
            }
            self.progress.advance(1);
        }
        let tuned = Tuned {
            record: Tuning {
                tensors: best.len(),
                values: best.values().map(Vec::len).sum(),
                tokens: windows.iter().map(Vec::len).sum(),
                epochs,
                best_epoch,
                kl_before: four_digits(before),
                kl_after: four_digits(after),
            },
            floats: best,
        };
        self.scratch.put(&key, &tuned)?;
        Ok(Some(tuned))
    }

    /// What the tuned values depend on beside the fingerprint of the scratch folder.
    fn tuned_key(&self, solved: &[Solved], held_back: &[Vec<u32>]) -> String {
        let mut hasher = Hasher::new();
        for s in solved {
            hasher.update(&[s.packed().shape().width.bits() as u8]);
        }
        held_back
            .iter()
            .for_each(|w| hasher.update(bytemuck::cast_slice(w)));
        format!("tuned-{}-{}", self.options.tune_epochs, hasher.finish())
    }

    /// Runs the source over the calibration windows.
    fn lessons(&self) -> Result<Vec<Lesson<'_>>, QuantError> {
        let mut lessons = Vec::new();
        for windows in self.options.calibration.windows.chunks(BATCH) {
            self.check_cancelled()?;
            let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
            let mut x = embed(&self.model, windows.iter().map(Vec::as_slice))?;
            for layer in 0..self.model.config().num_layers() {
                self.model.layer_forward_sequences(layer, &mut x, &lengths)?;
            }
            self.model.final_norm(&mut x);
            let mut rest = &x[..];
            for tokens in windows {
                let (target, tail) = rest.split_at(tokens.len() * self.model.config().hidden_size);
                lessons.push(Lesson {
                    tokens,
                    target: target.to_vec(),
                });
                rest = tail;
            }
            self.progress.advance(1);
        }
        Ok(lessons)
    }

    /// Adds the gradients of the mean KL divergence over the tokens of a batch to the variables.
    fn gradients(
        &self,
        packed: &Model,
        batch: &[Lesson<'_>],
        variables: &mut Variables,
    ) -> Result<(), QuantError> {
        let (d, vocab) = (packed.config().hidden_size, packed.config().vocab_size);
        let lengths: Vec<usize> = batch.iter().map(|lesson| lesson.tokens.len()).collect();
        let share = 1.0 / lengths.iter().sum::<usize>() as f32;
        let targets: Vec<f32> = batch.iter().flat_map(|lesson| &lesson.target).copied().collect();
        let mut x = embed(packed, batch.iter().map(|lesson| lesson.tokens))?;
        let mut states = Vec::new();
        for layer in 0..packed.config().num_layers() {
            states.push(x.clone());
            packed.layer_forward_sequences(layer, &mut x, &lengths)?;
        }
        let mut expected = Vec::new();
        packed.head_backward(&mut x, variables, |first, logits| {
            expected.resize(logits.len(), 0.0);
            let hidden = &targets[first * d..][..logits.len() / vocab * d];
            self.model.logits(hidden, &mut expected, &mut ());
            logits
                .par_chunks_exact_mut(vocab)
                .zip(expected.par_chunks_exact_mut(vocab))
                .for_each(|(logits, expected)| divergence_gradient(expected, logits, share));
        });
        for (layer, state) in states.iter().enumerate().rev() {
            packed.layer_backward(layer, state, &lengths, &mut x, variables)?;
        }
        Ok(())
    }
}

/// Puts values into a model.
fn set(model: &mut Model, floats: &BTreeMap<String, Vec<f32>>) -> Result<(), QuantError> {
    for (name, values) in floats {
        model.set_float(name, values.clone())?;
    }
    Ok(())
}

/// Logits of q become the gradient of `share` times its KL divergence from p with respect to them, `share · (q − p)`; those of p become
/// log-probabilities.
fn divergence_gradient(p: &mut [f32], q: &mut [f32], share: f32) {
    log_softmax(p);
    log_softmax(q);
    q.iter_mut()
        .zip(p)
        .for_each(|(q, p)| *q = share * (q.exp() - p.exp()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_the_divergence_is_its_slope() {
        const STEP: f64 = 1e-4;
        let (p, q) = ([0.5f32, -1.0, 2.0], [1.5f32, 0.0, 0.25]);
        let log_probs = |logits: [f64; 3]| {
            let sum: f64 = logits.iter().map(|v| v.exp()).sum();
            logits.map(|v| v - sum.ln())
        };
        let divergence = |q: [f64; 3]| {
            let (p, q) = (log_probs(p.map(f64::from)), log_probs(q));
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        };
        let (mut expected, mut gradient) = (p, q);
        divergence_gradient(&mut expected, &mut gradient, 0.5);
        for i in 0..3 {
            let moved = |by: f64| {
                let mut q = q.map(f64::from);
                q[i] += by;
                divergence(q)
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            assert!(
                (f64::from(gradient[i]) - 0.5 * slope).abs() < 1e-6,
                "{gradient:?}"
            );
        }
    }

    #[test]
    fn values_that_are_zero_stay_and_others_move_by_the_rate() {
        let mut variables = Variables(BTreeMap::new());
        let start = vec![2.0, 0.0, -0.5];
        variables
            .0
            .insert("a.weight".into(), Variable::new("a.weight", start));
        variables.float("a.weight", &[3.0, 1.0, 1e-3]);
        variables.float("not tuned", &[1.0]);
        variables.step(0, 0.25);
        // Adam's first step has the size of the rate, whatever the gradient's: down where the loss grows with the value.
        for (found, expected) in variables.rounded()["a.weight"].iter().zip([1.5, 0.0, -0.625]) {
            assert!((found - expected).abs() < 1e-3, "{found}, expected {expected}");
        }
        let unit = &Variable::new("a.bias", vec![3.0, 0.0, 0.0, 0.0]).unit;
        assert_eq!(unit, &[1.5; 4], "biases of 0 can move");
    }
}
