//! The two loops, once for all instruction sets.
#![expect(unsafe_code, reason = "kernels of instruction sets")]

use std::ops::Range;

use super::{ByteRun, ByteShape, CHUNK, KEY_GROUP, LANES, LINE, POSITIONS, QUAD};
use crate::Isa;

/// Query heads of a kernel.
const HEADS: usize = 4;
/// Registers of columns whose sums grow side by side.
const COLUMNS: usize = 4;

/// Queries of one to four heads; lengths as in [`super::ByteQuery`].
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) high: &'a [i8],
    pub(super) low: &'a [i8],
    /// Of the two digits.
    pub(super) sums: &'a [[i32; 2]],
    pub(super) scales: &'a [f32],
}

/// Weights of one to four heads at the positions of a chunk: digits `[G][CHUNK]`, units `[G]`.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) high: &'a [u8],
    pub(super) low: &'a [u8],
    pub(super) units: &'a [f32],
}

/// Scores of all heads, positions per head, and the first position of a kernel's.
type Scores<'a> = (&'a mut [f32], usize, usize);

/// Heads in parts of at most [`HEADS`], as even as possible.
pub(super) fn parts(heads: usize) -> impl Iterator<Item = Range<usize>> {
    let size = heads.div_ceil(heads.div_ceil(HEADS).max(1));
    (0..heads)
        .step_by(size.max(1))
        .map(move |first| first..(first + size).min(heads))
}

/// Scores of some heads at whole blocks of keys.
pub(super) fn dot(isa: Isa, shape: ByteShape, (queries, keys): (Heads<'_>, ByteRun<'_>), scores: Scores<'_>) {
    let (width, groups) = (shape.width(), shape.groups());
    let heads = queries.high.len() / width;
    let blocks = keys.codes.len() / (POSITIONS * width);
    assert!(
        queries.high.len() == heads * width
            && queries.low.len() == heads * width
            && queries.sums.len() == heads * groups
            && queries.scales.len() == heads * groups
            && keys.codes.len() == blocks * POSITIONS * width
            && keys.scales.len() == blocks * POSITIONS * groups
            && scores.0.len() == heads * scores.1
            && scores.2 + blocks * POSITIONS <= scores.1,
        "lengths of queries, keys and scores"
    );
    let kernel = dot_kernel(isa, heads);
    // SAFETY: `dot_kernel` gives what this CPU has; the lengths were checked.
    unsafe { kernel(shape, (queries, keys), scores) }
}

/// Adds the values of a chunk to the sums of some heads, `out [G, D]`.
pub(super) fn add(
    isa: Isa,
    shape: ByteShape,
    (weights, values): (Weights<'_>, ByteRun<'_>),
    out: &mut [f32],
) {
    let heads = weights.units.len();
    let blocks = values.codes.len() / (POSITIONS * shape.width());
    assert!(
        weights.high.len() == heads * CHUNK
            && weights.low.len() == heads * CHUNK
            && blocks * POSITIONS <= CHUNK
            && values.codes.len() == blocks * POSITIONS * shape.width()
            && out.len() == heads * shape.dim(),
        "lengths of weights, values and sums"
    );
    let kernel = add_kernel(isa, heads);
    // SAFETY: `add_kernel` gives what this CPU has; the lengths were checked.
    unsafe { kernel(shape, (weights, values), out) }
}

/// Sixteen sums of products of bytes in registers.
///
/// # Safety
/// The methods need the instruction set of the type; pointers are to as many values as they say.
pub(super) trait Sums: Copy {
    /// Sixteen floats.
    type Floats: Copy;
    unsafe fn zero() -> Self;
    /// What scores start with, when the bytes of a query sum up to `sum`.
    unsafe fn start(sum: i32) -> Self;
    /// Lane `l` gains `Σ_i (keys[4l + i] − 128)·query[i]`, or that without the 128 where `start` has taken it off before.
    unsafe fn plus_keys(self, keys: *const u8, query: *const i8) -> Self;
    /// Lane `l` gains `Σ_i weights[i]·values[4l + i]`, weights below 128, values signed.
    unsafe fn plus_values(self, weights: *const u8, values: *const u8) -> Self;
    /// `128·self + low`.
    unsafe fn joined(self, low: Self) -> Self;
    unsafe fn no_floats() -> Self::Floats;
    /// `total + f32(self)·(scales[..16]·by)`, every step rounded.
    unsafe fn scaled(self, scales: *const f32, by: f32, total: Self::Floats) -> Self::Floats;
    /// `f32(self)·by`.
    unsafe fn times(self, by: f32) -> Self::Floats;
    unsafe fn store(floats: Self::Floats, to: *mut f32);
    /// Asks for the line at this address, which need not be one that may be read.
    #[inline(always)]
    unsafe fn prefetch(_line: *const u8) {}
}

/// Bytes ahead that one line of each block is asked for: a page, so that the CPU's own prefetching, which ends with a page, goes on in the next.
/// Asking for every line is slower than for none.
const AHEAD: usize = 4096;

