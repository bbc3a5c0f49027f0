//! Kernels for AVX2, without and with VNNI in 256-bit registers.
//!
//! A register holds 16 columns of two rows, one row in each 128-bit half and one chain in each 64-bit word; a record is
//! eight of them. `vpshufb` puts the two bytes that hold the window of an even code into each 16-bit word, and a product with
//! a power of two shifts every word by its own count; the same for odd codes. Values come from four tables of 16 bytes:
//! `vpshufb` gives 0 for a negative index, so with tables of differences `t[0]`, `t[1] ^ t[0]`, … the value of window `w` is the xor of
//! the look-ups of `w`, `w − 16`, `w − 32` and `w − 48`. (Blends would compete with `vpshufb` for its ports.) A codebook that repeats
//! after 16 entries takes one look-up.
//!
//! Both multiply unsigned by signed bytes. Without VNNI (`vpmaddubsw`) the sign of the weight is moved to the activation:
//! `|w| · (a · sign w)`. With `|w| ≤ 128` and `|a| ≤ 127` a pair is at most 32 512 and does not saturate. With it (`vpdpbusd`) tables hold
//! `value + 128`, which 8-bit codes are already, and the sums of a group begin with `−128 · Σ activations`, as in the kernels for AVX-512: one instruction instead
//! of five. It has two encodings, that of AVX-VNNI and that of AVX-512 VL and VNNI; a CPU with either will do.

use std::arch::x86_64::*;
use std::ops::Range;

use super::common::{Pair, begin, by_two_tokens, chain_bytes, code_bytes, for_width, pairs, record_bytes};
use super::x86::{prefetch, prefetch_row_scales, scales};
use super::{Decoded, Job, Kernel, ROWS, Step};
use crate::activations::TokenBlock;
use crate::layout::{BLOCK, BLOCKS, TILE_ROWS, WINDOW_BITS};

/// Registers that hold the four rows of a block.
const HALVES: usize = 2;

/// Repeats `$body` for the eight registers of a record, with their number as the constant `$part`.
macro_rules! for_parts {
    ($part:ident => $body:block) => {
        for_parts!($part => $body, 0 1 2 3 4 5 6 7)
    };
    ($part:ident => $body:block, $($number:literal)*) => {
        $({
            const $part: usize = $number;
            $body
        })*
    };
}

