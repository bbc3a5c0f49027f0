//! Whole sequences at once, forwards and in reverse: gradients of a loss with respect to the outputs of every linear, and to the weights and
//! biases that stay in float.
//!
//! It serves compression, which asks how much the whole model's loss feels an error of one weight, and tunes what is not packed. In reverse a layer is
//! given its input again and recomputes what it needs in `f32`, so that nothing but the residual stream between layers has to be kept.
//! Sequences start at position 0. Mixtures of experts and sinks have no reverse pass.
//!
//! Shapes: T tokens of all sequences together, d = hidden size; `x` a value, `g` the gradient of the loss with respect to it. Results
//! do not depend on the number of threads.

mod attention;

use crate::cache::KvCache;
use crate::config::{ModelConfig, NormPlacement, Positions};
use crate::error::{ModelError, Result};
use crate::feed::{Feed, Mlp};
use crate::layer::Layer;
use crate::linear::Input;
use crate::math;
use crate::model::Model;
use crate::norm::Norm;
use crate::rope::RopeTable;
use crate::weights::{Projection, Weights};

/// Sees gradients on their way back.
pub trait GradientTap {
    /// The linear `name` read `x [T, n]`, and `g [T, m]` is the gradient of the loss with respect to its outputs.
    fn linear(&mut self, _name: &str, _x: &[f32], _g: &[f32], _tokens: usize) {}

    /// `g` is the gradient of the loss with respect to the float tensor `name` (weight or bias of a norm, bias of a linear), summed over the
    /// tokens of one call: a tensor that serves several blocks of tokens is seen several times, and the sum counts.
    fn float(&mut self, _name: &str, _g: &[f32]) {}
}

/// Hidden states of one block of a layer on the way forward.
struct BlockTrace<T> {
    /// `[T, d]`: what the block reads.
    input: Vec<f32>,
    /// What its inside needs again.
    inner: T,
    /// `[T, d]`: its output, before a norm of the output.
    output: Vec<f32>,
}

/// The inside of attention: queries, keys (normed and rotated), values and the mixed values.
struct AttentionTrace {
    /// Before and after the norm of queries and keys; the first is empty where there is none.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    /// Where clamping stopped the gradient.
    clamped: [Vec<bool>; 3],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    heads: Vec<f32>,
}

/// The inside of a feed-forward block: outputs of gate and up, and what down reads.
struct MlpTrace {
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
}

impl Model {
    /// Whether [`Self::layer_backward`] knows every layer.
    #[must_use]
    pub fn has_backward(&self) -> bool {
        self.layers
            .iter()
            .all(|layer| matches!(layer.feed, Feed::Dense(_)) && layer.sinks.is_none())
    }

    /// Applies one layer to many short sequences at once, `x [T, d]` in place, every sequence from position 0: what decoding a weight costs is
    /// paid once for all of them. `sequences` are their lengths.
    ///
    /// # Errors
    /// Never for dense layers; those of [`Self::layer_forward`] for a mixture of experts, whose sequences run one by one.
    ///
    /// # Panics
    /// There is no such layer, or the lengths do not agree.
    pub fn layer_forward_sequences(&self, layer: usize, x: &mut [f32], sequences: &[usize]) -> Result<()> {
        let d = self.config.hidden_size;
        assert_eq!(
            x.len(),
            sequences.iter().sum::<usize>() * d,
            "tokens of all sequences"
        );
        let Some((pass, mlp)) = self.pass(layer, sequences) else {
            let mut cache = KvCache::new(&self.config, sequences.iter().copied().max().unwrap_or(0));
            let mut rest = x;
            for tokens in sequences {
                let (sequence, tail) = rest.split_at_mut(tokens * d);
                self.layer_forward(layer, sequence, &mut cache, 0, &mut ())?;
                rest = tail;
            }
            return Ok(());
        };
        let attention = pass.attention_forward(x);
        let this = pass.layer;
        pass.add(
            &this.attn_norm,
            this.attn_post_norm.as_ref(),
            &attention.output,
            x,
        );
        let feed = pass.mlp_forward(mlp, x);
        pass.add(&this.mlp_norm, this.mlp_post_norm.as_ref(), &feed.output, x);
        self.release(Some(layer));
        Ok(())
    }

