//! Blocks of 32 elements with a scale (and a minimum): `Q4_0` to `Q8_1`; the non-linear 4-bit grids `IQ4_NL`, `IQ4_XS`;
//! the float grids `MXFP4` and `NVFP4`.
//!
//! 4-bit codes come in 16 bytes: the low nibbles are elements 0..16, the high ones 16..32. Fifth bits, where there are
//! any, are a `u32` with bit `j` for element `j`.

use std::array;

use super::{f16_at, f16_to_f32, u16_at, u32_at};

/// `d: f16, codes: [u4; 32]`, value `d·(code − 8)`.
#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for (j, &code) in block[2..].iter().enumerate() {
        low[j] = (i32::from(code & 15) - 8) as f32 * d;
        high[j] = (i32::from(code >> 4) - 8) as f32 * d;
    }
}

/// `d: f16, m: f16, codes: [u4; 32]`, value `d·code + m`.
#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for (j, &code) in block[4..].iter().enumerate() {
        low[j] = f32::from(code & 15) * d + m;
        high[j] = f32::from(code >> 4) * d + m;
    }
}

/// The fifth bits of elements `j` and `j + 16`, in place.
#[inline(always)]
fn fifth_bits(bits: u32, j: usize) -> (u8, u8) {
    (((bits >> j) << 4) as u8 & 16, (bits >> (j + 12)) as u8 & 16)
}

/// `d: f16, fifth bits: u32, codes: [u4; 32]`, value `d·(code − 16)`.
#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, bits) = (f16_at(block, 0), u32_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for (j, &code) in block[6..].iter().enumerate() {
        let (b0, b1) = fifth_bits(bits, j);
        low[j] = (i32::from(code & 15 | b0) - 16) as f32 * d;
        high[j] = (i32::from(code >> 4 | b1) - 16) as f32 * d;
    }
}

/// `d: f16, m: f16, fifth bits: u32, codes: [u4; 32]`, value `d·code + m`.
#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, bits) = (f16_at(block, 0), f16_at(block, 2), u32_at(block, 4));
    let (low, high) = out.split_at_mut(16);
    for (j, &code) in block[8..].iter().enumerate() {
        let (b0, b1) = fifth_bits(bits, j);
        low[j] = f32::from(code & 15 | b0) * d + m;
        high[j] = f32::from(code >> 4 | b1) * d + m;
    }
}

/// `d: f16, codes: [i8; 32]`, value `d·code`.
#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    *out = array::from_fn(|j| f32::from(block[2 + j] as i8) * d);
}

/// `d: f16, d·Σ codes: f16, codes: [i8; 32]`, value `d·code`.
#[inline(always)]
pub(super) fn q8_1(block: &[u8; 36], out: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    *out = array::from_fn(|j| f32::from(block[4 + j] as i8) * d);
}

/// Sixteen codes' values.
type Grid = [f32; 16];

/// The grid of `IQ4_NL` and `IQ4_XS`.
const NON_LINEAR: Grid = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// The values of E2M1, doubled.
const E2M1: Grid = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];

/// `2N` codes in `N` bytes (low nibbles first) through a table of values.
#[inline(always)]
fn table_nibbles(codes: &[u8], d: f32, grid: &Grid, out: &mut [f32]) {
    let (low, high) = out.split_at_mut(codes.len());
    for ((low, high), &code) in low.iter_mut().zip(high).zip(codes) {
        *low = d * grid[usize::from(code & 15)];
        *high = d * grid[usize::from(code >> 4)];
    }
}

/// `d: f16, codes: [u4; 32]`, value `d·grid[code]`.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    table_nibbles(&block[2..], f16_at(block, 0), &NON_LINEAR, out);
}

/// `d: f16`, upper two bits of the scales: `u16`, lower four bits: `[u4; 8]`, `codes: 8 × [u4; 32]`, value
/// `d·(scale − 32)·grid[code]`.
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let (d, upper) = (f16_at(block, 0), u16_at(block, 2));
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = (block[4 + i / 2] >> (4 * (i % 2))) & 15 | ((upper >> (2 * i)) as u8 & 3) << 4;
        let d = d * (i32::from(scale) - 32) as f32;
        table_nibbles(&block[8 + 16 * i..24 + 16 * i], d, &NON_LINEAR, out);
    }
}

/// `e: E8M0, codes: [E2M1; 32]`. The grid is doubled, so the scale is 2^(e − 128).
#[inline(always)]
pub(super) fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    table_nibbles(&block[1..], e8m0_half(block[0]), &E2M1, out);
}

/// `d` of an MXFP4 block whose grid is doubled: 2^(e − 128).
#[inline(always)]
fn e8m0_half(e: u8) -> f32 {
    let e = u32::from(e);
    // Exponents 0 and 1 are subnormal in binary32.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

/// MXFP4 as Hugging Face folders keep it, scales apart from codes and neighbours in one byte: `scales: [E8M0; B]`,
/// `codes: [[E2M1; 32]; B]` with element 2j in the low nibble of byte j. What is missing on any side is left out.
pub fn decode_mxfp4_pairs(scales: &[u8], codes: &[u8], out: &mut [f32]) {
    let blocks = out.as_chunks_mut::<32>().0.iter_mut();
    for ((out, codes), &e) in blocks.zip(codes.as_chunks::<16>().0).zip(scales) {
        let d = e8m0_half(e);
        for (pair, &code) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            *pair = [d * E2M1[usize::from(code & 15)], d * E2M1[usize::from(code >> 4)]];
        }
    }
}

/// `scales: [unsigned E4M3; 4], codes: 4 × [E2M1; 16]`. The grid is doubled, so the scales are halved.
#[inline(always)]
pub(super) fn nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // The exponent bias is 7, binary16's is 15: 2^8, halved. 0x7f counts as zero and the top bit for nothing.
        let scale = block[i];
        let d = if scale == 0x7f {
            0.0
        } else {
            f16_to_f32(u16::from(scale & 0x7f) << 7) * 128.0
        };
        table_nibbles(&block[4 + 8 * i..12 + 8 * i], d, &E2M1, out);
    }
}