/// Kernels in a module `$name`, compiled for `$features`; `$sums` are how products are added up.
macro_rules! kernels {
    ($name:ident, $features:literal, $sums:ty) => {
        pub(super) mod $name {
            use super::*;

            pub(in super::super) const KERNEL: Kernel = Kernel {
                one,
                decode: decode::<UNSIGNED>,
                multiply,
            };

            const UNSIGNED: bool = <$sums as Products>::UNSIGNED;

            /// # Safety
            /// The CPU has the features; `tiles` are in range, and no other thread stores them.
            unsafe fn one(job: &Job<'_>, tiles: Range<usize>) {
                // SAFETY: passed on.
                unsafe {
                    if repeats(&job.table) {
                        for_width!(one_of<true>, job, tiles)
                    } else {
                        for_width!(one_of<false>, job, tiles)
                    }
                }
            }

            /// # Safety
            /// `tiles` are in range, and no other thread stores them.
            #[target_feature(enable = $features)]
            unsafe fn one_of<const BITS: usize, const REPEATS: bool>(job: &Job<'_>, tiles: Range<usize>) {
                let decoder = Decoder::<BITS, REPEATS, UNSIGNED>::new(&job.table);
                let x = job.x.block(0, 0..job.w.shape().groups());
                prefetch_row_scales(job, &tiles);
                for tile in tiles {
                    let mut total = _mm_setzero_ps();
                    let groups = x.codes.iter().zip(x.corrections).zip(x.scales);
                    let records = job.records(tile).chunks_exact(record_bytes(BITS));
                    for (record, ((codes, correction), token_scale)) in records.zip(groups) {
                        prefetch(record);
                        let mut sums = [_mm256_setzero_si256(); HALVES];
                        for_parts!(PART => {
                            let codes = broadcast(&codes.0.as_chunks::<BLOCK>().0[PART / HALVES]);
                            // SAFETY: the CPU has the features.
                            sums[PART % HALVES] = unsafe {
                                <$sums>::add(sums[PART % HALVES], decoder.part::<PART>(record), codes)
                            };
                        });
                        let correction = if UNSIGNED { *correction } else { 0 };
                        total = add_term(total, sums, correction, scales::<BITS>(record), *token_scale);
                    }
                    let mut totals = [0.0; TILE_ROWS];
                    // SAFETY: four floats are written to an array of four floats; the rest is passed on.
                    unsafe {
                        _mm_storeu_ps(totals.as_mut_ptr(), total);
                        job.store(tile * TILE_ROWS, 0, &job.w.tile_row_scales(tile), &totals);
                    }
                }
            }

            /// # Safety
            /// The CPU has the features; strip and token of the step are in range, and no other thread stores these rows.
            unsafe fn multiply(panel: &[Decoded], x: &TokenBlock<'_>, totals: &mut [[f32; ROWS]], step: &Step<'_>) {
                // SAFETY: passed on.
                unsafe { by_two_tokens((multiply_of, multiply_of), panel, x, totals, step) }
            }

            /// Adds the products of a tile with `TOKENS` tokens of the block, from `from` on, to their totals.
            #[target_feature(enable = $features)]
            fn multiply_of<const TOKENS: usize>(
                panel: &[Decoded],
                (tile, from): (usize, usize),
                x: &TokenBlock<'_>,
                totals: &mut [[f32; ROWS]; TOKENS],
            ) {
                let rows = TILE_ROWS * tile..TILE_ROWS * (tile + 1);
                let mut sums_so_far: [__m128; TOKENS] =
                    // SAFETY: four floats inside of an array of 16 are read.
                    std::array::from_fn(|t| unsafe { _mm_loadu_ps(totals[t][rows.clone()].as_ptr()) });
                for Pair {
                    codes,
                    corrections,
                    token_scales,
                    weights,
                    scales,
                } in pairs::<TOKENS>(panel, (tile, from), x)
                {
                    let mut sums = [[_mm256_setzero_si256(); HALVES]; TOKENS];
                    for (part, weights) in weights.as_chunks::<{ 2 * BLOCK }>().0.iter().enumerate() {
                        let (q, half) = (part / HALVES, part % HALVES);
                        // SAFETY: an array of 32 bytes is read.
                        let weights = unsafe { _mm256_loadu_si256(weights.as_ptr().cast()) };
                        for (sums, codes) in sums.iter_mut().zip(codes) {
                            let codes = broadcast(&codes.0.as_chunks::<BLOCK>().0[q]);
                            // SAFETY: the CPU has the features.
                            sums[half] = unsafe { <$sums>::add(sums[half], weights, codes) };
                        }
                    }
                    // SAFETY: an array of four floats is read.
                    let scales = unsafe { _mm_loadu_ps(scales.as_ptr()) };
                    let tokens = sums.into_iter().zip(corrections).zip(token_scales);
                    for (total, ((sums, correction), token_scale)) in sums_so_far.iter_mut().zip(tokens) {
                        let correction = if UNSIGNED { *correction } else { 0 };
                        *total = add_term(*total, sums, correction, scales, *token_scale);
                    }
                }
                for (totals, sums) in totals.iter_mut().zip(sums_so_far) {
                    // SAFETY: four floats are written inside of an array of 16.
                    unsafe { _mm_storeu_ps(totals[rows.clone()].as_mut_ptr(), sums) }
                }
            }
        }
    };
}

kernels!(plain, "avx2", Pairs);
kernels!(avx_vnni, "avx2,avxvnni", AvxVnni);
kernels!(avx512_vnni, "avx2,avx512f,avx512vl,avx512vnni", Avx512Vnni);

/// # Safety
/// The CPU has AVX2.
unsafe fn decode<const UNSIGNED: bool>(
    job: &Job<'_>,
    strip: Range<usize>,
    groups: Range<usize>,
    panel: &mut [Decoded],
) {
    // SAFETY: passed on.
    unsafe {
        if repeats(&job.table) {
            for_width!(decode_of<true, UNSIGNED>, job, strip, groups, panel)
        } else {
            for_width!(decode_of<false, UNSIGNED>, job, strip, groups, panel)
        }
    }
}

