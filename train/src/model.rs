//! A decoder of the shape of dots.llm1 (mixture) or Qwen3 (dense twin), for automatic differentiation.
//!
//! Pre-norm blocks: attention with rotary positions and normed queries and keys, then SwiGLU, once or as E experts of which a token takes k. Mixing
//! weights are sigmoids of the router's logits over the chosen experts, divided by their sum (DeepSeek-AI 2024, arXiv 2412.19437, eq. 13 and 15). The
//! embedding is also the output matrix. Matrices are `[in, out]`.
//!
//! Experts are multiplied as one batch of matrices: tokens are gathered into `[E, c, d]`, c being the largest load, so that an unbalanced
//! batch pays for its balance in time; no token is dropped.

use burn::module::{Module, Param};
use burn::tensor::activation::{log_softmax, sigmoid, silu, softmax};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use rand::{RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use serde::{Deserialize, Serialize};

use crate::balance::Router;

/// Added to mean squares before their root is taken.
pub(crate) const EPSILON: f64 = 1e-6;
/// Base of the rotary frequencies.
pub(crate) const ROPE_BASE: f64 = 10_000.0;
/// Standard deviation of new weights.
const DEVIATION: f64 = 0.02;

/// The sizes of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    /// Width of the residual stream, d.
    pub(crate) width: usize,
    pub(crate) heads: usize,
    /// E; 0 for a dense model.
    pub(crate) experts: usize,
    /// k.
    pub(crate) top_k: usize,
    /// Hidden neurons of one expert; a dense model has k times as many.
    pub(crate) hidden: usize,
    /// Tokens that attend to each other.
    pub(crate) context: usize,
}

impl Shape {
    pub(crate) fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// All weights.
    pub(crate) fn parameters(&self) -> usize {
        let feed = 3 * self.width * self.hidden;
        let feed = match self.experts {
            0 => self.top_k * feed,
            experts => experts * (feed + self.width),
        };
        let layer = 4 * self.width * self.width + 2 * self.width + 2 * self.head_dim() + feed;
        self.vocabulary * self.width + self.layers * layer + self.width
    }
}

/// All weights of a model.
#[derive(Module, Debug)]
pub(crate) struct Model {
    /// `[V, d]`.
    pub(crate) embedding: Param<Tensor<2>>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Param<Tensor<1>>,
}

/// The weights of one block.
#[derive(Module, Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Param<Tensor<1>>,
    pub(crate) query: Param<Tensor<2>>,
    pub(crate) key: Param<Tensor<2>>,
    pub(crate) value: Param<Tensor<2>>,
    pub(crate) output: Param<Tensor<2>>,
    pub(crate) query_norm: Param<Tensor<1>>,
    pub(crate) key_norm: Param<Tensor<1>>,
    pub(crate) feed_norm: Param<Tensor<1>>,
    /// `[d, E]`; none in a dense model.
    pub(crate) router: Option<Param<Tensor<2>>>,
    /// `[E, d, h]`; `[1, d, k·h]` in a dense model. So are the others.
    pub(crate) gate: Param<Tensor<3>>,
    pub(crate) up: Param<Tensor<3>>,
    pub(crate) down: Param<Tensor<3>>,
}

/// What does not change from batch to batch.
#[derive(Debug)]
pub(crate) struct Constants {
    shape: Shape,
    /// `[1, 1, t, head_dim]`.
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// `[1, 1, t, t]`, true where a token may not look.
    future: Tensor<4, Bool>,
}

impl Constants {
    pub(crate) fn new(shape: Shape, device: &Device) -> Self {
        let (t, half) = (shape.context, shape.head_dim() / 2);
        let angle = |at: usize| {
            let (position, i) = (at / (2 * half), at % half);
            position as f64 * ROPE_BASE.powf(-(i as f64) / half as f64)
        };
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = (0..2 * half * t).map(|at| of(angle(at)) as f32).collect();
            Tensor::from_data(TensorData::new(values, [1, 1, t, 2 * half]), device)
        };
        let future: Vec<bool> = (0..t * t).map(|at| at % t > at / t).collect();
        Self {
            shape,
            cos: table(f64::cos),
            sin: table(f64::sin),
            future: Tensor::from_data(TensorData::new(future, [1, 1, t, t]), device),
        }
    }

    /// Rotates `x [B, H, t, head_dim]`: channel i with channel i + head_dim/2.
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = self.shape.head_dim() / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.clone().narrow(3, half, half));
        let turned = Tensor::cat(vec![second.neg(), first], 3);
        x * self.cos.clone() + turned * self.sin.clone()
    }
}

