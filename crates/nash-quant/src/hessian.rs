//! Second moments of the inputs of linears, `H = E[x xᵀ] [n, n]`, collected while the source model reads calibration text.

use std::collections::BTreeMap;

use nash_kernels::dense;
use nash_kernels::heap::zeros;
use nash_models::{Site, Tap};

/// Sums of `x xᵀ` per site of one layer (or of the head).
#[derive(Debug, Default)]
pub(crate) struct HessianTap {
    /// Sum and number of tokens per (layer, site).
    pub(crate) sums: BTreeMap<(usize, Site), (Vec<f32>, u64)>,
}

impl Tap for HessianTap {
    fn input(&mut self, layer: usize, site: Site, x: &[f32], tokens: usize, cols: usize) {
        if site == Site::Router {
            return; // Routers stay in float.
        }
        let (sum, count) = self
            .sums
            .entry((layer, site))
            .or_insert_with(|| (zeros(cols * cols), 0));
        dense::gram_accumulate(x, tokens, cols, sum);
        *count += tokens as u64;
    }
}

/// Of the mean of the diagonal: keeps inputs that never fired at a positive diagonal.
const FLOOR: f64 = 1e-4;

/// Divides by the number of tokens and adds `damping + n / (2 · tokens)` times `√(H_jj · mean of the diagonal)` to the diagonal. Returns what was added.
///
/// The second term shrinks estimates that rest on few tokens (experts, wide layers) towards a diagonal matrix, as Ledoit and Wolf (2004) do with
/// an estimated intensity. Theirs is a multiple of the identity; a few inputs of large energy, which transformers have, would make that a
/// floor far above what most inputs have. The geometric mean of an input's own energy and the mean leaves small ones their differences.
pub(crate) fn regularise(sum: &mut [f32], n: usize, tokens: u64, damping: f64) -> Vec<f32> {
    let scale = 1.0 / tokens.max(1) as f32;
    sum.iter_mut().for_each(|v| *v *= scale);
    let mean = (0..n).map(|i| f64::from(sum[i * n + i])).sum::<f64>() / n.max(1) as f64;
    let share = damping + 0.5 * n as f64 / tokens.max(1) as f64;
    let mut regularise_one = |i: usize| {
        let own = &mut sum[i * n + i];
        // A site without any signal becomes the identity: every weight counts the same.
        let added = if mean > 0.0 {
            (share * (f64::from(*own) * mean).sqrt() + FLOOR * mean) as f32
        } else {
            1.0
        };
        *own += added;
        added
    };
    (0..n).map(&mut regularise_one).collect()
}

/// Lower triangle of a symmetric matrix as little-endian bytes, and back.
pub(crate) mod triangle {
    use nash_kernels::heap::zeros;

    /// Side of the squares that are mirrored.
    const SQUARE: usize = 32;

    /// Packs the lower triangle, row by row.
    pub(crate) fn to_bytes(h: &[f32], n: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(n * (n + 1) * 2);
        for (i, row) in h.chunks(n).enumerate() {
            out.extend(row[..=i].iter().flat_map(|v| v.to_le_bytes()));
        }
        out
    }

    /// Restores the full matrix; `None` if the length does not fit.
    pub(crate) fn from_bytes(bytes: &[u8], n: usize) -> Option<Vec<f32>> {
        if bytes.len() != n * (n + 1) * 2 {
            return None;
        }
        let mut h = zeros(n * n);
        let (mut values, _) = bytes.as_chunks::<4>();
        for (i, row) in h.chunks_mut(n).enumerate() {
            let (own, rest) = values.split_at(i + 1);
            row.iter_mut()
                .zip(own)
                .for_each(|(h, &b)| *h = f32::from_le_bytes(b));
            values = rest;
        }
        // The mirror image, in squares that fit the first-level cache.
        for row in (0..n).step_by(SQUARE) {
            for column in (0..=row).step_by(SQUARE) {
                for i in row..n.min(row + SQUARE) {
                    for j in column..i.min(column + SQUARE) {
                        h[j * n + i] = h[i * n + j];
                    }
                }
            }
        }
        Some(h)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triangle_survives_the_disk() {
        let n = 71;
        let h: Vec<f32> = (0..n * n)
            .map(|k| ((k / n).max(k % n) * 100 + (k / n).min(k % n)) as f32)
            .collect();
        assert_eq!(triangle::from_bytes(&triangle::to_bytes(&h, n), n), Some(h));
        assert_eq!(triangle::from_bytes(&[0; 7], n), None);
    }

    #[test]
    fn a_silent_site_becomes_the_identity_and_others_stay_positive() {
        let mut h = vec![0.0; 4];
        regularise(&mut h, 2, 0, 0.1);
        assert_eq!(h, [1.0, 0.0, 0.0, 1.0]);
        let mut h = vec![8.0, 4.0, 4.0, 0.0];
        regularise(&mut h, 2, 4, 0.1);
        // Mean of the diagonal 1, share 0.1 + 2 / 8, and the floor.
        assert!((h[0] - (2.0 + 0.35 * 2f32.sqrt() + 1e-4)).abs() < 1e-6, "{h:?}");
        assert!((h[3] - 1e-4).abs() < 1e-9 && h[1] == 1.0, "{h:?}");
    }
}
