//! Keys and values of the positions seen so far, in half precision or as bytes.
//!
//! Layout per layer: a run per key head, `[capacity, head_dim]` in half precision and the blocks of [`ByteShape`] as bytes. Pages of
//! positions that were never written are never touched, so a large capacity costs address space only.

use std::ops::Range;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use nash_kernels::{ByteRun, ByteShape};

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::scratch::Scratch;

/// How a cache stores keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvType {
    /// In half precision.
    #[default]
    F16,
    /// As bytes, with a scale per 32 columns of a key and one per value: half the memory and about half the time.
    Q8,
}

/// The state of one sequence: its keys and values, its tokens, and the working buffers of the forward pass.
#[derive(Debug)]
pub struct KvCache {
    kind: KvType,
    layers: Vec<LayerCache>,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
    tokens: Vec<u32>,
    pub(crate) scratch: Scratch,
}

/// Keys and values of a layer, a run per key head.
#[derive(Debug)]
enum LayerCache {
    /// Bits of f16.
    Half { k: Vec<u16>, v: Vec<u16> },
    Bytes {
        k: Bytes,
        v: Bytes,
        /// What keys are stored relative to, `[kv_heads·head_dim]`: the mean of those of the first call. Keys of some models (Qwen 2) have
        /// channels with a large constant, which would take all the steps of a byte. It shifts all scores of a query alike.
        base: Vec<f32>,
    },
}

/// Codes and scales, `kv_heads` runs each.
#[derive(Debug)]
struct Bytes {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl KvCache {
    /// Room for `capacity` positions of this model, in half precision.
    #[must_use]
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        Self::with_type(config, capacity, KvType::default())
    }

    /// Room for `capacity` positions of this model.
    #[must_use]
    pub fn with_type(config: &ModelConfig, capacity: usize, kind: KvType) -> Self {
        let shape = ByteShape::new(config.attention.head_dim);
        let bytes = |scales: usize| Bytes {
            codes: vec![0; config.attention.kv_heads * shape.code_bytes(capacity)],
            scales: vec![0.0; config.attention.kv_heads * scales],
        };
        let size = config.kv_dim() * capacity;
        let layer = |_| match kind {
            KvType::F16 => LayerCache::Half {
                k: vec![0; size],
                v: vec![0; size],
            },
            KvType::Q8 => LayerCache::Bytes {
                k: bytes(shape.key_scales(capacity)),
                v: bytes(shape.value_scales(capacity)),
                base: vec![0.0; config.kv_dim()],
            },
        };
        Self {
            kind,
            layers: (0..config.num_layers()).map(layer).collect(),
            kv_heads: config.attention.kv_heads,
            head_dim: config.attention.head_dim,
            capacity,
            len: 0,
            tokens: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// How keys and values are stored.
    #[must_use]
    pub fn kind(&self) -> KvType {
        self.kind
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
        self.bytes_of(self.capacity)
    }

    /// Bytes of the keys and values of this many positions, all layers together.
    #[must_use]
    pub fn bytes_of(&self, positions: usize) -> usize {
        let shape = ByteShape::new(self.head_dim);
        let of_head = match self.kind {
            KvType::F16 => 4 * positions * self.head_dim,
            KvType::Q8 => {
                2 * shape.code_bytes(positions)
                    + 4 * (shape.key_scales(positions) + shape.value_scales(positions))
            }
        };
        self.layers.len() * self.kv_heads * of_head
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
        let (dim, width, capacity) = (self.head_dim, self.kv_heads * self.head_dim, self.capacity);
        match &mut self.layers[layer] {
            LayerCache::Half { k: keys, v: values } => {
                for (cache, fresh) in [(keys, k), (values, v)] {
                    let cache: &mut [f16] = cache.reinterpret_cast_mut();
                    for (head, run) in cache.chunks_exact_mut(capacity * dim).enumerate() {
                        let run = run[start * dim..].chunks_exact_mut(dim);
                        for (slot, token) in run.zip(fresh.chunks_exact(width)) {
                            slot.convert_from_f32_slice(&token[head * dim..(head + 1) * dim]);
                        }
                    }
                }
            }
            LayerCache::Bytes {
                k: keys,
                v: values,
                base,
            } => {
                let shape = ByteShape::new(dim);
                if start == 0 {
                    *base = mean(k, width);
                }
                let mut k = k.to_vec();
                k.chunks_exact_mut(width)
                    .for_each(|key| key.iter_mut().zip(&*base).for_each(|(k, base)| *k -= base));
                keys.store(
                    (start, &k),
                    (dim, width),
                    shape.key_scales(capacity),
                    ByteShape::store_key,
                );
                values.store(
                    (start, v),
                    (dim, width),
                    shape.value_scales(capacity),
                    ByteShape::store_value,
                );
            }
        }
    }

    /// Keys and values of one layer and what else a forward pass needs, borrowed side by side.
    pub(crate) fn layer(&self, layer: usize) -> CachedLayer<'_> {
        match &self.layers[layer] {
            LayerCache::Half { k, v } => CachedLayer::Half(HalfLayer {
                k: k.reinterpret_cast(),
                v: v.reinterpret_cast(),
                run: self.capacity * self.head_dim,
                head_dim: self.head_dim,
            }),
            LayerCache::Bytes { k, v, base } => CachedLayer::Bytes(ByteLayer {
                k,
                v,
                base,
                heads: self.kv_heads,
                shape: ByteShape::new(self.head_dim),
            }),
        }
    }
}

/// The mean of rows `[T, width]`.
fn mean(rows: &[f32], width: usize) -> Vec<f32> {
    let mut mean = crate::math::column_sums(rows, width);
    let tokens = (rows.len() / width).max(1) as f32;
    mean.iter_mut().for_each(|sum| *sum /= tokens);
    mean
}

impl Bytes {
    /// Writes rows `[T, width]` at positions from `start` on, each head's `dim` columns into its run of `scales` scales.
    fn store(
        &mut self,
        (start, fresh): (usize, &[f32]),
        (dim, width): (usize, usize),
        scales: usize,
        store: fn(ByteShape, &[f32], usize, &mut [u8], &mut [f32]),
    ) {
        let codes = self.codes.len() / (width / dim);
        let runs = self.codes.chunks_exact_mut(codes.max(1));
        for (head, (codes, scales)) in runs.zip(self.scales.chunks_exact_mut(scales.max(1))).enumerate() {
            for (token, row) in fresh.chunks_exact(width).enumerate() {
                let row = &row[head * dim..(head + 1) * dim];
                store(ByteShape::new(dim), row, start + token, codes, scales);
            }
        }
    }

