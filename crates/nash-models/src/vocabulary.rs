//! A matrix with a row per token, `[V, d]`: the embedding or the output matrix, whole or in ranges of rows
//! ([`ModelConfig::vocab_ranges`](crate::ModelConfig::vocab_ranges)). Vocabularies are ordered by merges, so early rows belong to
//! frequent tokens; a range of its own lets them be stored more exactly than rare ones.

use crate::backward::GradientTap;
use crate::linear::Input;
use crate::manifest::range_name;
use crate::weights::Weights;

/// The ranges of one matrix, in order of the rows.
pub(crate) struct Vocabulary {
    ranges: Vec<Range>,
}

struct Range {
    slot: usize,
    first: usize,
}

impl Vocabulary {
    /// The matrix of this name, cut into `ranges` ranges or, if 0, whole; `None` if there is none.
    pub(crate) fn find(weights: &Weights, name: &str, ranges: usize) -> Option<Self> {
        let slots = if ranges == 0 {
            vec![weights.slot(name)?]
        } else {
            (0..ranges)
                .map(|i| weights.slot(&range_name(name, i)))
                .collect::<Option<_>>()?
        };
        let mut next = 0;
        let ranges = slots.into_iter().map(|slot| {
            let first = next;
            next += weights.info(slot).rows;
            Range { slot, first }
        });
        Some(Self {
            ranges: ranges.collect(),
        })
    }

    /// Decodes the row of a token, which must be in the vocabulary.
    pub(crate) fn row(&self, weights: &Weights, token: usize, out: &mut [f32]) {
        let range = self.ranges.partition_point(|range| range.first <= token) - 1;
        let Range { slot, first } = self.ranges[range];
        weights.linear(slot).row(token - first, out);
    }

    /// `y = x·Wᵀ`, `y [T, V]`.
    pub(crate) fn forward(&self, weights: &Weights, input: &Input<'_>, y: &mut [f32]) {
        let vocab = y.len() / input.tokens().max(1);
        let mut part = Vec::new();
        for &Range { slot, first } in &self.ranges {
            let linear = weights.linear(slot);
            let rows = linear.rows();
            // The outputs of a range lie together for a single token, or if the range is everything.
            if input.tokens() == 1 || rows == vocab {
                linear.forward(input, &mut y[first..][..input.tokens() * rows]);
                continue;
            }
            part.resize(input.tokens() * rows, 0.0);
            linear.forward(input, &mut part);
            for (y, part) in y.chunks_exact_mut(vocab).zip(part.chunks_exact(rows)) {
                y[first..][..rows].copy_from_slice(part);
            }
        }
    }

    /// Takes the gradient `g [T, V]` of the outputs back to the inputs `x [T, d]`: adds `g·W` to `gx [T, d]`.
    pub(crate) fn backward(
        &self,
        weights: &Weights,
        x: &[f32],
        g: &[f32],
        gx: &mut [f32],
        tap: &mut dyn GradientTap,
    ) {
        for &Range { slot, first } in &self.ranges {
            let (info, linear) = (weights.info(slot), weights.linear(slot));
            let tokens = x.len() / info.cols;
            let vocab = g.len() / tokens.max(1);
            let part: Vec<f32> = g
                .chunks_exact(vocab.max(1))
                .flat_map(|row| &row[first..][..info.rows])
                .copied()
                .collect();
            tap.linear(&info.name, x, &part, tokens);
            linear.backward(&part, tokens, gx);
        }
    }
}
