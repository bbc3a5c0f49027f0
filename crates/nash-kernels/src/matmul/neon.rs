//! Kernels for AArch64 with NEON and dot products (FEAT_DotProd).
//!
//! A register holds 16 columns of one row, one chain in each half; a record is 16 of them. `tbl` puts the two bytes that hold the window of
//! an even code into each 16-bit word, from two planes where a block reaches into the next; the same for odd codes, whose windows are
//! in the same two bytes except at 5 bits. `ushl` shifts every word by its own count, `usra` joins both, and `tbl` with four registers
//! looks 16 windows up in all 64 entries. `sdot` multiplies signed bytes, so weights are plain values; the four sums of each
//! row are added up at the end of a group.
//!
//! Counted, not timed (this never ran on real hardware): the loop of [`one`] has 147 to 159 instructions per record of 256
//! weights at 2, 3, 4 and 6 bits, 214 at 5 and 60 at 8, as compiled by Rust 1.95. For the same reason there is no prefetch: whether it pays is not known.

use std::arch::aarch64::*;
use std::ops::Range;

use super::common::{Pair, begin, by_two_tokens, chain_bytes, code_bytes, for_width, pairs, record_bytes};
use super::{Decoded, Job, Kernel, ROWS, Step};
use crate::activations::TokenBlock;
use crate::layout::{BLOCK, BLOCKS, RUN, TILE_ROWS, WINDOW_BITS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
};

/// Repeats `$body` for the four rows of a tile or the four blocks of a group, with their number as the constant `$index`.
macro_rules! for_four {
    ($index:ident => $body:block) => {
        for_four!($index => $body, 0 1 2 3)
    };
    ($index:ident => $body:block, $($number:literal)*) => {
        $({
            const $index: usize = $number;
            $body
        })*
    };
}

/// # Safety
/// The CPU has the features of [`one_of`]; `tiles` are in range, and no other thread stores them.
unsafe fn one(job: &Job<'_>, tiles: Range<usize>) {
    // SAFETY: passed on.
    unsafe { for_width!(one_of, job, tiles) }
}

/// # Safety
/// The CPU has the features of [`decode_of`].
unsafe fn decode(job: &Job<'_>, strip: Range<usize>, groups: Range<usize>, panel: &mut [Decoded]) {
    // SAFETY: passed on.
    unsafe { for_width!(decode_of, job, strip, groups, panel) }
}

/// # Safety
/// The CPU has the features of [`multiply_of`]; strip and token of the step are in range, and no other thread stores these rows.
unsafe fn multiply(panel: &[Decoded], x: &TokenBlock<'_>, totals: &mut [[f32; ROWS]], step: &Step<'_>) {
    // SAFETY: passed on.
    unsafe { by_two_tokens((multiply_of, multiply_of), panel, x, totals, step) }
}

/// # Safety
/// `tiles` are in range, and no other thread stores them.
#[target_feature(enable = "neon,dotprod")]
unsafe fn one_of<const BITS: usize>(job: &Job<'_>, tiles: Range<usize>) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let x = job.x.block(0, 0..job.w.shape().groups());
    for tile in tiles {
        let mut total = vdupq_n_f32(0.0);
        let groups = x.codes.iter().zip(x.scales);
        for (record, (codes, token_scale)) in job.records(tile).chunks_exact(record_bytes(BITS)).zip(groups) {
            let mut sums = [vdupq_n_s32(0); TILE_ROWS];
            for_four!(R => {
                for_four!(Q => {
                    let codes = load(&codes.0.as_chunks().0[Q]);
                    sums[R] = dot(sums[R], decoder.row::<Q>(record, R), codes);
                });
            });
            total = add_term(total, sums, scales::<BITS>(record), *token_scale);
        }
        let mut totals = [0.0; TILE_ROWS];
        // SAFETY: four floats are written to an array of four floats; the rest is passed on.
        unsafe {
            vst1q_f32(totals.as_mut_ptr(), total);
            job.store(tile * TILE_ROWS, 0, &job.w.tile_row_scales(tile), &totals);
        }
    }
}

#[target_feature(enable = "neon,dotprod")]
fn decode_of<const BITS: usize>(
    job: &Job<'_>,
    strip: Range<usize>,
    groups: Range<usize>,
    panel: &mut [Decoded],
) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let bytes = record_bytes(BITS);
    for (i, tile) in strip.enumerate() {
        let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
        for (record, decoded) in records.chunks_exact(bytes).zip(panel.iter_mut()) {
            let blocks = decoded.weights[i]
                .as_chunks_mut::<BLOCK>()
                .0
                .as_chunks_mut::<TILE_ROWS>()
                .0;
            for_four!(R => {
                for_four!(Q => {
                    // SAFETY: 16 bytes are written to an array of 16 bytes.
                    unsafe { vst1q_s8(blocks[Q][R].as_mut_ptr().cast(), decoder.row::<Q>(record, R)) }
                });
            });
            // SAFETY: 16 bytes are written to an array of four floats.
            unsafe { vst1q_f32(decoded.scales[i].as_mut_ptr(), scales::<BITS>(record)) }
        }
    }
}

