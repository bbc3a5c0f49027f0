//! Kernels for AVX2.
//!
//! A register holds 16 columns of two rows, one row in each 128-bit half and one chain in each 64-bit word; a record is
//! eight of them. `vpshufb` takes the two bytes with the window of every even code, `vpmulhuw` and `vpmullw` shift each
//! by its own count, the same for odd codes, and values come from four tables of 16 bytes. `vpmaddubsw` multiplies
//! unsigned by signed bytes, so the sign of the weight is moved to the activation: `|w| · (a · sign w)`. With
//! `|w| ≤ 128` and `|a| ≤ 127` a pair is at most 32 512 and does not saturate.

use std::arch::x86_64::*;
use std::ops::Range;

use super::x86::{code_bytes, for_width, prefetch, record_bytes, scales};
use super::{Job, Kernel, Lanes, Panel, TokenBlock};
use crate::layout::{BLOCK, BLOCKS, CHAIN, RUN, WINDOW_BITS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
    tiles: 1,
};

/// Registers that hold the four rows of a block.
const HALVES: usize = 2;
/// Registers that hold a record.
const PARTS: usize = HALVES * BLOCKS;

/// # Safety
/// The CPU has AVX2; `tiles` are in range, and no other thread stores them.
unsafe fn one(job: &Job<'_>, tiles: Range<usize>) {
    // SAFETY: passed on.
    unsafe { for_width!(one_of, job, tiles) }
}

/// # Safety
/// The CPU has AVX2.
unsafe fn decode(job: &Job<'_>, tile: usize, groups: Range<usize>, panel: &mut Panel) {
    // SAFETY: passed on.
    unsafe { for_width!(decode_of, job, tile, groups, panel) }
}

/// # Safety
/// `tiles` are in range, and no other thread stores them.
#[target_feature(enable = "avx2")]
unsafe fn one_of<const BITS: usize>(job: &Job<'_>, tiles: Range<usize>) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let x = job.x.block(0).0;
    for tile in tiles {
        let mut lanes = [_mm256_setzero_ps(); HALVES];
        for (record, x) in job.records(tile).chunks_exact(record_bytes(BITS)).zip(x) {
            prefetch(record);
            let mut sums = [_mm256_setzero_si256(); HALVES];
            for (part, weights) in decoder.record(record).into_iter().enumerate() {
                let (q, half) = (part / HALVES, part % HALVES);
                let codes = broadcast(&x.codes.as_chunks::<BLOCK>().0[q]);
                sums[half] = _mm256_add_epi32(sums[half], products(weights, codes));
            }
            let scales = _mm_mul_ps(scales::<BITS>(record), _mm_set1_ps(x.scale));
            for (half, (lanes, sums)) in lanes.iter_mut().zip(sums).enumerate() {
                let term = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), spread_rows(scales, half));
                *lanes = _mm256_add_ps(*lanes, term);
            }
        }
        // SAFETY: passed on.
        unsafe { job.store(tile, 0, job.w.tile_row_scales(tile), &to_array(lanes)) }
    }
}

#[target_feature(enable = "avx2")]
fn decode_of<const BITS: usize>(job: &Job<'_>, tile: usize, groups: Range<usize>, panel: &mut Panel) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let bytes = record_bytes(BITS);
    let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
    let panel = panel.weights.iter_mut().zip(&mut panel.scales);
    for (record, (weights, scale)) in records.chunks_exact(bytes).zip(panel) {
        prefetch(record);
        for (weights, part) in weights
            .as_chunks_mut::<{ 2 * BLOCK }>()
            .0
            .iter_mut()
            .zip(decoder.record(record))
        {
            // SAFETY: 32 bytes are written to an array of 32 bytes.
            unsafe { _mm256_storeu_si256(weights.as_mut_ptr().cast(), part) }
        }
        // SAFETY: 16 bytes are written to an array of four floats.
        unsafe { _mm_storeu_ps(scale.as_mut_ptr(), scales::<BITS>(record)) }
    }
}

/// # Safety
/// The CPU has AVX2.
unsafe fn multiply(panels: &[Panel], x: &TokenBlock<'_>, lanes: &mut [Lanes]) {
    for (panel, lanes) in panels.iter().zip(lanes) {
        let lanes = &mut lanes.0[x.first..][..x.tokens];
        let mut pairs = lanes.as_chunks_mut::<2>();
        for (pair, lanes) in pairs.0.iter_mut().enumerate() {
            // SAFETY: passed on.
            unsafe { multiply_of::<2>(panel, x, 2 * pair, lanes) }
        }
        if let [last] = &mut pairs.1 {
            // SAFETY: passed on.
            unsafe { multiply_of::<1>(panel, x, x.tokens - 1, std::array::from_mut(last)) }
        }
    }
}

