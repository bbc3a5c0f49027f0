//! The grid a tensor is rounded to: `ŵ[r, c] = row_scale[r] · 2⁻¹⁴ · scale_code[r, g] · codebook[code]`, `g = c / 64`.
//!
//! A codebook is indexed by windows of six bits ([`crate::trellis`]). If its entries depend on a weight's own code only, and in ascending
//! order, the grid is *scalar*: the nearest level is found by bisection. 8-bit grids have no codebook: the level of code `k` is `k − 128`.

use half::f16;
use nash_kernels::{GROUP, SCALE_UNIT, Width};
use rayon::prelude::*;

use crate::trellis::{self, TABLE, Trellis};

/// Largest magnitude of a codebook entry and of a scale code.
pub const MAX_LEVEL: f32 = 127.0;

/// The levels of a codebook as floats with the midpoints between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Levels {
    values: Vec<f32>,
    midpoints: Vec<f32>,
    first_code: u8,
}

impl Levels {
    /// Levels of an ascending codebook; for 8 bits (empty codebook) the integers −127..=127.
    pub fn new(codebook: &[i8]) -> Self {
        let (values, first_code): (Vec<f32>, u8) = if codebook.is_empty() {
            ((-127..=127).map(|v| v as f32).collect(), 1)
        } else {
            (codebook.iter().map(|&v| f32::from(v)).collect(), 0)
        };
        let midpoints = values.windows(2).map(|p| 0.5 * (p[0] + p[1])).collect();
        Self {
            values,
            midpoints,
            first_code,
        }
    }

    /// All level values, ascending, with the code of each.
    pub fn iter(&self) -> impl Iterator<Item = (u8, f32)> + '_ {
        self.values
            .iter()
            .enumerate()
            .map(|(i, &v)| (i as u8 + self.first_code, v))
    }

    /// The value of a code, in codebook units.
    #[inline]
    pub fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code.saturating_sub(self.first_code)).min(self.values.len() - 1)]
    }

    /// The code whose level is nearest to `x` (in codebook units). Equal distances go down; NaN gives the lowest code.
    #[inline]
    pub fn nearest(&self, x: f32) -> u8 {
        let index = if self.midpoints.len() <= 16 {
            // Counting is branch-free; the midpoints of 2 to 4 bits fit one or two vectors.
            self.midpoints.iter().map(|&m| usize::from(x > m)).sum()
        } else if self.first_code == 1 {
            (x.round().clamp(-MAX_LEVEL, MAX_LEVEL) + MAX_LEVEL) as usize
        } else {
            self.midpoints.partition_point(|&m| x > m)
        };
        index as u8 + self.first_code
    }
}

/// What codes are worth, in codebook units.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for a tensor, and it is looked into all the time"
)]
pub enum Book {
    /// A value for every code.
    Scalar(Levels),
    /// A value for every window of six bits.
    Trellis(Trellis),
}

impl Book {
    /// The book of a stored codebook: 64 entries by window, or none at 8 bits.
    pub fn new(width: Width, codebook: &[i8]) -> Self {
        let own = &codebook[..codebook.len().min(width.levels())];
        let repeats = codebook.chunks(width.levels()).all(|part| part == own);
        if repeats && own.is_sorted() {
            return Book::Scalar(Levels::new(own));
        }
        let table: [f32; TABLE] = std::array::from_fn(|i| codebook.get(i).copied().map_or(0.0, f32::from));
        Book::Trellis(Trellis::new(width.bits(), table))
    }

    /// The values of the codes of one group, up to 64; zero beyond them.
    #[inline(always)]
    pub fn values(&self, codes: &[u8]) -> [f32; GROUP] {
        match self {
            Book::Scalar(levels) => {
                let mut values = [0.0; GROUP];
                for (value, &code) in values.iter_mut().zip(codes) {
                    *value = levels.value(code);
                }
                values
            }
            Book::Trellis(trellis) => trellis.values(codes),
        }
    }
}

/// Everything but the codes: what a packed tensor stores beside them.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Bits per code.
    pub width: Width,
    /// The values of the 64 windows, within ±127; empty for 8 bits.
    pub codebook: Vec<i8>,
    /// One scale per row, `[m]`.
    pub row_scales: Vec<f16>,
    /// One scale code per row and group, `[m, G]`, 0..=127.
    pub scale_codes: Vec<i8>,
}

