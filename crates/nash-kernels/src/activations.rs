//! Inputs of a packed matrix product, as int8 with a scale per token and group.
//!
//! For every token and group of 64 columns: `scale = absmax / 127`, `code = round_ties_even(x · 127 /
//! absmax)`, so `x ≈ scale · code` with an error of at most `scale · (½ + 2⁻¹⁵)` and codes in −127..=127.
//!
//! A group that holds a NaN or an infinity gets the scale NaN and codes 0, so that every output that
//! depends on it is NaN: bad numbers stay visible. A group whose largest magnitude is under 4·10⁻³⁷ is
//! taken as zero.

use crate::layout::{BLOCK, BLOCKS, GROUP};
use crate::pool;

/// Tokens that lie together, group by group: what a matrix kernel holds in registers at a time.
pub(crate) const TOKEN_BLOCK: usize = 8;

/// One token × one group.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(crate) struct ActivationGroup {
    /// Codes in −127..=127; 0 beyond the last column.
    pub(crate) codes: [i8; GROUP],
    /// `−128 · Σ codes[16q + 4l + i]` over `q, i` for lane `l`: what a kernel that stores weights as
    /// `value + 128` starts its sums with.
    pub(crate) correction: [i32; 4],
    /// Scale of the codes; NaN if the group held a NaN or an infinity.
    pub(crate) scale: f32,
}

const ZERO: ActivationGroup = ActivationGroup {
    codes: [0; GROUP],
    correction: [0; 4],
    scale: 0.0,
};

/// Quantized inputs `x [T, n]`; a buffer to be used again and again.
///
/// Blocks of eight tokens are interleaved group by group (`[T/8][groups][8]`, a last block of fewer tokens
/// is as wide as it needs), so that a kernel reads one contiguous stream.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    groups: Vec<ActivationGroup>,
    tokens: usize,
    cols: usize,
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
        (self.tokens, self.cols) = (tokens, cols);
        let groups = cols.div_ceil(GROUP);
        self.groups.clear();
        self.groups.resize(tokens * groups, ZERO);
        if groups == 0 {
            return;
        }
        let convert = convert_for_cpu();
        pool::for_each_chunk(&mut self.groups, TOKEN_BLOCK * groups, |block, out| {
            let in_block = out.len() / groups;
            for t in 0..in_block {
                let token = &x[(block * TOKEN_BLOCK + t) * cols..][..cols];
                for (group, x) in token.chunks(GROUP).enumerate() {
                    convert(x, &mut out[group * in_block + t]);
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
        let (block, in_block) = self.block(token - token % TOKEN_BLOCK);
        let found = &block[group * in_block + token % TOKEN_BLOCK];
        (&found.codes, found.scale)
    }

    /// The block of tokens that begins at `first` (a multiple of [`TOKEN_BLOCK`]), `[groups][in_block]`,
    /// and the number of its tokens.
    pub(crate) fn block(&self, first: usize) -> (&[ActivationGroup], usize) {
        debug_assert!(first.is_multiple_of(TOKEN_BLOCK) && first < self.tokens);
        let in_block = TOKEN_BLOCK.min(self.tokens - first);
        (
            &self.groups[first * self.groups()..][..in_block * self.groups()],
            in_block,
        )
    }
}

type Convert = fn(&[f32], &mut ActivationGroup);

/// The conversion of one group, compiled for what this CPU has. All give the same bits.
fn convert_for_cpu() -> Convert {
    #[cfg(target_arch = "x86_64")]
    if crate::Isa::active() >= crate::Isa::Avx2 {
        // The intrinsics-free body is compiled again with 256-bit registers.
        #[target_feature(enable = "avx2")]
        fn convert_avx2(x: &[f32], out: &mut ActivationGroup) {
            convert(x, out);
        }
        #[expect(unsafe_code, reason = "calls a function that needs AVX2")]
        return |x, out| {
            // SAFETY: the active instruction set is at least AVX2 here, and it is only active if present.
            unsafe { convert_avx2(x, out) }
        };
    }
    convert
}

/// Adding and subtracting it rounds a float of magnitude below 2²² to an integer, ties to even, and
/// leaves the integer in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn convert(x: &[f32], out: &mut ActivationGroup) {
    let mut padded = [0.0f32; GROUP];
    padded[..x.len()].copy_from_slice(x);
    // As integers, magnitudes compare like floats, and NaN and infinity are above all finite ones.
    let absmax = padded
        .iter()
        .fold(0u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
    let absmax = f32::from_bits(absmax);
    let inverse = 127.0 / absmax;
    *out = ZERO;
    if !absmax.is_finite() {
        out.scale = f32::NAN;
    } else if inverse.is_finite() {
        out.scale = absmax / 127.0;
        for (code, value) in out.codes.iter_mut().zip(&padded) {
            *code = (value * inverse + ROUND).to_bits() as i8;
        }
        for block in out.codes.as_chunks::<BLOCK>().0 {
            for (correction, lane) in out
                .correction
                .iter_mut()
                .zip(block.as_chunks::<{ BLOCK / BLOCKS }>().0)
            {
                *correction -= 128 * lane.iter().map(|&code| i32::from(code)).sum::<i32>();
            }
        }
    }
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
                    let mut alone = ZERO;
                    convert(values, &mut alone);
                    prop_assert_eq!(activations.group(t, group), (&alone.codes, alone.scale));
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
    fn corrections_are_the_sums_of_their_lanes() {
        let x: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let activations = quantized(&x, 1, 64);
        let group = activations.block(0).0[0];
        for (lane, &correction) in group.correction.iter().enumerate() {
            let columns = (0..64).filter(|column| column / 4 % 4 == lane);
            assert_eq!(
                correction,
                -128 * columns.map(|column| i32::from(group.codes[column])).sum::<i32>()
            );
        }
    }
}
