//! One transformer layer: attention and a feed-forward block on the residual stream.

use std::sync::Arc;

use crate::attention::{Attend, attend};
use crate::cache::KvCache;
use crate::config::{ModelConfig, NormPlacement, Positions};
use crate::error::Result;
use crate::feed::{Context, Feed};
use crate::linear::Input;
use crate::manifest::Site;
use crate::norm::Norm;
use crate::scratch::{Scratch, sized};
use crate::weights::Projection;

/// Weights of a layer.
pub(crate) struct Layer {
    pub(crate) attn_norm: Norm,
    pub(crate) q: Projection,
    pub(crate) k: Projection,
    pub(crate) v: Projection,
    pub(crate) q_norm: Option<Norm>,
    pub(crate) k_norm: Option<Norm>,
    /// `[heads]`.
    pub(crate) sinks: Option<Arc<[f32]>>,
    pub(crate) o: Projection,
    /// On the output of attention ([`NormPlacement::Sandwich`]).
    pub(crate) attn_post_norm: Option<Norm>,
    pub(crate) mlp_norm: Norm,
    pub(crate) feed: Feed,
    pub(crate) mlp_post_norm: Option<Norm>,
}

/// Inverse frequencies and cos/sin factor of the global and the local rope, where there is one.
pub(crate) type RopeTables = [Option<(Vec<f32>, f32)>; 2];

/// Where a layer call is.
pub(crate) struct Call<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) rope: &'a RopeTables,
    pub(crate) start: usize,
}

impl Layer {
    /// Visits every float tensor that the layer uses.
    pub(crate) fn for_each_float(&mut self, visit: &mut dyn FnMut(&mut Arc<[f32]>)) {
        let norms = [&mut self.attn_norm, &mut self.mlp_norm].into_iter();
        let others = [
            &mut self.q_norm,
            &mut self.k_norm,
            &mut self.attn_post_norm,
            &mut self.mlp_post_norm,
        ];
        for norm in norms.chain(others.into_iter().flatten()) {
            norm.for_each_float(visit);
        }
        for projection in [&mut self.q, &mut self.k, &mut self.v, &mut self.o] {
            projection.bias.iter_mut().for_each(&mut *visit);
        }
        self.sinks.iter_mut().for_each(&mut *visit);
        self.feed.for_each_float(visit);
    }

    /// `x [T, d]` in place; keys and values of positions `start..start + T` go into the cache. Ends where the tap wants no more.
    pub(crate) fn forward(
        &self,
        call: &Call<'_>,
        cx: &mut Context<'_>,
        x: &mut [f32],
        cache: &mut KvCache,
    ) -> Result<()> {
        let (config, d) = (call.config, call.config.hidden_size);
        cache.check(config, call.start + x.len() / d)?;
        let mut scratch = std::mem::take(&mut cache.scratch);
        self.before(config, &self.attn_norm, x, &mut scratch);
        self.attention(call, cx, cache, &mut scratch);
        if !cx.tap.wants_more() {
            cache.scratch = scratch;
            return Ok(());
        }
        self.after(
            config,
            &self.attn_norm,
            self.attn_post_norm.as_ref(),
            x,
            &mut scratch,
        );
        self.before(config, &self.mlp_norm, x, &mut scratch);
        self.feed.forward(cx, d, &mut scratch);
        self.after(
            config,
            &self.mlp_norm,
            self.mlp_post_norm.as_ref(),
            x,
            &mut scratch,
        );
        cache.scratch = scratch;
        Ok(())
    }

    /// The input of a block into `scratch.normed`.
    fn before(&self, config: &ModelConfig, norm: &Norm, x: &[f32], scratch: &mut Scratch) {
        sized(&mut scratch.normed, x.len()).copy_from_slice(x);
        if config.norm.placement != NormPlacement::AfterResidual {
            norm.apply(&mut scratch.normed);
        }
    }

    /// Adds a block's output `scratch.out` to the residual stream.
    fn after(
        &self,
        config: &ModelConfig,
        norm: &Norm,
        post: Option<&Norm>,
        x: &mut [f32],
        scratch: &mut Scratch,
    ) {
        if let Some(post) = post {
            post.apply(&mut scratch.out);
        }
        x.iter_mut().zip(&scratch.out).for_each(|(x, out)| *x += out);
        if config.norm.placement == NormPlacement::AfterResidual {
            norm.apply(x);
        }
    }

    /// From `scratch.normed` to `scratch.out`.
    fn attention(&self, call: &Call<'_>, cx: &mut Context<'_>, cache: &mut KvCache, scratch: &mut Scratch) {
        let (config, a, d) = (call.config, &call.config.attention, call.config.hidden_size);
        let Scratch {
            normed,
            out,
            q,
            k,
            v,
            heads,
            states,
            mlp,
            rope,
            ..
        } = scratch;
        let input = Input::with_buffer(normed, d, std::mem::take(&mut mlp.activations));
        let tokens = input.tokens();
        cx.tap.input(cx.layer, Site::AttnIn, normed, tokens, d);
        if !cx.tap.wants_more() {
            mlp.activations = input.into_buffer();
            return;
        }
        let projections = [(&self.q, &mut *q), (&self.k, &mut *k), (&self.v, &mut *v)];
        cx.weights.project_each(projections, &input);
        let activations = input.into_buffer();
        for (norm, x) in [(&self.q_norm, &mut *q), (&self.k_norm, &mut *k)] {
            if let Some(norm) = norm {
                norm.apply(x);
            }
        }
        if let Some(clip) = a.clip {
            for x in [&mut *q, k, v] {
                x.iter_mut().for_each(|v| *v = v.clamp(-clip, clip));
            }
        }
        if let Positions::Rope(settings) = &config.positions {
            let local = usize::from(config.layers[cx.layer].sliding && settings.local.is_some());
            if let Some((inverse, factor)) = &call.rope[local] {
                rope[local].fill(inverse, *factor, call.start, tokens);
                rope[local].rotate(settings, a.head_dim, a.heads, q);
                rope[local].rotate(settings, a.head_dim, a.kv_heads, k);
            }
        }
        cache.store(cx.layer, call.start, k, v);
        let heads = sized(heads, tokens * config.q_dim());
        let attention = Attend {
            config: a,
            sinks: self.sinks.as_deref(),
            window: config.window(cx.layer),
            start: call.start,
            q,
            k,
            v,
            cache: cache.layer(cx.layer),
        };
        attend(&attention, states, heads);
        cx.tap
            .input(cx.layer, Site::AttnOut, heads, tokens, config.q_dim());
        if !cx.tap.wants_more() {
            mlp.activations = activations;
            return;
        }
        let input = Input::with_buffer(heads, config.q_dim(), activations);
        cx.weights.project(&self.o, &input, out);
        mlp.activations = input.into_buffer();
    }
}