impl Grid {
    /// Number of scale groups of a row of `cols` inputs.
    pub fn groups(cols: usize) -> usize {
        cols.div_ceil(GROUP)
    }

    /// The step of row `r`, group `g`: value of one codebook unit.
    #[inline]
    pub fn step(&self, r: usize, g: usize, groups: usize) -> f32 {
        self.row_scales[r].to_f32() * SCALE_UNIT * f32::from(self.scale_codes[r * groups + g])
    }

    /// What codes are worth on this grid.
    pub fn book(&self) -> Book {
        Book::new(self.width, &self.codebook)
    }

    /// Writes row `r` of `Ŵ` (`[n]`) for the codes of that row.
    pub fn dequantize_row(&self, book: &Book, r: usize, codes: &[u8], out: &mut [f32]) {
        let groups = Self::groups(codes.len());
        for (g, (codes, out)) in codes.chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
            let step = self.step(r, g, groups);
            for (o, value) in out.iter_mut().zip(book.values(codes)) {
                *o = step * value;
            }
        }
    }

    /// `Ŵ [m, n]` for the given codes.
    pub fn dequantize(&self, cols: usize, codes: &[u8]) -> Vec<f32> {
        let book = self.book();
        let mut out = vec![0.0; codes.len()];
        for (r, (c, o)) in codes.chunks(cols).zip(out.chunks_mut(cols)).enumerate() {
            self.dequantize_row(&book, r, c, o);
        }
        out
    }

    /// The codes `[m, n]` that minimise `Σ h (w − ŵ)²` on this grid for column importances `h [n]`: round to nearest. On a scalar grid every weight takes
    /// its nearest level, whatever `h`.
    pub fn nearest_codes(&self, weights: &[f32], h: &[f32]) -> Vec<u8> {
        let (cols, book) = (h.len(), self.book());
        let groups = Self::groups(cols);
        let mut codes = vec![0; weights.len()];
        codes
            .par_chunks_mut(cols)
            .zip(weights.par_chunks(cols))
            .enumerate()
            .for_each(|(r, (codes, w))| {
                let row = codes.chunks_mut(GROUP).zip(w.chunks(GROUP)).zip(h.chunks(GROUP));
                for (g, ((codes, w), h)) in row.enumerate() {
                    let step = self.step(r, g, groups);
                    match &book {
                        Book::Scalar(levels) => {
                            let inverse = inverse_or_zero(step);
                            for (c, &w) in codes.iter_mut().zip(w) {
                                *c = levels.nearest(w * inverse);
                            }
                        }
                        Book::Trellis(trellis) => {
                            let nearest = trellis::nearest(w, h, trellis, step);
                            codes.copy_from_slice(&nearest[..codes.len()]);
                        }
                    }
                }
            });
        codes
    }
}

/// `1 / step`, or 0 where the step is 0 (a group of zeros).
#[inline]
pub(crate) fn inverse_or_zero(step: f32) -> f32 {
    if step > 0.0 { 1.0 / step } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_nearest_for_every_width() {
        for codebook in [
            vec![-100, -20, 30, 127],
            (0..32).map(|i| (i * 8 - 124) as i8).collect(),
            vec![],
        ] {
            let levels = Levels::new(&codebook);
            for i in -1400..1400 {
                let x = i as f32 * 0.1;
                let code = levels.nearest(x);
                let best = levels
                    .iter()
                    .map(|(_, v)| (v - x).abs())
                    .fold(f32::INFINITY, f32::min);
                assert!(
                    ((levels.value(code) - x).abs() - best).abs() < 1e-4,
                    "{x}: code {code} of {codebook:?}"
                );
            }
        }
    }

    #[test]
    fn nan_and_infinity_have_codes() {
        let levels = Levels::new(&[-127, -1, 1, 127]);
        assert_eq!(levels.nearest(f32::NAN), 0);
        assert_eq!(levels.nearest(f32::INFINITY), 3);
        assert_eq!(Levels::new(&[]).nearest(f32::NEG_INFINITY), 1);
    }
}