/// Adds the products of a tile with `TOKENS` tokens of the block, from `from` on, to their totals.
#[target_feature(enable = "neon,dotprod")]
fn multiply_of<const TOKENS: usize>(
    panel: &[Decoded],
    (tile, from): (usize, usize),
    x: &TokenBlock<'_>,
    totals: &mut [[f32; ROWS]; TOKENS],
) {
    let rows = TILE_ROWS * tile..TILE_ROWS * (tile + 1);
    let mut sums_so_far: [float32x4_t; TOKENS] =
        // SAFETY: four floats inside of an array of 16 are read.
        std::array::from_fn(|t| unsafe { vld1q_f32(totals[t][rows.clone()].as_ptr()) });
    for Pair {
        codes,
        token_scales,
        weights,
        scales,
        ..
    } in pairs::<TOKENS>(panel, (tile, from), x)
    {
        let mut sums = [[vdupq_n_s32(0); TILE_ROWS]; TOKENS];
        for (part, weights) in weights.as_chunks::<BLOCK>().0.iter().enumerate() {
            let (q, r) = (part / TILE_ROWS, part % TILE_ROWS);
            // SAFETY: an array of 16 bytes is read.
            let weights = unsafe { vld1q_s8(weights.as_ptr().cast()) };
            for (sums, codes) in sums.iter_mut().zip(codes) {
                sums[r] = dot(sums[r], weights, load(&codes.0.as_chunks().0[q]));
            }
        }
        // SAFETY: an array of four floats is read.
        let scales = unsafe { vld1q_f32(scales.as_ptr()) };
        for ((total, sums), token_scale) in sums_so_far.iter_mut().zip(sums).zip(token_scales) {
            *total = add_term(*total, sums, scales, *token_scale);
        }
    }
    for (totals, sums) in totals.iter_mut().zip(sums_so_far) {
        // SAFETY: four floats are written inside of an array of 16.
        unsafe { vst1q_f32(totals[rows.clone()].as_mut_ptr(), sums) }
    }
}

/// Turns codes into values; see the module.
struct Decoder<const BITS: usize> {
    table: int8x16x4_t,
    /// For even and for odd codes.
    shifts: [int16x8_t; 2],
}

impl<const BITS: usize> Decoder<BITS> {
    /// For each block the indices of `tbl` for even and for odd codes.
    const PICKS: [[[u8; BLOCK]; 2]; BLOCKS] = {
        let mut picks = [[[0; BLOCK]; 2]; BLOCKS];
        let mut q = 0;
        while q < BLOCKS {
            picks[q] = [pick(BITS, q, 0), pick(BITS, q, 1)];
            q += 1;
        }
        picks
    };
    /// The shifts of even and of odd codes.
    const SHIFTS: [[i16; BLOCK / 2]; 2] = [shifts(BITS, 0), shifts(BITS, 1)];

    #[inline]
    #[target_feature(enable = "neon")]
    fn new(table: &[i8; 64]) -> Self {
        // Hidden from the compiler, which would undo `usra` if it knew the counts.
        let [even, odd] = std::hint::black_box(Self::SHIFTS);
        // SAFETY: arrays of 64 and 16 bytes are read.
        unsafe {
            Decoder {
                table: vld1q_s8_x4(table.as_ptr()),
                shifts: [vld1q_s16(even.as_ptr()), vld1q_s16(odd.as_ptr())],
            }
        }
    }

    /// The weights of row `r` in block `Q`: 16 columns.
    #[inline]
    #[target_feature(enable = "neon")]
    fn row<const Q: usize>(&self, record: &[u8], r: usize) -> int8x16_t {
        if BITS == 8 {
            return vreinterpretq_s8_u8(veorq_u8(plane::<BITS>(record, Q, r), vdupq_n_u8(0x80)));
        }
        let (even, odd) = (self.words::<Q>(record, r, 0), self.words::<Q>(record, r, 1));
        let odd = vandq_u16(odd, vdupq_n_u16(0x3f00));
        vqtbl4q_s8(self.table, vreinterpretq_u8_u16(vsraq_n_u16::<10>(odd, even)))
    }

