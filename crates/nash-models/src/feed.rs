//! Feed-forward blocks: the gated or plain MLP and the mixture of experts with plain top-k routing.

use std::sync::{Arc, Mutex, PoisonError};

use nash_kernels::{Activations, dense, pool};

use crate::channels::ChannelSparsity;
use crate::config::{Activation, MoeConfig, Scoring};
use crate::linear::Input;
use crate::manifest::Site;
use crate::math;
use crate::routing::{RoutingCall, RoutingPolicy};
use crate::scratch::{MlpScratch, MoeScratch, Routed, Scratch, sized};
use crate::tap::Tap;
use crate::weights::{Projected, Projection, Weights};

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
    pub(crate) channels: Option<&'a ChannelSparsity>,
    pub(crate) routing: Option<&'a Mutex<Box<dyn RoutingPolicy>>>,
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
                if cx.tap.wants_more() {
                    mlp.forward(cx, Site::MlpDown, input, buffers, out);
                } else {
                    buffers.activations = input.into_buffer();
                }
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
        let inner: &[f32] = if self.gate.is_some() {
            let sparse = cx.channels.filter(|_| down == Site::MlpDown);
            let opened = sparse.map_or_else(Vec::new, |_| gate.clone());
            activate_gated(kind, gate, up);
            if let Some(channels) = sparse {
                channels.apply(cx.layer, &opened, gate, kind);
            }
            gate
        } else {
            pool::for_each_chunk(up, CHUNK, |_, up| math::activate(kind, up));
            up
        };
        let width = inner.len() / tokens.max(1);
        cx.tap.input(cx.layer, down, inner, tokens, width);
        if !cx.tap.wants_more() {
            buffers.activations = activations;
            return;
        }
        let input = Input::with_buffer(inner, width, activations);
        cx.weights.project(&self.down, &input, out);
        buffers.activations = input.into_buffer();
    }
}

/// `gate ← act(gate) ∘ up`.
fn activate_gated(kind: Activation, gate: &mut [f32], up: &[f32]) {
    pool::for_each_chunk(gate, CHUNK, |i, gate| {
        math::activate_gated(kind, gate, &up[i * CHUNK..])
    });
}

/// The shared expert and its buffers.
type Shared<'a> = (&'a Mlp, &'a mut MlpScratch);

/// Which projection of an expert, and the outputs of all experts, in order.
type Output<'a> = (fn(&Mlp) -> Option<&Projection>, &'a mut [f32]);

/// The rows of each expert that has any.
fn by_expert(routed: &[Routed]) -> impl Iterator<Item = &[Routed]> {
    routed.chunk_by(|a, b| a.expert == b.expert)
}

/// Rows of routed tokens that are worked on together, about: enough to share out, little enough to fit in memory.
const PART_ROWS: usize = 2048;

