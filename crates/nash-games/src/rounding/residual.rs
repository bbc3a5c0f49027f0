//! Keeping the residual `R = Δ H` up to date: `R += change · H` for changes that are dense in early sweeps and sparse in late ones.
//!
//! Rows that changed much are multiplied together; of the others only the changes that are not zero, each a multiple of a row of `H`. Sums have a fixed
//! order: they depend on the changes alone.

use std::ops::Range;

use nash_kernels::dense::{MatMut, MatRef, gemm};

use crate::trellis::{Lanes, WIDE, WithLanes, dispatch};

/// A row that changed in at least one of this many places is dense.
const DENSE: usize = 3;
/// Registers of sums that a sparse row keeps at a time.
const REGISTERS: usize = 16;
/// Columns they hold.
const TILE: usize = REGISTERS * WIDE;

/// `change · H[rows, columns]`.
pub(super) struct Product<'a> {
    /// Changes `[m, stride]`.
    pub(super) change: &'a [f32],
    pub(super) stride: usize,
    /// Columns of `change` that count; column k belongs to row `first + k` of H.
    pub(super) used: Range<usize>,
    pub(super) first: usize,
    /// `[n, n]`.
    pub(super) hessian: &'a [f32],
    pub(super) n: usize,
    /// Columns of H.
    pub(super) columns: Range<usize>,
}

impl Product<'_> {
    /// Adds it to the columns of `out [m, width]` from `at` on.
    pub(super) fn add_to(&self, out: &mut [f32], width: usize, at: usize, buffer: &mut Vec<f32>) {
        let (used, wide) = (self.used.len(), self.columns.len());
        if used == 0 || wide == 0 {
            return;
        }
        let rows = out.len() / width;
        let changed = |r: usize| &self.change[r * self.stride..][self.used.clone()];
        let counts: Vec<usize> = (0..rows)
            .map(|r| changed(r).iter().filter(|d| **d != 0.0).count())
            .collect();
        let h = MatRef::row_major(self.hessian, self.n, self.n)
            .rows_range(self.first + self.used.start..self.first + self.used.end)
            .cols_range(self.columns.clone());
        let dense: Vec<usize> = (0..rows).filter(|&r| counts[r] * DENSE >= used).collect();
        if dense.len() == rows {
            let change = MatRef::row_major(&self.change[..rows * self.stride], rows, self.stride);
            let out = MatMut::row_major(out, rows, width).cols_range(at..at + wide);
            return gemm(1.0, change.cols_range(self.used.clone()), h, 1.0, out);
        }
        if !dense.is_empty() {
            buffer.clear();
            dense.iter().for_each(|&r| buffer.extend_from_slice(changed(r)));
            buffer.resize(dense.len() * (used + wide), 0.0);
            let (change, product) = buffer.split_at_mut(dense.len() * used);
            let change = MatRef::row_major(change, dense.len(), used);
            gemm(1.0, change, h, 0.0, MatMut::row_major(product, dense.len(), wide));
            for (&r, product) in dense.iter().zip(product.chunks(wide)) {
                let row = &mut out[r * width + at..][..wide];
                row.iter_mut().zip(product).for_each(|(r, p)| *r += p);
            }
        }
        let sparse: Vec<(usize, Vec<(usize, f32)>)> = (0..rows)
            .filter(|&r| counts[r] > 0 && counts[r] * DENSE < used)
            .map(|r| {
                let places = changed(r).iter().enumerate().filter(|(_, d)| **d != 0.0);
                (
                    r,
                    places
                        .map(|(k, &d)| (self.first + self.used.start + k, d))
                        .collect(),
                )
            })
            .collect();
        dispatch(Sparse {
            product: self,
            rows: &sparse,
            out: (out, width, at),
        });
    }
}