    /// The run of one of `heads` heads.
    fn run(&self, head: usize, heads: usize) -> ByteRun<'_> {
        let (codes, scales) = (self.codes.len() / heads, self.scales.len() / heads);
        ByteRun {
            codes: &self.codes[head * codes..(head + 1) * codes],
            scales: &self.scales[head * scales..(head + 1) * scales],
        }
    }
}

/// Read access to the keys and values of one layer.
#[derive(Clone, Copy)]
pub(crate) enum CachedLayer<'a> {
    Half(HalfLayer<'a>),
    Bytes(ByteLayer<'a>),
}

impl CachedLayer<'_> {
    /// Decodes positions `first..first + k.len()/head_dim` of a head.
    pub(crate) fn read(&self, head: usize, first: usize, k: &mut [f32], v: &mut [f32]) {
        match self {
            Self::Half(layer) => layer.read(head, first, k, v),
            Self::Bytes(layer) => layer.read(head, first, k, v),
        }
    }
}

/// In half precision.
#[derive(Clone, Copy)]
pub(crate) struct HalfLayer<'a> {
    k: &'a [f16],
    v: &'a [f16],
    run: usize,
    head_dim: usize,
}

impl HalfLayer<'_> {
    fn read(&self, head: usize, first: usize, k: &mut [f32], v: &mut [f32]) {
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

/// As bytes.
#[derive(Clone, Copy)]
pub(crate) struct ByteLayer<'a> {
    k: &'a Bytes,
    v: &'a Bytes,
    base: &'a [f32],
    heads: usize,
    shape: ByteShape,
}

impl ByteLayer<'_> {
    fn read(&self, head: usize, first: usize, k: &mut [f32], v: &mut [f32]) {
        let positions = first..first + k.len() / self.shape.dim();
        let (keys, values) = self.runs(head);
        self.shape.read_keys(keys, positions.clone(), k);
        for key in k.chunks_exact_mut(self.shape.dim()) {
            key.iter_mut()
                .zip(self.base(head))
                .for_each(|(k, base)| *k += base);
        }
        self.shape.read_values(values, positions, v);
    }

    /// How rows are stored.
    pub(crate) fn shape(&self) -> ByteShape {
        self.shape
    }

    /// What the keys of a head are stored relative to, `[head_dim]`.
    pub(crate) fn base(&self, head: usize) -> &[f32] {
        &self.base[head * self.shape.dim()..(head + 1) * self.shape.dim()]
    }

    /// Keys, relative to [`Self::base`], and values of a head, from position 0 on.
    pub(crate) fn runs(&self, head: usize) -> (ByteRun<'_>, ByteRun<'_>) {
        (self.k.run(head, self.heads), self.v.run(head, self.heads))
    }
}
