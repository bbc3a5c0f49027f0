//! Causal grouped-query attention over the cache, with an optional sliding window and soft cap.
//!
//! Keys are visited in blocks with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): a unit of work
//! keeps, per query row, the maximum score m, the sum l of exponentials and the weighted sum o of values, and never
//! holds more than a block of scores. A unit is a key head with a block of queries; when there is one token, its
//! keys are cut into fixed parts instead (flash decoding), merged in a fixed order. So results do not depend on
//! the number of threads, and a long context costs no memory beyond the cache.
//!
//! Positions of this call are read in f32, earlier ones from the cache; with one token everything comes from
//! the cache, as it is stored. A sink (gpt-oss; Xiao et al. 2023) joins the sum l of its head when the states are merged. Shapes: q `[T, heads·D]`, k and v `[T, kv_heads·D]`, D = head_dim; G = heads/kv_heads query heads share
//! a key head; a unit's rows are ordered token by token, then by query head.

use std::cell::Cell;
use std::ops::Range;

use nash_kernels::dense::{self, MatMut, MatRef};
use nash_kernels::{ByteQuery, POSITIONS, pool};

use crate::cache::{ByteLayer, CachedLayer, HalfLayer};
use crate::config::AttentionConfig;
use crate::math;
use crate::scratch::sized;

/// Query rows of a unit (tokens × G), at least one token.
const UNIT_ROWS: usize = 64;
/// Keys of a block.
const BLOCK: usize = 128;
/// Keys of a part when there is one token.
const PART: usize = 512;
/// Tokens of a task that joins the states.
const MERGE_TOKENS: usize = 16;

/// One attention call.
pub(crate) struct Attend<'a> {
    pub(crate) config: &'a AttentionConfig,
    /// `[heads]`: a score per head that takes its share of the weights and has no value.
    pub(crate) sinks: Option<&'a [f32]>,
    /// What this layer sees, its own position included; `None` for everything.
    pub(crate) window: Option<usize>,
    /// Position of the first query.
    pub(crate) start: usize,
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) cache: CachedLayer<'a>,
}

/// How the work of a call is cut.
#[derive(Clone, Copy)]
struct Plan {
    tokens: usize,
    /// Query heads per key head.
    group: usize,
    /// Tokens of a unit.
    unit_tokens: usize,
    /// Units per key head along the tokens.
    blocks: usize,
    /// Units per key head and token block along the keys.
    parts: usize,
    /// Floats of a unit's state: rows × (o [D], m, l).
    state: usize,
}

thread_local! {
    /// Taken out while in use.
    static BUFFERS: Cell<Buffers> = Cell::default();
}

/// Buffers of a thread.
#[derive(Default)]
struct Buffers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    scores: Vec<f32>,
    bytes: ByteQuery,
}

/// Attention output `[T, heads·D]` into `out`; `states` is scratch.
pub(crate) fn attend(call: &Attend<'_>, states: &mut Vec<f32>, out: &mut [f32]) {
    let plan = call.plan();
    let a = call.config;
    let states = sized(states, a.kv_heads * plan.blocks * plan.parts * plan.state);
    pool::for_each_chunk(states, plan.state, |unit, state| {
        let mut buffers = BUFFERS.take();
        call.unit(&plan, unit, &mut buffers, state);
        BUFFERS.set(buffers);
    });
    let states: &[f32] = states;
    let width = plan.group * a.head_dim;
    let row = a.heads * a.head_dim;
    pool::for_each_chunk(out, MERGE_TOKENS * row, |chunk, out| {
        for (local, out) in out.chunks_exact_mut(row).enumerate() {
            for (head, out) in out.chunks_exact_mut(width).enumerate() {
                call.merge(&plan, states, head, chunk * MERGE_TOKENS + local, out);
            }
        }
    });
}

/// Parts of the visible keys; they begin at multiples of [`PART`], so that every part is whole blocks of a cache of bytes.
fn parts_of(keys: &Range<usize>) -> usize {
    keys.end.div_ceil(PART) - keys.start / PART
}

