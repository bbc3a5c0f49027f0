//! From stored elements to `f32`, block by block.
//!
//! One small function per format, each from `[u8; block_bytes]` to `[f32; block_len]`, written so that the compiler
//! vectorises it; [`decode`] runs them compiled for the best instruction set of the machine. The arithmetic (order and
//! rounding of every operation) is that of ggml's `dequantize_row_*`, so the results are bit-identical to ggml's and
//! do not depend on the instruction set: no operation is fused or reordered.
//!
//! Nothing here can fail: the caller has checked that the lengths fit. Any bytes are valid; a NaN scale gives NaNs.

mod grids;
mod k_quants;
mod lattice;
mod legacy;
mod ternary;

use pulp::NullaryFnOnce;

use crate::DType;
pub use legacy::decode_mxfp4_pairs;

/// Decodes whole blocks: `out.len()` elements from `DType::bytes(out.len())` bytes. Surplus on either side is ignored.
pub(crate) fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(dtype.bytes(out.len()), Some(bytes.len()));
    pulp::Arch::new().dispatch(Decode { dtype, bytes, out });
}

struct Decode<'a> {
    dtype: DType,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl NullaryFnOnce for Decode<'_> {
    type Output = ();

    // Inlined into a function compiled for the detected instruction set; so is everything marked `inline(always)` below.
    #[inline(always)]
    fn call(self) {
        let Self { dtype, bytes, out } = self;
        match dtype {
            DType::F32 => numbers(bytes, out, f32::from_le_bytes),
            DType::F16 => numbers(bytes, out, |b| f16_to_f32(u16::from_le_bytes(b))),
            DType::BF16 => numbers(bytes, out, |b| {
                f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
            }),
            DType::F64 => numbers(bytes, out, |b| f64::from_le_bytes(b) as f32),
            DType::F8E4M3 => numbers(bytes, out, |[b]| E4M3[usize::from(b)]),
            DType::F8E5M2 => numbers(bytes, out, |[b]| f16_to_f32(u16::from(b) << 8)),
            DType::I8 => numbers(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
            DType::I16 => numbers(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
            DType::I32 => numbers(bytes, out, |b| i32::from_le_bytes(b) as f32),
            DType::I64 => numbers(bytes, out, |b| i64::from_le_bytes(b) as f32),
            DType::U8 => numbers(bytes, out, |[b]| f32::from(b)),
            DType::U16 => numbers(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
            DType::U32 => numbers(bytes, out, |b| u32::from_le_bytes(b) as f32),
            DType::U64 => numbers(bytes, out, |b| u64::from_le_bytes(b) as f32),
            DType::Bool => numbers(bytes, out, |[b]| f32::from(u8::from(b != 0))),
            DType::Q4_0 => blocks(bytes, out, legacy::q4_0),
            DType::Q4_1 => blocks(bytes, out, legacy::q4_1),
            DType::Q5_0 => blocks(bytes, out, legacy::q5_0),
            DType::Q5_1 => blocks(bytes, out, legacy::q5_1),
            DType::Q8_0 => blocks(bytes, out, legacy::q8_0),
            DType::Q8_1 => blocks(bytes, out, legacy::q8_1),
            DType::IQ4NL => blocks(bytes, out, legacy::iq4_nl),
            DType::IQ4XS => blocks(bytes, out, legacy::iq4_xs),
            DType::MXFP4 => blocks(bytes, out, legacy::mxfp4),
            DType::NVFP4 => blocks(bytes, out, legacy::nvfp4),
            DType::Q2K => blocks(bytes, out, k_quants::q2_k),
            DType::Q3K => blocks(bytes, out, k_quants::q3_k),
            DType::Q4K => blocks(bytes, out, k_quants::q4_k),
            DType::Q5K => blocks(bytes, out, k_quants::q5_k),
            DType::Q6K => blocks(bytes, out, k_quants::q6_k),
            DType::Q8K => blocks(bytes, out, k_quants::q8_k),
            DType::IQ1S => blocks(bytes, out, lattice::iq1_s),
            DType::IQ1M => blocks(bytes, out, lattice::iq1_m),
            DType::IQ2XXS => blocks(bytes, out, lattice::iq2_xxs),
            DType::IQ2XS => blocks(bytes, out, lattice::iq2_xs),
            DType::IQ2S => blocks(bytes, out, lattice::iq2_s),
            DType::IQ3XXS => blocks(bytes, out, lattice::iq3_xxs),
            DType::IQ3S => blocks(bytes, out, lattice::iq3_s),
            DType::TQ1_0 => blocks(bytes, out, ternary::tq1_0),
            DType::TQ2_0 => blocks(bytes, out, ternary::tq2_0),
        }
    }
}

#[inline(always)]
fn numbers<const B: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; B]) -> f32) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<B>().0) {
        *value = number(*bytes);
    }
}

