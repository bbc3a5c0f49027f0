//! Sixteen numbers side by side: the few operations that the search over a trellis needs and the compiler does not find by itself, above all a permutation
//! by computed indices.
//!
//! Products are fused with the sum that follows on every CPU, so results do not depend on it. With AVX-512 the operations are pulp's safe wrappers of the
//! instructions; elsewhere [`Plain`] arrays, which are also what the tests compare with.

/// Numbers side by side.
pub(crate) const WIDE: usize = 16;

/// Operations on sixteen numbers.
pub(crate) trait Lanes: Copy {
    /// Sixteen `f32`.
    type Floats: Copy;
    /// Sixteen `u32`.
    type Wholes: Copy;
    /// Sixteen answers.
    type Mask: Copy;

    fn load(self, values: &[f32; WIDE]) -> Self::Floats;
    fn store(self, values: Self::Floats, to: &mut [f32; WIDE]);
    fn splat(self, value: f32) -> Self::Floats;
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn subtract(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn multiply(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a · b + c`, rounded once.
    fn fused(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    fn less(self, a: Self::Floats, b: Self::Floats) -> Self::Mask;
    fn select(self, mask: Self::Mask, then: Self::Floats, other: Self::Floats) -> Self::Floats;
    /// `values[index[i]]`, indices modulo 16.
    fn permute(self, values: Self::Floats, index: Self::Wholes) -> Self::Floats;

    fn load_wholes(self, values: &[u32; WIDE]) -> Self::Wholes;
    fn store_wholes(self, values: Self::Wholes, to: &mut [u32; WIDE]);
    fn splat_wholes(self, value: u32) -> Self::Wholes;
    fn add_wholes(self, a: Self::Wholes, b: Self::Wholes) -> Self::Wholes;
    fn select_wholes(self, mask: Self::Mask, then: Self::Wholes, other: Self::Wholes) -> Self::Wholes;
    fn shift_right<const BITS: u32>(self, values: Self::Wholes) -> Self::Wholes;
}

/// What is to be done with lanes.
pub(crate) trait WithLanes {
    type Output;
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Does it with the widest registers of this CPU.
pub(crate) fn dispatch<O: WithLanes>(op: O) -> O::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V4::try_new() {
        return simd.vectorize(On { op, lanes: simd });
    }
    pulp::Arch::new().dispatch(On { op, lanes: Plain })
}

struct On<O, L> {
    op: O,
    lanes: L,
}

impl<O: WithLanes, L: Lanes> pulp::NullaryFnOnce for On<O, L> {
    type Output = O::Output;

    #[inline(always)]
    fn call(self) -> O::Output {
        self.op.run(self.lanes)
    }
}

/// Arrays.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Lanes for Plain {
    type Floats = [f32; WIDE];
    type Wholes = [u32; WIDE];
    type Mask = [bool; WIDE];

    #[inline(always)]
    fn load(self, values: &[f32; WIDE]) -> [f32; WIDE] {
        *values
    }
    #[inline(always)]
    fn store(self, values: [f32; WIDE], to: &mut [f32; WIDE]) {
        *to = values;
    }
    #[inline(always)]
    fn splat(self, value: f32) -> [f32; WIDE] {
        [value; WIDE]
    }
    #[inline(always)]
    fn add(self, a: [f32; WIDE], b: [f32; WIDE]) -> [f32; WIDE] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn subtract(self, a: [f32; WIDE], b: [f32; WIDE]) -> [f32; WIDE] {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn multiply(self, a: [f32; WIDE], b: [f32; WIDE]) -> [f32; WIDE] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fused(self, a: [f32; WIDE], b: [f32; WIDE], c: [f32; WIDE]) -> [f32; WIDE] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn less(self, a: [f32; WIDE], b: [f32; WIDE]) -> [bool; WIDE] {
        std::array::from_fn(|i| a[i] < b[i])
    }
    #[inline(always)]
    fn select(self, mask: [bool; WIDE], then: [f32; WIDE], other: [f32; WIDE]) -> [f32; WIDE] {
        std::array::from_fn(|i| if mask[i] { then[i] } else { other[i] })
    }
    #[inline(always)]
    fn permute(self, values: [f32; WIDE], index: [u32; WIDE]) -> [f32; WIDE] {
        index.map(|i| values[i as usize % WIDE])
    }
    #[inline(always)]
    fn load_wholes(self, values: &[u32; WIDE]) -> [u32; WIDE] {
        *values
    }
    #[inline(always)]
    fn store_wholes(self, values: [u32; WIDE], to: &mut [u32; WIDE]) {
        *to = values;
    }
    #[inline(always)]
    fn splat_wholes(self, value: u32) -> [u32; WIDE] {
        [value; WIDE]
    }
    #[inline(always)]
    fn add_wholes(self, a: [u32; WIDE], b: [u32; WIDE]) -> [u32; WIDE] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn select_wholes(self, mask: [bool; WIDE], then: [u32; WIDE], other: [u32; WIDE]) -> [u32; WIDE] {
        std::array::from_fn(|i| if mask[i] { then[i] } else { other[i] })
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self, values: [u32; WIDE]) -> [u32; WIDE] {
        values.map(|v| v >> BITS)
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{__m512, __m512i};

    use pulp::x86::V4;

    use super::{Lanes, WIDE};

    impl Lanes for V4 {
        type Floats = __m512;
        type Wholes = __m512i;
        type Mask = u16;

        #[inline(always)]
        fn load(self, values: &[f32; WIDE]) -> __m512 {
            pulp::cast(*values)
        }
        #[inline(always)]
        fn store(self, values: __m512, to: &mut [f32; WIDE]) {
            *to = pulp::cast(values);
        }
        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            self.avx512f._mm512_set1_ps(value)
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            self.avx512f._mm512_add_ps(a, b)
        }
        #[inline(always)]
        fn subtract(self, a: __m512, b: __m512) -> __m512 {
            self.avx512f._mm512_sub_ps(a, b)
        }
        #[inline(always)]
        fn multiply(self, a: __m512, b: __m512) -> __m512 {
            self.avx512f._mm512_mul_ps(a, b)
        }
        #[inline(always)]
        fn fused(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            self.avx512f._mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        fn less(self, a: __m512, b: __m512) -> u16 {
            self.avx512f._mm512_cmplt_ps_mask(a, b)
        }
        #[inline(always)]
        fn select(self, mask: u16, then: __m512, other: __m512) -> __m512 {
            self.avx512f._mm512_mask_blend_ps(mask, other, then)
        }
        #[inline(always)]
        fn permute(self, values: __m512, index: __m512i) -> __m512 {
            self.avx512f._mm512_permutexvar_ps(index, values)
        }
        #[inline(always)]
        fn load_wholes(self, values: &[u32; WIDE]) -> __m512i {
            pulp::cast(*values)
        }
        #[inline(always)]
        fn store_wholes(self, values: __m512i, to: &mut [u32; WIDE]) {
            *to = pulp::cast(values);
        }
        #[inline(always)]
        fn splat_wholes(self, value: u32) -> __m512i {
            self.avx512f._mm512_set1_epi32(value as i32)
        }
        #[inline(always)]
        fn add_wholes(self, a: __m512i, b: __m512i) -> __m512i {
            self.avx512f._mm512_add_epi32(a, b)
        }
        #[inline(always)]
        fn select_wholes(self, mask: u16, then: __m512i, other: __m512i) -> __m512i {
            self.avx512f._mm512_mask_blend_epi32(mask, other, then)
        }
        #[inline(always)]
        fn shift_right<const BITS: u32>(self, values: __m512i) -> __m512i {
            self.avx512f._mm512_srli_epi32::<BITS>(values)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bit of everything.
    struct Everything;

    impl WithLanes for Everything {
        type Output = ([f32; WIDE], [u32; WIDE]);

        fn run<L: Lanes>(self, lanes: L) -> Self::Output {
            let a = lanes.load(&std::array::from_fn(|i| i as f32 * 0.37 - 2.0));
            let b = lanes.load(&std::array::from_fn(|i| (i * i % 7) as f32));
            let index = lanes.load_wholes(&std::array::from_fn(|i| (i * 5) as u32));
            let mask = lanes.less(a, b);
            let mixed = lanes.select(mask, lanes.fused(a, b, lanes.splat(0.1)), lanes.multiply(a, a));
            let moved = lanes.permute(lanes.subtract(lanes.add(mixed, a), b), index);
            let wholes = lanes.select_wholes(mask, lanes.shift_right::<1>(index), lanes.splat_wholes(9));
            let (mut floats, mut counts) = ([0.0; WIDE], [0; WIDE]);
            lanes.store(moved, &mut floats);
            lanes.store_wholes(lanes.add_wholes(wholes, index), &mut counts);
            (floats, counts)
        }
    }

    #[test]
    fn every_instruction_set_gives_what_arrays_give() {
        assert_eq!(dispatch(Everything), Everything.run(Plain));
    }
}