#[target_feature(enable = "avx2")]
fn decode_of<const BITS: usize, const REPEATS: bool, const UNSIGNED: bool>(
    job: &Job<'_>,
    strip: Range<usize>,
    groups: Range<usize>,
    panel: &mut [Decoded],
) {
    let decoder = Decoder::<BITS, REPEATS, UNSIGNED>::new(&job.table);
    let bytes = record_bytes(BITS);
    for (i, tile) in strip.enumerate() {
        let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
        for (record, decoded) in records.chunks_exact(bytes).zip(panel.iter_mut()) {
            prefetch(record);
            let weights = decoded.weights[i].as_chunks_mut::<{ 2 * BLOCK }>().0;
            for_parts!(PART => {
                // SAFETY: 32 bytes are written to an array of 32 bytes.
                unsafe { _mm256_storeu_si256(weights[PART].as_mut_ptr().cast(), decoder.part::<PART>(record)) }
            });
            // SAFETY: 16 bytes are written to an array of four floats.
            unsafe { _mm_storeu_ps(decoded.scales[i].as_mut_ptr(), scales::<BITS>(record)) }
        }
    }
}

/// How products of weights and activations are added up in fours.
trait Products {
    /// Whether weights are `value + 128`.
    const UNSIGNED: bool;
    /// Adds eight fours to eight sums.
    ///
    /// # Safety
    /// The CPU has the features that the intrinsics ask for.
    unsafe fn add(sums: __m256i, weights: __m256i, codes: __m256i) -> __m256i;
}

/// What AVX2 has.
struct Pairs;

impl Products for Pairs {
    const UNSIGNED: bool = false;
    #[inline(always)]
    unsafe fn add(sums: __m256i, weights: __m256i, codes: __m256i) -> __m256i {
        // SAFETY: passed on.
        unsafe {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(codes, weights));
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

/// VNNI with the encoding of AVX.
struct AvxVnni;

impl Products for AvxVnni {
    const UNSIGNED: bool = true;
    #[inline(always)]
    unsafe fn add(sums: __m256i, weights: __m256i, codes: __m256i) -> __m256i {
        // SAFETY: passed on.
        unsafe { _mm256_dpbusd_avx_epi32(sums, weights, codes) }
    }
}

/// VNNI with the encoding of AVX-512.
struct Avx512Vnni;

impl Products for Avx512Vnni {
    const UNSIGNED: bool = true;
    #[inline(always)]
    unsafe fn add(sums: __m256i, weights: __m256i, codes: __m256i) -> __m256i {
        // SAFETY: passed on.
        unsafe { _mm256_dpbusd_epi32(sums, weights, codes) }
    }
}

/// Adds to the totals of four rows the sums `[row][lane]` of a group plus a correction, scaled by the product of row's and activations' scales.
#[inline]
#[target_feature(enable = "avx2")]
fn add_term(
    total: __m128,
    sums: [__m256i; HALVES],
    correction: i32,
    scales: __m128,
    token_scale: f32,
) -> __m128 {
    // Rows 0 and 2 in the low half, two sums each; 1 and 3 in the high half.
    let pairs = _mm256_hadd_epi32(sums[0], sums[1]);
    let sums = _mm_hadd_epi32(
        _mm256_castsi256_si128(pairs),
        _mm256_extracti128_si256::<1>(pairs),
    );
    let sums = _mm_add_epi32(
        _mm_shuffle_epi32::<0b11_01_10_00>(sums),
        _mm_set1_epi32(correction),
    );
    let sums = _mm_cvtepi32_ps(sums);
    let scales = _mm_mul_ps(scales, _mm_set1_ps(token_scale));
    _mm_add_ps(total, _mm_mul_ps(sums, scales))
}

/// Turns codes into values; see the module. `REPEATS`: the codebook [repeats]. `UNSIGNED`: values are larger by 128.
struct Decoder<const BITS: usize, const REPEATS: bool, const UNSIGNED: bool> {
    /// The first table, and the differences of each other one to that before it.
    tables: [__m256i; 4],
}

impl<const BITS: usize, const REPEATS: bool, const UNSIGNED: bool> Decoder<BITS, REPEATS, UNSIGNED> {
    /// For each block the controls of `vpshufb` for even and for odd codes.
    const PICKS: [[[i8; BLOCK]; 2]; BLOCKS] = {
        let mut picks = [[[0; BLOCK]; 2]; BLOCKS];
        let mut q = 0;
        while q < BLOCKS {
            picks[q] = [pick(BITS, q, 0), pick(BITS, q, 1)];
            q += 1;
        }
        picks
    };
    /// The factors for even and for odd codes.
    const FACTORS: [[u16; BLOCK / 2]; 2] = [factors(BITS, 0), factors(BITS, 1)];

    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(table: &[i8; 64]) -> Self {
        let mut tables = [_mm256_setzero_si256(); 4];
        // The first difference is in every value.
        let mut last = _mm256_set1_epi8(if UNSIGNED { i8::MIN } else { 0 });
        for (difference, part) in tables.iter_mut().zip(table.as_chunks().0) {
            let part = broadcast(part);
            *difference = _mm256_xor_si256(part, last);
            last = part;
        }
        Decoder { tables }
    }

    /// Weights `32 · PART ..` of a record.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn part<const PART: usize>(&self, record: &[u8]) -> __m256i {
        assert!(record.len() == record_bytes(BITS));
        let (q, half) = (PART / HALVES, PART % HALVES);
        // The chains of the two rows in plane `p`, with zeros above those of a half plane.
        let plane = |p: usize| {
            let plane = &record[64 * p..code_bytes(BITS)];
            match plane.len() {
                // SAFETY: half of the 32 bytes is read.
                32 => _mm256_cvtepu32_epi64(unsafe { _mm_loadu_si128(plane[16 * half..].as_ptr().cast()) }),
                // SAFETY: half of the first 64 bytes is read.
                _ => unsafe { _mm256_loadu_si256(plane[32 * half..].as_ptr().cast()) },
            }
        };
        if BITS == 8 {
            let values = plane(q);
            return if UNSIGNED {
                values
            } else {
                _mm256_xor_si256(values, _mm256_set1_epi8(i8::MIN))
            };
        }
        // Byte `k` of the chain is to be byte `k % 8` of its word, for all bytes with windows of the block.
        let (p, end) = (BITS * q / 8, (8 * BITS * q + 7 * BITS + WINDOW_BITS).div_ceil(8));
        let words = if end > 8 * (p + 1) && 8 * (p + 1) < chain_bytes(BITS) {
            _mm256_blend_epi32::<0b0101_0101>(plane(p), plane(p + 1))
        } else {
            plane(p)
        };
        let [even, odd] = [0, 1].map(|parity| {
            let picked = _mm256_shuffle_epi8(words, broadcast(&Self::PICKS[q][parity]));
            _mm256_mullo_epi16(picked, broadcast_words(&Self::FACTORS[parity]))
        });
        let odd = _mm256_and_si256(odd, _mm256_set1_epi16(0x3f00));
        self.look_up(_mm256_or_si256(_mm256_srli_epi16::<10>(even), odd))
    }

    /// The values of 32 windows.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(&self, windows: __m256i) -> __m256i {
        let mut values = _mm256_shuffle_epi8(self.tables[0], windows);
        if !REPEATS {
            for (table, first) in self.tables[1..].iter().zip([16, 32, 48]) {
                let index = _mm256_sub_epi8(windows, _mm256_set1_epi8(first));
                values = _mm256_xor_si256(values, _mm256_shuffle_epi8(*table, index));
            }
        }
        values
    }
}

