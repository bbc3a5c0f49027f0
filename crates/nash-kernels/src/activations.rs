//! Inputs of a packed matrix product, as int8 with a scale per token and group.
//!
//! For every token and group of 64 columns: `scale = absmax / 127`, `code = round_ties_even(x · 127 /
//! absmax)`, so `x ≈ scale · code` with an error of at most `scale · (½ + 2⁻¹⁵)` and codes in −127..=127.
//!
//! A group that holds a NaN or an infinity gets the scale NaN and codes 0, so that every output that
//! depends on it is NaN: bad numbers stay visible. A group whose largest magnitude is under 4·10⁻³⁷ is
//! taken as zero.

use std::ops::Range;

use crate::layout::GROUP;
use crate::pool;

/// Tokens that lie together, group by group: what a matrix kernel holds in registers at a time.
pub(crate) const TOKEN_BLOCK: usize = 8;

/// Codes in −127..=127 of one token and group; 0 beyond the last column.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub(crate) struct Codes(pub(crate) [i8; GROUP]);

/// Quantized inputs `x [T, n]`; a buffer to be used again and again.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    /// Eight tokens each, the last one those that remain. What is left of earlier uses may follow.
    blocks: Vec<Block>,
    tokens: usize,
    cols: usize,
}

/// Up to eight tokens, group by group, so that a kernel reads contiguous streams: `[groups][tokens]`. What is left of earlier uses may follow.
#[derive(Clone, Debug, Default)]
struct Block {
    codes: Vec<Codes>,
    /// `−128 · Σ codes`: what makes up for weights that are stored as `value + 128`.
    corrections: Vec<i32>,
    /// Scale of the codes; NaN if the group held a NaN or an infinity.
    scales: Vec<f32>,
}

impl Activations {
    /// An empty buffer: no tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Quantizes `x [tokens, cols]`, replacing what was there. The result does not depend on the number
    /// of threads.
    ///
    /// # Panics
    /// If `x` has not `tokens · cols` elements.
    pub fn quantize(&mut self, x: &[f32], tokens: usize, cols: usize) {
        assert_eq!(Some(x.len()), tokens.checked_mul(cols), "inputs [tokens, cols]");
        self.quantize_rows(tokens, cols, |token| &x[token * cols..][..cols]);
    }

    /// Quantizes `tokens` rows of `cols` columns wherever they are, replacing what was there.
    ///
    /// # Panics
    /// If a row has not `cols` elements.
    pub fn quantize_rows<'x>(&mut self, tokens: usize, cols: usize, row: impl Fn(usize) -> &'x [f32] + Sync) {
        (self.tokens, self.cols) = (tokens, cols);
        let blocks = tokens.div_ceil(TOKEN_BLOCK);
        if self.blocks.len() < blocks {
            self.blocks.resize_with(blocks, Block::default);
        }
        let convert = convert_for_cpu();
        pool::for_each_chunk(&mut self.blocks[..blocks], 1, |block, out| {
            let first = block * TOKEN_BLOCK;
            let tokens = first..tokens.min(first + TOKEN_BLOCK);
            for out in out {
                out.grow(tokens.len() * cols.div_ceil(GROUP));
                for (t, token) in tokens.clone().enumerate() {
                    let x = row(token);
                    assert_eq!(x.len(), cols, "columns of token {token}");
                    convert(out, (t, tokens.len()), x);
                }
            }
        });
    }

    /// Tokens `T`.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns `n`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Groups per token: `ceil(cols / 64)`.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(GROUP)
    }

    /// Codes (zero beyond the last column) and scale of one token and group.
    ///
    /// # Panics
    /// If `token` or `group` is out of range.
    pub fn group(&self, token: usize, group: usize) -> (&[i8; GROUP], f32) {
        assert!(
            token < self.tokens && group < self.groups(),
            "activations [{token}, {group}]"
        );
        let block = self.block(token - token % TOKEN_BLOCK, group..group + 1);
        let at = token % TOKEN_BLOCK;
        (&block.codes[at].0, block.scales[at])
    }

    /// Some groups of the block of tokens that begins at `first`, a multiple of [`TOKEN_BLOCK`].
    #[inline]
    pub(crate) fn block(&self, first: usize, groups: Range<usize>) -> TokenBlock<'_> {
        debug_assert!(first.is_multiple_of(TOKEN_BLOCK) && first < self.tokens);
        let tokens = TOKEN_BLOCK.min(self.tokens - first);
        let block = &self.blocks[first / TOKEN_BLOCK];
        let range = groups.start * tokens..groups.end * tokens;
        TokenBlock {
            codes: &block.codes[range.clone()],
            corrections: &block.corrections[range.clone()],
            scales: &block.scales[range],
            tokens,
        }
    }
}

/// Some groups of up to eight tokens, `[groups][tokens]`.
#[derive(Debug)]
pub(crate) struct TokenBlock<'a> {
    pub(crate) codes: &'a [Codes],
    pub(crate) corrections: &'a [i32],
    pub(crate) scales: &'a [f32],
    pub(crate) tokens: usize,
}

