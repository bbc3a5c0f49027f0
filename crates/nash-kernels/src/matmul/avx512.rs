//! Kernels for AVX-512 F, BW, VBMI and VNNI.
//!
//! A shift (and at 3, 5 and 6 bits a merge with the second plane) brings 64 codes into the low bits of 64
//! bytes, and `vpermb` looks them up in a table of 64 entries. An index counts only with its low six bits and
//! the table repeats, so the bits above the code do no harm. The tables hold `value + 128` (8-bit codes are that
//! already), since `vpdpbusd` multiplies unsigned by signed bytes; a sum starts with `−128 · Σ activations` of its
//! lane to make up for it.
//!
//! A register of weights is 16 columns of four rows, one row in each 128-bit lane, so the 16 columns of
//! activations are broadcast and a group ends as `[row][lane]` sums without any horizontal step.

use std::arch::x86_64::*;
use std::ops::Range;

use super::x86::{code_bytes, for_width, prefetch, record_bytes, scales};
use super::{Job, Kernel, Lanes, Panel, TILES, TokenBlock};
use crate::activations::ActivationGroup;
use crate::layout::{BLOCKS, GROUP, TILE_WEIGHTS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
    tiles: TILES,
};

/// # Safety
/// The CPU has the features of [`one_of`]; `tiles` are in range, and no other thread stores them.
unsafe fn one(job: &Job<'_>, tiles: Range<usize>) {
    // SAFETY: passed on.
    unsafe { for_width!(one_of, job, tiles) }
}

/// # Safety
/// The CPU has the features of [`decode_of`].
unsafe fn decode(job: &Job<'_>, tile: usize, groups: Range<usize>, panel: &mut Panel) {
    // SAFETY: passed on.
    unsafe { for_width!(decode_of, job, tile, groups, panel) }
}

