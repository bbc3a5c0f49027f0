//! Keys and values as bytes, and one token's attention over them in whole numbers.
//!
//! `P` positions, `D` head dimension, `G` query heads that share the keys. A position's key is cut into groups of [`KEY_GROUP`] columns,
//! each with a scale `absmax / 127` and codes in −127..=127; its value has one scale. Sixteen positions are a block:
//!
//! * keys `[P/16][D/4][16 positions][4 columns]`, stored as code + 128; scales `[P/16][groups][16]`;
//! * values `[P/16][4 quads][D][4 positions]`; scales `[P]`.
//!
//! So four bytes side by side are what a dot product of bytes sums up: for keys the scores of sixteen positions grow in the lanes of a register,
//! for values the sums of sixteen columns, and nothing is summed across lanes. Columns are padded with zeros to whole blocks of sixteen.
//!
//! Scores: groups of the query become numbers of 15 bits in two digits to the base of 128, products are summed exactly, and
//! `score = Σ_groups f32(S)·(key scale·query scale)`. Values: per [`CHUNK`] positions the weights times the scales of their values become numbers
//! of 14 bits relative to the largest, in two digits; sums are exact again. Every rounding is written down here once and nothing is fused, so all instruction sets give the same bits.
//!
//! A group that holds a NaN or an infinity gets the scale NaN: bad numbers stay visible.

mod kernels;
mod query;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

pub use query::ByteQuery;

use crate::vectorize;

/// Positions of a block: storage is in whole blocks.
pub const POSITIONS: usize = 16;
/// Columns that share a scale of a key.
pub const KEY_GROUP: usize = 32;
/// Columns side by side in a register; rows are padded to it.
const LANES: usize = 16;
/// Bytes that a lane sums up at a time.
const QUAD: usize = 4;
/// Bytes of a register.
const LINE: usize = LANES * QUAD;
/// Positions whose weights are numbers relative to the same maximum.
const CHUNK: usize = 128;
/// Adding and subtracting it rounds a float of magnitude below 2²² to an integer, ties to even, and leaves the integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// How rows of `dim` columns are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteShape {
    dim: usize,
}

impl ByteShape {
    /// Rows of `dim` columns.
    #[must_use]
    pub const fn new(dim: usize) -> Self {
        Self { dim }
    }

    /// Columns D.
    #[must_use]
    pub const fn dim(self) -> usize {
        self.dim
    }

