//! Causal grouped-query attention over the cache, with an optional sliding window and soft cap.
//!
//! Keys are visited in blocks with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): a unit of work
//! keeps, per query row, the maximum score m, the sum l of exponentials and the weighted sum o of values, and never
//! holds more than a block of scores. A unit is a key head with a block of queries; when there is one token, its
//! keys are cut into fixed parts instead (flash decoding), merged in a fixed order. So results do not depend on
//! the number of threads, and a long context costs no memory beyond the cache.
//!
//! Positions of this call are read in f32, earlier ones from the f16 cache; with one token everything comes from
//! the cache. Shapes: q `[T, heads·D]`, k and v `[T, kv_heads·D]`, D = head_dim; G = heads/kv_heads query heads share
//! a key head; a unit's rows are ordered token by token, then by query head.

use std::cell::Cell;
use std::ops::Range;

use nash_kernels::dense::{self, MatMut, MatRef};
use nash_kernels::pool;

use crate::cache::CachedLayer;
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

impl Attend<'_> {
    fn plan(&self) -> Plan {
        let a = self.config;
        let tokens = self.q.len() / (a.heads * a.head_dim);
        let group = a.heads / a.kv_heads;
        let unit_tokens = (UNIT_ROWS / group).clamp(1, tokens);
        let parts = if tokens == 1 {
            self.visible(0..1).len().div_ceil(PART)
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
        let Buffers { q, k, v, scores } = buffers;
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

        let mut keys = self.visible(tokens.clone());
        if plan.tokens == 1 {
            let first = keys.start + part * PART;
            keys = first..(first + PART).min(keys.end);
        }
        // From here on the fresh keys are read; a single token reads its own from the cache as well.
        let fresh = if plan.tokens == 1 { keys.end } else { self.start };
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
            let mut sum = 0.0;
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
        let max = scores.iter().copied().fold(old, f32::max);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return;
        }
        scores.iter_mut().for_each(|s| *s = math::exp(*s - max));
        let keep = math::exp(old - max);
        self.sum[row] = self.sum[row] * keep + scores.iter().sum::<f32>();
        self.max[row] = max;
        if keep != 1.0 {
            self.o[row * dim..(row + 1) * dim]
                .iter_mut()
                .for_each(|v| *v *= keep);
        }
    }
}
