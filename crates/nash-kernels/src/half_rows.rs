//! Products with rows in half precision, as attention needs them for one token: keys and values are read from the cache once,
//! for all query heads that share them, and never become a float copy.
//!
//! `P` positions, `D` head dimension, `G` query heads. Sixteen lanes are summed side by side, each in order, then joined in a fixed
//! tree; a product and the sum it goes into are rounded once (fused). So all instruction sets give the same bits, as everywhere in this crate.
#![expect(unsafe_code, reason = "kernels of instruction sets")]

use half::f16;

use crate::Isa;

/// Values side by side.
const LANES: usize = 16;
/// Query heads that share one pass over the rows.
const HEADS: usize = 4;

/// `scores [G, P] = scale · q [G, D] · rows [P, D]ᵀ`.
///
/// # Panics
/// If a length is not what `dim` asks for.
pub fn dot_rows(q: &[f32], rows: &[f16], dim: usize, scale: f32, scores: &mut [f32]) {
    dot_rows_with(Isa::active(), q, rows, dim, scale, scores);
}

/// `out [G, D] += weights [G, P] · rows [P, D]`.
///
/// # Panics
/// If a length is not what `dim` asks for.
pub fn add_rows(weights: &[f32], rows: &[f16], dim: usize, out: &mut [f32]) {
    add_rows_with(Isa::active(), weights, rows, dim, out);
}

fn dot_rows_with(isa: Isa, q: &[f32], rows: &[f16], dim: usize, scale: f32, scores: &mut [f32]) {
    let positions = check(rows, dim, q.len(), scores.len());
    let heads = q
        .chunks(HEADS * dim)
        .zip(scores.chunks_mut((HEADS * positions).max(1)));
    for (q, scores) in heads {
        let kernel = dot_kernel(isa, q.len() / dim);
        // SAFETY: `dot_kernel` gives what this CPU has, and `check` made the lengths agree.
        unsafe { kernel(q, rows, dim, scores) }
        scores.iter_mut().for_each(|score| *score *= scale);
    }
}

fn add_rows_with(isa: Isa, weights: &[f32], rows: &[f16], dim: usize, out: &mut [f32]) {
    let positions = check(rows, dim, out.len(), weights.len());
    let heads = out
        .chunks_mut(HEADS * dim)
        .zip(weights.chunks((HEADS * positions).max(1)));
    for (out, weights) in heads {
        let kernel = add_kernel(isa, out.len() / dim);
        // SAFETY: as above.
        unsafe { kernel(weights, rows, dim, out) }
    }
}

/// The number of rows, when `per_head [G, D]` and `per_position [G, P]` fit.
fn check(rows: &[f16], dim: usize, per_head: usize, per_position: usize) -> usize {
    assert!(dim > 0 && rows.len().is_multiple_of(dim), "rows of {dim}");
    assert!(per_head.is_multiple_of(dim), "heads of {dim}");
    let positions = rows.len() / dim;
    assert_eq!(per_head / dim * positions, per_position, "heads by positions");
    positions
}

/// Sixteen floats in registers.
///
/// # Safety
/// The methods need the instruction set of the type; pointers are to sixteen values.
trait Floats: Copy {
    unsafe fn zero() -> Self;
    unsafe fn of_half(from: *const f16) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn splat(value: f32) -> Self;
    /// `self + a·b`, rounded once.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// The sums of four, each of its lanes in the tree of [`sum`].
    #[inline(always)]
    unsafe fn sums(four: [Self; 4]) -> [f32; 4] {
        four.map(|lanes| {
            let mut array = [0.0; LANES];
            // SAFETY: the array has sixteen values.
            unsafe { lanes.store(array.as_mut_ptr()) }
            sum(array)
        })
    }
}

/// Rows whose lanes are joined together.
const ROWS: usize = 4;