/// # Safety
/// `tiles` are in range, and no other thread stores them.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
unsafe fn one_of<const BITS: usize>(job: &Job<'_>, tiles: Range<usize>) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let x = job.x.block(0).0;
    for tile in tiles {
        let mut lanes = _mm512_setzero_ps();
        for (record, x) in job.records(tile).chunks_exact(record_bytes(BITS)).zip(x) {
            prefetch(record);
            let weights = decoder.record(record);
            let sums = dot(&weights, x);
            let scales = _mm_mul_ps(scales::<BITS>(record), _mm_set1_ps(x.scale));
            let term = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), spread_rows(scales));
            lanes = _mm512_add_ps(lanes, term);
        }
        // SAFETY: passed on.
        unsafe { job.store(tile, 0, job.w.tile_row_scales(tile), &to_array(lanes)) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
fn decode_of<const BITS: usize>(job: &Job<'_>, tile: usize, groups: Range<usize>, panel: &mut Panel) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let bytes = record_bytes(BITS);
    let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
    let panel = panel.weights.iter_mut().zip(&mut panel.scales);
    for (record, (weights, scale)) in records.chunks_exact(bytes).zip(panel) {
        prefetch(record);
        for (weights, block) in weights
            .as_chunks_mut::<GROUP>()
            .0
            .iter_mut()
            .zip(decoder.record(record))
        {
            // SAFETY: 64 bytes are written to an array of 64 bytes.
            unsafe { _mm512_storeu_si512(weights.as_mut_ptr().cast(), block) }
        }
        let scales = scales::<BITS>(record);
        // SAFETY: 16 bytes are written to an array of four floats.
        unsafe { _mm_storeu_ps(scale.as_mut_ptr(), scales) }
    }
}

/// # Safety
/// The CPU has the features of [`multiply_of`].
unsafe fn multiply(panels: &[Panel], x: &TokenBlock<'_>, lanes: &mut [Lanes]) {
    macro_rules! for_counts {
        ($($tokens:literal)*) => {
            match (panels.len(), x.tokens) {
                // SAFETY: passed on.
                $((1, $tokens) => unsafe { multiply_of::<1, $tokens>(panels, x, lanes) },)*
                // SAFETY: passed on.
                $((2, $tokens) => unsafe { multiply_of::<2, $tokens>(panels, x, lanes) },)*
                (panels, tokens) => unreachable!("{panels} panels, {tokens} tokens"),
            }
        };
    }
    for_counts!(1 2 3 4 5 6 7 8);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
fn multiply_of<const PANELS: usize, const TOKENS: usize>(
    panels: &[Panel],
    x: &TokenBlock<'_>,
    lanes: &mut [Lanes],
) {
    let panels: [&Panel; PANELS] = std::array::from_fn(|p| &panels[p]);
    let mut totals = [[_mm512_setzero_ps(); TOKENS]; PANELS];
    for (totals, lanes) in totals.iter_mut().zip(&*lanes) {
        for (total, lanes) in totals.iter_mut().zip(&lanes.0[x.first..]) {
            // SAFETY: an array of 16 floats is read.
            *total = unsafe { _mm512_loadu_ps(lanes.as_ptr()) };
        }
    }
    for (g, x) in x.groups.as_chunks::<TOKENS>().0.iter().enumerate() {
        let mut weights = [[_mm512_setzero_si512(); BLOCKS]; PANELS];
        let mut scales = [_mm512_setzero_ps(); PANELS];
        for p in 0..PANELS {
            weights[p] = load_weights(&panels[p].weights[g]);
            // SAFETY: an array of four floats is read.
            scales[p] = spread_rows(unsafe { _mm_loadu_ps(panels[p].scales[g].as_ptr()) });
        }
        for t in 0..TOKENS {
            let scale = _mm512_set1_ps(x[t].scale);
            for p in 0..PANELS {
                let sums = _mm512_cvtepi32_ps(dot(&weights[p], &x[t]));
                totals[p][t] =
                    _mm512_add_ps(totals[p][t], _mm512_mul_ps(sums, _mm512_mul_ps(scales[p], scale)));
            }
        }
    }
    for (totals, lanes) in totals.iter().zip(lanes) {
        for (total, lanes) in totals.iter().zip(&mut lanes.0[x.first..]) {
            *lanes = to_array(*total);
        }
    }
}

/// Turns codes into `value + 128`; see the module.
struct Decoder<const BITS: usize> {
    table: __m512i,
    /// For each block the rotation that brings the bit of a plane of single bits to its place in the index.
    to_place: [__m512i; BLOCKS],
}

impl<const BITS: usize> Decoder<BITS> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new(table: &[i8; 64]) -> Self {
        // SAFETY: an array of 64 bytes is read.
        let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
        // Block `q` has bit `2q` of its first 32 codes, and bit `2q + 1` of the others.
        let place = BITS as i32 - 1;
        let rotation = |q| {
            let (first, others) = (
                _mm256_set1_epi32(place - 2 * q),
                _mm256_set1_epi32(place - 2 * q - 1),
            );
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), others)
        };
        Decoder {
            table: _mm512_xor_si512(table, _mm512_set1_epi8(i8::MIN)),
            to_place: [rotation(0), rotation(1), rotation(2), rotation(3)],
        }
    }

    /// The weights of a record, 16 columns of the four rows in each register.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn record(&self, record: &[u8]) -> [__m512i; BLOCKS] {
        assert!(record.len() == record_bytes(BITS));
        // SAFETY: the 64 bytes from 64·i on are inside the planes: `planes` below asks for the blocks of 64 bytes that
        // a width has.
        let plane = |i: usize| unsafe { _mm512_loadu_si512(record.as_ptr().add(64 * i).cast()) };
        let low = match BITS {
            2 | 3 => {
                let x = plane(0);
                [
                    x,
                    _mm512_srli_epi16::<2>(x),
                    _mm512_srli_epi16::<4>(x),
                    _mm512_srli_epi16::<6>(x),
                ]
            }
            4..=6 => {
                let (x, y) = (plane(0), plane(1));
                [x, y, _mm512_srli_epi16::<4>(x), _mm512_srli_epi16::<4>(y)]
            }
            _ => return [plane(0), plane(1), plane(2), plane(3)],
        };
        let high = match BITS {
            3 | 5 => {
                // SAFETY: the plane of single bits is the last 32 bytes of the codes.
                let bits = unsafe { _mm256_loadu_si256(record.as_ptr().add(code_bytes(BITS) - 32).cast()) };
                let bits = _mm512_broadcast_i64x4(bits);
                self.to_place.map(|counts| _mm512_rolv_epi32(bits, counts))
            }
            6 => {
                let x = plane(2);
                [
                    _mm512_slli_epi16::<4>(x),
                    _mm512_slli_epi16::<2>(x),
                    x,
                    _mm512_srli_epi16::<2>(x),
                ]
            }
            _ => return low.map(|codes| _mm512_permutexvar_epi8(codes, self.table)),
        };
        let low_bits = _mm512_set1_epi8(if BITS == 3 { 0b11 } else { 0b1111 });
        std::array::from_fn(|q| {
            // Each bit: `low_bits ? low : high`.
            let codes = _mm512_ternarylogic_epi32::<0xca>(low_bits, low[q], high[q]);
            _mm512_permutexvar_epi8(codes, self.table)
        })
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_weights(weights: &[u8; TILE_WEIGHTS]) -> [__m512i; BLOCKS] {
    let blocks = weights.as_chunks::<GROUP>().0;
    // SAFETY: an array of 64 bytes is read.
    std::array::from_fn(|q| unsafe { _mm512_loadu_si512(blocks[q].as_ptr().cast()) })
}

/// The exact sums `S [row][lane]` of one group and token.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot(weights: &[__m512i; BLOCKS], x: &ActivationGroup) -> __m512i {
    // SAFETY: arrays of 16 bytes are read.
    let broadcast = |from: *const i8| unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(from.cast())) };
    let mut sums = broadcast(x.correction.as_ptr().cast());
    for (weights, codes) in weights.iter().zip(x.codes.as_chunks::<16>().0) {
        sums = _mm512_dpbusd_epi32(sums, *weights, broadcast(codes.as_ptr()));
    }
    sums
}

/// One value per row to `[row][lane]`.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread_rows(rows: __m128) -> __m512 {
    let indices = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_permutexvar_ps(indices, _mm512_castps128_ps512(rows))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn to_array(lanes: __m512) -> [f32; 16] {
    let mut array = [0.0; 16];
    // SAFETY: 16 floats are written to an array of 16 floats.
    unsafe { _mm512_storeu_ps(array.as_mut_ptr(), lanes) }
    array
}