/// The keys of a part.
fn part_of(keys: Range<usize>, part: usize) -> Range<usize> {
    let first = (keys.start / PART + part) * PART;
    first.max(keys.start)..(first + PART).min(keys.end)
}

impl Attend<'_> {
    fn plan(&self) -> Plan {
        let a = self.config;
        let tokens = self.q.len() / (a.heads * a.head_dim);
        let group = a.heads / a.kv_heads;
        let unit_tokens = (UNIT_ROWS / group).clamp(1, tokens);
        let parts = if tokens == 1 {
            parts_of(&self.visible(0..1))
        } else {
            1
        };
        let state = unit_tokens * group * (a.head_dim + 2);
        Plan {
            tokens,
            group,
            unit_tokens,
            blocks: tokens.div_ceil(unit_tokens),
            parts,
            state,
        }
    }

    /// Positions that any of these tokens sees.
    fn visible(&self, tokens: Range<usize>) -> Range<usize> {
        let first = match self.window {
            Some(window) => (self.start + tokens.start + 1).saturating_sub(window),
            None => 0,
        };
        first..self.start + tokens.end
    }

    fn unit(&self, plan: &Plan, unit: usize, buffers: &mut Buffers, state: &mut [f32]) {
        let (dim, group) = (self.config.head_dim, plan.group);
        let head = unit / (plan.blocks * plan.parts);
        let block = unit / plan.parts % plan.blocks;
        let part = unit % plan.parts;
        let tokens = block * plan.unit_tokens..((block + 1) * plan.unit_tokens).min(plan.tokens);
        let rows = tokens.len() * group;
        let Buffers {
            q,
            k,
            v,
            scores,
            bytes,
        } = buffers;
        q.clear();
        for token in tokens.clone() {
            let at = (token * self.config.heads + head * group) * dim;
            q.extend_from_slice(&self.q[at..at + group * dim]);
        }
        let (o, stats) = state.split_at_mut(plan.unit_tokens * group * dim);
        o.fill(0.0);
        let (max, sum) = stats.split_at_mut(plan.unit_tokens * group);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        let mut rows_state = RowStates {
            o: &mut o[..rows * dim],
            max,
            sum,
        };

        let keys = self.visible(tokens.clone());
        if plan.tokens == 1 {
            let part = part_of(keys, part);
            return match &self.cache {
                CachedLayer::Half(layer) => self.absorb_halves(layer, (head, part), q, scores, rows_state),
                CachedLayer::Bytes(layer) => {
                    self.absorb_bytes(layer, (head, part), q, (bytes, scores), rows_state)
                }
            };
        }
        // From here on the fresh keys are read.
        let fresh = self.start;
        let mut first = keys.start;
        while first < keys.end {
            let limit = if first < fresh {
                fresh.min(keys.end)
            } else {
                keys.end
            };
            let block = first..(first + BLOCK).min(limit);
            let (keys, values) = if first < fresh {
                self.cache.read(
                    head,
                    first,
                    sized(k, block.len() * dim),
                    sized(v, block.len() * dim),
                );
                (
                    MatRef::row_major(k, block.len(), dim),
                    MatRef::row_major(v, block.len(), dim),
                )
            } else {
                let width = self.config.kv_heads * dim;
                let rows = block.start - self.start..block.end - self.start;
                let view = |x| {
                    let all = MatRef::row_major(x, plan.tokens, width);
                    all.rows_range(rows.clone())
                        .cols_range(head * dim..(head + 1) * dim)
                };
                (view(self.k), view(self.v))
            };
            let scores = sized(scores, rows * block.len());
            let product = MatMut::row_major(scores, rows, block.len());
            dense::gemm(
                self.config.scale,
                MatRef::row_major(q, rows, dim),
                keys.t(),
                0.0,
                product,
            );
            for (row, scores) in scores.chunks_exact_mut(block.len()).enumerate() {
                let position = self.start + tokens.start + row / group;
                rows_state.absorb(
                    row,
                    dim,
                    self.allowed(position, &block),
                    self.config.softcap,
                    scores,
                );
            }
            let o = MatMut::row_major(rows_state.o, rows, dim);
            dense::gemm(1.0, MatRef::row_major(scores, rows, block.len()), values, 1.0, o);
            first = block.end;
        }
    }

    /// A part of the keys, for the only token, in half precision.
    fn absorb_halves(
        &self,
        cache: &HalfLayer<'_>,
        (head, keys): (usize, Range<usize>),
        q: &[f32],
        scores: &mut Vec<f32>,
        mut rows: RowStates<'_>,
    ) {
        let (dim, softcap) = (self.config.head_dim, self.config.softcap);
        let (k, v) = cache.rows(head, keys.clone());
        let scores = sized(scores, q.len() / dim * keys.len());
        nash_kernels::dot_rows(q, k, dim, self.config.scale, scores);
        for (row, scores) in scores.chunks_exact_mut(keys.len()).enumerate() {
            rows.absorb(row, dim, 0..keys.len(), softcap, scores);
        }
        nash_kernels::add_rows(scores, v, dim, rows.o);
    }

    /// The same as bytes.
    fn absorb_bytes(
        &self,
        cache: &ByteLayer<'_>,
        (head, keys): (usize, Range<usize>),
        q: &[f32],
        (query, scores): (&mut ByteQuery, &mut Vec<f32>),
        mut rows: RowStates<'_>,
    ) {
        let (dim, softcap, shape) = (self.config.head_dim, self.config.softcap, cache.shape());
        let (k, v) = cache.runs(head);
        let blocks = keys.start / POSITIONS..keys.end.div_ceil(POSITIONS);
        let scores = sized(scores, q.len() / dim * blocks.len() * POSITIONS);
        query.quantize(shape, q, self.config.scale);
        query.scores(shape, k, blocks.clone(), scores);
        let begin = blocks.start * POSITIONS;
        let per_query = q
            .chunks_exact(dim)
            .zip(scores.chunks_exact_mut(blocks.len() * POSITIONS));
        for (row, (q, scores)) in per_query.enumerate() {
            let shift = self.config.scale * dense::dot(q, cache.base(head));
            scores.iter_mut().for_each(|score| *score += shift);
            rows.absorb(row, dim, keys.start - begin..keys.end - begin, softcap, scores);
        }
        query.add_values(shape, (v, keys), scores, rows.o);
    }

    /// Which keys of the block the query at this position sees, relative to the block.
    fn allowed(&self, position: usize, block: &Range<usize>) -> Range<usize> {
        let low = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        let relative = |p: usize| p.clamp(block.start, block.end) - block.start;
        let (low, high) = (relative(low), relative(position + 1));
        low..high.max(low)
    }

    /// Joins the parts of one token and key head and divides by the sums: `out [G·D]`.
    fn merge(&self, plan: &Plan, states: &[f32], head: usize, token: usize, out: &mut [f32]) {
        let dim = self.config.head_dim;
        let (block, local) = (token / plan.unit_tokens, token % plan.unit_tokens);
        let unit = (head * plan.blocks + block) * plan.parts;
        let parts = states[unit * plan.state..(unit + plan.parts) * plan.state].chunks_exact(plan.state);
        let rows = plan.unit_tokens * plan.group;
        for (g, out) in out.chunks_exact_mut(dim).enumerate() {
            let row = local * plan.group + g;
            let max = parts
                .clone()
                .map(|state| state[rows * dim + row])
                .fold(f32::NEG_INFINITY, f32::max);
            let sink = self.sinks.map(|sinks| sinks[head * plan.group + g]);
            let max = sink.map_or(max, |sink| max.max(sink));
            let mut sum = sink.map_or(0.0, |sink| math::exp(sink - max));
            out.fill(0.0);
            for state in parts.clone() {
                let weight = math::exp(state[rows * dim + row] - max);
                sum += weight * state[rows * (dim + 1) + row];
                for (out, o) in out.iter_mut().zip(&state[row * dim..(row + 1) * dim]) {
                    *out += weight * o;
                }
            }
            let inverse = 1.0 / sum;
            out.iter_mut().for_each(|v| *v *= inverse);
        }
    }
}

