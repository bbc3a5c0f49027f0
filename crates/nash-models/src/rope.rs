//! Rotary position embedding: frequencies with their scaling, tables of cos and sin, rotation in place.
//!
//! Shapes: heads `x [T, heads·head_dim]`; tables `[T, dims/2]`. The angle is `position · frequency` in f32, as in
//! `transformers`, so that long positions agree with what models were trained on.

use crate::config::{RopeConfig, RopeFrequencies, RopeScaling, RopeStyle};

/// Inverse frequencies `[dims/2]` and the factor on cos and sin.
pub(crate) fn frequencies(rope: &RopeFrequencies, dims: usize) -> (Vec<f32>, f32) {
    let half = dims / 2;
    let plain = |j: usize| rope.base.powf(-2.0 * j as f64 / dims as f64);
    let map = |f: &dyn Fn(usize, f64) -> f64| (0..half).map(|j| f(j, plain(j)) as f32).collect();
    match &rope.scaling {
        RopeScaling::None => (map(&|_, f| f), 1.0),
        RopeScaling::Linear { factor } => (map(&|_, f| f / factor), 1.0),
        RopeScaling::Factors(factors) => (map(&|j, f| f / f64::from(factors[j])), 1.0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let scale = |f: f64| {
                let wave = 2.0 * std::f64::consts::PI / f;
                if wave < original_context / high_freq_factor {
                    f
                } else if wave > original_context / low_freq_factor {
                    f / factor
                } else {
                    let keep =
                        (original_context / wave - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - keep) * f / factor + keep * f
                }
            };
            (map(&|_, f| scale(f)), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => {
            // The dimension that makes `rotations` turns over the original context.
            let dimension = |rotations: f64| {
                dims as f64 * (original_context / (rotations * 2.0 * std::f64::consts::PI)).ln()
                    / (2.0 * rope.base.ln())
            };
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            let blend = |j: usize, f: f64| {
                let divide = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                divide * f / factor + (1.0 - divide) * f
            };
            (map(&blend), *attention_factor as f32)
        }
    }
}

/// cos and sin of a run of positions.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    /// First position and number of positions that `cos` and `sin` hold.
    range: Option<(usize, usize)>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Fills the table for positions `start..start + tokens` unless it holds them already.
    pub(crate) fn fill(&mut self, inverse: &[f32], factor: f32, start: usize, tokens: usize) {
        if self.range == Some((start, tokens)) {
            return;
        }
        self.cos.clear();
        self.sin.clear();
        for position in start..start + tokens {
            for f in inverse {
                let (sin, cos) = (position as f32 * f).sin_cos();
                self.cos.push(cos * factor);
                self.sin.push(sin * factor);
            }
        }
        self.range = Some((start, tokens));
    }

    /// The table that turns everything back: the transpose of every rotation.
    pub(crate) fn transposed(&self) -> Self {
        Self {
            range: self.range,
            cos: self.cos.clone(),
            sin: self.sin.iter().map(|v| -v).collect(),
        }
    }

    /// Rotates `x [T, heads·head_dim]` in place; the table holds T positions.
    pub(crate) fn rotate(&self, rope: &RopeConfig, head_dim: usize, heads: usize, x: &mut [f32]) {
        let half = rope.dims / 2;
        let rows = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        for (token, (cos, sin)) in x.chunks_exact_mut(heads * head_dim).zip(rows) {
            for head in token.chunks_exact_mut(head_dim) {
                match rope.style {
                    RopeStyle::Half => {
                        let (first, rest) = head.split_at_mut(half);
                        for j in 0..half {
                            (first[j], rest[j]) = (
                                first[j] * cos[j] - rest[j] * sin[j],
                                rest[j] * cos[j] + first[j] * sin[j],
                            );
                        }
                    }
                    RopeStyle::Interleaved => {
                        for (j, pair) in head[..2 * half].chunks_exact_mut(2).enumerate() {
                            let (a, b) = (pair[0], pair[1]);
                            (pair[0], pair[1]) = (a * cos[j] - b * sin[j], b * cos[j] + a * sin[j]);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(style: RopeStyle) -> RopeConfig {
        let global = RopeFrequencies {
            base: 10_000.0,
            scaling: RopeScaling::None,
        };
        RopeConfig {
            dims: 8,
            style,
            global,
            local: None,
        }
    }

    #[test]
    fn styles_are_permutations_of_each_other() {
        let half = rope(RopeStyle::Half);
        let interleaved = rope(RopeStyle::Interleaved);
        let (inverse, factor) = frequencies(&half.global, 8);
        let mut table = RopeTable::default();
        table.fill(&inverse, factor, 5, 2);
        // Two tokens, one head of 10: the last two elements stay as they are.
        let mut a: Vec<f32> = (0..20).map(|v| v as f32 * 0.3 - 2.0).collect();
        let to_pairs = |x: &[f32]| -> Vec<f32> {
            x.chunks(10)
                .flat_map(|h| {
                    (0..4)
                        .flat_map(|j| [h[j], h[j + 4]])
                        .chain([h[8], h[9]])
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        let mut b = to_pairs(&a);
        table.rotate(&half, 10, 1, &mut a);
        table.rotate(&interleaved, 10, 1, &mut b);
        assert_eq!(to_pairs(&a), b);
        assert_eq!(a[8], 8.0 * 0.3 - 2.0);
    }

    #[test]
    fn rotation_keeps_length_and_depends_on_distance_only() {
        let rope = rope(RopeStyle::Half);
        let (inverse, factor) = frequencies(&rope.global, 8);
        let q: Vec<f32> = vec![0.5, -1.0, 2.0, 0.1, 1.5, 0.3, -0.7, 0.9];
        let k: Vec<f32> = vec![1.0, 0.2, -0.4, 0.8, -1.1, 0.6, 0.5, -0.3];
        let at = |x: &[f32], position: usize| {
            let mut table = RopeTable::default();
            table.fill(&inverse, factor, position, 1);
            let mut y = x.to_vec();
            table.rotate(&rope, 8, 1, &mut y);
            y
        };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let near = dot(&at(&q, 7), &at(&k, 4));
        let far = dot(&at(&q, 103), &at(&k, 100));
        assert!((near - far).abs() < 1e-4, "{near} {far}");
        assert!((dot(&at(&q, 9), &at(&q, 9)) - dot(&q, &q)).abs() < 1e-4);
    }
}
