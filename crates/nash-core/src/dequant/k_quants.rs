//! The k-quants: super-blocks of 256 elements, whose sub-blocks of 16 or 32 have quantized scales (and minima).
//!
//! 2-bit fields of a byte belong to elements 32 apart: byte `l` of a run of 32 holds elements `l, l+32, l+64, l+96`.

use std::array;

use super::{bytes_at, f16_at};

/// `scales: [(u4 scale, u4 min); 16], codes: [u2; 256], d: f16, dmin: f16`, value `d·scale·code − dmin·min`.
#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = block[i];
        let (d, m) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        let codes = &block[16 + 32 * (i / 8) + 16 * (i % 2)..][..16];
        let shift = 2 * (i % 8 / 2);
        for (value, code) in out.iter_mut().zip(codes) {
            *value = d * f32::from((code >> shift) & 3) - m;
        }
    }
}

/// `third bits: [u8; 32]` (bit `i/32` of byte `i%32`; *clear* subtracts 4), `codes: [u2; 256]`,
/// `scales: [u6; 16]`, `d: f16`, value `d·(scale − 32)·(code − 4·[bit clear])`.
#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block, 108);
    let packed = &block[96..108];
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Lower four bits in bytes 0..8 (two nibbles each), upper two in bytes 8..12 (four fields each).
        let scale = (packed[i % 8] >> (4 * (i / 8))) & 15 | ((packed[8 + i % 4] >> (2 * (i / 4))) & 3) << 4;
        let d = d * (i32::from(scale) - 32) as f32;
        let codes = &block[32 + 32 * (i / 8) + 16 * (i % 2)..][..16];
        let bits = &block[16 * (i % 2)..][..16];
        let shift = 2 * (i % 8 / 2);
        for ((value, code), bits) in out.iter_mut().zip(codes).zip(bits) {
            let third = (bits >> (i / 2)) & 1;
            *value = d * (i32::from((code >> shift) & 3 | third << 2) - 4) as f32;
        }
    }
}

/// Scale and minimum (6 bits each) number `i` of 8 out of 12 bytes, as `Q4_K` and `Q5_K` pack them.
#[inline(always)]
fn scale_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (
            packed[i + 4] & 15 | packed[i - 4] >> 6 << 4,
            packed[i + 4] >> 4 | packed[i] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

/// `d: f16, dmin: f16, scales and minima: [u6; 16], codes: [u4; 256]`, value `d·scale·code − dmin·min`.
#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let packed: [u8; 12] = bytes_at(block, 4);
    for (i, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let codes: [u8; 32] = bytes_at(block, 16 + 32 * i);
        let (low, high) = out.split_at_mut(32);
        let (scale, min) = scale_min(&packed, 2 * i);
        let (d0, m0) = (d * scale, dmin * min);
        for j in 0..32 {
            low[j] = d0 * f32::from(codes[j] & 15) - m0;
        }
        let (scale, min) = scale_min(&packed, 2 * i + 1);
        let (d1, m1) = (d * scale, dmin * min);
        for j in 0..32 {
            high[j] = d1 * f32::from(codes[j] >> 4) - m1;
        }
    }
}

/// `d: f16, dmin: f16, scales and minima: [u6; 16]`, `fifth bits: [u8; 32]` (bit `i/32` of byte `i%32`),
/// `codes: [u4; 256]`, value `d·scale·code − dmin·min`.
#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (packed, bits) = (&block[4..16], &block[16..48]);
    let codes = block[48..].as_chunks::<32>().0;
    for (i, (out, codes)) in out.as_chunks_mut::<64>().0.iter_mut().zip(codes).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let (scale0, min0) = scale_min(packed, 2 * i);
        let (scale1, min1) = scale_min(packed, 2 * i + 1);
        let (d0, m0, d1, m1) = (d * scale0, dmin * min0, d * scale1, dmin * min1);
        for (j, (code, bits)) in codes.iter().zip(bits).enumerate() {
            let bits = bits >> (2 * i);
            low[j] = d0 * f32::from(code & 15 | (bits & 1) << 4) - m0;
            high[j] = d1 * f32::from(code >> 4 | (bits & 2) << 3) - m1;
        }
    }
}

/// `lower nibbles: [u4; 256], upper bits: [u2; 256], scales: [i8; 16], d: f16`, value `d·scale·(code − 32)`.
/// In each half of 128, nibble byte `l` of 64 holds elements `l` and `l + 64`.
#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let mut codes = [0u8; 256];
    for (half, codes) in codes.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let nibbles: [u8; 64] = bytes_at(block, 64 * half);
        let bits: [u8; 32] = bytes_at(block, 128 + 32 * half);
        for l in 0..32 {
            codes[l] = nibbles[l] & 15 | (bits[l] & 3) << 4;
            codes[l + 32] = nibbles[l + 32] & 15 | (bits[l] >> 2 & 3) << 4;
            codes[l + 64] = nibbles[l] >> 4 | (bits[l] >> 4 & 3) << 4;
            codes[l + 96] = nibbles[l + 32] >> 4 | bits[l] >> 6 << 4;
        }
    }
    let d = f16_at(block, 208);
    for (i, (out, codes)) in out
        .as_chunks_mut::<16>()
        .0
        .iter_mut()
        .zip(codes.as_chunks::<16>().0)
        .enumerate()
    {
        let d = d * f32::from(block[192 + i] as i8);
        *out = array::from_fn(|j| d * (i32::from(codes[j]) - 32) as f32);
    }
}

/// `d: f32, codes: [i8; 256], sums: [i16; 16]`, value `d·code`.
#[inline(always)]
pub(super) fn q8_k(block: &[u8; 292], out: &mut [f32; 256]) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for (value, &code) in out.iter_mut().zip(&block[4..260]) {
        *value = d * f32::from(code as i8);
    }
}
