//! Sums of products of bytes with AVX-512 VNNI and with AVX2.
#![expect(unsafe_code, reason = "kernels of instruction sets")]

use std::arch::x86_64::*;

use super::kernels::{Sums, kernels};

kernels!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    __m512i,
    dot_avx512,
    add_avx512
);
kernels!(
    #[target_feature(enable = "avx2")]
    Pair,
    dot_avx2,
    add_avx2
);

/// Four bytes in every lane.
///
/// # Safety
/// Four bytes can be read.
#[inline(always)]
unsafe fn quad(from: *const u8) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<i32>().read_unaligned() }
}

impl Sums for __m512i {
    type Floats = __m512;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the instruction set is the caller's promise, here and below; pointers are to as many values as the trait says.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn start(sum: i32) -> Self {
        // SAFETY: see `zero`.
        unsafe { _mm512_set1_epi32(-128 * sum) }
    }
    #[inline(always)]
    unsafe fn plus_keys(self, keys: *const u8, query: *const i8) -> Self {
        // SAFETY: see `zero`.
        unsafe {
            let keys = _mm512_loadu_si512(keys.cast());
            _mm512_dpbusd_epi32(self, keys, _mm512_set1_epi32(quad(query.cast())))
        }
    }
    #[inline(always)]
    unsafe fn plus_values(self, weights: *const u8, values: *const u8) -> Self {
        // SAFETY: see `zero`.
        unsafe {
            let values = _mm512_loadu_si512(values.cast());
            _mm512_dpbusd_epi32(self, _mm512_set1_epi32(quad(weights)), values)
        }
    }
    #[inline(always)]
    unsafe fn joined(self, low: Self) -> Self {
        // SAFETY: see `zero`.
        unsafe { _mm512_add_epi32(_mm512_slli_epi32::<7>(self), low) }
    }
    #[inline(always)]
    unsafe fn no_floats() -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn scaled(self, scales: *const f32, by: f32, total: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe {
            let scales = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(by));
            _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(self), scales))
        }
    }
    #[inline(always)]
    unsafe fn times(self, by: f32) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_mul_ps(_mm512_cvtepi32_ps(self), _mm512_set1_ps(by)) }
    }
    #[inline(always)]
    unsafe fn store(floats: __m512, to: *mut f32) {
        // SAFETY: see `zero`.
        unsafe { _mm512_storeu_ps(to, floats) }
    }
    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

/// Sixteen sums in two registers.
#[derive(Clone, Copy)]
pub(super) struct Pair([__m256i; 2]);

impl Pair {
    /// Adds the sums of four products each; the magnitudes of two products together are below 2¹⁵.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[inline(always)]
    unsafe fn plus(self, unsigned: [__m256i; 2], signed: [__m256i; 2]) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let products = |i: usize| _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned[i], signed[i]), ones);
            Self([
                _mm256_add_epi32(self.0[0], products(0)),
                _mm256_add_epi32(self.0[1], products(1)),
            ])
        }
    }
}

/// A line in two registers.
///
/// # Safety
/// The CPU has AVX2; 64 bytes can be read.
#[inline(always)]
unsafe fn line(from: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm256_loadu_si256(from.cast()),
            _mm256_loadu_si256(from.add(32).cast()),
        ]
    }
}

impl Sums for Pair {
    type Floats = [__m256; 2];
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the instruction set is the caller's promise, here and below; pointers are to as many values as the trait says.
        unsafe { Self([_mm256_setzero_si256(); 2]) }
    }
    #[inline(always)]
    unsafe fn start(_: i32) -> Self {
        // SAFETY: see `zero`.
        unsafe { Self::zero() }
    }
    #[inline(always)]
    unsafe fn plus_keys(self, keys: *const u8, query: *const i8) -> Self {
        // SAFETY: see `zero`.
        unsafe {
            let query = _mm256_set1_epi32(quad(query.cast()));
            // Two unsigned bytes of 255 times 127 would not fit into 16 bits: the signs go to the query.
            let ([a, b], offset) = (line(keys), _mm256_set1_epi8(-128));
            let (a, b) = (_mm256_xor_si256(a, offset), _mm256_xor_si256(b, offset));
            self.plus(
                [_mm256_abs_epi8(a), _mm256_abs_epi8(b)],
                [_mm256_sign_epi8(query, a), _mm256_sign_epi8(query, b)],
            )
        }
    }
    #[inline(always)]
    unsafe fn plus_values(self, weights: *const u8, values: *const u8) -> Self {
        // SAFETY: see `zero`.
        unsafe { self.plus([_mm256_set1_epi32(quad(weights)); 2], line(values)) }
    }
    #[inline(always)]
    unsafe fn joined(self, low: Self) -> Self {
        // SAFETY: see `zero`.
        unsafe {
            Self([
                _mm256_add_epi32(_mm256_slli_epi32::<7>(self.0[0]), low.0[0]),
                _mm256_add_epi32(_mm256_slli_epi32::<7>(self.0[1]), low.0[1]),
            ])
        }
    }
    #[inline(always)]
    unsafe fn no_floats() -> [__m256; 2] {
        // SAFETY: see `zero`.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn scaled(self, scales: *const f32, by: f32, total: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see `zero`.
        unsafe {
            let add = |i: usize| {
                let scales = _mm256_mul_ps(_mm256_loadu_ps(scales.add(8 * i)), _mm256_set1_ps(by));
                _mm256_add_ps(total[i], _mm256_mul_ps(_mm256_cvtepi32_ps(self.0[i]), scales))
            };
            [add(0), add(1)]
        }
    }
    #[inline(always)]
    unsafe fn times(self, by: f32) -> [__m256; 2] {
        // SAFETY: see `zero`.
        unsafe {
            let times = |i: usize| _mm256_mul_ps(_mm256_cvtepi32_ps(self.0[i]), _mm256_set1_ps(by));
            [times(0), times(1)]
        }
    }
    #[inline(always)]
    unsafe fn store(floats: [__m256; 2], to: *mut f32) {
        // SAFETY: see `zero`.
        unsafe {
            _mm256_storeu_ps(to, floats[0]);
            _mm256_storeu_ps(to.add(8), floats[1]);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}