/// `x · w / √(mean x² + ε)` along the last dimension.
fn rms_norm<const D: usize>(x: Tensor<D>, weight: &Param<Tensor<1>>) -> Tensor<D> {
    let scale = x.clone().square().mean_dim(D - 1).add_scalar(EPSILON).sqrt();
    x / scale * weight.val().unsqueeze()
}

impl Model {
    /// Uniform weights with a standard deviation of 0.02, norms of one.
    pub(crate) fn new(shape: Shape, seed: u64, device: &Device) -> Self {
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let bound = (DEVIATION * 3f64.sqrt()) as f32;
        let mut values =
            |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-bound..bound)).collect() };
        let mut matrix = |rows: usize, columns: usize| {
            Param::from_data(TensorData::new(values(rows * columns), [rows, columns]), device)
        };
        let (d, h) = (shape.width, shape.hidden);
        let embedding = matrix(shape.vocabulary, d);
        let mut attention: Vec<_> = (0..4 * shape.layers).map(|_| matrix(d, d)).collect();
        let routers: Vec<_> = (0..shape.layers)
            .map(|_| (shape.experts > 0).then(|| matrix(d, shape.experts)))
            .collect();
        let mut stack = |count: usize, rows: usize, columns: usize| {
            Param::from_data(
                TensorData::new(values(count * rows * columns), [count, rows, columns]),
                device,
            )
        };
        let ones = |count: usize| Param::from_data(TensorData::new(vec![1.0f32; count], [count]), device);
        let (count, h) = if shape.experts == 0 {
            (1, shape.top_k * h)
        } else {
            (shape.experts, h)
        };
        let mut next = || attention.pop().expect("four for each layer");
        let layers = routers
            .into_iter()
            .map(|router| Layer {
                attention_norm: ones(d),
                query: next(),
                key: next(),
                value: next(),
                output: next(),
                query_norm: ones(shape.head_dim()),
                key_norm: ones(shape.head_dim()),
                feed_norm: ones(d),
                router,
                gate: stack(count, d, h),
                up: stack(count, d, h),
                down: stack(count, h, d),
            })
            .collect();
        Self {
            embedding,
            layers,
            norm: ones(d),
        }
    }

    /// Mean cross-entropy of `targets [B·t]` given `tokens [B·t]`, in nats, and what `router` adds to the loss of training.
    pub(crate) fn loss(
        &self,
        constants: &Constants,
        tokens: &[u32],
        targets: &[u32],
        router: &mut Router,
    ) -> (Tensor<1>, Option<Tensor<1>>) {
        let (shape, device) = (&constants.shape, constants.cos.device());
        let (t, d) = (shape.context, shape.width);
        let ints = |values: &[u32]| {
            let values: Vec<i32> = values.iter().map(|&id| id.cast_signed()).collect();
            Tensor::<1, Int>::from_data(TensorData::from(values.as_slice()), &device)
        };
        let mut x = self
            .embedding
            .val()
            .select(0, ints(tokens))
            .reshape([tokens.len() / t, t, d]);
        let mut penalty: Option<Tensor<1>> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            x = x.clone() + layer.attend(constants, rms_norm(x, &layer.attention_norm));
            let flat = rms_norm(x.clone(), &layer.feed_norm).reshape([tokens.len(), d]);
            let (fed, more) = layer.feed(shape, index, flat, router);
            penalty = match (penalty, more) {
                (Some(sum), Some(more)) => Some(sum + more),
                (sum, more) => sum.or(more),
            };
            x = x + fed.reshape([tokens.len() / t, t, d]);
        }
        let x = rms_norm(x, &self.norm).reshape([tokens.len(), d]);
        let logits = log_softmax(x.matmul(self.embedding.val().transpose()), 1);
        let picked = logits.gather(1, ints(targets).unsqueeze_dim(1));
        (picked.mean().neg(), penalty)
    }
}

