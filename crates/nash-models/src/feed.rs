//! Feed-forward blocks: the gated or plain MLP and the mixture of experts with plain top-k routing.

use std::sync::Arc;

use nash_kernels::{dense, pool};

use crate::config::{Activation, MoeConfig, Scoring};
use crate::linear::Input;
use crate::manifest::Site;
use crate::math;
use crate::scratch::{MlpScratch, Scratch, sized};
use crate::tap::Tap;
use crate::weights::{Projection, Weights};

/// A feed-forward block.
pub(crate) enum Feed {
    Dense(Mlp),
    Experts(Box<Experts>),
}

/// `down(act(gate(x)) ∘ up(x))`, or `down(act(up(x)))` without a gate.
pub(crate) struct Mlp {
    pub(crate) gate: Option<Projection>,
    pub(crate) up: Projection,
    pub(crate) down: Projection,
}

/// A mixture of experts.
pub(crate) struct Experts {
    pub(crate) config: MoeConfig,
    pub(crate) router: Projection,
    /// `[experts]`, added for the choice only.
    pub(crate) correction: Option<Arc<[f32]>>,
    pub(crate) experts: Vec<Mlp>,
    pub(crate) shared: Option<Mlp>,
    /// `[d]`.
    pub(crate) shared_gate: Option<Arc<[f32]>>,
}

/// What the blocks of one layer need besides their weights.
pub(crate) struct Context<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) layer: usize,
    pub(crate) activation: Activation,
    pub(crate) tap: &'a mut dyn Tap,
}

/// Elements of a task.
const CHUNK: usize = 1 << 14;

impl Feed {
    /// Visits every float tensor that the block uses.
    pub(crate) fn for_each_float(&mut self, visit: &mut dyn FnMut(&mut Arc<[f32]>)) {
        match self {
            Self::Dense(mlp) => mlp.for_each_bias(visit),
            Self::Experts(experts) => {
                experts.router.bias.iter_mut().for_each(&mut *visit);
                for mlp in experts.experts.iter_mut().chain(&mut experts.shared) {
                    mlp.for_each_bias(visit);
                }
                for float in [&mut experts.correction, &mut experts.shared_gate] {
                    float.iter_mut().for_each(&mut *visit);
                }
            }
        }
    }

    /// The block applied to `scratch.normed [T, d]`, into `scratch.out [T, d]`.
    pub(crate) fn forward(&self, cx: &mut Context<'_>, d: usize, scratch: &mut Scratch) {
        match self {
            Self::Dense(mlp) => {
                let Scratch {
                    normed,
                    out,
                    mlp: buffers,
                    ..
                } = scratch;
                let input = Input::with_buffer(normed, d, std::mem::take(&mut buffers.activations));
                cx.tap.input(cx.layer, Site::MlpIn, normed, input.tokens(), d);
                mlp.forward(cx, Site::MlpDown, input, buffers, out);
            }
            Self::Experts(experts) => experts.forward(cx, d, scratch),
        }
    }
}

impl Mlp {
    fn for_each_bias(&mut self, visit: &mut dyn FnMut(&mut Arc<[f32]>)) {
        let projections = self.gate.iter_mut().chain([&mut self.up, &mut self.down]);
        projections.for_each(|p| p.bias.iter_mut().for_each(&mut *visit));
    }

    /// The caller has shown the input to the tap, and lent it the buffer, which comes back to `buffers`.
    fn forward(
        &self,
        cx: &mut Context<'_>,
        down: Site,
        input: Input<'_>,
        buffers: &mut MlpScratch,
        out: &mut Vec<f32>,
    ) {
        match &self.gate {
            Some(gate) => {
                let projections = [(gate, &mut buffers.gate), (&self.up, &mut buffers.up)];
                cx.weights.project_each(projections, &input);
            }
            None => cx.weights.project(&self.up, &input, &mut buffers.up),
        }
        let tokens = input.tokens();
        let activations = input.into_buffer();
        let kind = cx.activation;
        let MlpScratch { gate, up, .. } = buffers;
        let inner = if self.gate.is_some() {
            pool::for_each_chunk(gate, CHUNK, |i, gate| {
                math::activate(kind, gate);
                gate.iter_mut()
                    .zip(&up[i * CHUNK..])
                    .for_each(|(gate, up)| *gate *= up);
            });
            gate
        } else {
            pool::for_each_chunk(up, CHUNK, |_, up| math::activate(kind, up));
            up
        };
        let width = inner.len() / tokens.max(1);
        cx.tap.input(cx.layer, down, inner, tokens, width);
        let input = Input::with_buffer(inner, width, activations);
        cx.weights.project(&self.down, &input, out);
        buffers.activations = input.into_buffer();
    }
}

