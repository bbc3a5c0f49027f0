//! A matrix with a row per token, `[V, d]`: the embedding or the output matrix, whole or in parts
//! ([`VocabParts`](crate::VocabParts)): segments of columns, and in each the same ranges of rows.

use std::borrow::Cow;
use std::cell::Cell;
use std::sync::Arc;

use nash_kernels::{Activations, Product};

use crate::backward::GradientTap;
use crate::config::{self, ModelConfig};
use crate::linear::Input;
use crate::manifest::part_name;
use crate::scratch::sized;
use crate::weights::Weights;

/// The segments of one matrix; together they have every column once.
pub(crate) struct Vocabulary {
    segments: Vec<Segment>,
}

struct Segment {
    /// Columns of the matrix; `None` for all.
    columns: Option<Arc<[u32]>>,
    /// In order of the rows.
    ranges: Vec<Range>,
}

struct Range {
    slot: usize,
    first: usize,
}

thread_local! {
    /// Taken out while in use.
    static BUFFERS: Cell<Buffers> = Cell::default();
}

/// What one token needs: outputs of all segments but the first, and their inputs.
#[derive(Default)]
struct Buffers {
    parts: Vec<f32>,
    x: Vec<f32>,
    codes: Vec<Activations>,
}

impl Vocabulary {
    /// The matrix of this name; `None` if there is none.
    pub(crate) fn find(weights: &Weights, config: &ModelConfig, name: &str) -> Option<Self> {
        let parts = &config.vocab_parts;
        if parts.is_whole() {
            let slot = weights.slot(name)?;
            let ranges = vec![Range { slot, first: 0 }];
            let columns = None;
            return Some(Self {
                segments: vec![Segment { columns, ranges }],
            });
        }
        let segment = |config::Segment { outliers, columns }| {
            let mut next = 0;
            let ranges = (0..parts.ranges.len().max(1)).map(|i| {
                let slot = weights.slot(&part_name(name, outliers, i))?;
                let first = next;
                next += weights.info(slot).rows;
                Some(Range { slot, first })
            });
            Some(Segment {
                ranges: ranges.collect::<Option<_>>()?,
                columns,
            })
        };
        let segments = parts.segments(config.hidden_size).into_iter().map(segment);
        Some(Self {
            segments: segments.collect::<Option<_>>()?,
        })
    }

    /// Decodes the row of a token, which must be in the vocabulary.
    pub(crate) fn row(&self, weights: &Weights, token: usize, out: &mut [f32]) {
        for Segment { columns, ranges } in &self.segments {
            let range = ranges.partition_point(|range| range.first <= token) - 1;
            let Range { slot, first } = ranges[range];
            let linear = weights.linear(slot);
            let Some(columns) = columns else {
                linear.row(token - first, out);
                continue;
            };
            let mut part = vec![0.0; columns.len()];
            linear.row(token - first, &mut part);
            for (&column, value) in columns.iter().zip(part) {
                out[column as usize] = value;
            }
        }
    }

    /// `y = x·Wᵀ`, `y [T, V]`.
    pub(crate) fn forward(&self, weights: &Weights, input: &Input<'_>, y: &mut [f32]) {
        if input.tokens() == 1 && self.ranges().all(|r| weights.linear(r.slot).packed().is_some()) {
            return self.forward_one(weights, input, y);
        }
        let vocab = y.len() / input.tokens().max(1);
        let mut part = Vec::new();
        for (s, segment) in self.segments.iter().enumerate() {
            let x = segment.gather(input.x(), input.cols());
            let own = match &segment.columns {
                Some(columns) => &Input::new(&x, columns.len()),
                None => input,
            };
            for &Range { slot, first } in &segment.ranges {
                let linear = weights.linear(slot);
                let rows = linear.rows();
                // The outputs of a range lie together for a single token, or if the range is everything.
                if s == 0 && (input.tokens() == 1 || rows == vocab) {
                    linear.forward(own, &mut y[first..][..input.tokens() * rows]);
                    continue;
                }
                let part = sized(&mut part, input.tokens() * rows);
                linear.forward(own, part);
                for (y, part) in y.chunks_exact_mut(vocab).zip(part.chunks_exact(rows)) {
                    let y = &mut y[first..][..rows];
                    if s == 0 {
                        y.copy_from_slice(part);
                    } else {
                        y.iter_mut().zip(part).for_each(|(y, part)| *y += part);
                    }
                }
            }
        }
    }