/// Takes the rows of some experts, at least one, off the front.
fn take_part<'a>(rest: &mut &'a [Routed]) -> &'a [Routed] {
    let mut len = 0;
    for group in by_expert(rest) {
        if len > 0 && len + group.len() > PART_ROWS {
            break;
        }
        len += group.len();
    }
    rest.split_off(..len).unwrap_or_default()
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
        // The shared expert reads the same input, quantized once. Its answer is the start of the sum. For one token it is multiplied together with the routed ones.
        let together = tokens == 1 && self.shared_gate.is_none();
        match self.shared.as_ref().filter(|_| !together) {
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
        self.rank(cx, (normed, d), moe);
        self.route(moe);
        let shared = self.shared.as_ref().filter(|_| together);
        self.mix(cx, normed, moe, out, shared.map(|shared| (shared, mlp)));
    }

    /// Adds to `out [T, d]` what the chosen experts answer to `normed [T, d]`.
    fn mix(
        &self,
        cx: &mut Context<'_>,
        normed: &[f32],
        moe: &mut MoeScratch,
        out: &mut [f32],
        mut shared: Option<Shared<'_>>,
    ) {
        let routed = std::mem::take(&mut moe.routed);
        let mut rest = &routed[..];
        while !rest.is_empty() {
            let part = take_part(&mut rest);
            self.mix_part(cx, (normed, part), moe, out, shared.take());
        }
        moe.routed = routed;
    }

    /// [`Self::mix`] for some of the experts: their products with gate and up are one piece of work, those with down another.
    fn mix_part(
        &self,
        cx: &mut Context<'_>,
        (normed, routed): (&[f32], &[Routed]),
        moe: &mut MoeScratch,
        out: &mut [f32],
        mut shared: Option<Shared<'_>>,
    ) {
        let MoeScratch {
            gathered,
            gate,
            up,
            answers,
            activations,
            ..
        } = moe;
        let Some(first) = self.experts.first() else { return };
        let weights = cx.weights;
        let (d, f) = (weights.info(first.up.slot).cols, self.config.intermediate);
        let x = if normed.len() == d {
            normed
        } else {
            gathered.clear();
            for row in routed {
                gathered.extend_from_slice(&normed[row.token * d..(row.token + 1) * d]);
            }
            gathered
        };
        let mut inputs = self.inputs(cx, (x, d), Site::ExpertIn, routed, activations);
        if weights.is_packed(&first.up) {
            Input::quantize_each(&mut inputs);
        }
        let (gates, ups) = (sized(gate, routed.len() * f), sized(up, routed.len() * f));
        let outputs: &mut [Output<'_>] = &mut [(|e| e.gate.as_ref(), gates), (|e| Some(&e.up), ups)];
        let mut besides = Vec::new();
        if let Some((shared, buffers)) = &mut shared {
            cx.tap.input(cx.layer, Site::SharedIn, x, 1, d);
            let MlpScratch { gate, up, .. } = &mut **buffers;
            for (projection, y) in [(shared.gate.as_ref(), gate), (Some(&shared.up), up)] {
                let Some(projection) = projection else { continue };
                besides.push(Projected {
                    projection,
                    input: &inputs[0],
                    y: sized(y, weights.info(projection.slot).rows),
                });
            }
        }
        self.project(weights, routed, &inputs, outputs, besides);
        activations.extend(inputs.into_iter().map(Input::into_buffer));

        activate_gated(cx.activation, gate, up);

        let mut inputs = self.inputs(cx, (gate, f), Site::ExpertDown, routed, activations);
        let shared = shared.map(|(shared, buffers)| {
            let MlpScratch {
                gate,
                up,
                activations,
            } = buffers;
            activate_gated(cx.activation, gate, up);
            cx.tap.input(cx.layer, Site::SharedDown, gate, 1, gate.len());
            // Behind those of the routed experts.
            inputs.push(Input::with_buffer(gate, gate.len(), std::mem::take(activations)));
            (&shared.down, activations)
        });
        if weights.is_packed(&first.down) {
            Input::quantize_each(&mut inputs);
        }
        let outputs: &mut [Output<'_>] = &mut [(|e| Some(&e.down), sized(answers, routed.len() * d))];
        let mut besides = Vec::new();
        if let (Some((projection, _)), Some(input)) = (&shared, inputs.last()) {
            let y = &mut *out;
            besides.push(Projected { projection, input, y });
        }
        self.project(weights, routed, &inputs, outputs, besides);
        if let Some((_, buffer)) = shared {
            *buffer = inputs.pop().map(Input::into_buffer).unwrap_or_default();
        }
        activations.extend(inputs.into_iter().map(Input::into_buffer));

        for (row, answer) in routed.iter().zip(answers.chunks_exact(d)) {
            let out = &mut out[row.token * d..(row.token + 1) * d];
            out.iter_mut()
                .zip(answer)
                .for_each(|(out, answer)| *out += row.weight * answer);
        }
    }

    /// The rows of `x [A, n]` as one input per expert, or the only row `x [n]` as the input of all, quantized once; the tap
    /// sees what each expert reads. The inputs are lent buffers.
    fn inputs<'x>(
        &self,
        cx: &mut Context<'_>,
        (x, n): (&'x [f32], usize),
        site: fn(usize) -> Site,
        routed: &[Routed],
        buffers: &mut Vec<Activations>,
    ) -> Vec<Input<'x>> {
        let one = x.len() == n;
        let mut rest = x;
        let mut inputs = Vec::with_capacity(self.config.experts.min(routed.len()));
        for group in by_expert(routed) {
            let rows = if one {
                x
            } else {
                rest.split_off(..group.len() * n).unwrap_or_default()
            };
            cx.tap
                .input(cx.layer, site(group[0].expert), rows, group.len(), n);
            if !one || inputs.is_empty() {
                inputs.push(Input::with_buffer(rows, n, buffers.pop().unwrap_or_default()));
            }
        }
        inputs
    }

    /// Projects the input of every expert, or the only input for all of them, into its rows of the outputs, and what is to be projected besides.
    fn project<'a>(
        &'a self,
        weights: &Weights,
        routed: &[Routed],
        inputs: &'a [Input<'a>],
        outputs: &mut [Output<'a>],
        besides: Vec<Projected<'a>>,
    ) {
        let mut products = besides;
        products.reserve(outputs.len() * self.config.experts.min(routed.len()));
        for (i, group) in by_expert(routed).enumerate() {
            let expert = &self.experts[group[0].expert];
            let input = inputs.get(i).unwrap_or(&inputs[0]);
            for (which, rest) in outputs.iter_mut() {
                let Some(projection) = which(expert) else { continue };
                let len = group.len() * weights.info(projection.slot).rows;
                let y = rest.split_off_mut(..len).unwrap_or_default();
                products.push(Projected { projection, input, y });
            }
        }
        weights.project_all(&mut products);
    }

    /// Turns the router's logits `moe.scores [T, experts]` into scores, and into `moe.ranks [T, experts]`, by which tokens choose.
    fn rank(&self, cx: &Context<'_>, (x, width): (&[f32], usize), moe: &mut MoeScratch) {
        let config = &self.config;
        let MoeScratch { scores, ranks, .. } = moe;
        for scores in scores.chunks_exact_mut(config.experts) {
            match config.scoring {
                Scoring::Softmax => math::softmax(scores),
                Scoring::Sigmoid => scores.iter_mut().for_each(|s| *s = math::sigmoid(*s)),
                Scoring::Unit => {}
            }
        }
        // The choice goes by score plus correction, the mixing by the score alone.
        ranks.clone_from(scores);
        for ranks in ranks.chunks_exact_mut(config.experts) {
            if let Some(correction) = &self.correction {
                ranks
                    .iter_mut()
                    .zip(correction.iter())
                    .for_each(|(rank, c)| *rank += c);
            }
            self.close_groups(ranks);
        }
        if let Some(policy) = cx.routing {
            let mut policy = policy.lock().unwrap_or_else(PoisonError::into_inner);
            policy.rank(RoutingCall {
                layer: cx.layer,
                x,
                width,
                ranks,
                experts: config.experts,
                top_k: config.top_k,
            });
        }
    }

    /// Sorts the tokens by expert into `moe.routed`, given scores and ranks.
    fn route(&self, moe: &mut MoeScratch) {
        let config = &self.config;
        let MoeScratch {
            scores,
            ranks,
            order,
            routed,
            ..
        } = moe;
        routed.clear();
        let rows = scores
            .chunks_exact(config.experts)
            .zip(ranks.chunks_exact(config.experts));
        for (token, (scores, ranks)) in rows.enumerate() {
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
            routed.extend(order.iter().map(|&expert| Routed {
                expert,
                token,
                weight: match config.scoring {
                    Scoring::Unit => config.scale,
                    _ => scores[expert] * scale,
                },
            }));
        }
        routed.sort_unstable_by_key(|row| (row.expert, row.token));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_experts_within_the_limit() {
        let sizes = [3, PART_ROWS - 3, 1, PART_ROWS + 5, PART_ROWS, 7, 8];
        let rows = |(expert, size): (usize, &usize)| {
            let row = Routed {
                expert,
                token: 0,
                weight: 1.0,
            };
            vec![row; *size]
        };
        let routed: Vec<Routed> = sizes.iter().enumerate().flat_map(rows).collect();
        let mut rest = &routed[..];
        let mut parts = Vec::new();
        while !rest.is_empty() {
            let part = take_part(&mut rest);
            parts.push(by_expert(part).map(|group| group[0].expert).collect::<Vec<_>>());
        }
        assert_eq!(parts, [vec![0, 1], vec![2], vec![3], vec![4], vec![5, 6]]);
    }
}
