//! What the kernels of vector instruction sets share, whatever the architecture.

use super::{Decoded, ROWS, Step};
use crate::activations::{Codes, TokenBlock};
use crate::layout::{CHAIN, RUN, TILE_ROWS, TILE_WEIGHTS};

/// Calls `$function::<bits>` or `$function::<bits, flags…>` for the width of the job.
macro_rules! for_width {
    ($function:ident $(<$($flag:tt),+>)?, $job:expr $(, $argument:expr)*) => {
        match $job.w.shape().width.bits() {
            2 => $function::<2 $(, $($flag),+)?>($job $(, $argument)*),
            3 => $function::<3 $(, $($flag),+)?>($job $(, $argument)*),
            4 => $function::<4 $(, $($flag),+)?>($job $(, $argument)*),
            5 => $function::<5 $(, $($flag),+)?>($job $(, $argument)*),
            6 => $function::<6 $(, $($flag),+)?>($job $(, $argument)*),
            _ => $function::<8 $(, $($flag),+)?>($job $(, $argument)*),
        }
    };
}
pub(super) use for_width;

/// Bytes of codes in a record of a width.
pub(super) const fn code_bytes(bits: usize) -> usize {
    32 * bits
}

/// Bytes of a record of a width.
pub(super) const fn record_bytes(bits: usize) -> usize {
    code_bytes(bits) + TILE_ROWS
}

/// Bytes of a chain of a width.
pub(super) const fn chain_bytes(bits: usize) -> usize {
    CHAIN / 8 * bits
}

/// The bit in its run at which the even (`parity` 0) or odd code begins that belongs to 16-bit word `word` of a register:
/// 16 columns of a row, two of them in each word.
pub(super) const fn begin(bits: usize, parity: usize, word: usize) -> usize {
    bits * (2 * word % RUN + parity)
}

/// Adds the products of tile `tile` of some groups with `TOKENS` tokens of the block, from `from` on, to their totals.
pub(super) type MultiplyOf<const TOKENS: usize> =
    unsafe fn(&[Decoded], (usize, usize), &TokenBlock<'_>, &mut [[f32; ROWS]; TOKENS]);

/// What stands against each other in a group: codes and scales of tokens, weights and scales of four rows.
pub(super) struct Pair<'a, const TOKENS: usize> {
    pub(super) codes: &'a [Codes; TOKENS],
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "for unsigned weights")
    )]
    pub(super) corrections: &'a [i32; TOKENS],
    pub(super) token_scales: &'a [f32; TOKENS],
    pub(super) weights: &'a [u8; TILE_WEIGHTS],
    pub(super) scales: &'a [f32; TILE_ROWS],
}

/// Tile `tile` and `TOKENS` tokens of the block, from `from` on, group by group.
#[inline(always)]
pub(super) fn pairs<'a, const TOKENS: usize>(
    panel: &'a [Decoded],
    (tile, from): (usize, usize),
    x: &TokenBlock<'a>,
) -> impl Iterator<Item = Pair<'a, TOKENS>> {
    let corrections = x.corrections.chunks_exact(x.tokens);
    x.groups()
        .zip(corrections)
        .zip(panel)
        .filter_map(move |(((codes, scales), corrections), decoded)| {
            Some(Pair {
                codes: codes[from..].first_chunk()?,
                corrections: corrections[from..].first_chunk()?,
                token_scales: scales[from..].first_chunk()?,
                weights: &decoded.weights[tile],
                scales: &decoded.scales[tile],
            })
        })
}

/// A kernel's `multiply`, by two tokens of one tile at a time.
///
/// # Safety
/// The CPU has what `two` and `last` need; strip and token of the step are in range, and no other thread stores these rows.
#[inline]
pub(super) unsafe fn by_two_tokens(
    (two, last): (MultiplyOf<2>, MultiplyOf<1>),
    panel: &[Decoded],
    x: &TokenBlock<'_>,
    totals: &mut [[f32; ROWS]],
    step: &Step<'_>,
) {
    if step.begin {
        totals.fill([0.0; ROWS]);
    }
    for tile in 0..step.strip.len() {
        let (pairs, rest) = totals.as_chunks_mut();
        for (pair, totals) in pairs.iter_mut().enumerate() {
            // SAFETY: passed on.
            unsafe { two(panel, (tile, 2 * pair), x, totals) }
        }
        if let [totals] = rest {
            // SAFETY: passed on.
            unsafe { last(panel, (tile, x.tokens - 1), x, std::array::from_mut(totals)) }
        }
    }
    // SAFETY: passed on.
    unsafe { step.finish(totals) }
}
