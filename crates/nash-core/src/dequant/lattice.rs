//! The i-quants on lattices: super-blocks of 256 elements, coded 8 (or 4) at a time as a point of a table, plus signs.
//!
//! Where signs cost 7 bits for 8 elements, the eighth makes their number even.

use super::grids::{IQ1, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS};
use super::{f16_at, f16_to_f32, u16_at, u32_at};

/// All eight signs from seven: bit 7 is the parity of the others.
#[inline(always)]
fn even_signs(signs: u32) -> u8 {
    let signs = (signs & 127) as u8;
    signs | ((signs.count_ones() & 1) as u8) << 7
}

/// Writes `d·±point`.
#[inline(always)]
fn signed<const N: usize>(point: &[u8; N], signs: u8, d: f32, out: &mut [f32; N]) {
    for (k, (value, &coordinate)) in out.iter_mut().zip(point).enumerate() {
        let magnitude = d * f32::from(coordinate);
        *value = if signs >> k & 1 == 0 {
            magnitude
        } else {
            -magnitude
        };
    }
}

/// `(½ + nibble)·¼·d`, the scale of sub-block `i` out of packed nibbles.
#[inline(always)]
fn quarter_scale(nibbles: &[u8], i: usize, d: f32) -> f32 {
    d * (0.5 + f32::from((nibbles[i / 2] >> (4 * (i % 2))) & 15)) * 0.25
}

/// `d: f16`, then per 32 elements `points: [u8; 4], signs and scale: 4 × u7, u4`.
#[inline(always)]
pub(super) fn iq2_xxs(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let word = u32_at(block, 2 + 8 * i + 4);
        let d = d * (0.5 + (word >> 28) as f32) * 0.25;
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let point = usize::from(block[2 + 8 * i + l]);
            signed(&IQ2XXS[point], even_signs(word >> (7 * l)), d, out);
        }
    }
}

/// `d: f16, codes: [(u9 point, u7 signs); 32], scales: [u4; 16]`.
#[inline(always)]
pub(super) fn iq2_xs(block: &[u8; 74], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let code = u16_at(block, 2 + 2 * i);
        let d = quarter_scale(&block[66..], i / 2, d);
        signed(
            &IQ2XS[usize::from(code & 511)],
            even_signs(u32::from(code >> 9)),
            d,
            out,
        );
    }
}

/// `d: f16, points: [u8; 32], signs: [u8; 32], upper bits of the points: [u2; 32], scales: [u4; 16]`.
#[inline(always)]
pub(super) fn iq2_s(block: &[u8; 82], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let upper = usize::from(block[66 + i / 4] >> (2 * (i % 4)) & 3);
        let point = usize::from(block[2 + i]) | upper << 8;
        signed(
            &IQ2S[point],
            block[34 + i],
            quarter_scale(&block[74..], i / 2, d),
            out,
        );
    }
}

/// `d: f16, points: [u8; 64]`, then per 32 elements `signs and scale: 4 × u7, u4`.
#[inline(always)]
pub(super) fn iq3_xxs(block: &[u8; 98], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let word = u32_at(block, 66 + 4 * i);
        let d = d * (0.5 + (word >> 28) as f32) * 0.5;
        for (l, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let point = usize::from(block[2 + 8 * i + l]);
            let signs = even_signs(word >> (7 * (l / 2))) >> (4 * (l % 2));
            signed(&IQ3XXS[point], signs, d, out);
        }
    }
}

/// `d: f16, points: [u8; 64], ninth bits of the points: [u1; 64], signs: [u1; 256], scales: [u4; 8]`.
#[inline(always)]
pub(super) fn iq3_s(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let scale = (block[106 + i / 16] >> (4 * (i / 8 % 2))) & 15;
        let d = d * f32::from(1 + 2 * scale);
        let point = usize::from(block[2 + i]) | usize::from(block[66 + i / 8] >> (i % 8) & 1) << 8;
        signed(&IQ3S[point], block[74 + i / 2] >> (4 * (i % 2)), d, out);
    }
}

/// Writes `d·(point ± ⅛)`.
#[inline(always)]
fn shifted(point: &[i8; 8], negative: bool, d: f32, out: &mut [f32; 8]) {
    let delta = if negative { -0.125 } else { 0.125 };
    for (value, &coordinate) in out.iter_mut().zip(point) {
        *value = d * (f32::from(coordinate) + delta);
    }
}

/// `d: f16, points: [u8; 32]`, then per 32 elements `upper bits of the points: 4 × u3, scale: u3, sign of the shift: u1`.
#[inline(always)]
pub(super) fn iq1_s(block: &[u8; 50], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let word = u16_at(block, 34 + 2 * i);
        let d = d * f32::from(2 * (word >> 12 & 7) + 1);
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let point = usize::from(block[2 + 4 * i + l]) | usize::from(word >> (3 * l) & 7) << 8;
            shifted(&IQ1[point], word & 0x8000 != 0, d, out);
        }
    }
}

/// `points: [u8; 32]`, per 8 elements `(upper bits: u3, sign of the shift: u1)`, `4 × u16` holding 4 × 3-bit scales each
/// (one per 16 elements) and, in the upper nibbles, the `f16` scale.
#[inline(always)]
pub(super) fn iq1_m(block: &[u8; 56], out: &mut [f32; 256]) {
    let words = [48, 50, 52, 54].map(|at| u16_at(block, at));
    let d =
        f16_to_f32(words[0] >> 12 | (words[1] >> 8) & 0x00f0 | (words[2] >> 4) & 0x0f00 | words[3] & 0xf000);
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let d = d * f32::from(2 * (words[i / 8] >> (3 * (i / 2 % 4)) & 7) + 1);
        let nibble = block[32 + i / 2] >> (4 * (i % 2));
        let point = usize::from(block[i]) | usize::from(nibble & 7) << 8;
        shifted(&IQ1[point], nibble & 8 != 0, d, out);
    }
}