/// The rows that changed in few places.
struct Sparse<'p, 'a> {
    product: &'p Product<'a>,
    /// Row, and which row of H counts how often.
    rows: &'p [(usize, Vec<(usize, f32)>)],
    out: (&'p mut [f32], usize, usize),
}

impl WithLanes for Sparse<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Product {
            hessian, n, columns, ..
        } = self.product;
        let (out, width, at) = self.out;
        // Tile by tile, so that what is read of H stays near while the rows take turns.
        for first in columns.clone().step_by(TILE) {
            let tile = first..columns.end.min(first + TILE);
            for (row, places) in self.rows {
                let to = &mut out[row * width + at + (first - columns.start)..][..tile.len()];
                let (whole, rest) = to.as_chunks_mut::<WIDE>();
                if whole.len() == REGISTERS {
                    add_rows::<L, REGISTERS>(lanes, whole, (hessian, *n, first), places);
                } else {
                    for (i, to) in whole.iter_mut().enumerate() {
                        add_rows::<L, 1>(
                            lanes,
                            std::slice::from_mut(to),
                            (hessian, *n, first + i * WIDE),
                            places,
                        );
                    }
                }
                let first = tile.end - rest.len();
                for &(k, d) in places {
                    let h = &hessian[k * n + first..][..rest.len()];
                    rest.iter_mut().zip(h).for_each(|(r, h)| *r = d.mul_add(*h, *r));
                }
            }
        }
    }
}

/// `to += Σ d · H[k, first..]` over the places.
#[inline(always)]
fn add_rows<L: Lanes, const N: usize>(
    lanes: L,
    to: &mut [[f32; WIDE]],
    (hessian, n, first): (&[f32], usize, usize),
    places: &[(usize, f32)],
) {
    let mut sums: [L::Floats; N] = std::array::from_fn(|i| lanes.load(&to[i]));
    for &(k, d) in places {
        let (h, _) = hessian[k * n + first..][..N * WIDE].as_chunks::<WIDE>();
        let d = lanes.splat(d);
        for (sum, h) in sums.iter_mut().zip(h) {
            *sum = lanes.fused(d, lanes.load(h), *sum);
        }
    }
    for (sum, to) in sums.into_iter().zip(to) {
        lanes.store(sum, to);
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Rows of every density, and columns that fill no tile.
    #[test]
    fn dense_and_sparse_rows_agree_with_the_definition() {
        let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(3);
        let (n, m, stride) = (701, 7, 200);
        let hessian: Vec<f32> = (0..n * n).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        for share in [0.0, 0.02, 0.3, 1.0] {
            let change: Vec<f32> = (0..m * stride)
                .map(|i| {
                    // Some rows are always full.
                    let keep = rng.random::<f64>() < share || (share > 0.1 && i / stride == 2);
                    if keep { rng.random_range(-1.0f32..1.0) } else { 0.0 }
                })
                .collect();
            for (used, columns) in [(0..200, 0..n), (64..128, 130..449), (10..11, 700..701)] {
                let product = Product {
                    change: &change,
                    stride,
                    used: used.clone(),
                    first: 400,
                    hessian: &hessian,
                    n,
                    columns: columns.clone(),
                };
                let (width, at) = (columns.len() + 5, 3);
                let start: Vec<f32> = (0..m * width).map(|_| rng.random_range(-1.0f32..1.0)).collect();
                let mut found = start.clone();
                product.add_to(&mut found, width, at, &mut Vec::new());
                for (i, (found, start)) in found.iter().zip(&start).enumerate() {
                    let (r, c) = (i / width, i % width);
                    let inside = (at..at + columns.len()).contains(&c);
                    let sum: f64 = used
                        .clone()
                        .filter(|_| inside)
                        .map(|k| {
                            f64::from(change[r * stride + k])
                                * f64::from(hessian[(400 + k) * n + columns.start + c - at])
                        })
                        .sum();
                    // At most 201 terms below 1, each rounded to 2⁻²⁴ of sums below 201.
                    let error = (f64::from(*found) - f64::from(*start) - sum).abs();
                    assert!(
                        error < 201.0 * 201.0 * 2f64.powi(-24),
                        "row {r}, column {c}: {error}"
                    );
                }
            }
        }
    }
}
