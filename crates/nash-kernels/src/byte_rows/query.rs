//! Queries of the heads that share keys, as bytes.

use std::ops::Range;

use super::kernels::{self, Heads};
use super::{ByteRun, ByteShape, CHUNK, KEY_GROUP, POSITIONS, ROUND, absmax};
use crate::{Isa, vectorize};

/// Queries `[G, D]` quantized like keys, and what else one token's attention needs; a buffer to be used again and again.
#[derive(Clone, Debug, Default)]
pub struct ByteQuery {
    /// First and second digit to the base of 128, `[G][D]` each, padded.
    high: Vec<i8>,
    low: Vec<i8>,
    /// Sums of the digits of a group, `[G][groups]`.
    sums: Vec<[i32; 2]>,
    /// With the factor on scores, `[G][groups]`.
    scales: Vec<f32>,
    digits: Digits,
}

/// Weights of a chunk as two digits to the base of 128, `[G][CHUNK]` each; the value of a unit `[G]`.
#[derive(Clone, Debug, Default)]
struct Digits {
    high: Vec<u8>,
    low: Vec<u8>,
    units: Vec<f32>,
}

/// Largest weight in units: two digits.
const UNITS: f32 = 16383.0;
/// Largest magnitude of a query in units: a first digit of 127 and a second one of 0; second digits are in −64..64.
const QUERY_UNITS: f32 = 127.0 * 128.0;

impl ByteQuery {
    /// Takes in the queries `q [G, D]`; scores will be multiplied by `factor`.
    ///
    /// # Panics
    /// If `q` is not a whole number of heads.
    pub fn quantize(&mut self, shape: ByteShape, q: &[f32], factor: f32) {
        assert!(q.len().is_multiple_of(shape.dim()), "whole heads");
        let (heads, width, groups) = (q.len() / shape.dim(), shape.width(), shape.groups());
        for digits in [&mut self.high, &mut self.low] {
            digits.clear();
            digits.resize(heads * width, 0);
        }
        self.sums.clear();
        self.scales.clear();
        let digits = self
            .high
            .chunks_exact_mut(width)
            .zip(self.low.chunks_exact_mut(width));
        for (q, (high, low)) in q.chunks_exact(shape.dim()).zip(digits) {
            let digits = high.chunks_mut(KEY_GROUP).zip(low.chunks_mut(KEY_GROUP));
            for (q, (high, low)) in q.chunks(KEY_GROUP).zip(digits) {
                self.scales.push(factor * digits_of(q, high, low));
                let sum = |digits: &[i8]| digits.iter().map(|&digit| i32::from(digit)).sum();
                self.sums.push([sum(high), sum(low)]);
            }
        }
        debug_assert_eq!(self.scales.len(), heads * groups);
    }

    /// Scores `[G, 16·blocks]` of these blocks of keys; those of positions that were never written have no meaning.
    ///
    /// # Panics
    /// If the run has fewer blocks, or `scores` another length.
    pub fn scores(&self, shape: ByteShape, keys: ByteRun<'_>, blocks: Range<usize>, scores: &mut [f32]) {
        self.scores_with(Isa::active(), shape, keys, blocks, scores);
    }

    pub(super) fn scores_with(
        &self,
        isa: Isa,
        shape: ByteShape,
        keys: ByteRun<'_>,
        blocks: Range<usize>,
        scores: &mut [f32],
    ) {
        let (width, groups) = (shape.width(), shape.groups());
        let heads = self.high.len() / width;
        assert_eq!(
            scores.len(),
            heads * blocks.len() * POSITIONS,
            "room for the scores"
        );
        let stride = blocks.len() * POSITIONS;
        let mut done = 0;
        while done < blocks.len() {
            let chunk = (blocks.len() - done).min(CHUNK / POSITIONS);
            let first = blocks.start + done;
            let run = ByteRun {
                codes: &keys.codes[shape.code_bytes(first * POSITIONS)..]
                    [..shape.code_bytes(chunk * POSITIONS)],
                scales: &keys.scales[shape.key_scales(first * POSITIONS)..]
                    [..shape.key_scales(chunk * POSITIONS)],
            };
            for heads in kernels::parts(heads) {
                let queries = Heads {
                    high: &self.high[heads.start * width..heads.end * width],
                    low: &self.low[heads.start * width..heads.end * width],
                    sums: &self.sums[heads.start * groups..heads.end * groups],
                    scales: &self.scales[heads.start * groups..heads.end * groups],
                };
                let scores = &mut scores[heads.start * stride..heads.end * stride];
                kernels::dot(isa, shape, (queries, run), (scores, stride, done * POSITIONS));
            }
            done += chunk;
        }
    }