    /// Columns with the padding.
    const fn width(self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    /// Scales of a key.
    const fn groups(self) -> usize {
        self.dim.div_ceil(KEY_GROUP)
    }

    /// Bytes of the codes of keys, or of values, at `positions` positions, rounded up to whole blocks.
    #[must_use]
    pub const fn code_bytes(self, positions: usize) -> usize {
        positions.next_multiple_of(POSITIONS) * self.width()
    }

    /// Scales of the keys at `positions` positions, rounded up to whole blocks.
    #[must_use]
    pub const fn key_scales(self, positions: usize) -> usize {
        positions.next_multiple_of(POSITIONS) * self.groups()
    }

    /// Scales of the values at `positions` positions, rounded up to whole blocks.
    #[must_use]
    pub const fn value_scales(self, positions: usize) -> usize {
        positions.next_multiple_of(POSITIONS)
    }

    /// Writes a key `[D]` at a position of a run of codes and scales.
    ///
    /// # Panics
    /// If the run ends before the position, or the key has another length.
    pub fn store_key(self, key: &[f32], position: usize, codes: &mut [u8], scales: &mut [f32]) {
        assert_eq!(key.len(), self.dim, "a key");
        let (block, lane) = (position / POSITIONS, position % POSITIONS);
        let codes = &mut codes[block * POSITIONS * self.width()..][..POSITIONS * self.width()];
        let scales = &mut scales[block * POSITIONS * self.groups()..][..POSITIONS * self.groups()];
        for (group, key) in key.chunks(KEY_GROUP).enumerate() {
            let mut bytes = [0; KEY_GROUP];
            scales[group * POSITIONS + lane] = quantize(key, &mut bytes);
            let lines = codes[group * KEY_GROUP * POSITIONS..].chunks_exact_mut(LINE);
            for (line, quad) in lines.zip(bytes.as_chunks::<QUAD>().0) {
                line[lane * QUAD..][..QUAD].copy_from_slice(&quad.map(|code| code.cast_unsigned() ^ 0x80));
            }
        }
    }

    /// Writes a value `[D]` at a position of a run of codes and scales.
    ///
    /// # Panics
    /// If the run ends before the position, or the value has another length.
    pub fn store_value(self, value: &[f32], position: usize, codes: &mut [u8], scales: &mut [f32]) {
        assert_eq!(value.len(), self.dim, "a value");
        let mut bytes = [0; 64];
        let scale = scale(absmax(value));
        scales[position] = scale;
        let quad = &mut codes[position / QUAD * QUAD * self.width()..][..QUAD * self.width()];
        for (value, quad) in value.chunks(bytes.len()).zip(quad.chunks_mut(QUAD * bytes.len())) {
            quantize_by(scale, value, &mut bytes);
            for (slot, byte) in quad.chunks_exact_mut(QUAD).zip(bytes) {
                slot[position % QUAD] = byte.cast_unsigned();
            }
        }
    }

    /// Decodes the keys at these positions to `out [positions, D]`.
    ///
    /// # Panics
    /// If the run ends before the positions, or `out` has another length.
    pub fn read_keys(self, keys: ByteRun<'_>, positions: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), positions.len() * self.dim, "room for the keys");
        let (width, groups) = (self.width(), self.groups());
        for (position, out) in positions.zip(out.chunks_exact_mut(self.dim)) {
            let (block, lane) = (position / POSITIONS, position % POSITIONS);
            let codes = &keys.codes[block * POSITIONS * width..][..POSITIONS * width];
            let scales = &keys.scales[block * POSITIONS * groups..][..POSITIONS * groups];
            vectorize(
                #[inline(always)]
                || {
                    for (group, out) in out.chunks_mut(KEY_GROUP).enumerate() {
                        let lines = codes[group * KEY_GROUP * POSITIONS..].chunks_exact(LINE);
                        let mut bytes = [[0u8; QUAD]; KEY_GROUP / QUAD];
                        for (bytes, line) in bytes.iter_mut().zip(lines) {
                            bytes.copy_from_slice(&line[lane * QUAD..][..QUAD]);
                        }
                        let scale = scales[group * POSITIONS + lane];
                        for (out, byte) in out.iter_mut().zip(bytes.as_flattened()) {
                            *out = scale * f32::from((byte ^ 0x80).cast_signed());
                        }
                    }
                },
            );
        }
    }

    /// Decodes the values at these positions to `out [positions, D]`.
    ///
    /// # Panics
    /// If the run ends before the positions, or `out` has another length.
    pub fn read_values(self, values: ByteRun<'_>, positions: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), positions.len() * self.dim, "room for the values");
        for (position, out) in positions.zip(out.chunks_exact_mut(self.dim)) {
            let quad = &values.codes[position / QUAD * QUAD * self.width()..][..QUAD * self.width()];
            let (scale, up) = (values.scales[position], 24 - 8 * (position % QUAD));
            vectorize(
                #[inline(always)]
                || {
                    for (out, quad) in out.iter_mut().zip(quad.as_chunks::<QUAD>().0) {
                        *out = scale * ((i32::from_le_bytes(*quad) << up) >> 24) as f32;
                    }
                },
            );
        }
    }
}

/// Keys or values of one head: whole blocks of codes and their scales, from position 0 on.
#[derive(Clone, Copy, Debug)]
pub struct ByteRun<'a> {
    /// See [`ByteShape::code_bytes`].
    pub codes: &'a [u8],
    /// See [`ByteShape::key_scales`] and [`ByteShape::value_scales`].
    pub scales: &'a [f32],
}

/// Largest magnitude; NaN or infinity if there is one.
fn absmax(x: &[f32]) -> f32 {
    // As integers, magnitudes compare like floats, and NaN and infinity are above all finite ones.
    let max = vectorize(
        #[inline(always)]
        || x.iter().fold(0u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff)),
    );
    f32::from_bits(max)
}

/// The scale for a magnitude: NaN if that is not finite, 0 if it is too small to divide by.
fn scale(absmax: f32) -> f32 {
    if !absmax.is_finite() {
        f32::NAN
    } else if (127.0 / absmax).is_finite() {
        absmax / 127.0
    } else {
        0.0
    }
}

/// `codes = round_ties_even(x / scale)`, 0 beyond the last value and for a scale that is 0 or NaN.
fn quantize_by(scale: f32, x: &[f32], codes: &mut [i8]) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (codes, rest) = codes.split_at_mut(x.len());
    rest.fill(0);
    if inverse == 0.0 {
        return codes.fill(0);
    }
    vectorize(
        #[inline(always)]
        || {
            for (code, value) in codes.iter_mut().zip(x) {
                *code = (value * inverse + ROUND).to_bits() as i8;
            }
        },
    );
}

/// Quantizes a group and returns its scale.
fn quantize(x: &[f32], codes: &mut [i8]) -> f32 {
    let scale = scale(absmax(x));
    quantize_by(scale, x, codes);
    scale
}