impl Layer {
    /// Attention over `x [B, t, d]`.
    fn attend(&self, constants: &Constants, x: Tensor<3>) -> Tensor<3> {
        let shape = &constants.shape;
        let [batch, t, d] = x.dims();
        let split = |x: Tensor<3>| x.reshape([batch, t, shape.heads, shape.head_dim()]);
        let query = rms_norm(
            split(x.clone().matmul(self.query.val().unsqueeze())),
            &self.query_norm,
        );
        let key = rms_norm(
            split(x.clone().matmul(self.key.val().unsqueeze())),
            &self.key_norm,
        );
        let value = split(x.matmul(self.value.val().unsqueeze())).swap_dims(1, 2);
        let (query, key) = (
            constants.rotate(query.swap_dims(1, 2)),
            constants.rotate(key.swap_dims(1, 2)),
        );
        let scores = query
            .matmul(key.swap_dims(2, 3))
            .mul_scalar((shape.head_dim() as f64).powf(-0.5));
        let future = constants.future.clone().expand([batch, shape.heads, t, t]);
        let weights = softmax(scores.mask_fill(future, f32::NEG_INFINITY), 3);
        let mixed = weights.matmul(value).swap_dims(1, 2).reshape([batch, t, d]);
        mixed.matmul(self.output.val().unsqueeze())
    }

    /// The experts of `x [T, d]`, and what the router adds to the loss.
    fn feed(
        &self,
        shape: &Shape,
        index: usize,
        x: Tensor<2>,
        router: &mut Router,
    ) -> (Tensor<2>, Option<Tensor<1>>) {
        let Some(weights) = &self.router else {
            return (self.experts(x.unsqueeze()).squeeze_dim(0), None);
        };
        let (device, k) = (x.device(), shape.top_k);
        let [tokens, d] = x.dims();
        let scores = sigmoid(x.clone().matmul(weights.val()));
        let host = |tensor: Tensor<2>| {
            tensor
                .inner()
                .try_into_vec_as::<f32>()
                .expect("floats of this device")
        };
        let choices = router.choose(index, &host(scores.clone()), || host(x.clone()));
        let places = Places::of(&choices, k, shape.experts);
        let ints =
            |values: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::from(values.as_slice()), &device);
        let chosen = ints(choices.iter().map(|&e| i32::from(e)).collect()).reshape([tokens, k]);
        let gates = scores.clone().gather(1, chosen);
        let gates = gates.clone() / gates.sum_dim(1);
        let gathered = x
            .select(0, ints(places.rows))
            .reshape([shape.experts, places.capacity, d]);
        let out = self
            .experts(gathered)
            .reshape([shape.experts * places.capacity, d]);
        let out = out.select(0, ints(places.slots)).reshape([tokens, k, d]) * gates.unsqueeze_dim(2);
        let penalty = router.penalty(scores, &choices);
        (out.sum_dim(1).squeeze_dim(1), penalty)
    }

    /// SwiGLU of `x [E, c, d]`, each expert on its rows.
    fn experts(&self, x: Tensor<3>) -> Tensor<3> {
        let hidden = silu(x.clone().matmul(self.gate.val())) * x.matmul(self.up.val());
        hidden.matmul(self.down.val())
    }
}

/// Where tokens go when they are gathered by expert.
#[derive(Debug, PartialEq)]
struct Places {
    /// Rows per expert: the largest load.
    capacity: usize,
    /// `[E, c]`: the token of each row; the first one where there is none.
    rows: Vec<i32>,
    /// `[T, k]`: the row of each choice.
    slots: Vec<i32>,
}

impl Places {
    /// Of `choices [T, k]`.
    fn of(choices: &[u16], top_k: usize, experts: usize) -> Self {
        let mut loads = vec![0usize; experts];
        choices.iter().for_each(|&e| loads[usize::from(e)] += 1);
        let capacity = loads.iter().copied().max().unwrap_or(0);
        let mut rows = vec![0; experts * capacity];
        loads.fill(0);
        let slots = choices.iter().enumerate().map(|(at, &e)| {
            let e = usize::from(e);
            let row = e * capacity + loads[e];
            rows[row] = (at / top_k) as i32;
            loads[e] += 1;
            row as i32
        });
        let slots = slots.collect();
        Self {
            capacity,
            rows,
            slots,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_has_a_row_of_its_expert() {
        let choices = [2, 0, 2, 1, 2, 0];
        let places = Places::of(&choices, 2, 4);
        assert_eq!(places.capacity, 3);
        for (at, (&e, &slot)) in choices.iter().zip(&places.slots).enumerate() {
            assert_eq!(slot as usize / 3, usize::from(e));
            assert_eq!(places.rows[slot as usize], at as i32 / 2);
        }
    }
}