impl<'a> TokenBlock<'a> {
    /// Codes and scales of the tokens, group by group.
    #[inline(always)]
    pub(crate) fn groups(&self) -> impl Iterator<Item = (&'a [Codes], &'a [f32])> {
        self.codes
            .chunks_exact(self.tokens)
            .zip(self.scales.chunks_exact(self.tokens))
    }
}

impl Block {
    /// Has room for so many groups of tokens. Never shrinks: what is cut off would be cleared when it is needed again.
    fn grow(&mut self, len: usize) {
        if self.codes.len() < len {
            self.codes.resize(len, Codes([0; GROUP]));
            self.corrections.resize(len, 0);
            self.scales.resize(len, 0.0);
        }
    }

    /// Writes the groups of token `t` of `tokens`, `x [cols]`.
    #[inline(always)]
    fn write(
        &mut self,
        (t, tokens): (usize, usize),
        x: &[f32],
        convert: impl Fn(&[f32; GROUP], &mut Codes) -> (i32, f32),
    ) {
        let (groups, rest) = x.as_chunks();
        let mut last = [0.0; GROUP];
        last[..rest.len()].copy_from_slice(rest);
        let last = Some(&last).filter(|_| !rest.is_empty());
        for (group, x) in groups.iter().chain(last).enumerate() {
            let at = group * tokens + t;
            (self.corrections[at], self.scales[at]) = convert(x, &mut self.codes[at]);
        }
    }
}

/// Writes a token, one of so many, to its block.
type Convert = fn(&mut Block, (usize, usize), &[f32]);

/// The conversion of a token for what this CPU has. All give the same bits.
fn convert_for_cpu() -> Convert {
    #[cfg(target_arch = "x86_64")]
    #[expect(
        unsafe_code,
        reason = "calls functions that need an instruction set, and intrinsics that read and write arrays"
    )]
    {
        use std::arch::x86_64::*;

        /// The intrinsics-free body is compiled again with 256-bit registers.
        #[target_feature(enable = "avx2")]
        fn token_avx2(block: &mut Block, at: (usize, usize), x: &[f32]) {
            block.write(at, x, convert);
        }

        #[target_feature(enable = "avx512f")]
        fn token_avx512(block: &mut Block, at: (usize, usize), x: &[f32]) {
            block.write(at, x, |x, out| convert_avx512(x, out));
        }

        /// [`convert`], two thirds faster than what the compiler makes of it.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn convert_avx512(x: &[f32; GROUP], out: &mut Codes) -> (i32, f32) {
            let values: [__m512; 4] = std::array::from_fn(|i| {
                // SAFETY: 16 floats inside of an array of 64 are read.
                unsafe { _mm512_loadu_ps(x[16 * i..].as_ptr()) }
            });
            let magnitude = |v| _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(i32::MAX));
            let larger = |a, b| _mm512_max_epu32(a, b);
            let [a, b, c, d] = values.map(magnitude);
            let absmax = f32::from_bits(_mm512_reduce_max_epu32(larger(larger(a, b), larger(c, d))));
            let inverse = 127.0 / absmax;
            if !absmax.is_finite() || !inverse.is_finite() {
                return convert(x, out);
            }
            let inverse = _mm512_set1_ps(inverse);
            // Rounds to nearest, ties to even, as Rust's floats do.
            let codes = values.map(|v| _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
            for (out, codes) in out.0.as_chunks_mut::<16>().0.iter_mut().zip(codes) {
                // SAFETY: 16 bytes are written to an array of 16 bytes.
                unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(codes)) }
            }
            let [a, b, c, d] = codes;
            let sum = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
            (-128 * _mm512_reduce_add_epi32(sum), absmax / 127.0)
        }

        match crate::Isa::active() {
            crate::Isa::Avx512 => {
                return |block, at, x| {
                    // SAFETY: the active instruction set is AVX-512 here, and it is only active if present.
                    unsafe { token_avx512(block, at, x) }
                };
            }
            crate::Isa::Avx2 | crate::Isa::Vnni => {
                return |block, at, x| {
                    // SAFETY: the active instruction set has AVX2 here, and it is only active if present.
                    unsafe { token_avx2(block, at, x) }
                };
            }
            _ => {}
        }
    }
    |block, at, x| block.write(at, x, convert)
}