    /// The windows of the even or odd codes of row `r` in block `Q`, at bit 10 or 8 of their words.
    #[inline]
    #[target_feature(enable = "neon")]
    fn words<const Q: usize>(&self, record: &[u8], r: usize, parity: usize) -> uint16x8_t {
        // SAFETY: an array of 16 bytes is read.
        let pick = unsafe { vld1q_u8(Self::PICKS[Q][parity].as_ptr()) };
        let (p, end) = (BITS * Q / 8, (8 * BITS * Q + 7 * BITS + WINDOW_BITS).div_ceil(8));
        let first = plane::<BITS>(record, p, r);
        let picked = if end > 8 * (p + 1) && 8 * (p + 1) < chain_bytes(BITS) {
            vqtbl2q_u8(uint8x16x2_t(first, plane::<BITS>(record, p + 1, r)), pick)
        } else {
            vqtbl1q_u8(first, pick)
        };
        vshlq_u16(vreinterpretq_u16_u8(picked), self.shifts[parity])
    }
}

/// The chains of row `r` in plane `p`, with zeros after those of a half plane.
#[inline]
#[target_feature(enable = "neon")]
fn plane<const BITS: usize>(record: &[u8], p: usize, r: usize) -> uint8x16_t {
    assert!(record.len() == record_bytes(BITS) && r < TILE_ROWS);
    let plane = &record[64 * p..code_bytes(BITS)];
    match plane.len() {
        // SAFETY: a quarter of the 32 bytes is read.
        32 => vcombine_u8(unsafe { vld1_u8(plane[8 * r..].as_ptr()) }, vdup_n_u8(0)),
        // SAFETY: a quarter of the first 64 bytes is read.
        _ => unsafe { vld1q_u8(plane[16 * r..].as_ptr()) },
    }
}

/// The byte of the run at which the bytes begin that `tbl` picks for a word: that of the even code, if they hold the whole window.
const fn picked_from(bits: usize, parity: usize, word: usize) -> usize {
    let even = begin(bits, 0, word) / 8;
    if begin(bits, parity, word) + WINDOW_BITS <= 8 * even + 16 {
        even
    } else {
        begin(bits, parity, word) / 8
    }
}

/// For block `q` and the even or odd codes of two chains: where [`Decoder::words`]'s planes hold the two bytes with each window;
/// beyond the end of the chain an index that gives zero.
const fn pick(bits: usize, q: usize, parity: usize) -> [u8; BLOCK] {
    let mut indices = [u8::MAX; BLOCK];
    let mut at = 0;
    while at < BLOCK {
        let (byte, chain) = (bits * q + picked_from(bits, parity, at / 2) + at % 2, at / RUN);
        if byte < chain_bytes(bits) {
            // A last half plane holds four bytes of each chain.
            let in_plane = if byte / 8 == bits / 2 { 4 } else { 8 };
            indices[at] = (BLOCK * (byte / 8 - bits * q / 8) + in_plane * chain + byte % 8) as u8;
        }
        at += 1;
    }
    indices
}

/// What moves the windows of even codes to bits 10 to 16 of their words, and those of odd codes to bits 8 to 14.
const fn shifts(bits: usize, parity: usize) -> [i16; BLOCK / 2] {
    let mut shifts = [0; BLOCK / 2];
    let mut word = 0;
    while word < shifts.len() {
        let from = begin(bits, parity, word) - 8 * picked_from(bits, parity, word);
        shifts[word] = (10 - 2 * parity) as i16 - from as i16;
        word += 1;
    }
    shifts
}

/// The four scale codes of a record as floats.
#[inline]
#[target_feature(enable = "neon")]
fn scales<const BITS: usize>(record: &[u8]) -> float32x4_t {
    let codes = record[code_bytes(BITS)..]
        .first_chunk()
        .map_or(0, |codes| u32::from_le_bytes(*codes));
    let codes = vmovl_s8(vcreate_s8(u64::from(codes)));
    vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes)))
}

/// Adds to the totals of four rows the sums of a group, four of each row, scaled by the product of row's and activations' scales.
#[inline]
#[target_feature(enable = "neon")]
fn add_term(
    total: float32x4_t,
    [a, b, c, d]: [int32x4_t; TILE_ROWS],
    scales: float32x4_t,
    token_scale: f32,
) -> float32x4_t {
    let sums = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
    vaddq_f32(
        total,
        vmulq_f32(vcvtq_f32_s32(sums), vmulq_n_f32(scales, token_scale)),
    )
}

#[inline]
#[target_feature(enable = "neon")]
fn load(codes: &[i8; BLOCK]) -> int8x16_t {
    // SAFETY: an array of 16 bytes is read.
    unsafe { vld1q_s8(codes.as_ptr()) }
}

/// Adds products of weights and activations to sums, in fours: `vdotq_s32`, which is not stable in Rust 1.95.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sums: int32x4_t, weights: int8x16_t, codes: int8x16_t) -> int32x4_t {
    // SAFETY: one instruction, which the function's features include, and which works on the given registers only.
    unsafe {
        std::arch::asm!(
            "sdot {sums:v}.4s, {weights:v}.16b, {codes:v}.16b",
            sums = inout(vreg) sums,
            weights = in(vreg) weights,
            codes = in(vreg) codes,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