    /// A pass through a dense layer; `None` for a mixture of experts and for attention with sinks.
    fn pass<'a>(&'a self, layer: usize, sequences: &'a [usize]) -> Option<(Pass<'a>, &'a Mlp)> {
        let this = &self.layers[layer];
        let (Feed::Dense(mlp), None) = (&this.feed, &this.sinks) else {
            return None;
        };
        let pass = Pass {
            config: &self.config,
            weights: &self.weights,
            layer: this,
            window: self.config.window(layer),
            rope: self.rope_table(layer, sequences),
            sequences,
        };
        Some((pass, mlp))
    }

    /// Takes the gradient `g [T, d]` back through a layer: from its output to its input `x [T, d]`. `sequences` are the lengths of the
    /// independent sequences that `x` holds one after the other.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for a mixture of experts and for attention with sinks.
    ///
    /// # Panics
    /// There is no such layer, or the lengths do not agree.
    pub fn layer_backward(
        &self,
        layer: usize,
        x: &[f32],
        sequences: &[usize],
        g: &mut [f32],
        tap: &mut dyn GradientTap,
    ) -> Result<()> {
        let d = self.config.hidden_size;
        assert_eq!(
            x.len(),
            sequences.iter().sum::<usize>() * d,
            "tokens of all sequences"
        );
        assert_eq!(x.len(), g.len(), "one gradient per value");
        let Some((pass, mlp)) = self.pass(layer, sequences) else {
            return Err(ModelError::Unsupported {
                architecture: self.config.architecture.clone(),
                what: "the reverse pass of a mixture of experts or of attention with sinks".into(),
            });
        };
        let this = pass.layer;
        let attention = pass.attention_forward(x);
        let mut middle = x.to_vec();
        pass.add(
            &this.attn_norm,
            this.attn_post_norm.as_ref(),
            &attention.output,
            &mut middle,
        );
        let feed = pass.mlp_forward(mlp, &middle);
        pass.block_backward(
            (&this.mlp_norm, this.mlp_post_norm.as_ref()),
            (&middle, &feed.output),
            g,
            tap,
            |g, tap| pass.mlp_backward(mlp, &feed, g, tap),
        );
        pass.block_backward(
            (&this.attn_norm, this.attn_post_norm.as_ref()),
            (x, &attention.output),
            g,
            tap,
            |g, tap| pass.attention_backward(&attention, g, tap),
        );
        Ok(())
    }

    /// Takes the loss back through the output matrix and the final norm: `x [T, d]`, the hidden states after the last layer, become the
    /// gradient with respect to them. `loss(first token, logits [t, V])` is called for blocks of tokens and turns logits into
    /// their gradients in place.
    pub fn head_backward(
        &self,
        x: &mut [f32],
        tap: &mut dyn GradientTap,
        mut loss: impl FnMut(usize, &mut [f32]),
    ) {
        const TOKENS: usize = 64;
        let (d, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let mut logits = Vec::new();
        for (block, x) in x.chunks_mut(TOKENS * d).enumerate() {
            let tokens = x.len() / d;
            let mut hidden = x.to_vec();
            self.final_norm(&mut hidden);
            logits.resize(tokens * vocab, 0.0);
            self.logits(&hidden, &mut logits, &mut ());
            let capped = self.config.logit_softcap.map(|cap| (cap, logits.clone()));
            loss(block * TOKENS, &mut logits);
            if let Some((cap, values)) = capped {
                for (g, y) in logits.iter_mut().zip(values) {
                    *g *= 1.0 - (y / cap) * (y / cap);
                }
            }
            let mut g = vec![0.0; x.len()];
            self.head()
                .backward(&self.weights, (&hidden, d), &logits, &mut g, tap);
            if let Some(norm) = &self.final_norm {
                norm.backward(x, &mut g, tap);
            }
            x.copy_from_slice(&g);
        }
    }

    /// Angles of the positions of the longest sequence, if this layer rotates.
    fn rope_table(&self, layer: usize, sequences: &[usize]) -> Option<RopeTable> {
        let Positions::Rope(settings) = &self.config.positions else {
            return None;
        };
        let local = usize::from(self.config.layers[layer].sliding && settings.local.is_some());
        let (inverse, factor) = self.rope[local].as_ref()?;
        let mut table = RopeTable::default();
        table.fill(inverse, *factor, 0, sequences.iter().copied().max().unwrap_or(0));
        Some(table)
    }
}

