//! Kernels for AVX-512 F, BW, VBMI, VBMI2 and VNNI.
//!
//! A plane is a register of eight chains, 64 bits of each. Where the windows of eight codes reach into the next plane, a
//! funnel shift (VBMI2) brings them into one 64-bit word; `vpmultishiftqb` takes the byte that begins at each code from
//! there, and `vpermb` looks it up in a table of 64 entries: an index counts only with its low six bits, the window. The tables hold
//! `value + 128` (8-bit codes are that already), since `vpdpbusd` multiplies unsigned by signed bytes; a sum starts with
//! `−128 · Σ activations` of its lane to make up for it.
//!
//! A register of weights is 16 columns of four rows, one row in each 128-bit lane. For one token, the 16 columns of activations are
//! broadcast, and the sums of four groups, `[row][lane]` each, are added up to one register `[row][group]`. For more
//! tokens a panel holds four columns of 16 rows in each register, so that four columns of activations are broadcast and a group
//! ends as the sums of 16 rows.

use std::arch::x86_64::*;
use std::ops::Range;

use super::common::{code_bytes, for_width, record_bytes};
use super::x86::{prefetch, prefetch_row_scales, scales};
use super::{Decoded, Job, Kernel, ROWS, Step, TILES};
use crate::activations::{Codes, TokenBlock};
use crate::layout::{BLOCK, BLOCKS, GROUP, SCALE_UNIT, TILE_ROWS, WINDOW_BITS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
};

/// Groups whose sums fill a register with those of four rows.
const FOUR: usize = 4;

/// Four columns of activations at a time.
const QUADS: usize = GROUP / 4;

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
/// `tiles` are in range, and no other thread stores them.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
unsafe fn one_of<const BITS: usize>(job: &Job<'_>, tiles: Range<usize>) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let x = job.x.block(0, 0..job.w.shape().groups());
    prefetch_row_scales(job, &tiles);
    for tile in tiles {
        let mut total = _mm512_setzero_ps();
        let records = job.records(tile).chunks(FOUR * record_bytes(BITS));
        let x = x
            .codes
            .chunks(FOUR)
            .zip(x.corrections.chunks(FOUR).zip(x.scales.chunks(FOUR)));
        for (records, (codes, (corrections, token_scales))) in records.zip(x) {
            let mut sums = [_mm512_setzero_si512(); FOUR];
            let mut scale_codes = [0; FOUR];
            let records = records.chunks_exact(record_bytes(BITS));
            // Beyond the last group everything is zero, which changes nothing.
            let (corrections, token_scales) = (padded(corrections), padded(token_scales));
            for (((sums, scale_code), record), codes) in
                sums.iter_mut().zip(&mut scale_codes).zip(records).zip(codes)
            {
                prefetch(record);
                *sums = dot(&decoder.record(record), codes);
                *scale_code = i32::from_le_bytes(*record.last_chunk().unwrap_or(&[0; 4]));
            }
            // SAFETY: arrays of four integers and of four floats are read.
            let (corrections, token_scales) = unsafe {
                (
                    _mm_loadu_si128(corrections.as_ptr().cast()),
                    _mm_loadu_ps(token_scales.as_ptr()),
                )
            };
            let sums = _mm512_add_epi32(add_lanes(sums), _mm512_broadcast_i32x4(corrections));
            let scales = _mm512_mul_ps(by_row(scale_codes), _mm512_broadcast_f32x4(token_scales));
            let terms = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales);
            total = _mm512_add_ps(total, _mm512_permute_ps::<0b00_00_00_00>(terms));
            total = _mm512_add_ps(total, _mm512_permute_ps::<0b01_01_01_01>(terms));
            total = _mm512_add_ps(total, _mm512_permute_ps::<0b10_10_10_10>(terms));
            total = _mm512_add_ps(total, _mm512_permute_ps::<0b11_11_11_11>(terms));
        }
        // SAFETY: passed on.
        unsafe { store_one(job, tile, total) }
    }
}

/// The four values of an array that may be shorter at its end.
#[inline(always)]
fn padded<T: Copy + Default>(values: &[T]) -> [T; FOUR] {
    values.first_chunk().copied().unwrap_or_else(|| {
        let mut all = [T::default(); FOUR];
        all.iter_mut().zip(values).for_each(|(all, value)| *all = *value);
        all
    })
}

/// From the sums `[row][lane]` of four groups, `[row][group]`.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes([a, b, c, d]: [__m512i; FOUR]) -> __m512i {
    let pairs = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (ab, cd) = (pairs(a, b), pairs(c, d));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}