    /// `out [G, D] += weights [G, 16·blocks] · values`, where only `positions` within these blocks count and their weights are not
    /// negative.
    ///
    /// # Panics
    /// If the run has fewer blocks, the positions are outside, or lengths do not fit.
    pub fn add_values(
        &mut self,
        shape: ByteShape,
        (values, positions): (ByteRun<'_>, Range<usize>),
        weights: &[f32],
        out: &mut [f32],
    ) {
        self.add_values_with(Isa::active(), shape, (values, positions), weights, out);
    }

    pub(super) fn add_values_with(
        &mut self,
        isa: Isa,
        shape: ByteShape,
        (values, positions): (ByteRun<'_>, Range<usize>),
        weights: &[f32],
        out: &mut [f32],
    ) {
        let dim = shape.dim();
        assert!(out.len().is_multiple_of(dim), "whole heads");
        let heads = out.len() / dim;
        let blocks = positions.start / POSITIONS..positions.end.div_ceil(POSITIONS);
        let (begin, stride) = (blocks.start * POSITIONS, blocks.len() * POSITIONS);
        assert_eq!(weights.len(), heads * stride, "weights of whole blocks");
        for first in (begin..begin + stride).step_by(CHUNK) {
            let chunk = CHUNK.min(begin + stride - first);
            let run = ByteRun {
                codes: &values.codes[shape.code_bytes(first)..][..shape.code_bytes(chunk)],
                scales: &values.scales[first..][..chunk],
            };
            let counted = positions.start.max(first) - first..positions.end.min(first + chunk) - first;
            self.digits
                .fill(heads, (weights, stride, first - begin), run.scales, counted);
            for heads in kernels::parts(heads) {
                let digits = kernels::Weights {
                    high: &self.digits.high[heads.start * CHUNK..heads.end * CHUNK],
                    low: &self.digits.low[heads.start * CHUNK..heads.end * CHUNK],
                    units: &self.digits.units[heads.clone()],
                };
                kernels::add(
                    isa,
                    shape,
                    (digits, run),
                    &mut out[heads.start * dim..heads.end * dim],
                );
            }
        }
    }
}

/// Writes a group of a query in two digits; the value of a unit.
fn digits_of(q: &[f32], high: &mut [i8], low: &mut [i8]) -> f32 {
    let absmax = absmax(q);
    let inverse = QUERY_UNITS / absmax;
    if !absmax.is_finite() {
        return f32::NAN;
    }
    if !inverse.is_finite() {
        return 0.0;
    }
    for ((q, high), low) in q.iter().zip(high).zip(low) {
        let units = (q * inverse + ROUND)
            .to_bits()
            .wrapping_sub(ROUND.to_bits())
            .cast_signed();
        *high = ((units + 64) >> 7) as i8;
        *low = (units - ((units + 64) >> 7 << 7)) as i8;
    }
    absmax / QUERY_UNITS
}

impl Digits {
    /// The weights from `at` on of each head, times the scales of their values; zero outside of `counted`.
    fn fill(
        &mut self,
        heads: usize,
        (weights, stride, at): (&[f32], usize, usize),
        scales: &[f32],
        counted: Range<usize>,
    ) {
        for digits in [&mut self.high, &mut self.low] {
            digits.clear();
            digits.resize(heads * CHUNK, 0);
        }
        self.units.clear();
        let digits = self
            .high
            .chunks_exact_mut(CHUNK)
            .zip(self.low.chunks_exact_mut(CHUNK));
        for (weights, (high, low)) in weights.chunks_exact(stride).zip(digits) {
            let weights = &weights[at..][counted.clone()];
            let scales = &scales[counted.clone()];
            let (high, low) = (&mut high[counted.clone()], &mut low[counted.clone()]);
            let mut terms = [0.0f32; CHUNK];
            let terms = &mut terms[..weights.len()];
            let unit = vectorize(
                #[inline(always)]
                || {
                    let mut max = 0;
                    for ((term, weight), scale) in terms.iter_mut().zip(weights).zip(scales) {
                        *term = weight * scale;
                        // Not negative: as integers they compare like floats, NaN above all.
                        max = max.max(term.to_bits() & 0x7fff_ffff);
                    }
                    let max = f32::from_bits(max);
                    let inverse = UNITS / max;
                    if !max.is_finite() {
                        return f32::NAN;
                    }
                    if !inverse.is_finite() {
                        return 0.0;
                    }
                    for ((term, high), low) in terms.iter().zip(high).zip(low) {
                        let units = (term * inverse + ROUND).to_bits();
                        *high = (units >> 7 & 0x7f) as u8;
                        *low = (units & 0x7f) as u8;
                    }
                    max / UNITS
                },
            );
            self.units.push(unit);
        }
    }
}