impl Experts {
    fn forward(&self, cx: &mut Context<'_>, d: usize, scratch: &mut Scratch) {
        let Scratch {
            normed,
            out,
            mlp,
            moe,
            ..
        } = scratch;
        let input = Input::with_buffer(normed, d, std::mem::take(&mut mlp.activations));
        let tokens = input.tokens();
        cx.tap.input(cx.layer, Site::Router, normed, tokens, d);
        cx.weights.project(&self.router, &input, &mut moe.scores);
        // The shared expert reads the same input, quantized once. Its answer is the start of the sum.
        match &self.shared {
            Some(shared) => {
                cx.tap.input(cx.layer, Site::SharedIn, normed, tokens, d);
                shared.forward(cx, Site::SharedDown, input, mlp, out);
                if let Some(gate) = &self.shared_gate {
                    for (out, x) in out.chunks_exact_mut(d).zip(normed.chunks_exact(d)) {
                        let open = math::sigmoid(dense::dot(x, gate));
                        out.iter_mut().for_each(|v| *v *= open);
                    }
                }
            }
            None => {
                mlp.activations = input.into_buffer();
                sized(out, tokens * d).fill(0.0);
            }
        }
        for (expert, chosen) in self.route(&mut moe.scores).into_iter().enumerate() {
            if chosen.is_empty() {
                continue;
            }
            moe.gathered.clear();
            for &(token, _) in &chosen {
                moe.gathered
                    .extend_from_slice(&normed[token * d..(token + 1) * d]);
            }
            cx.tap
                .input(cx.layer, Site::ExpertIn(expert), &moe.gathered, chosen.len(), d);
            let input = Input::with_buffer(&moe.gathered, d, std::mem::take(&mut mlp.activations));
            self.experts[expert].forward(cx, Site::ExpertDown(expert), input, mlp, &mut moe.expert_out);
            for (&(token, weight), answer) in chosen.iter().zip(moe.expert_out.chunks_exact(d)) {
                let out = &mut out[token * d..(token + 1) * d];
                out.iter_mut()
                    .zip(answer)
                    .for_each(|(out, answer)| *out += weight * answer);
            }
        }
    }

    /// Per expert its tokens with their mixing weights, given the router's logits `[T, experts]`.
    fn route(&self, logits: &mut [f32]) -> Vec<Vec<(usize, f32)>> {
        let config = &self.config;
        let mut chosen = vec![Vec::new(); config.experts];
        let mut order: Vec<usize> = Vec::new();
        let mut ranks: Vec<f32> = Vec::new();
        for (token, scores) in logits.chunks_exact_mut(config.experts).enumerate() {
            match config.scoring {
                Scoring::Softmax => math::softmax(scores),
                Scoring::Sigmoid => scores.iter_mut().for_each(|s| *s = math::sigmoid(*s)),
            }
            // The choice goes by score plus correction, the mixing by the score alone.
            ranks.clear();
            ranks.extend_from_slice(scores);
            if let Some(correction) = &self.correction {
                ranks
                    .iter_mut()
                    .zip(correction.iter())
                    .for_each(|(rank, c)| *rank += c);
            }
            self.close_groups(&mut ranks);
            order.clear();
            order.extend(0..config.experts);
            order.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]));
            order.truncate(config.top_k);
            let sum: f32 = order.iter().map(|&expert| scores[expert]).sum();
            let scale = if config.normalize {
                config.scale / (sum + 1e-20)
            } else {
                config.scale
            };
            for &expert in &order {
                chosen[expert].push((token, scores[expert] * scale));
            }
        }
        chosen
    }

    /// Group-limited routing (DeepSeek-V3): only the groups with the best sums of two experts stay open.
    fn close_groups(&self, ranks: &mut [f32]) {
        let Some(groups) = self.config.groups else { return };
        let size = ranks.len() / groups.count;
        let mut order: Vec<(usize, f32)> = ranks
            .chunks_exact(size)
            .map(|group| {
                // The two largest.
                group.iter().fold(
                    (f32::NEG_INFINITY, f32::NEG_INFINITY),
                    |(first, second), &rank| {
                        if rank > first {
                            (rank, first)
                        } else {
                            (first, second.max(rank))
                        }
                    },
                )
            })
            .map(|(first, second)| if size > 1 { first + second } else { first })
            .enumerate()
            .collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        for &(group, _) in &order[groups.top_k..] {
            ranks[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
        }
    }
}
