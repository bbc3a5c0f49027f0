//! The k best experts of many tokens at once: one token per vector lane.
//!
//! A block of as many tokens as a vector has lanes is transposed, then every expert in turn is put into the sorted list of the k
//! best so far: one comparison and two selections per place. No branch depends on the data, and the list stays in registers. Only comparisons
//! decide, so that every instruction set gives the same choices; equal values go to the lower expert.
//!
//! Shapes: scores `[n, E]` of the n tokens of a part; values `[E, stride]`, a column per token.

use pulp::{Simd, WithSimd};

/// Lanes of the widest vectors.
pub(super) const MAX_LANES: usize = 16;

/// A part of a batch to choose for. `K` is the length of the sorted list: k, or k + 1 if margins are wanted.
pub(super) struct Select<'a, const K: usize> {
    /// `[n, E]`.
    pub(super) scores: &'a [f32],
    /// `[E]`.
    pub(super) prices: &'a [f32],
    /// `[n, k]`, written.
    pub(super) choices: &'a mut [u16],
    /// `[E]`, added to.
    pub(super) loads: &'a mut [u32],
    /// `[E, stride]`: room for the transposed block; with margins, where they stay.
    pub(super) values: &'a mut [f32],
    /// At least [`MAX_LANES`]; with margins, at least the tokens of the part, rounded up to that.
    pub(super) stride: usize,
    /// Experts per token, k: `K` or `K − 1`.
    pub(super) top_k: usize,
}

impl<const K: usize> WithSimd for Select<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (lanes, experts) = (S::F32_LANES, self.prices.len());
        let margins = K > self.top_k;
        let mut at = 0;
        let blocks = self.scores.chunks(lanes * experts);
        for (scores, choices) in blocks.zip(self.choices.chunks_mut(lanes * self.top_k)) {
            let values = &mut self.values[at..];
            transpose(scores, self.prices, values, self.stride);
            let mut best = [simd.splat_f32s(f32::NEG_INFINITY); K];
            let mut index = [simd.splat_u32s(0); K];
            for (e, column) in (0u32..).zip(values.chunks(self.stride)) {
                let value = S::as_simd_f32s(&column[..lanes]).0[0];
                let expert = simd.splat_u32s(e);
                // From the last place up: a place takes what the one before loses, else the new value if that is larger, else nothing.
                let mut above = simd.greater_than_f32s(value, best[K - 1]);
                for place in (1..K).rev() {
                    let here = above;
                    above = simd.greater_than_f32s(value, best[place - 1]);
                    let new = simd.select_f32s(here, value, best[place]);
                    best[place] = simd.select_f32s(above, best[place - 1], new);
                    let new = simd.select_u32s(here, expert, index[place]);
                    index[place] = simd.select_u32s(above, index[place - 1], new);
                }
                best[0] = simd.select_f32s(above, value, best[0]);
                index[0] = simd.select_u32s(above, expert, index[0]);
            }
            for (place, index) in index.iter().take(self.top_k).enumerate() {
                let mut experts = [0u32; MAX_LANES];
                S::as_mut_simd_u32s(&mut experts[..lanes]).0[0] = *index;
                for (choices, &e) in choices.chunks_mut(self.top_k).zip(&experts) {
                    choices[place] = e as u16;
                    self.loads[e as usize] += 1;
                }
            }
            if margins {
                let (last, next) = (best[self.top_k - 1], best[K - 1]);
                for column in values.chunks_mut(self.stride) {
                    let value = &mut S::as_mut_simd_f32s(&mut column[..lanes]).0[0];
                    let chosen = simd.greater_than_or_equal_f32s(*value, last);
                    *value = simd.sub_f32s(*value, simd.select_f32s(chosen, next, last));
                }
                at += lanes;
            }
        }
    }
}

