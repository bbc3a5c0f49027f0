//! Kernels for AVX-512 F, BW, VBMI, VBMI2 and VNNI.
//!
//! A plane is a register of eight chains, 64 bits of each. Where the windows of eight codes reach into the next plane, a
//! funnel shift (VBMI2) brings them into one 64-bit word; `vpmultishiftqb` takes the byte that begins at each code from
//! there, and `vpermb` looks it up in a table of 64 entries: an index counts only with its low six bits, the window. The tables hold
//! `value + 128` (8-bit codes are that already), since `vpdpbusd` multiplies unsigned by signed bytes; a sum starts with
//! `−128 · Σ activations` of its lane to make up for it.
//!
//! A register of weights is 16 columns of four rows, one row in each 128-bit lane, so the 16 columns of
//! activations are broadcast and a group ends as `[row][lane]` sums without any horizontal step.

use std::arch::x86_64::*;
use std::ops::Range;

use super::common::{code_bytes, for_width, record_bytes};
use super::x86::{prefetch, prefetch_row_scales, scales};
use super::{Job, Kernel, Lanes, Panel, TILES, TokenBlock};
use crate::activations::ActivationGroup;
use crate::layout::{BLOCKS, GROUP, SCALE_UNIT, TILE_ROWS, TILE_WEIGHTS, WINDOW_BITS};

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
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
unsafe fn one_of<const BITS: usize>(job: &Job<'_>, tiles: Range<usize>) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let x = job.x.block(0).0;
    prefetch_row_scales(job, &tiles);
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
        unsafe { store_one(job, tile, lanes) }
    }
}

/// [`Job::store`] of the only token, without a detour through memory where all four rows exist.
///
/// # Safety
/// As [`Job::store`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_one(job: &Job<'_>, tile: usize, lanes: __m512) {
    let first = tile * TILE_ROWS;
    let Some(row_scales) = job.w.row_scales().get(first..first + TILE_ROWS) else {
        // SAFETY: passed on.
        return unsafe { job.store(tile, 0, job.w.tile_row_scales(tile), &to_array(lanes)) };
    };
    // SAFETY: four halves are read; `tile` is in range and all its rows exist, so that four floats from `first` on lie inside of
    // the outputs, and no other thread has them.
    unsafe {
        let halves = _mm_loadl_epi64(row_scales.as_ptr().cast());
        // Sixteen at once: what has four would need another feature.
        let scales = _mm512_castps512_ps128(_mm512_cvtph_ps(_mm256_castsi128_si256(halves)));
        let scales = _mm_mul_ps(scales, _mm_set1_ps(SCALE_UNIT));
        // (lane[0] + lane[1]) + (lane[2] + lane[3]) in each row, then one value of each.
        let pairs = _mm512_add_ps(lanes, _mm512_permute_ps::<0b10_11_00_01>(lanes));
        let sums = _mm512_add_ps(pairs, _mm512_permute_ps::<0b01_00_11_10>(pairs));
        let of_rows = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(of_rows, sums));
        _mm_storeu_ps(job.y.add(first), _mm_mul_ps(scales, sums));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
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
}

impl<const BITS: usize> Decoder<BITS> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(table: &[i8; 64]) -> Self {
        // SAFETY: an array of 64 bytes is read.
        let table = unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
        Decoder {
            table: _mm512_xor_si512(table, _mm512_set1_epi8(i8::MIN)),
        }
    }

    /// The weights of a record, 16 columns of the four rows in each register.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi,avx512vbmi2")]
    fn record(&self, record: &[u8]) -> [__m512i; BLOCKS] {
        assert!(record.len() == record_bytes(BITS));
        let plane = |p: usize| {
            let plane = record[(64 * p).min(code_bytes(BITS))..code_bytes(BITS)].as_ptr();
            match code_bytes(BITS).saturating_sub(64 * p) {
                0 => _mm512_setzero_si512(),
                // SAFETY: the slice has 32 bytes.
                32 => _mm512_cvtepu32_epi64(unsafe { _mm256_loadu_si256(plane.cast()) }),
                // SAFETY: the slice has 64 bytes or more.
                _ => unsafe { _mm512_loadu_si512(plane.cast()) },
            }
        };
        // At 8 bits the planes are the values.
        let planes = [plane(0), plane(1), plane(2), plane(3)];
        if BITS == 8 {
            return planes;
        }
        [
            self.block::<0>(&planes),
            self.block::<1>(&planes),
            self.block::<2>(&planes),
            self.block::<3>(&planes),
        ]
    }

    /// The weights of block `Q`, whose codes begin at bit `8 · BITS · Q` of their chains.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi,avx512vbmi2")]
    fn block<const Q: usize>(&self, planes: &[__m512i; 4]) -> __m512i {
        let (plane, first) = (8 * BITS * Q / 64, 8 * BITS * Q % 64);
        let end = first + 7 * BITS + WINDOW_BITS;
        let (words, first) = if end <= 64 {
            (planes[plane], first)
        } else {
            let shift = _mm512_set1_epi64(first as i64);
            (_mm512_shrdv_epi64(planes[plane], planes[plane + 1], shift), 0)
        };
        let begins = u64::from_le_bytes(std::array::from_fn(|i| (first + BITS * i) as u8));
        let windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(begins.cast_signed()), words);
        _mm512_permutexvar_epi8(windows, self.table)
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