#[inline(always)]
fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (values, bytes) in out
        .as_chunks_mut::<N>()
        .0
        .iter_mut()
        .zip(bytes.as_chunks::<B>().0)
    {
        block(bytes, values);
    }
}

/// `N` bytes from byte `at`.
#[inline(always)]
fn bytes_at<const B: usize, const N: usize>(block: &[u8; B], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}

/// The little-endian `u16` at byte `at`.
#[inline(always)]
fn u16_at<const B: usize>(block: &[u8; B], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// The little-endian `u32` at byte `at`.
#[inline(always)]
fn u32_at<const B: usize>(block: &[u8; B], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The binary16 at byte `at`.
#[inline(always)]
fn f16_at<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    f16_to_f32(u16_at(block, at))
}

/// Exact conversion without branches or CPU features, so that it vectorises everywhere: the exponent is rebiased by a
/// multiplication with 2^112, which also normalises subnormals; what overflows binary16 was an infinity or a NaN.
#[inline(always)]
const fn f16_to_f32(half: u16) -> f32 {
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    const OVERFLOW: f32 = 65536.0;
    let magnitude = f32::from_bits(((half & 0x7fff) as u32) << 13) * REBIAS;
    let special = if magnitude >= OVERFLOW { 0xff << 23 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | ((half & 0x8000) as u32) << 16)
}

/// The 256 values of OCP E4M3 (finite, NaN at ±0x7f).
const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        // The mantissa is binary16's upper three bits; the exponent bias is 7 instead of 15.
        let magnitude = f16_to_f32(((code & 0x7f) as u16) << 7) * 256.0;
        let magnitude = if code & 0x7f == 0x7f { f32::NAN } else { magnitude };
        table[code] = if code >= 0x80 { -magnitude } else { magnitude };
        code += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_exactly() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits);
            let found = f16_to_f32(bits);
            if expected.is_nan() {
                assert!(found.is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(found.to_bits(), expected.to_f32().to_bits(), "{bits:#06x}");
            }
        }
    }

    #[test]
    fn mxfp4_in_pairs_has_the_values_of_the_blocks_of_ggml() {
        for e in 0..=255u8 {
            // Element i has code 7i mod 16.
            let code = |i: usize| (7 * i % 16) as u8;
            let pairs: [u8; 16] = std::array::from_fn(|j| code(2 * j) | code(2 * j + 1) << 4);
            let mut block = [e; 17];
            (0..16).for_each(|j| block[1 + j] = code(j) | code(j + 16) << 4);
            let (mut found, mut expected) = ([0.0; 32], [0.0; 32]);
            decode_mxfp4_pairs(&[e], &pairs, &mut found);
            decode(DType::MXFP4, &block, &mut expected);
            assert_eq!(found.map(f32::to_bits), expected.map(f32::to_bits), "scale {e}");
        }
    }

    #[test]
    fn e4m3_has_the_values_of_the_ocp_specification() {
        let cases = [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
        ];
        for (code, value) in cases
            .into_iter()
            .chain([(0x38, 1.0), (0x7e, 448.0), (0xfe, -448.0)])
        {
            assert_eq!(E4M3[code], value, "{code:#04x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
    }
}