/// Online softmax of a unit's rows.
struct RowStates<'a> {
    /// `[rows, D]`.
    o: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

impl RowStates<'_> {
    /// Turns a row of scores into weights relative to the new maximum and rescales what was summed before.
    fn absorb(
        &mut self,
        row: usize,
        dim: usize,
        allowed: Range<usize>,
        cap: Option<f32>,
        scores: &mut [f32],
    ) {
        scores[..allowed.start].fill(0.0);
        scores[allowed.end..].fill(0.0);
        let scores = &mut scores[allowed];
        if let Some(cap) = cap {
            scores.iter_mut().for_each(|s| *s = math::softcap(*s, cap));
        }
        let old = self.max[row];
        let max = math::max(old, scores);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return;
        }
        let keep = math::exp(old - max);
        self.sum[row] = self.sum[row] * keep + math::exp_below(max, scores);
        self.max[row] = max;
        if keep != 1.0 {
            self.o[row * dim..(row + 1) * dim]
                .iter_mut()
                .for_each(|v| *v *= keep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{KvCache, KvType};
    use crate::config::{ModelConfig, QkNorm};
    use nash_kernels::{ByteRun, ByteShape};
    use serde_json::json;

    /// Numbers in (−1, 1), deterministic.
    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    struct Setting {
        kind: KvType,
        heads: usize,
        kv_heads: usize,
        dim: usize,
        window: Option<usize>,
        softcap: Option<f32>,
        sinks: Option<Vec<f32>>,
        /// Positions in the cache, and tokens of the call.
        start: usize,
        tokens: usize,
    }

    impl Setting {
        fn config(&self) -> ModelConfig {
            let mut config = ModelConfig::from_hf(&json!({"model_type": "llama", "vocab_size": 8,
                "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "head_dim": self.dim,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}))
            .unwrap();
            config.attention.softcap = self.softcap;
            assert_eq!(config.attention.qk_norm, QkNorm::None);
            config
        }

        /// The definition, in f64; positions before the call are as the cache gives them, and all are if there is one token.
        fn naive(&self, config: &ModelConfig, q: &[f32], fresh: [&[f32]; 2], cache: &KvCache) -> Vec<f64> {
            let (dim, group) = (self.dim, self.heads / self.kv_heads);
            let all = self.start + self.tokens;
            let cached: Vec<[Vec<f32>; 2]> = (0..self.kv_heads)
                .map(|head| {
                    let [mut k, mut v] = [vec![0.0; all * dim], vec![0.0; all * dim]];
                    cache.layer(0).read(head, 0, &mut k, &mut v);
                    [k, v]
                })
                .collect();
            let read = |which: usize, position: usize, head: usize, j: usize| {
                f64::from(if position < self.start || self.tokens == 1 {
                    cached[head][which][position * dim + j]
                } else {
                    fresh[which][(position * self.kv_heads + head) * dim + j]
                })
            };
            let mut out = Vec::new();
            for token in 0..self.tokens {
                let position = self.start + token;
                let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
                for head in 0..self.heads {
                    let q = &q[(token * self.heads + head) * dim..][..dim];
                    let scores = (first..=position).map(|p| {
                        let dot: f64 = (0..dim)
                            .map(|j| f64::from(q[j]) * read(0, p, head / group, j))
                            .sum();
                        let score = dot * f64::from(config.attention.scale);
                        self.softcap
                            .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    });
                    let weights: Vec<f64> = scores.map(f64::exp).collect();
                    let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[head]).exp());
                    let total: f64 = weights.iter().sum::<f64>() + sink.unwrap_or(0.0);
                    out.extend((0..dim).map(|j| {
                        let values = (first..=position).map(|p| read(1, p, head / group, j));
                        weights.iter().zip(values).map(|(w, v)| w * v).sum::<f64>() / total
                    }));
                }
            }
            out
        }

        /// Queries that bytes hold without an error, each head for itself.
        fn on_grid(&self, q: &[f32]) -> Vec<f32> {
            let shape = ByteShape::new(self.dim);
            let (mut codes, mut scales) = (vec![0; shape.code_bytes(1)], vec![0.0; shape.key_scales(1)]);
            let mut rounded = q.to_vec();
            for head in rounded.chunks_exact_mut(self.dim) {
                shape.store_key(head, 0, &mut codes, &mut scales);
                let run = ByteRun {
                    codes: &codes,
                    scales: &scales,
                };
                shape.read_keys(run, 0..1, head);
            }
            rounded
        }

        fn check(&self) {
            let config = self.config();
            let all = self.start + self.tokens;
            let (width, kv) = (self.heads * self.dim, self.kv_heads * self.dim);
            // Scores of several units, so that the maximum matters.
            let q: Vec<f32> = noise(self.tokens * width, 1)
                .into_iter()
                .map(|v| v * 6.0)
                .collect();
            let q = self.on_grid(&q);
            let (k, v) = (noise(all * kv, 2), noise(all * kv, 3));
            let mut cache = KvCache::with_type(&config, all + 3, self.kind);
            cache.store(0, 0, &k, &v);
            let call = Attend {
                config: &config.attention,
                sinks: self.sinks.as_deref(),
                window: self.window,
                start: self.start,
                q: &q,
                k: &k[self.start * kv..],
                v: &v[self.start * kv..],
                cache: cache.layer(0),
            };
            let mut out = vec![f32::NAN; self.tokens * width];
            // What a buffer held before must not matter.
            attend(&call, &mut vec![f32::NAN; 100_000], &mut out);
            // Values are below 1; a score of up to 6·√dim has an error of 2⁻²⁴ times that and √dim. Weights for bytes are whole numbers of
            // 2⁻¹⁴ of the largest of 128, so wrong by half of that at worst, all 128 in one direction.
            let bytes = self.kind == KvType::Q8 && self.tokens == 1;
            let bound = if bytes { 2e-5 + 128.0 / 32766.0 } else { 2e-5 };
            let exact = self.naive(&config, &q, [&k, &v], &cache);
            for (at, (got, want)) in out.iter().zip(exact).enumerate() {
                assert!(
                    (f64::from(*got) - want).abs() < bound,
                    "element {at}: {got}, want {want}"
                );
            }
        }
    }

    #[test]
    fn agrees_with_the_definition_across_blocks_parts_and_units() {
        for (start, tokens) in [
            (0, 1),
            (1299, 1),
            (512, 1),
            (0, 7),
            (0, 300),
            (150, 70),
            (127, 130),
            (640, 2),
        ] {
            for window in [None, Some(1), Some(20), Some(600), Some(10_000)] {
                for (heads, kv_heads, dim, softcap) in
                    [(6, 2, 16, None), (3, 3, 10, Some(2.0)), (4, 1, 24, None)]
                {
                    // Sinks from lower to higher than any score.
                    let sinks = (0..heads).map(|head| head as f32 * 20.0 - 30.0).collect();
                    for (sinks, kind) in [
                        (None, KvType::F16),
                        (Some(sinks), KvType::F16),
                        (None, KvType::Q8),
                    ] {
                        Setting {
                            kind,
                            heads,
                            kv_heads,
                            dim,
                            window,
                            softcap,
                            sinks,
                            start,
                            tokens,
                        }
                        .check();
                    }
                }
            }
        }
    }
}