/// # Safety
/// The CPU has the instruction set of `S`; the lengths are those that [`dot`] checks, for `G` heads.
#[inline(always)]
pub(super) unsafe fn dot_of<S: Sums, const G: usize>(
    shape: ByteShape,
    (queries, keys): (Heads<'_>, ByteRun<'_>),
    (scores, stride, first): Scores<'_>,
) {
    let (width, groups) = (shape.width(), shape.groups());
    let blocks = keys.codes.chunks_exact(POSITIONS * width);
    let scales = keys.scales.chunks_exact(POSITIONS * groups);
    for (block, (codes, scales)) in blocks.zip(scales).enumerate() {
        // SAFETY: a block has `width / 4` lines of keys and `groups` times sixteen scales, a head `width` bytes; the instruction set is
        // the caller's promise.
        unsafe {
            S::prefetch(codes.as_ptr().wrapping_add(AHEAD));
            let mut totals = [S::no_floats(); G];
            for group in 0..groups {
                let start = |g: usize| queries.sums[g * groups + group].map(|sum| S::start(sum));
                let mut sums: [[S; 2]; G] = std::array::from_fn(start);
                for quad in group * (KEY_GROUP / QUAD)..((group + 1) * (KEY_GROUP / QUAD)).min(width / QUAD) {
                    let line = codes.as_ptr().add(quad * LINE);
                    for (g, [high, low]) in sums.iter_mut().enumerate() {
                        let at = g * width + quad * QUAD;
                        *high = high.plus_keys(line, queries.high.as_ptr().add(at));
                        *low = low.plus_keys(line, queries.low.as_ptr().add(at));
                    }
                }
                let scales = scales.as_ptr().add(group * POSITIONS);
                for (g, total) in totals.iter_mut().enumerate() {
                    let [high, low] = sums[g];
                    *total = high
                        .joined(low)
                        .scaled(scales, queries.scales[g * groups + group], *total);
                }
            }
            for (g, total) in totals.into_iter().enumerate() {
                let scores = &mut scores[g * stride + first + block * POSITIONS..][..POSITIONS];
                S::store(total, scores.as_mut_ptr());
            }
        }
    }
}

/// # Safety
/// The CPU has the instruction set of `S`; the lengths are those that [`add`] checks, for `G` heads.
#[inline(always)]
pub(super) unsafe fn add_of<S: Sums, const G: usize>(
    shape: ByteShape,
    (weights, values): (Weights<'_>, ByteRun<'_>),
    out: &mut [f32],
) {
    let width = shape.width();
    let wide = width - width % (COLUMNS * LANES);
    // SAFETY: passed on; the columns are inside of the padded width.
    unsafe {
        for at in (0..wide).step_by(COLUMNS * LANES) {
            add_columns::<S, G, COLUMNS>(shape, (weights, values), at, out);
        }
        for at in (wide..width).step_by(LANES) {
            add_columns::<S, G, 1>(shape, (weights, values), at, out);
        }
    }
}

/// [`add_of`] for the columns of `C` registers from `at` on.
///
/// # Safety
/// As [`add_of`]; the columns are inside of the padded width.
#[inline(always)]
unsafe fn add_columns<S: Sums, const G: usize, const C: usize>(
    shape: ByteShape,
    (weights, values): (Weights<'_>, ByteRun<'_>),
    at: usize,
    out: &mut [f32],
) {
    // SAFETY: a quad of positions has `width / 16` lines of values, of which `C` from `at` on are read, and four digits of each head.
    unsafe {
        let mut sums = [[[S::zero(); C]; 2]; G];
        for (quad, codes) in values.codes.chunks_exact(QUAD * shape.width()).enumerate() {
            let line = codes.as_ptr().add(QUAD * at);
            if quad.is_multiple_of(POSITIONS / QUAD) {
                S::prefetch(line.wrapping_add(AHEAD));
            }
            for (g, sums) in sums.iter_mut().enumerate() {
                let digit = g * CHUNK + quad * QUAD;
                for (sums, digits) in sums.iter_mut().zip([weights.high, weights.low]) {
                    for (c, sum) in sums.iter_mut().enumerate() {
                        *sum = sum.plus_values(digits.as_ptr().add(digit), line.add(c * LINE));
                    }
                }
            }
        }
        let rows = out.chunks_exact_mut(shape.dim()).zip(weights.units);
        for ((out, &unit), [high, low]) in rows.zip(sums) {
            for c in 0..C {
                let mut columns = [0.0f32; LANES];
                S::store(high[c].joined(low[c]).times(unit), columns.as_mut_ptr());
                // The last register may reach beyond the last column.
                let out = out[at.min(shape.dim())..].iter_mut().skip(c * LANES);
                out.zip(columns).for_each(|(out, column)| *out += column);
            }
        }
    }
}