    fn ranges(&self) -> impl Iterator<Item = &Range> {
        self.segments.iter().flat_map(|segment| &segment.ranges)
    }

    /// [`Self::forward`] of one token with packed matrices: all parts as one piece of work.
    fn forward_one(&self, weights: &Weights, input: &Input<'_>, y: &mut [f32]) {
        let mut buffers = BUFFERS.take();
        let Buffers { parts, x, codes } = &mut buffers;
        codes.resize_with(self.segments.len(), Activations::default);
        for (segment, codes) in self.segments.iter().zip(&mut *codes) {
            segment.gather_into(input.x(), input.cols(), x);
            codes.quantize(x, 1, x.len());
        }
        let vocab = y.len();
        let parts = sized(parts, (self.segments.len() - 1) * vocab);
        {
            let outputs = std::iter::once(&mut *y).chain(parts.chunks_exact_mut(vocab));
            let segments = self.segments.iter().zip(&*codes).zip(outputs);
            nash_kernels::matmul_each(segments.flat_map(|((segment, x), mut rest)| {
                segment.ranges.iter().filter_map(move |range| {
                    let w = weights.linear(range.slot).packed()?;
                    let y = rest.split_off_mut(..w.shape().rows)?;
                    Some(Product { w, x, y })
                })
            }));
        }
        for part in parts.chunks_exact(vocab) {
            y.iter_mut().zip(part).for_each(|(y, part)| *y += part);
        }
        BUFFERS.set(buffers);
    }

    /// Takes the gradient `g [T, V]` of the outputs back to the inputs `x [T, d]`: adds `g·W` to `gx [T, d]`.
    pub(crate) fn backward(
        &self,
        weights: &Weights,
        (x, d): (&[f32], usize),
        g: &[f32],
        gx: &mut [f32],
        tap: &mut dyn GradientTap,
    ) {
        let tokens = x.len() / d;
        let vocab = (g.len() / tokens.max(1)).max(1);
        for segment in &self.segments {
            let own = segment.gather(x, d);
            let mut own_gx = vec![0.0; own.len()];
            for &Range { slot, first } in &segment.ranges {
                let (info, linear) = (weights.info(slot), weights.linear(slot));
                let part: Vec<f32> = g
                    .chunks_exact(vocab)
                    .flat_map(|row| &row[first..][..info.rows])
                    .copied()
                    .collect();
                tap.linear(&info.name, &own, &part, tokens);
                linear.backward(&part, tokens, &mut own_gx);
            }
            segment.scatter_add(&own_gx, gx, d);
        }
    }
}

impl Segment {
    /// The columns of the segment, `[T, c]`, of `x [T, d]`.
    fn gather<'x>(&self, x: &'x [f32], d: usize) -> Cow<'x, [f32]> {
        if self.columns.is_none() {
            return x.into();
        }
        let mut own = Vec::new();
        self.gather_into(x, d, &mut own);
        own.into()
    }

    /// [`Self::gather`] into a buffer.
    fn gather_into(&self, x: &[f32], d: usize, out: &mut Vec<f32>) {
        out.clear();
        match &self.columns {
            None => out.extend_from_slice(x),
            Some(columns) => out.extend(
                x.chunks_exact(d)
                    .flat_map(|row| columns.iter().map(|&c| row[c as usize])),
            ),
        }
    }

    /// Adds `part [T, c]` to the columns of the segment in `x [T, d]`.
    fn scatter_add(&self, part: &[f32], x: &mut [f32], d: usize) {
        let Some(columns) = &self.columns else {
            x.iter_mut().zip(part).for_each(|(x, part)| *x += part);
            return;
        };
        for (x, part) in x.chunks_exact_mut(d).zip(part.chunks_exact(columns.len())) {
            for (&column, part) in columns.iter().zip(part) {
                x[column as usize] += part;
            }
        }
    }
}