/// `values[e, lane] = scores[lane, e] − prices[e]`, above the −∞ that stands for "nobody yet". Several tokens at a time: fewer, wider stores.
#[inline(always)]
fn transpose(scores: &[f32], prices: &[f32], values: &mut [f32], stride: usize) {
    const ROWS: usize = 8;
    let experts = prices.len();
    let worth = |score: f32, price: f32| (score - price).max(f32::MIN);
    let blocks = scores.chunks_exact(ROWS * experts);
    let (rest, done) = (blocks.remainder(), scores.len() / experts / ROWS * ROWS);
    for (block, first) in blocks.zip((0..).step_by(ROWS)) {
        let rows: [&[f32]; ROWS] = std::array::from_fn(|lane| &block[lane * experts..][..experts]);
        for ((e, &price), column) in prices.iter().enumerate().zip(values.chunks_mut(stride)) {
            let worths: [f32; ROWS] = std::array::from_fn(|lane| worth(rows[lane][e], price));
            column[first..first + ROWS].copy_from_slice(&worths);
        }
    }
    for (row, lane) in rest.chunks_exact(experts).zip(done..) {
        for ((&score, &price), column) in row.iter().zip(prices).zip(values.chunks_mut(stride)) {
            column[lane] = worth(score, price);
        }
    }
}

/// Runs [`Select`] with a list of `K`.
pub(super) fn select<const K: usize>(arguments: Select<'_, K>) {
    pulp::Arch::new().dispatch(arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores `[n, E]` that are often equal.
    fn scores(tokens: usize, experts: usize) -> Vec<f32> {
        (0..tokens * experts)
            .map(|i| (i * 7919 % 61) as f32 / 8.0 - 3.0)
            .collect()
    }

    /// Choices, loads and margins by this instruction set.
    fn by<S: Simd>(simd: S, tokens: usize, experts: usize) -> (Vec<u16>, Vec<u32>, Vec<f32>) {
        const K: usize = 5;
        let stride = tokens.next_multiple_of(MAX_LANES).max(MAX_LANES);
        let prices: Vec<f32> = (0..experts).map(|e| (e % 3) as f32).collect();
        let (mut choices, mut loads) = (vec![0; tokens * (K - 1)], vec![0; experts]);
        let mut values = vec![0.0; experts * stride];
        simd.vectorize(Select::<K> {
            scores: &scores(tokens, experts),
            prices: &prices,
            choices: &mut choices,
            loads: &mut loads,
            values: &mut values,
            stride,
            top_k: K - 1,
        });
        let margins = values
            .chunks(stride)
            .flat_map(|column| &column[..tokens])
            .copied()
            .collect();
        (choices, loads, margins)
    }

    struct Best(usize, usize);

    impl WithSimd for Best {
        type Output = (Vec<u16>, Vec<u32>, Vec<f32>);

        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            by(simd, self.0, self.1)
        }
    }

    #[test]
    fn every_instruction_set_chooses_the_same() {
        for (tokens, experts) in [(0, 9), (1, 5), (3, 8), (8, 9), (15, 64), (16, 7), (37, 100)] {
            let expected = by(pulp::Scalar::new(), tokens, experts);
            assert_eq!(pulp::Arch::new().dispatch(Best(tokens, experts)), expected);
            #[cfg(target_arch = "x86_64")]
            if let Some(avx2) = pulp::x86::V3::try_new() {
                assert_eq!(
                    by(avx2, tokens, experts),
                    expected,
                    "{tokens} tokens, {experts} experts"
                );
            }
            // A margin is what the token would lose without the expert, or, negative, what it would lose with it.
            let (choices, _, margins) = expected;
            for (token, chosen) in choices.chunks(4).enumerate() {
                let all = scores(tokens, experts);
                let worth = |e: usize| all[token * experts + e] - (e % 3) as f32;
                let mut sorted: Vec<f32> = (0..experts).map(worth).collect();
                sorted.sort_by(|a, b| b.total_cmp(a));
                for e in 0..experts {
                    let instead = sorted[if chosen.contains(&(e as u16)) { 4 } else { 3 }];
                    assert_eq!(
                        margins[e * tokens + token],
                        worth(e) - instead,
                        "token {token} expert {e}"
                    );
                }
            }
        }
    }
}
