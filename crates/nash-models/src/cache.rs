//! Keys and values of the positions seen so far, in half precision.
//!
//! Layout per layer: `[kv_heads, capacity, head_dim]`, so that a head reads its positions as one run. Pages of
//! positions that were never written are never touched, so a large capacity costs address space only.

use std::ops::Range;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::scratch::Scratch;

/// The state of one sequence: its keys and values, its tokens, and the working buffers of the forward pass.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
    tokens: Vec<u32>,
    pub(crate) scratch: Scratch,
}

/// Bits of f16, `[kv_heads, capacity, head_dim]`.
#[derive(Debug)]
struct LayerCache {
    k: Vec<u16>,
    v: Vec<u16>,
}

impl KvCache {
    /// Room for `capacity` positions of this model.
    #[must_use]
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        let size = config.kv_dim() * capacity;
        let layer = |_| LayerCache {
            k: vec![0; size],
            v: vec![0; size],
        };
        Self {
            layers: (0..config.num_layers()).map(layer).collect(),
            kv_heads: config.attention.kv_heads,
            head_dim: config.attention.head_dim,
            capacity,
            len: 0,
            tokens: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// Positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No positions held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The tokens at the positions held, as [`crate::Model::forward`] saw them.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes of keys and values at full capacity.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| 2 * (layer.k.len() + layer.v.len()))
            .sum()
    }

    /// Forgets all positions from `len` on; longer than what is held changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.tokens.truncate(len);
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets what does not agree with `tokens` and returns how many leading tokens need no new computation.
    pub fn keep_common_prefix(&mut self, tokens: &[u32]) -> usize {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        self.truncate(common);
        common
    }

    /// Counts positions that the layers have written.
    pub(crate) fn advance(&mut self, tokens: &[u32]) {
        self.len += tokens.len();
        self.tokens.extend_from_slice(tokens);
    }

    /// Checks that the cache fits the model and has room up to position `end`.
    pub(crate) fn check(&self, config: &ModelConfig, end: usize) -> Result<()> {
        let a = &config.attention;
        if (self.layers.len(), self.kv_heads, self.head_dim) != (config.num_layers(), a.kv_heads, a.head_dim)
        {
            let shape = |l, h, d| format!("{l} layers of {h} heads of {d}");
            let mine = shape(self.layers.len(), self.kv_heads, self.head_dim);
            let theirs = shape(config.num_layers(), a.kv_heads, a.head_dim);
            return Err(ModelError::CacheMismatch {
                problem: format!("{mine}, the model has {theirs}"),
            });
        }
        if end > self.capacity {
            return Err(ModelError::ContextOverflow {
                needed: end,
                capacity: self.capacity,
            });
        }
        Ok(())
    }

    /// Writes keys and values `[T, kv_heads·head_dim]` at positions `start..start + T`.
    pub(crate) fn store(&mut self, layer: usize, start: usize, k: &[f32], v: &[f32]) {
        let (dim, width) = (self.head_dim, self.kv_heads * self.head_dim);
        let layer = &mut self.layers[layer];
        for (cache, fresh) in [(&mut layer.k, k), (&mut layer.v, v)] {
            let cache: &mut [f16] = cache.reinterpret_cast_mut();
            for (head, run) in cache.chunks_exact_mut(self.capacity * dim).enumerate() {
                let run = run[start * dim..].chunks_exact_mut(dim);
                for (slot, token) in run.zip(fresh.chunks_exact(width)) {
                    slot.convert_from_f32_slice(&token[head * dim..(head + 1) * dim]);
                }
            }
        }
    }

    /// Keys and values of one layer and what else a forward pass needs, borrowed side by side.
    pub(crate) fn layer(&self, layer: usize) -> CachedLayer<'_> {
        let LayerCache { k, v } = &self.layers[layer];
        let run = self.capacity * self.head_dim;
        CachedLayer {
            k: k.reinterpret_cast(),
            v: v.reinterpret_cast(),
            run,
            head_dim: self.head_dim,
        }
    }
}

/// Read access to the keys and values of one layer.
#[derive(Clone, Copy)]
pub(crate) struct CachedLayer<'a> {
    k: &'a [f16],
    v: &'a [f16],
    run: usize,
    head_dim: usize,
}

impl CachedLayer<'_> {
    /// Decodes positions `first..first + k.len()/head_dim` of a head.
    pub(crate) fn read(&self, head: usize, first: usize, k: &mut [f32], v: &mut [f32]) {
        let start = head * self.run + first * self.head_dim;
        self.k[start..start + k.len()].convert_to_f32_slice(k);
        self.v[start..start + v.len()].convert_to_f32_slice(v);
    }

    /// Keys and values `[positions, head_dim]` of a head as they are stored.
    pub(crate) fn rows(&self, head: usize, positions: Range<usize>) -> (&[f16], &[f16]) {
        let at = |p: usize| head * self.run + p * self.head_dim;
        let range = at(positions.start)..at(positions.end);
        (&self.k[range.clone()], &self.v[range])
    }
}
