//! Ternary blocks of 256 elements, value `d·(digit − 1)`.

use super::f16_at;

/// Digits in base 3, five to a byte (four in the last 4 bytes), `d: f16`.
///
/// A byte is `⌈256·n/243⌉` of the number `n = Σ digit·3^k`, so that a multiplication by 3^k (mod 256) brings a digit to the
/// front and one by 3 carries it out.
#[inline(always)]
pub(super) fn tq1_0(block: &[u8; 54], out: &mut [f32; 256]) {
    let d = f16_at(block, 52);
    digits(&block[..32], d, &mut out[..160]);
    digits(&block[32..48], d, &mut out[160..240]);
    digits(&block[48..52], d, &mut out[240..]);
}

/// Digit `k` of byte `m` is element `k·bytes.len() + m`.
#[inline(always)]
fn digits(bytes: &[u8], d: f32, out: &mut [f32]) {
    let mut power = 1u8;
    for out in out.chunks_exact_mut(bytes.len()) {
        for (value, byte) in out.iter_mut().zip(bytes) {
            let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
            *value = (f32::from(digit) - 1.0) * d;
        }
        power = power.wrapping_mul(3);
    }
}

/// `digits: [u2; 256], d: f16`; the fields of byte `l` of a run of 32 are elements `l, l+32, l+64, l+96`.
#[inline(always)]
pub(super) fn tq2_0(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(block, 64);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let codes = &block[32 * (i / 4)..][..32];
        for (value, code) in out.iter_mut().zip(codes) {
            *value = (f32::from((code >> (2 * (i % 4))) & 3) - 1.0) * d;
        }
    }
}