/// # Safety
/// As [`dot_of`].
type Dot = unsafe fn(ByteShape, (Heads<'_>, ByteRun<'_>), Scores<'_>);
/// # Safety
/// As [`add_of`].
type Add = unsafe fn(ByteShape, (Weights<'_>, ByteRun<'_>), &mut [f32]);

/// The two kernels of an instruction set, for one to four heads.
macro_rules! kernels {
    ($(#[$feature:meta])* $sums:ident, $dot:ident, $add:ident) => {
        /// # Safety
        /// As [`dot_of`](crate::byte_rows::kernels::dot_of).
        $(#[$feature])*
        pub(super) unsafe fn $dot<const G: usize>(
            shape: $crate::byte_rows::ByteShape,
            inputs: ($crate::byte_rows::kernels::Heads<'_>, $crate::byte_rows::ByteRun<'_>),
            scores: (&mut [f32], usize, usize),
        ) {
            // SAFETY: passed on.
            unsafe { $crate::byte_rows::kernels::dot_of::<$sums, G>(shape, inputs, scores) }
        }
        /// # Safety
        /// As [`add_of`](crate::byte_rows::kernels::add_of).
        $(#[$feature])*
        pub(super) unsafe fn $add<const G: usize>(
            shape: $crate::byte_rows::ByteShape,
            inputs: ($crate::byte_rows::kernels::Weights<'_>, $crate::byte_rows::ByteRun<'_>),
            out: &mut [f32],
        ) {
            // SAFETY: passed on.
            unsafe { $crate::byte_rows::kernels::add_of::<$sums, G>(shape, inputs, out) }
        }
    };
}
pub(super) use kernels;

macro_rules! for_heads {
    ($kernel:path, $heads:expr) => {{
        use $kernel as kernel;
        match $heads {
            1 => kernel::<1>,
            2 => kernel::<2>,
            3 => kernel::<3>,
            _ => kernel::<HEADS>,
        }
    }};
}

fn dot_kernel(isa: Isa, heads: usize) -> Dot {
    assert!(isa.is_available(), "this CPU lacks {}", isa.name());
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => for_heads!(super::x86::dot_avx512, heads),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Vnni => for_heads!(super::x86::dot_avx2, heads),
        _ => for_heads!(dot_portable, heads),
    }
}

fn add_kernel(isa: Isa, heads: usize) -> Add {
    assert!(isa.is_available(), "this CPU lacks {}", isa.name());
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => for_heads!(super::x86::add_avx512, heads),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Vnni => for_heads!(super::x86::add_avx2, heads),
        _ => for_heads!(add_portable, heads),
    }
}

type Portable = [i32; LANES];
kernels!(Portable, dot_portable, add_portable);

impl Sums for Portable {
    type Floats = [f32; LANES];
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn start(_: i32) -> Self {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn plus_keys(self, keys: *const u8, query: *const i8) -> Self {
        // SAFETY: a line of keys and four bytes of a query, says the trait.
        let (keys, query) = unsafe {
            (
                keys.cast::<[[u8; QUAD]; LANES]>().read_unaligned(),
                query.cast::<[i8; QUAD]>().read_unaligned(),
            )
        };
        std::array::from_fn(|lane| {
            let products = keys[lane].iter().zip(query);
            self[lane]
                + products
                    .map(|(k, q)| (i32::from(*k) - 128) * i32::from(q))
                    .sum::<i32>()
        })
    }
    #[inline(always)]
    unsafe fn plus_values(self, weights: *const u8, values: *const u8) -> Self {
        // SAFETY: four digits and a line of values, says the trait.
        let (weights, values) = unsafe {
            (
                weights.cast::<[u8; QUAD]>().read_unaligned(),
                values.cast::<[[i8; QUAD]; LANES]>().read_unaligned(),
            )
        };
        std::array::from_fn(|lane| {
            let products = values[lane].iter().zip(weights);
            self[lane] + products.map(|(v, w)| i32::from(*v) * i32::from(w)).sum::<i32>()
        })
    }
    #[inline(always)]
    unsafe fn joined(self, low: Self) -> Self {
        std::array::from_fn(|lane| 128 * self[lane] + low[lane])
    }
    #[inline(always)]
    unsafe fn no_floats() -> [f32; LANES] {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn scaled(self, scales: *const f32, by: f32, total: [f32; LANES]) -> [f32; LANES] {
        // SAFETY: sixteen scales, says the trait.
        let scales = unsafe { scales.cast::<[f32; LANES]>().read_unaligned() };
        std::array::from_fn(|lane| total[lane] + self[lane] as f32 * (scales[lane] * by))
    }
    #[inline(always)]
    unsafe fn times(self, by: f32) -> [f32; LANES] {
        self.map(|sum| sum as f32 * by)
    }
    #[inline(always)]
    unsafe fn store(floats: [f32; LANES], to: *mut f32) {
        // SAFETY: sixteen values, says the trait.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(floats) }
    }
}