/// The lanes in a fixed tree.
#[inline(always)]
fn sum(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// The values of `from`, at most sixteen, and zeros after them.
#[inline(always)]
fn padded<T: Copy>(from: &[T], zero: T) -> [T; LANES] {
    let mut all = [zero; LANES];
    all[..from.len()].copy_from_slice(from);
    all
}

/// # Safety
/// The CPU has the instruction set of `F`; `q [G, D]`, `scores [G, P]` for `rows [P, D]`.
#[inline(always)]
unsafe fn dot_of<F: Floats, const G: usize>(q: &[f32], rows: &[f16], dim: usize, scores: &mut [f32]) {
    let positions = rows.len() / dim;
    for first in (0..positions).step_by(ROWS) {
        let count = ROWS.min(positions - first);
        // SAFETY: passed on; the instruction set is the caller's promise.
        unsafe {
            let mut sums = [[F::zero(); ROWS]; G];
            for r in 0..count {
                let row = &rows[(first + r) * dim..][..dim];
                let products = products::<F, G>(q, row);
                for (sums, product) in sums.iter_mut().zip(products) {
                    sums[r] = product;
                }
            }
            for (g, sums) in sums.into_iter().enumerate() {
                let sums = F::sums(sums);
                scores[g * positions + first..][..count].copy_from_slice(&sums[..count]);
            }
        }
    }
}

/// Lane by lane the products of a row with `G` heads of `q`.
///
/// # Safety
/// The CPU has the instruction set of `F`; `q` has `G` times the length of `row`.
#[inline(always)]
unsafe fn products<F: Floats, const G: usize>(q: &[f32], row: &[f16]) -> [F; G] {
    let dim = row.len();
    let whole = dim - dim % LANES;
    // SAFETY: chunks of sixteen lie inside of `row` and of each head of `q`, the rest is padded to sixteen.
    unsafe {
        let mut sums = [F::zero(); G];
        for at in (0..whole).step_by(LANES) {
            let k = F::of_half(row.as_ptr().add(at));
            for (g, sum) in sums.iter_mut().enumerate() {
                *sum = sum.plus_product(k, F::load(q.as_ptr().add(g * dim + at)));
            }
        }
        if whole < dim {
            let k = F::of_half(padded(&row[whole..], f16::ZERO).as_ptr());
            for (g, sum) in sums.iter_mut().enumerate() {
                let q = padded(&q[g * dim + whole..(g + 1) * dim], 0.0);
                *sum = sum.plus_product(k, F::load(q.as_ptr()));
            }
        }
        sums
    }
}

/// # Safety
/// The CPU has the instruction set of `F`; `weights [G, P]`, `out [G, D]` for `rows [P, D]`.
#[inline(always)]
unsafe fn add_of<F: Floats, const G: usize>(weights: &[f32], rows: &[f16], dim: usize, out: &mut [f32]) {
    let wide = dim - dim % (CHUNKS * LANES);
    // SAFETY: passed on.
    unsafe {
        for at in (0..wide).step_by(CHUNKS * LANES) {
            add_columns::<F, G, CHUNKS>(weights, rows, (dim, at), out);
        }
        for at in (wide..dim).step_by(LANES) {
            add_columns::<F, G, 1>(weights, rows, (dim, at), out);
        }
    }
}

/// Chunks of columns that are summed side by side: whole lines of the cache, read one after the other.
const CHUNKS: usize = 4;

/// [`add_of`] for the columns of `C` chunks from `at` on; a single chunk may reach beyond the last column.
///
/// # Safety
/// As [`add_of`]; several chunks lie inside of a row.
#[inline(always)]
unsafe fn add_columns<F: Floats, const G: usize, const C: usize>(
    weights: &[f32],
    rows: &[f16],
    (dim, at): (usize, usize),
    out: &mut [f32],
) {
    let positions = rows.len() / dim;
    let width = (C * LANES).min(dim - at);
    let mut buffer = [[[0.0f32; LANES]; C]; G];
    for (buffer, out) in buffer.iter_mut().zip(out.chunks_exact(dim)) {
        buffer.as_flattened_mut()[..width].copy_from_slice(&out[at..][..width]);
    }
    // SAFETY: the instruction set is the caller's promise; sixteen values are read where there are sixteen, else from padded copies.
    unsafe {
        let mut sums: [[F; C]; G] =
            std::array::from_fn(|g| std::array::from_fn(|c| F::load(buffer[g][c].as_ptr())));
        for (p, row) in rows.chunks_exact(dim).enumerate() {
            let values: [F; C] = if width == C * LANES {
                std::array::from_fn(|c| F::of_half(row.as_ptr().add(at + c * LANES)))
            } else {
                [F::of_half(padded(&row[at..], f16::ZERO).as_ptr()); C]
            };
            for (g, sums) in sums.iter_mut().enumerate() {
                let weight = F::splat(weights[g * positions + p]);
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = sum.plus_product(weight, value);
                }
            }
        }
        for (sums, buffer) in sums.into_iter().zip(&mut buffer) {
            for (sum, buffer) in sums.into_iter().zip(buffer) {
                sum.store(buffer.as_mut_ptr());
            }
        }
    }
    for (buffer, out) in buffer.iter().zip(out.chunks_exact_mut(dim)) {
        out[at..][..width].copy_from_slice(&buffer.as_flattened()[..width]);
    }
}