/// Adds the products of a panel with `TOKENS` tokens of the block, from `from` on, to their lanes.
#[target_feature(enable = "avx2")]
fn multiply_of<const TOKENS: usize>(
    panel: &Panel,
    x: &TokenBlock<'_>,
    from: usize,
    lanes: &mut [[f32; 16]; TOKENS],
) {
    let mut totals = [[_mm256_setzero_ps(); HALVES]; TOKENS];
    for (totals, lanes) in totals.iter_mut().zip(&*lanes) {
        // SAFETY: an array of 16 floats is read, half by half.
        *totals = std::array::from_fn(|half| unsafe { _mm256_loadu_ps(lanes[8 * half..].as_ptr()) });
    }
    let groups = x.groups.chunks_exact(x.tokens);
    for (x, (weights, scales)) in groups.zip(panel.weights.iter().zip(&panel.scales)) {
        let Some(x) = x[from..].first_chunk::<TOKENS>() else {
            return;
        };
        let mut sums = [[_mm256_setzero_si256(); HALVES]; TOKENS];
        for (part, weights) in weights.as_chunks::<{ 2 * BLOCK }>().0.iter().enumerate() {
            let (q, half) = (part / HALVES, part % HALVES);
            // SAFETY: an array of 32 bytes is read.
            let weights = unsafe { _mm256_loadu_si256(weights.as_ptr().cast()) };
            for (sums, x) in sums.iter_mut().zip(x) {
                let codes = broadcast(&x.codes.as_chunks::<BLOCK>().0[q]);
                sums[half] = _mm256_add_epi32(sums[half], products(weights, codes));
            }
        }
        // SAFETY: an array of four floats is read.
        let scales = unsafe { _mm_loadu_ps(scales.as_ptr()) };
        for ((totals, sums), x) in totals.iter_mut().zip(&sums).zip(x) {
            let scales = _mm_mul_ps(scales, _mm_set1_ps(x.scale));
            for half in 0..HALVES {
                let term = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), spread_rows(scales, half));
                totals[half] = _mm256_add_ps(totals[half], term);
            }
        }
    }
    for (totals, lanes) in totals.iter().zip(lanes) {
        *lanes = to_array(*totals);
    }
}

/// Turns codes into values; see the module.
struct Decoder<const BITS: usize> {
    tables: [__m256i; 4],
    /// The four tables are the same.
    repeats: bool,
}

impl<const BITS: usize> Decoder<BITS> {
    /// For each block, for even and odd codes, which bytes of its register hold their windows.
    const PICKS: [[[i8; BLOCK]; 2]; BLOCKS] = {
        let mut picks = [[[0; BLOCK]; 2]; BLOCKS];
        let mut q = 0;
        while q < BLOCKS {
            picks[q] = [pick(BITS, q, 0), pick(BITS, q, 1)];
            q += 1;
        }
        picks
    };
    /// For even and odd codes the factor that moves each window: the even ones from the upper half of the product to bit 0,
    /// the odd ones to bit 8.
    const FACTORS: [[i8; BLOCK]; 2] = {
        let mut factors = [[0; BLOCK]; 2];
        let mut code = 0;
        while code < BLOCK {
            let shift = BITS * (code % RUN) % 8;
            let factor: u16 = match (code % 2, shift) {
                (0, 0) => 1 << 8,
                (0, _) => 1 << (16 - shift),
                _ => 1 << (8 - shift),
            };
            let bytes = factor.to_le_bytes();
            factors[code % 2][code / 2 * 2] = bytes[0].cast_signed();
            factors[code % 2][code / 2 * 2 + 1] = bytes[1].cast_signed();
            code += 1;
        }
        factors
    };

    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(table: &[i8; 64]) -> Self {
        let tables = table.as_chunks::<16>().0;
        Decoder {
            tables: std::array::from_fn(|i| broadcast(&tables[i])),
            repeats: tables.iter().all(|part| part == &tables[0]),
        }
    }