/// From the scale codes of four groups, four rows in each, floats `[row][group]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn by_row([a, b, c, d]: [i32; FOUR]) -> __m512 {
    let by_row = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let codes = _mm_shuffle_epi8(_mm_setr_epi32(a, b, c, d), by_row);
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
}

/// [`Job::store`] of a tile for the only token, whose totals are `[row][any]`.
///
/// # Safety
/// `tile` is in range, and no other thread stores it.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_one(job: &Job<'_>, tile: usize, totals: __m512) {
    let first = tile * TILE_ROWS;
    let of_rows = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    let totals = _mm512_castps512_ps128(_mm512_permutexvar_ps(of_rows, totals));
    let Some(row_scales) = job.w.row_scales().get(first..first + TILE_ROWS) else {
        let mut array = [0.0; TILE_ROWS];
        // SAFETY: four floats are written to an array of four floats; the rest is passed on.
        return unsafe {
            _mm_storeu_ps(array.as_mut_ptr(), totals);
            job.store(first, 0, &job.w.tile_row_scales(tile), &array)
        };
    };
    // SAFETY: four halves are read; `tile` is in range and all its rows exist, so that four floats from `first` on lie inside of
    // the outputs, and no other thread has them.
    unsafe {
        let halves = _mm_loadl_epi64(row_scales.as_ptr().cast());
        // Sixteen at once: what has four would need another feature.
        let scales = _mm512_castps512_ps128(_mm512_cvtph_ps(_mm256_castsi128_si256(halves)));
        let scales = _mm_mul_ps(scales, _mm_set1_ps(SCALE_UNIT));
        _mm_storeu_ps(job.y.add(first), _mm_mul_ps(scales, totals));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
fn decode_of<const BITS: usize>(
    job: &Job<'_>,
    strip: Range<usize>,
    groups: Range<usize>,
    panel: &mut [Decoded],
) {
    let decoder = Decoder::<BITS>::new(&job.table);
    let bytes = record_bytes(BITS);
    // Tiles beyond the last one are copies of it: nobody asks for their rows.
    let tiles: [&[u8]; TILES] = std::array::from_fn(|i| {
        let tile = (strip.start + i).min(strip.end - 1);
        &job.records(tile)[groups.start * bytes..groups.end * bytes]
    });
    for (group, decoded) in (0..groups.len()).zip(panel) {
        let mut blocks = [[_mm512_setzero_si512(); TILES]; BLOCKS];
        for (i, tile) in tiles.iter().enumerate() {
            let record = &tile[group * bytes..][..bytes];
            prefetch(record);
            for (block, weights) in blocks.iter_mut().zip(decoder.record(record)) {
                block[i] = weights;
            }
            // SAFETY: 16 bytes are written to an array of four floats.
            unsafe { _mm_storeu_ps(decoded.scales[i].as_mut_ptr(), scales::<BITS>(record)) }
        }
        let quads = decoded.weights.as_flattened_mut().as_chunks_mut::<64>().0;
        for (quads, block) in quads.as_chunks_mut::<4>().0.iter_mut().zip(blocks) {
            for (quad, rows) in quads.iter_mut().zip(by_columns(block)) {
                // SAFETY: 64 bytes are written to an array of 64 bytes.
                unsafe { _mm512_storeu_si512(quad.as_mut_ptr().cast(), rows) }
            }
        }
    }
}

/// From 16 columns of four tiles, `[row][quad]` each, four columns of 16 rows: `[tile][row]` for each quad.
#[inline]
#[target_feature(enable = "avx512f")]
fn by_columns([a, b, c, d]: [__m512i; TILES]) -> [__m512i; 4] {
    // Two quads of the rows of two tiles: the first quad in the low half.
    let first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    let last = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    let both = |of| {
        (
            _mm512_permutex2var_epi32(a, of, b),
            _mm512_permutex2var_epi32(c, of, d),
        )
    };
    let low = |(ab, cd)| _mm512_inserti64x4::<1>(ab, _mm512_castsi512_si256(cd));
    let high = |(ab, cd)| _mm512_shuffle_i64x2::<0b11_10_11_10>(ab, cd);
    let (first, last) = (both(first), both(last));
    [low(first), high(first), low(last), high(last)]
}

/// # Safety
/// The CPU has the features of [`multiply_of`]; strip and token of the step are in range, and no other thread stores these rows.
unsafe fn multiply(panel: &[Decoded], x: &TokenBlock<'_>, totals: &mut [[f32; ROWS]], step: &Step<'_>) {
    macro_rules! for_counts {
        ($($tokens:literal in $parts:literal)*) => {
            match x.tokens {
                // SAFETY: passed on.
                $($tokens => unsafe { multiply_of::<$tokens, $parts>(panel, x, totals, step) },)*
                tokens => unreachable!("{tokens} tokens"),
            }
        };
    }
    // A sum in several parts where there are too few sums to keep the multipliers busy.
    for_counts!(1 in 8 2 in 4 3 in 2 4 in 2 5 in 1 6 in 1 7 in 1 8 in 1);
}

/// # Safety
/// Strip and token of the step are in range, and no other thread stores these rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
unsafe fn multiply_of<const TOKENS: usize, const PARTS: usize>(
    panel: &[Decoded],
    x: &TokenBlock<'_>,
    totals: &mut [[f32; ROWS]],
    step: &Step<'_>,
) {
    let Some(totals) = totals.first_chunk_mut::<TOKENS>() else {
        return;
    };
    let mut sums = [_mm512_setzero_ps(); TOKENS];
    if !step.begin {
        // SAFETY: arrays of 16 floats are read.
        sums = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(totals[t].as_ptr()) });
    }
    let groups = x.codes.as_chunks::<TOKENS>().0.iter();
    let groups = groups
        .zip(x.corrections.as_chunks::<TOKENS>().0)
        .zip(x.scales.as_chunks::<TOKENS>().0);
    for (((codes, corrections), token_scales), Decoded { weights, scales }) in groups.zip(panel) {
        let mut parts = [[_mm512_setzero_si512(); PARTS]; TOKENS];
        for (parts, correction) in parts.iter_mut().zip(corrections) {
            parts[0] = _mm512_set1_epi32(*correction);
        }
        let weights = weights.as_flattened().as_chunks::<64>().0;
        for first in (0..QUADS).step_by(PARTS) {
            for part in 0..PARTS {
                // SAFETY: an array of 64 bytes is read.
                let weights = unsafe { _mm512_loadu_si512(weights[first + part].as_ptr().cast()) };
                for (parts, codes) in parts.iter_mut().zip(codes) {
                    let codes = codes.0.as_chunks::<4>().0[first + part].map(i8::cast_unsigned);
                    let codes = _mm512_set1_epi32(i32::from_le_bytes(codes));
                    parts[part] = _mm512_dpbusd_epi32(parts[part], weights, codes);
                }
            }
        }
        // SAFETY: an array of 16 floats is read.
        let scales = unsafe { _mm512_loadu_ps(scales.as_flattened().as_ptr()) };
        for ((sum, parts), token_scale) in sums.iter_mut().zip(parts).zip(token_scales) {
            let exact = parts[1..]
                .iter()
                .fold(parts[0], |sum, part| _mm512_add_epi32(sum, *part));
            let scales = _mm512_mul_ps(scales, _mm512_set1_ps(*token_scale));
            *sum = _mm512_add_ps(*sum, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scales));
        }
    }
    let (rows, first) = (step.job.w.shape().rows, step.strip.start * TILE_ROWS);
    if let Some(row_scales) = step.end
        && first + ROWS <= rows
    {
        // SAFETY: an array of 16 floats is read. Token and all rows of the strip exist, so that 16 floats lie inside of the outputs,
        // and no other thread has them.
        unsafe {
            let row_scales = _mm512_loadu_ps(row_scales.as_ptr());
            for (t, sum) in sums.into_iter().enumerate() {
                let y = step.job.y.add((step.token + t) * rows + first);
                _mm512_storeu_ps(y, _mm512_mul_ps(row_scales, sum));
            }
        }
        return;
    }
    for (total, sum) in totals.iter_mut().zip(sums) {
        // SAFETY: 16 floats are written to an array of 16 floats.
        unsafe { _mm512_storeu_ps(total.as_mut_ptr(), sum) }
    }
    // SAFETY: passed on.
    unsafe { step.finish(totals) }
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

/// The sums `[row][lane]` of one group, too large by 128 for each unit of the activations.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot(weights: &[__m512i; BLOCKS], codes: &Codes) -> __m512i {
    let mut sums = _mm512_setzero_si512();
    for (weights, codes) in weights.iter().zip(codes.0.as_chunks::<BLOCK>().0) {
        // SAFETY: an array of 16 bytes is read.
        let codes = unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(codes.as_ptr().cast())) };
        sums = _mm512_dpbusd_epi32(sums, *weights, codes);
    }
    sums
}