/// # Safety
/// As [`dot_of`].
type Dot = unsafe fn(&[f32], &[f16], usize, &mut [f32]);
/// # Safety
/// As [`add_of`].
type Add = unsafe fn(&[f32], &[f16], usize, &mut [f32]);

/// The two kernels of an instruction set, for one to four heads.
macro_rules! kernels {
    ($(#[$feature:meta])* $vis:vis $floats:ident, $dot:ident, $add:ident) => {
        /// # Safety
        /// As [`dot_of`].
        $(#[$feature])*
        $vis unsafe fn $dot<const G: usize>(q: &[f32], rows: &[f16], dim: usize, scores: &mut [f32]) {
            // SAFETY: passed on.
            unsafe { dot_of::<$floats, G>(q, rows, dim, scores) }
        }
        /// # Safety
        /// As [`add_of`].
        $(#[$feature])*
        $vis unsafe fn $add<const G: usize>(weights: &[f32], rows: &[f16], dim: usize, out: &mut [f32]) {
            // SAFETY: passed on.
            unsafe { add_of::<$floats, G>(weights, rows, dim, out) }
        }
    };
}

macro_rules! for_heads {
    ($kernel:ident, $heads:expr) => {
        match $heads {
            1 => $kernel::<1>,
            2 => $kernel::<2>,
            3 => $kernel::<3>,
            _ => $kernel::<HEADS>,
        }
    };
}

fn dot_kernel(isa: Isa, heads: usize) -> Dot {
    match usable(isa) {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => for_heads!(dot_avx512, heads),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => for_heads!(dot_avx2, heads),
        _ => for_heads!(dot_portable, heads),
    }
}

fn add_kernel(isa: Isa, heads: usize) -> Add {
    match usable(isa) {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => for_heads!(add_avx512, heads),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => for_heads!(add_avx2, heads),
        _ => for_heads!(add_portable, heads),
    }
}

/// What of an instruction set can be used here: beside AVX2 it takes FMA and F16C, which all but emulated CPUs have with it.
fn usable(isa: Isa) -> Isa {
    assert!(isa.is_available(), "this CPU lacks {}", isa.name());
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx2 | Isa::Vnni) {
        let both = std::arch::is_x86_feature_detected!("f16c") && std::arch::is_x86_feature_detected!("fma");
        return if both { Isa::Avx2 } else { Isa::Portable };
    }
    isa
}

impl Floats for [f32; LANES] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn of_half(from: *const f16) -> Self {
        // SAFETY: sixteen values, says the trait.
        std::array::from_fn(|i| unsafe { crate::layout::float(*from.add(i)) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: sixteen values, says the trait.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| a[i].mul_add(b[i], self[i]))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: sixteen values, says the trait.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
}

type Portable = [f32; LANES];
kernels!(Portable, dot_portable, add_portable);

#[cfg(target_arch = "x86_64")]
use x86::{add_avx2, add_avx512, dot_avx2, dot_avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{Floats, add_of, dot_of};

    impl Floats for __m512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the instruction set is the caller's promise, here and below; pointers are to sixteen values.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn of_half(from: *const f16) -> Self {
            // SAFETY: see `zero`.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see `zero`.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: see `zero`.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see `zero`.
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see `zero`.
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            // SAFETY: see `zero`; four floats are written to an array of four.
            unsafe {
                // The upper half of each onto its lower, two vectors in one register, then all four in one.
                let fold = |a, b| {
                    let (low, high) = (
                        _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                        _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
                    );
                    _mm512_add_ps(low, high)
                };
                let (ab, cd) = (fold(a, b), fold(c, d));
                let (low, high) = (
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd),
                );
                let quads = _mm512_add_ps(low, high);
                let pairs = _mm512_add_ps(quads, _mm512_permute_ps::<0b01_00_11_10>(quads));
                let sums = _mm512_add_ps(pairs, _mm512_permute_ps::<0b10_11_00_01>(pairs));
                let of_rows = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
                let mut four = [0.0; 4];
                let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(of_rows, sums));
                _mm_storeu_ps(four.as_mut_ptr(), sums);
                four
            }
        }
    }

    /// Sixteen floats in two registers.
    #[derive(Clone, Copy)]
    pub(super) struct Pair([__m256; 2]);

    impl Floats for Pair {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the instruction set is the caller's promise, here and below; pointers are to sixteen values.
            unsafe { Pair([_mm256_setzero_ps(); 2]) }
        }
        #[inline(always)]
        unsafe fn of_half(from: *const f16) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                let halves = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast())];
                Pair([_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])])
            }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see `zero`.
            unsafe { Pair([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: see `zero`.
            unsafe { Pair([_mm256_set1_ps(value); 2]) }
        }
        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                Pair([
                    _mm256_fmadd_ps(a.0[0], b.0[0], self.0[0]),
                    _mm256_fmadd_ps(a.0[1], b.0[1], self.0[1]),
                ])
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see `zero`.
            unsafe {
                _mm256_storeu_ps(to, self.0[0]);
                _mm256_storeu_ps(to.add(8), self.0[1]);
            }
        }
    }

    kernels!(#[target_feature(enable = "avx512f")] pub(super) __m512, dot_avx512, add_avx512);
    kernels!(#[target_feature(enable = "avx2,fma,f16c")] pub(super) Pair, dot_avx2, add_avx2);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let value = |i: usize| ((i as u32 + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) >> 8;
        (0..count).map(|i| value(i) as f32 / 8_388_608.0 - 1.0).collect()
    }

    fn halves(count: usize, seed: u32) -> Vec<f16> {
        noise(count, seed).into_iter().map(f16::from_f32).collect()
    }

    proptest! {
        #[test]
        fn products_are_right_and_the_same_everywhere(
            heads in 1usize..10, positions in 0usize..40, dim in 1usize..100, seed in 0u32..100
        ) {
            let (q, rows) = (noise(heads * dim, seed), halves(positions * dim, seed + 1));
            let mut expected = vec![0.0; heads * positions];
            dot_rows_with(Isa::Portable, &q, &rows, dim, 0.5, &mut expected);
            for (i, score) in expected.iter().enumerate() {
                let (g, p) = (i / positions, i % positions);
                let exact: f64 = (0..dim)
                    .map(|j| f64::from(q[g * dim + j]) * f64::from(rows[p * dim + j].to_f32()))
                    .sum();
                // Terms of at most 1, summed in ⌈dim/16⌉ + 4 rounded steps, then scaled.
                prop_assert!((f64::from(*score) - 0.5 * exact).abs() <= 2f64.powi(-24) * (dim * (dim / 16 + 8)) as f64);
            }
            let weights = noise(heads * positions, seed + 2);
            let mut sums = noise(heads * dim, seed + 3);
            let start = sums.clone();
            add_rows_with(Isa::Portable, &weights, &rows, dim, &mut sums);
            for (i, sum) in sums.iter().enumerate() {
                let (g, j) = (i / dim, i % dim);
                let exact: f64 = (0..positions)
                    .map(|p| f64::from(weights[g * positions + p]) * f64::from(rows[p * dim + j].to_f32()))
                    .sum();
                let error = (f64::from(*sum) - f64::from(start[i]) - exact).abs();
                prop_assert!(error <= 2f64.powi(-24) * ((positions + 1) * (positions + 2)) as f64);
            }
            for isa in Isa::available() {
                let (mut scores, mut other) = (vec![0.0; expected.len()], start.clone());
                dot_rows_with(isa, &q, &rows, dim, 0.5, &mut scores);
                add_rows_with(isa, &weights, &rows, dim, &mut other);
                prop_assert_eq!(&scores, &expected, "{}", isa.name());
                prop_assert_eq!(&other, &sums, "{}", isa.name());
            }
        }
    }

    #[test]
    fn every_half_becomes_the_float_it_is() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            let (float, known) = (crate::layout::float(half), half.to_f32());
            assert!(
                float.to_bits() == known.to_bits() || float.is_nan() && known.is_nan(),
                "{bits:#x}"
            );
        }
    }
}