/// Whether the table is 16 entries four times. Also at 8 bits, which have none.
fn repeats(table: &[i8; 64]) -> bool {
    table[16..] == table[..48]
}

/// For block `q` and the even or odd codes of two chains: which byte of [`Decoder::part`]'s words holds the begin of each window, and
/// the byte after it; beyond the end of the chain zero.
const fn pick(bits: usize, q: usize, parity: usize) -> [i8; BLOCK] {
    let mut control = [-128; BLOCK];
    let mut at = 0;
    while at < BLOCK {
        let byte = bits * q + begin(bits, parity, at / 2) / 8 + at % 2;
        if byte < chain_bytes(bits) {
            control[at] = (at / 8 * 8 + byte % 8) as i8;
        }
        at += 1;
    }
    control
}

/// What moves the windows of even codes to bits 10 to 16 of their words, and those of odd codes to bits 8 to 14.
const fn factors(bits: usize, parity: usize) -> [u16; BLOCK / 2] {
    let mut factors = [0; BLOCK / 2];
    let mut word = 0;
    while word < factors.len() {
        factors[word] = 1 << (10 - 2 * parity - begin(bits, parity, word) % 8);
        word += 1;
    }
    factors
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(codes: &[i8; BLOCK]) -> __m256i {
    // SAFETY: an array of 16 bytes is read.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.as_ptr().cast())) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast_words(words: &[u16; BLOCK / 2]) -> __m256i {
    // SAFETY: an array of 16 bytes is read.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(words.as_ptr().cast())) }
}