/// One layer and what a pass through it needs.
struct Pass<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    layer: &'a Layer,
    window: Option<usize>,
    rope: Option<RopeTable>,
    sequences: &'a [usize],
}

impl Pass<'_> {
    fn before(&self, norm: &Norm, x: &[f32]) -> Vec<f32> {
        let mut normed = x.to_vec();
        if self.config.norm.placement != NormPlacement::AfterResidual {
            norm.apply(&mut normed);
        }
        normed
    }

    /// Adds a block's output to the residual stream.
    fn add(&self, norm: &Norm, post: Option<&Norm>, output: &[f32], x: &mut [f32]) {
        let mut output = output.to_vec();
        if let Some(post) = post {
            post.apply(&mut output);
        }
        x.iter_mut().zip(&output).for_each(|(x, o)| *x += o);
        if self.config.norm.placement == NormPlacement::AfterResidual {
            norm.apply(x);
        }
    }

    /// `g` from after a block to before it; `inside` does the same for the block without norms and residual stream.
    fn block_backward(
        &self,
        (norm, post): (&Norm, Option<&Norm>),
        (x, output): (&[f32], &[f32]),
        g: &mut [f32],
        tap: &mut dyn GradientTap,
        inside: impl FnOnce(Vec<f32>, &mut dyn GradientTap) -> Vec<f32>,
    ) {
        let after = self.config.norm.placement == NormPlacement::AfterResidual;
        if after {
            let sum: Vec<f32> = x.iter().zip(output).map(|(x, o)| x + o).collect();
            norm.backward(&sum, g, tap);
        }
        let mut block = g.to_vec();
        if let Some(post) = post {
            post.backward(output, &mut block, tap);
        }
        let mut block = inside(block, tap);
        if !after {
            norm.backward(x, &mut block, tap);
        }
        g.iter_mut().zip(&block).for_each(|(g, b)| *g += b);
    }

    fn project(&self, projection: &Projection, x: &[f32]) -> Vec<f32> {
        let mut y = Vec::new();
        let cols = self.weights.linear(projection.slot).cols();
        self.weights.project(projection, &Input::new(x, cols), &mut y);
        y
    }

    /// Adds `g · W` to `gx` and shows the tap what the linear read and the gradient of its bias.
    fn project_backward(
        &self,
        projection: &Projection,
        x: &[f32],
        g: &[f32],
        gx: &mut [f32],
        tap: &mut dyn GradientTap,
    ) {
        let linear = self.weights.linear(projection.slot);
        let tokens = x.len() / linear.cols();
        let name = &self.weights.info(projection.slot).name;
        tap.linear(name, x, g, tokens);
        if projection.bias.is_some() {
            tap.float(&format!("{name}.bias"), &math::column_sums(g, linear.rows()));
        }
        linear.backward(g, tokens, gx);
    }

    /// Rotates queries or keys of every sequence, forwards or back.
    fn rotate(&self, heads: usize, x: &mut [f32], table: Option<&RopeTable>) {
        let (Positions::Rope(settings), Some(table)) = (&self.config.positions, table) else {
            return;
        };
        let width = heads * self.config.attention.head_dim;
        let mut rest = x;
        for &tokens in self.sequences {
            let (sequence, tail) = rest.split_at_mut(tokens * width);
            table.rotate(settings, self.config.attention.head_dim, heads, sequence);
            rest = tail;
        }
    }

    fn attention_forward(&self, x: &[f32]) -> BlockTrace<AttentionTrace> {
        let (a, layer) = (&self.config.attention, self.layer);
        let input = self.before(&layer.attn_norm, x);
        let [mut q, mut k, mut v] = [&layer.q, &layer.k, &layer.v].map(|p| self.project(p, &input));
        let normed = |norm: &Option<Norm>, x: &mut Vec<f32>| match norm {
            Some(norm) => {
                let raw = x.clone();
                norm.apply(x);
                raw
            }
            None => Vec::new(),
        };
        let (raw_q, raw_k) = (normed(&layer.q_norm, &mut q), normed(&layer.k_norm, &mut k));
        let clamped = [&mut q, &mut k, &mut v].map(|x| match a.clip {
            Some(clip) => x
                .iter_mut()
                .map(|v| {
                    let outside = v.abs() > clip;
                    *v = v.clamp(-clip, clip);
                    outside
                })
                .collect(),
            None => Vec::new(),
        });
        self.rotate(a.heads, &mut q, self.rope.as_ref());
        self.rotate(a.kv_heads, &mut k, self.rope.as_ref());
        let heads = attention::forward(a, self.window, self.sequences, (&q, &k, &v));
        let output = self.project(&layer.o, &heads);
        BlockTrace {
            input,
            inner: AttentionTrace {
                raw_q,
                raw_k,
                clamped,
                q,
                k,
                v,
                heads,
            },
            output,
        }
    }

    /// From the gradient of attention's output to that of its input.
    fn attention_backward(
        &self,
        trace: &BlockTrace<AttentionTrace>,
        g: Vec<f32>,
        tap: &mut dyn GradientTap,
    ) -> Vec<f32> {
        let (a, layer, t) = (&self.config.attention, self.layer, &trace.inner);
        let mut g_heads = vec![0.0; t.heads.len()];
        self.project_backward(&layer.o, &t.heads, &g, &mut g_heads, tap);
        let mut grads = attention::backward(a, self.window, self.sequences, (&t.q, &t.k, &t.v), &g_heads);
        let back = self.rope.as_ref().map(RopeTable::transposed);
        self.rotate(a.heads, &mut grads[0], back.as_ref());
        self.rotate(a.kv_heads, &mut grads[1], back.as_ref());
        for (g, clamped) in grads.iter_mut().zip(&t.clamped) {
            for (g, _) in g.iter_mut().zip(clamped).filter(|(_, c)| **c) {
                *g = 0.0;
            }
        }
        for (norm, raw, g) in [(&layer.q_norm, &t.raw_q, 0), (&layer.k_norm, &t.raw_k, 1)] {
            if let Some(norm) = norm {
                norm.backward(raw, &mut grads[g], tap);
            }
        }
        let mut g_input = vec![0.0; trace.input.len()];
        for (projection, g) in [&layer.q, &layer.k, &layer.v].into_iter().zip(&grads) {
            self.project_backward(projection, &trace.input, g, &mut g_input, tap);
        }
        g_input
    }

    fn mlp_forward(&self, mlp: &Mlp, x: &[f32]) -> BlockTrace<MlpTrace> {
        let kind = self.config.mlp.activation;
        let input = self.before(&self.layer.mlp_norm, x);
        let up = self.project(&mlp.up, &input);
        let gate = mlp.gate.as_ref().map_or(Vec::new(), |g| self.project(g, &input));
        let mut inner = if mlp.gate.is_some() {
            gate.clone()
        } else {
            up.clone()
        };
        math::activate(kind, &mut inner);
        if mlp.gate.is_some() {
            inner.iter_mut().zip(&up).for_each(|(i, u)| *i *= u);
        }
        let output = self.project(&mlp.down, &inner);
        BlockTrace {
            input,
            inner: MlpTrace { gate, up, inner },
            output,
        }
    }

    /// From the gradient of the feed-forward block's output to that of its input.
    fn mlp_backward(
        &self,
        mlp: &Mlp,
        trace: &BlockTrace<MlpTrace>,
        g: Vec<f32>,
        tap: &mut dyn GradientTap,
    ) -> Vec<f32> {
        let (kind, t) = (self.config.mlp.activation, &trace.inner);
        let mut g_inner = vec![0.0; t.inner.len()];
        self.project_backward(&mlp.down, &t.inner, &g, &mut g_inner, tap);
        let mut g_input = vec![0.0; trace.input.len()];
        let Some(gate) = &mlp.gate else {
            let mut slope = t.up.clone();
            math::slope(kind, &mut slope);
            g_inner.iter_mut().zip(slope).for_each(|(g, s)| *g *= s);
            self.project_backward(&mlp.up, &trace.input, &g_inner, &mut g_input, tap);
            return g_input;
        };
        let (mut value, mut slope) = (t.gate.clone(), t.gate.clone());
        math::activate(kind, &mut value);
        math::slope(kind, &mut slope);
        let g_up: Vec<f32> = g_inner.iter().zip(value).map(|(g, v)| g * v).collect();
        let g_gate: Vec<f32> = g_inner
            .iter()
            .zip(&t.up)
            .zip(slope)
            .map(|((g, u), s)| g * u * s)
            .collect();
        self.project_backward(&mlp.up, &trace.input, &g_up, &mut g_input, tap);
        self.project_backward(gate, &trace.input, &g_gate, &mut g_input, tap);
        g_input
    }
}