/// Adding and subtracting it rounds a float of magnitude below 2²² to an integer, ties to even, and
/// leaves the integer in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn convert(x: &[f32; GROUP], out: &mut Codes) -> (i32, f32) {
    // As integers, magnitudes compare like floats, and NaN and infinity are above all finite ones.
    let absmax = x.iter().fold(0u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
    let absmax = f32::from_bits(absmax);
    let inverse = 127.0 / absmax;
    if !absmax.is_finite() || !inverse.is_finite() {
        out.0 = [0; GROUP];
        return (0, if absmax.is_finite() { 0.0 } else { f32::NAN });
    }
    for (code, value) in out.0.iter_mut().zip(x) {
        *code = (value * inverse + ROUND).to_bits() as i8;
    }
    let sum: i32 = out.0.iter().map(|&code| i32::from(code)).sum();
    (-128 * sum, absmax / 127.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantized(x: &[f32], tokens: usize, cols: usize) -> Activations {
        let mut activations = Activations::new();
        activations.quantize(x, tokens, cols);
        activations
    }

    proptest! {
        /// `|x − scale·code| ≤ scale/2` up to the rounding of `127/absmax`, of the product and of the scale:
        /// three relative errors of 2⁻²⁴ on a magnitude of at most 127 steps, under 2⁻¹⁵ steps.
        #[test]
        fn the_error_is_half_a_step(x in prop::collection::vec(-1e3f32..1e3, 0..300), zoom in -30i32..30) {
            let x: Vec<f32> = x.iter().map(|v| v * (zoom as f32).exp2()).collect();
            let activations = quantized(&x, 1, x.len());
            for (group, values) in x.chunks(GROUP).enumerate() {
                let (codes, scale) = activations.group(0, group);
                for (&value, &code) in values.iter().zip(codes) {
                    let error = (f64::from(value) - f64::from(scale) * f64::from(code)).abs();
                    prop_assert!(error <= f64::from(scale) * (0.5 + 2f64.powi(-15)), "{value} {scale} {code}");
                    prop_assert!(code != -128);
                }
            }
        }

        #[test]
        fn any_bits_are_accepted(bits in prop::collection::vec(any::<u32>(), 1..200)) {
            let x: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let activations = quantized(&x, 1, x.len());
            for (group, values) in x.chunks(GROUP).enumerate() {
                let (codes, scale) = activations.group(0, group);
                prop_assert_eq!(scale.is_nan(), values.iter().any(|v| !v.is_finite()));
                prop_assert!(codes.iter().all(|&c| c != -128));
            }
        }

        /// The vectorized body gives what the plain one gives, and tokens land where `group` looks.
        #[test]
        fn every_token_is_converted_alone(tokens in 0usize..20, cols in 0usize..150, seed in 0u32..1000) {
            let x: Vec<f32> = (0..tokens * cols)
                .map(|i| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 - 8e6)
                .collect();
            let activations = quantized(&x, tokens, cols);
            for t in 0..tokens {
                for (group, values) in x[t * cols..][..cols].chunks(GROUP).enumerate() {
                    let mut padded = [0.0; GROUP];
                    padded[..values.len()].copy_from_slice(values);
                    let mut alone = Codes([1; GROUP]);
                    let (_, scale) = convert(&padded, &mut alone);
                    prop_assert_eq!(activations.group(t, group), (&alone.0, scale));
                }
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_ends_are_reached() {
        let mut x = vec![0.0; 64];
        x[..6].copy_from_slice(&[127.0, -127.0, 0.5, 1.5, 2.5, -0.5]);
        let activations = quantized(&x, 1, 64);
        let (codes, scale) = activations.group(0, 0);
        assert_eq!(scale, 1.0);
        assert_eq!(codes[..6], [127, -127, 0, 2, 2, 0]);
    }

    #[test]
    fn tiny_groups_are_zero() {
        for tiny in [0.0, -0.0, f32::from_bits(1), 1e-40, 3.7e-37] {
            let activations = quantized(&[tiny; 64], 1, 64);
            assert_eq!(activations.group(0, 0), (&[0; 64], 0.0), "{tiny:e}");
        }
        let activations = quantized(&[4e-37; 64], 1, 64);
        assert_eq!(activations.group(0, 0).0, &[127; 64]);
    }

    #[test]
    fn corrections_are_the_sums_of_their_groups() {
        let x: Vec<f32> = (0..3 * 150).map(|i| (i as f32 * 0.7).sin()).collect();
        let activations = quantized(&x, 3, 150);
        let block = activations.block(0, 0..3);
        for (codes, &correction) in block.codes.iter().zip(block.corrections) {
            assert_eq!(
                correction,
                -128 * codes.0.iter().map(|&code| i32::from(code)).sum::<i32>()
            );
        }
    }

    #[test]
    fn rows_may_lie_anywhere() {
        let x: Vec<f32> = (0..19 * 70).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut turned = Activations::new();
        turned.quantize_rows(19, 70, |token| &x[(18 - token) * 70..][..70]);
        let all = quantized(&x, 19, 70);
        for (token, group) in (0..19).flat_map(|token| [(token, 0), (token, 1)]) {
            assert_eq!(turned.group(token, group), all.group(18 - token, group));
        }
    }

    /// What an earlier, larger use left behind is not seen.
    #[test]
    fn a_buffer_is_used_again() {
        let x: Vec<f32> = (0..20 * 200).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut used = quantized(&x, 20, 200);
        used.quantize(&x[..9 * 70], 9, 70);
        let fresh = quantized(&x[..9 * 70], 9, 70);
        for (token, group) in (0..9).flat_map(|token| [(token, 0), (token, 1)]) {
            assert_eq!(used.group(token, group), fresh.group(token, group));
        }
    }
}
