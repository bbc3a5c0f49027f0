//! Causal grouped-query attention with its gradient, whole score matrices at a time: for the few hundred tokens of a calibration window.
//!
//! Per head with scores `S = scale·Q Kᵀ` (capped where the model caps), weights `P = softmax(S)` and output `O = P V`:
//! `gV = Pᵀ gO`, `gP = gO Vᵀ`, `gS = P ∘ (gP − rowsum(gP ∘ P))`, `gQ = scale·gS K`, `gK = scale·gSᵀ Q`; key heads sum over the query
//! heads that share them.

use nash_kernels::dense::{MatMut, MatRef, gemm};
use nash_kernels::pool;

use crate::config::AttentionConfig;
use crate::math;

/// Rows of a task.
const ROWS: usize = 16;

/// Attention output `[T, heads·D]` for q `[T, heads·D]`, k and v `[T, kv_heads·D]`.
pub(super) fn forward(
    a: &AttentionConfig,
    window: Option<usize>,
    sequences: &[usize],
    (q, k, v): (&[f32], &[f32], &[f32]),
) -> Vec<f32> {
    let mut out = vec![0.0; q.len()];
    for_each_head(a, sequences, |view| {
        let mut scores = Vec::new();
        let p = view.weights(window, q, k, &mut scores);
        let v = view.keys(v);
        gemm(
            1.0,
            MatRef::row_major(&p, view.tokens, view.tokens),
            v,
            0.0,
            view.queries_mut(&mut out),
        );
    });
    out
}

/// Gradients of q, k and v for the gradient `g [T, heads·D]` of the output.
pub(super) fn backward(
    a: &AttentionConfig,
    window: Option<usize>,
    sequences: &[usize],
    (q, k, v): (&[f32], &[f32], &[f32]),
    g: &[f32],
) -> [Vec<f32>; 3] {
    let mut gq = vec![0.0; q.len()];
    let (mut gk, mut gv) = (vec![0.0; k.len()], vec![0.0; v.len()]);
    for_each_head(a, sequences, |view| {
        let t = view.tokens;
        let mut scores = Vec::new();
        let p = view.weights(window, q, k, &mut scores);
        let g = view.queries(g);
        gemm(
            1.0,
            MatRef::row_major(&p, t, t).t(),
            g,
            1.0,
            view.keys_mut(&mut gv),
        );
        let mut gs = vec![0.0; t * t];
        gemm(1.0, g, view.keys(v).t(), 0.0, MatMut::row_major(&mut gs, t, t));
        pool::for_each_chunk(&mut gs, ROWS * t, |chunk, gs| {
            for (r, gs) in gs.chunks_exact_mut(t).enumerate() {
                let at = (chunk * ROWS + r) * t;
                let p = &p[at..at + t];
                let mean = nash_kernels::dense::dot(gs, p);
                gs.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - mean));
                if let Some(cap) = a.softcap {
                    for (g, s) in gs.iter_mut().zip(&scores[at..at + t]) {
                        *g *= 1.0 - (s / cap) * (s / cap);
                    }
                }
            }
        });
        let gs = MatRef::row_major(&gs, t, t);
        gemm(a.scale, gs, view.keys(k), 0.0, view.queries_mut(&mut gq));
        gemm(a.scale, gs.t(), view.queries(q), 1.0, view.keys_mut(&mut gk));
    });
    [gq, gk, gv]
}

/// One query head of one sequence.
struct HeadView<'a> {
    config: &'a AttentionConfig,
    head: usize,
    /// First token and number of tokens of the sequence.
    first: usize,
    tokens: usize,
}

/// Visits every query head of every sequence, in order.
fn for_each_head(a: &AttentionConfig, sequences: &[usize], mut visit: impl FnMut(&HeadView<'_>)) {
    let mut first = 0;
    for &tokens in sequences {
        for head in 0..a.heads {
            visit(&HeadView {
                config: a,
                head,
                first,
                tokens,
            });
        }
        first += tokens;
    }
}

impl HeadView<'_> {
    /// Row width, and the columns of this head, among queries or keys.
    fn place(&self, of_queries: bool) -> (usize, std::ops::Range<usize>) {
        let a = self.config;
        let (heads, head) = if of_queries {
            (a.heads, self.head)
        } else {
            (a.kv_heads, self.head / (a.heads / a.kv_heads))
        };
        (heads * a.head_dim, head * a.head_dim..(head + 1) * a.head_dim)
    }

    fn view<'x>(&self, x: &'x [f32], of_queries: bool) -> MatRef<'x> {
        let (width, cols) = self.place(of_queries);
        let all = MatRef::row_major(x, x.len() / width, width);
        all.rows_range(self.first..self.first + self.tokens)
            .cols_range(cols)
    }

    fn view_mut<'x>(&self, x: &'x mut [f32], of_queries: bool) -> MatMut<'x> {
        let (width, cols) = self.place(of_queries);
        let rows = x.len() / width;
        let all = MatMut::row_major(x, rows, width);
        all.rows_range(self.first..self.first + self.tokens)
            .cols_range(cols)
    }

    fn queries<'x>(&self, x: &'x [f32]) -> MatRef<'x> {
        self.view(x, true)
    }

    fn keys<'x>(&self, x: &'x [f32]) -> MatRef<'x> {
        self.view(x, false)
    }

    fn queries_mut<'x>(&self, x: &'x mut [f32]) -> MatMut<'x> {
        self.view_mut(x, true)
    }

    fn keys_mut<'x>(&self, x: &'x mut [f32]) -> MatMut<'x> {
        self.view_mut(x, false)
    }

    /// The weights P `[t, t]`; `scores` gets the capped scores if the model caps them.
    fn weights(&self, window: Option<usize>, q: &[f32], k: &[f32], scores: &mut Vec<f32>) -> Vec<f32> {
        let t = self.tokens;
        let mut p = vec![0.0; t * t];
        let out = MatMut::row_major(&mut p, t, t);
        gemm(self.config.scale, self.queries(q), self.keys(k).t(), 0.0, out);
        if let Some(cap) = self.config.softcap {
            p.iter_mut().for_each(|s| *s = math::softcap(*s, cap));
            scores.clone_from(&p);
        }
        pool::for_each_chunk(&mut p, ROWS * t, |chunk, rows| {
            for (r, row) in rows.chunks_exact_mut(t).enumerate() {
                let position = chunk * ROWS + r;
                let low = window.map_or(0, |w| (position + 1).saturating_sub(w));
                row[..low].fill(0.0);
                row[position + 1..].fill(0.0);
                math::softmax(&mut row[low..=position]);
            }
        });
        p
    }
}
