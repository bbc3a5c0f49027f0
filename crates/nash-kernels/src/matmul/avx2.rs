//! Kernels for AVX2.
//!
//! A register holds 16 columns of two rows, one row in each 128-bit half. Codes are cut out of their bit
//! stream 16 bits at a time: `vpshufb` fetches the two bytes that hold a code, a multiplication by a power of
//! two brings it to the top of its 16 bits, a shift to its place; codes with even and odd indices are done
//! apart. Values come from one, two or four tables of 16 bytes. `vpmaddubsw` multiplies unsigned by signed
//! bytes, so the sign of the weight is moved to the activation: `|w| · (a · sign w)`. With `|w| ≤ 128` and
//! `|a| ≤ 127` a pair is at most 32 512 and does not saturate.

use std::arch::x86_64::*;
use std::ops::Range;

use super::x86::{code_bytes, for_width, prefetch, record_bytes, scales};
use super::{Job, Kernel, Lanes, Panel, TokenBlock};
use crate::layout::{BLOCK, BLOCKS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
    tiles: 1,
};

/// Registers that hold the four rows of a block.
const HALVES: usize = 2;

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
            for (q, codes) in x.codes.as_chunks::<BLOCK>().0.iter().enumerate() {
                let codes = broadcast(codes);
                for (half, sums) in sums.iter_mut().enumerate() {
                    *sums = _mm256_add_epi32(*sums, products(decoder.block(record, q, half), codes));
                }
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
        for (index, weights) in weights.as_chunks_mut::<{ 2 * BLOCK }>().0.iter_mut().enumerate() {
            let block = decoder.block(record, index / HALVES, index % HALVES);
            // SAFETY: 32 bytes are written to an array of 32 bytes.
            unsafe { _mm256_storeu_si256(weights.as_mut_ptr().cast(), block) }
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
        for (index, weights) in weights.as_chunks::<{ 2 * BLOCK }>().0.iter().enumerate() {
            let (q, half) = (index / HALVES, index % HALVES);
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

/// Where the codes with even (`odd = 0`) or odd index are: for each, the two bytes that hold it, and the power of
/// two that moves it to the top of these 16 bits.
const fn places(bits: usize, odd: usize) -> ([u8; 16], [u16; 8]) {
    let (mut bytes, mut factors) = ([0; 16], [0; 8]);
    let mut i = 0;
    while i < 8 {
        let bit = (2 * i + odd) * bits;
        bytes[2 * i] = (bit / 8) as u8;
        bytes[2 * i + 1] = (bit / 8 + 1) as u8;
        // 8-bit codes are not taken apart.
        factors[i] = if bits < 8 { 1 << (16 - bits - bit % 8) } else { 0 };
        i += 1;
    }
    (bytes, factors)
}

/// Turns codes into values; see the module.
struct Decoder<const BITS: usize> {
    /// Bytes and factors of the codes with even index, then with odd index.
    bytes: [__m256i; 2],
    factors: [__m256i; 2],
    tables: [__m256i; 4],
}

impl<const BITS: usize> Decoder<BITS> {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(table: &[i8; 64]) -> Self {
        let [even, odd] = const { [places(BITS, 0), places(BITS, 1)] };
        // SAFETY: arrays of 16 bytes are read.
        let load = |bytes: *const u8| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.cast())) };
        let tables = table.as_chunks::<16>().0;
        Decoder {
            bytes: [load(even.0.as_ptr()), load(odd.0.as_ptr())],
            factors: [load(even.1.as_ptr().cast()), load(odd.1.as_ptr().cast())],
            tables: std::array::from_fn(|i| load(tables[i].as_ptr().cast())),
        }
    }

    /// Block `q` of rows `2 · half` and `2 · half + 1` of a record.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn block(&self, record: &[u8], q: usize, half: usize) -> __m256i {
        assert!(q < BLOCKS && half < HALVES && record.len() == record_bytes(BITS));
        let offset = (q * HALVES + half) * 4 * BITS;
        if BITS == 8 {
            // SAFETY: `offset + 32` is at most 256, inside the record.
            let codes = unsafe { _mm256_loadu_si256(record.as_ptr().add(offset).cast()) };
            return _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN));
        }
        let low = load_row::<BITS>(record, offset);
        let high = load_row::<BITS>(record, offset + 2 * BITS);
        self.look_up(self.codes(_mm256_set_m128i(high, low)))
    }

    /// The bit streams of two times 16 codes to one code per byte.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn codes(&self, raw: __m256i) -> __m256i {
        let top =
            |odd: usize| _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, self.bytes[odd]), self.factors[odd]);
        let even = _mm256_srl_epi16(top(0), _mm_cvtsi32_si128(16 - BITS as i32));
        let odd = _mm256_srl_epi16(top(1), _mm_cvtsi32_si128(8 - BITS as i32));
        let mask = _mm256_set1_epi16(((1 << BITS) - 1) << 8);
        _mm256_or_si256(even, _mm256_and_si256(odd, mask))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(&self, codes: __m256i) -> __m256i {
        let from = |table: usize| _mm256_shuffle_epi8(self.tables[table], codes);
        // `vpblendvb` looks at bit 7 of each byte; what a shift moves in from the neighbour lies below it.
        let bit_4 = _mm256_slli_epi16::<3>(codes);
        let bit_5 = _mm256_slli_epi16::<2>(codes);
        match BITS {
            2..=4 => from(0),
            5 => _mm256_blendv_epi8(from(0), from(1), bit_4),
            _ => {
                let below_32 = _mm256_blendv_epi8(from(0), from(1), bit_4);
                let above_32 = _mm256_blendv_epi8(from(2), from(3), bit_4);
                _mm256_blendv_epi8(below_32, above_32, bit_5)
            }
        }
    }
}

/// The `2 · BITS` bytes of 16 codes that begin at `offset`, in the low bytes of a register; what lies above them is
/// left open. Reads nothing outside the record.
#[inline]
#[target_feature(enable = "avx2")]
fn load_row<const BITS: usize>(record: &[u8], offset: usize) -> __m128i {
    assert!(offset + 2 * BITS <= code_bytes(BITS) && record.len() == record_bytes(BITS));
    // SAFETY: the codes of a row end inside the codes, behind which come four more bytes. So eight bytes are there at
    // up to 4 bits (2 · 2 + 4 of them, or more), and ten at 5 bits. Sixteen are where the condition says so.
    unsafe {
        let from = record.as_ptr().add(offset);
        match BITS {
            2..=4 => _mm_loadl_epi64(from.cast()),
            _ if offset + 16 <= record_bytes(BITS) => _mm_loadu_si128(from.cast()),
            5 => _mm_insert_epi16::<4>(
                _mm_loadl_epi64(from.cast()),
                from.add(8).cast::<i16>().read_unaligned().into(),
            ),
            _ => unreachable!("rows of 12 and 16 bytes have 16 bytes before the end of the record"),
        }
    }
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