    /// The weights of a record, `[block][row][16]`, 32 in each register.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn record(&self, record: &[u8]) -> [__m256i; PARTS] {
        assert!(record.len() == record_bytes(BITS));
        [
            self.part::<0>(record),
            self.part::<1>(record),
            self.part::<2>(record),
            self.part::<3>(record),
            self.part::<4>(record),
            self.part::<5>(record),
            self.part::<6>(record),
            self.part::<7>(record),
        ]
    }

    /// Weights `32 · PART ..` of a record.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn part<const PART: usize>(&self, record: &[u8]) -> __m256i {
        let (q, half) = (PART / HALVES, PART % HALVES);
        let plane = |p: usize| {
            let (offset, rest) = (64 * p, code_bytes(BITS) - 64 * p);
            // SAFETY: `record` has checked the length: half of a plane of 64 or of 32 bytes is read.
            unsafe {
                match rest {
                    32 => {
                        _mm256_cvtepu32_epi64(_mm_loadu_si128(record.as_ptr().add(offset + 16 * half).cast()))
                    }
                    _ => _mm256_loadu_si256(record.as_ptr().add(offset + 32 * half).cast()),
                }
            }
        };
        if BITS == 8 {
            return _mm256_xor_si256(plane(q), _mm256_set1_epi8(i8::MIN));
        }
        let (p, first) = (BITS * q / 8, BITS * q % 8);
        let end = first + (7 * BITS + WINDOW_BITS).div_ceil(8);
        let words = if end > 8 && 8 * (p + 1) < CHAIN / 8 * BITS {
            // Bytes 4.. of the words of this plane, and bytes ..4 of the next one at their place.
            _mm256_blend_epi32::<0b0101_0101>(plane(p), plane(p + 1))
        } else {
            plane(p)
        };
        let [even, odd] = [0, 1].map(|parity| _mm256_shuffle_epi8(words, broadcast(&Self::PICKS[q][parity])));
        let even = _mm256_mulhi_epu16(even, broadcast(&Self::FACTORS[0]));
        let odd = _mm256_mullo_epi16(odd, broadcast(&Self::FACTORS[1]));
        self.look_up(_mm256_blendv_epi8(
            even,
            odd,
            _mm256_set1_epi16(0xff00u16.cast_signed()),
        ))
    }

    /// The values of 32 windows, whose bytes may hold anything in their upper two bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(&self, windows: __m256i) -> __m256i {
        let low = _mm256_and_si256(windows, _mm256_set1_epi8(0b1111));
        let from = |table: usize| _mm256_shuffle_epi8(self.tables[table], low);
        if self.repeats {
            return from(0);
        }
        // A blend looks at the top bit of each byte.
        let (bit_4, bit_5) = (_mm256_slli_epi16::<3>(windows), _mm256_slli_epi16::<2>(windows));
        let below_32 = _mm256_blendv_epi8(from(0), from(1), bit_4);
        let above_32 = _mm256_blendv_epi8(from(2), from(3), bit_4);
        _mm256_blendv_epi8(below_32, above_32, bit_5)
    }
}

/// For block `q` and the even (`parity` 0) or odd codes of two chains: the bytes of the words in [`Decoder::part`] that
/// hold each window, as a control of `vpshufb`. A window that begins with a byte is put into the upper one, because it is to
/// be shifted.
const fn pick(bits: usize, q: usize, parity: usize) -> [i8; BLOCK] {
    let mut control = [-128; BLOCK];
    let mut at = 0;
    while at < BLOCK {
        let bit = bits * (at / 2 * 2 % RUN + parity);
        let begins_in_upper = parity == 0 && bit.is_multiple_of(8);
        let byte = bits * q + bit / 8 + at % 2;
        if begins_in_upper {
            if at % 2 == 1 {
                control[at] = (at / 8 * 8 + (byte - 1) % 8) as i8;
            }
        } else if byte < CHAIN / 8 * bits {
            control[at] = (at / 8 * 8 + byte % 8) as i8;
        }
        at += 1;
    }
    control
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(codes: &[i8; BLOCK]) -> __m256i {
    // SAFETY: an array of 16 bytes is read.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.as_ptr().cast())) }
}

/// Products of weights and activations, added up in fours.
#[inline]
#[target_feature(enable = "avx2")]
fn products(weights: __m256i, codes: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(codes, weights));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// One value per row to `[row][lane]` of two rows.
#[inline]
#[target_feature(enable = "avx2")]
fn spread_rows(rows: __m128, half: usize) -> __m256 {
    let first = _mm256_set1_epi32(2 * half as i32);
    let indices = _mm256_add_epi32(first, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    _mm256_permutevar8x32_ps(_mm256_castps128_ps256(rows), indices)
}

#[inline]
#[target_feature(enable = "avx2")]
fn to_array(lanes: [__m256; HALVES]) -> [f32; 16] {
    let mut array = [0.0; 16];
    for (lanes, array) in lanes.iter().zip(array.as_chunks_mut::<8>().0) {
        // SAFETY: eight floats are written to an array of eight floats.
        unsafe { _mm256_storeu_ps(array.as_mut_ptr(), *lanes) }
    }
    array
}
