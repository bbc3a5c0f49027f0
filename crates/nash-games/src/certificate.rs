//! Certificate of a rounding equilibrium: the regret of every player, by a route that shares no code with the solver.
//!
//! The solver keeps a residual up to date move by move in `f32` and finds best responses by bisection. Here `R = Δ H` is
//! computed anew in `f64`, plain loops, and every level of the codebook and every scale code is tried.

use half::f16;
use nash_kernels::GROUP;
use rayon::prelude::*;

use crate::error::GameError;
use crate::grid::Grid;
use crate::rounding::{MIN_GAIN, Problem};

/// What the check found.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RoundingCertificate {
    /// Φ of the solution.
    pub potential: f64,
    /// Φ divided by the energy `Σ w H wᵀ` of the weights: the relative layer error.
    pub relative_error: f64,
    /// The largest gain any single player could still make, as a share of the energy of its row.
    pub max_regret: f64,
    /// Players who could gain more than the solver's threshold for a move by d, `2·10⁻³ H d²`: 0 at an equilibrium.
    pub unsettled: u64,
    /// Number of players checked, weights and scales.
    pub players: u64,
}

/// Checks every `stride`-th row (1: all of them), because the check costs `m · n²` multiplications in `f64`.
///
/// # Errors
/// If the lengths do not agree.
pub fn certify_rounding(
    problem: Problem<'_>,
    grid: &Grid,
    codes: &[u8],
    stride: usize,
) -> Result<RoundingCertificate, GameError> {
    problem.check(grid, codes)?;
    let (n, groups) = (problem.cols, Grid::groups(problem.cols));
    let book: Vec<f64> = grid.codebook.iter().map(|&v| f64::from(v)).collect();
    let rows: Vec<RowCheck> = (0..problem.rows())
        .into_par_iter()
        .step_by(stride.max(1))
        .map(|r| {
            let row = Row {
                weights: &problem.weights[r * n..][..n],
                codes: &codes[r * n..][..n],
                scale_codes: &grid.scale_codes[r * groups..][..groups],
                unit: f64::from(f16::to_f32(grid.row_scales[r])) / 16384.0,
                bits: grid.width.bits(),
                book: &book,
            };
            row.check(problem.hessian)
        })
        .collect();
    let mut total = RoundingCertificate::default();
    let mut energy = 0.0;
    for row in &rows {
        total.potential += row.potential;
        energy += row.energy;
        total.max_regret = total
            .max_regret
            .max(row.max_gain / row.energy.max(f64::MIN_POSITIVE));
        total.unsettled += row.unsettled;
        total.players += (n + groups) as u64;
    }
    total.relative_error = total.potential / energy.max(f64::MIN_POSITIVE);
    Ok(total)
}

struct Row<'a> {
    weights: &'a [f32],
    codes: &'a [u8],
    scale_codes: &'a [i8],
    unit: f64,
    bits: usize,
    book: &'a [f64],
}

struct RowCheck {
    potential: f64,
    energy: f64,
    max_gain: f64,
    unsettled: u64,
}

impl Row<'_> {
    /// The levels of whole groups of codes, read bit by bit from the stream that they make: the bits of a chain one after the other, six of them, from a code's first
    /// on, being the index of its level.
    fn levels(&self, codes: &[u8]) -> Vec<f64> {
        let mut levels = vec![0.0; codes.len()];
        if self.bits == 8 {
            for (level, &code) in levels.iter_mut().zip(codes) {
                *level = (f64::from(code) - 128.0).max(-127.0);
            }
            return levels;
        }
        for (levels, codes) in levels.chunks_mut(GROUP).zip(codes.chunks(GROUP)) {
            for half in 0..2 {
                let columns = || (0..codes.len()).filter(move |c| c / 8 % 2 == half);
                // At most 32 codes of 6 bits: two words, the second of which starts at code 16.
                let mut words = [0u128; 2];
                for (s, c) in columns().enumerate() {
                    words[s / 16] |= u128::from(codes[c]) << (self.bits * (s % 16));
                }
                for (s, c) in columns().enumerate() {
                    let at = self.bits * (s % 16);
                    let following = if s < 16 { words[1] << (16 * self.bits) } else { 0 };
                    let index = ((words[s / 16] | following) >> at) as usize % 64;
                    levels[c] = self.book[index];
                }
            }
        }
        levels
    }

    fn check(&self, hessian: &[f32]) -> RowCheck {
        let n = self.weights.len();
        let step = |c: usize| self.unit * f64::from(self.scale_codes[c / GROUP]);
        let levels = self.levels(self.codes);
        let delta: Vec<f64> = (0..n)
            .map(|c| step(c) * levels[c] - f64::from(self.weights[c]))
            .collect();
        let weights: Vec<f64> = self.weights.iter().map(|&w| f64::from(w)).collect();
        let residual = times_hessian(&delta, hessian);
        let weighted = times_hessian(&weights, hessian);
        let energy = weights.iter().zip(weighted).map(|(w, hw)| w * hw).sum();
        let potential = delta.iter().zip(&residual).map(|(d, r)| d * r).sum();
        let mut check = RowCheck {
            potential,
            energy,
            max_gain: 0.0,
            unsettled: 0,
        };
        let mut group = self.codes.to_vec();
        for c in 0..n {
            let (start, end) = (c / GROUP * GROUP, n.min((c / GROUP + 1) * GROUP));
            let deviations = (0..1u32 << self.bits).map(|code| {
                group[c] = code as u8;
                let changed = self.levels(&group[start..end]);
                group[c] = self.codes[c];
                let d: Vec<(usize, f64)> = (start..end)
                    .map(|i| (i, step(i) * (changed[i - start] - levels[i])))
                    .filter(|(_, d)| *d != 0.0)
                    .collect();
                let h = |i: usize, j: usize| f64::from(hessian[i * n + j]);
                let pull = |i: usize| d.iter().map(|&(j, dj)| h(i, j) * dj).sum::<f64>();
                let change: f64 = d.iter().map(|&(i, di)| di * (2.0 * residual[i] + pull(i))).sum();
                (d.iter().map(|&(i, di)| h(i, i) * di * di).sum(), -change)
            });
            check.count(deviations);
        }
        for g in 0..self.scale_codes.len() {
            let (start, end) = (g * GROUP, n.min((g + 1) * GROUP));
            let v: Vec<f64> = levels[start..end].iter().map(|l| self.unit * l).collect();
            let slope: f64 = v
                .iter()
                .zip(&residual[start..end])
                .map(|(v, r)| 2.0 * v * r)
                .sum();
            let mut curvature = 0.0;
            for (i, vi) in v.iter().enumerate() {
                let h = &hessian[(start + i) * n + start..];
                curvature += vi * v.iter().zip(h).map(|(vj, &h)| vj * f64::from(h)).sum::<f64>();
            }
            if self.scale_codes[g] == 0 {
                continue; // A group of zeros has no scale to choose.
            }
            check.count((1..=127).map(|code| {
                let d = f64::from(code) - f64::from(self.scale_codes[g]);
                (curvature * d * d, -d * (slope + d * curvature))
            }));
        }
        check
    }
}

/// `v H` in `f64`.
fn times_hessian(v: &[f64], hessian: &[f32]) -> Vec<f64> {
    let mut out = vec![0.0f64; v.len()];
    pulp::Arch::new().dispatch(|| {
        for (v, h) in v.iter().zip(hessian.chunks(v.len())) {
            out.iter_mut()
                .zip(h)
                .for_each(|(out, &h)| *out += v * f64::from(h));
        }
    });
    out
}

impl RowCheck {
    /// Notes one player's deviations, given as (size, gain): the size is `Σ h d²` over the values that change by `d`.
    fn count(&mut self, deviations: impl Iterator<Item = (f64, f64)>) {
        let mut unsettled = false;
        for (size, gain) in deviations {
            self.max_gain = self.max_gain.max(gain);
            // Twice the solver's threshold: its f32 residual may hide gains just above it.
            unsettled |= gain > 2.0 * f64::from(MIN_GAIN) * size;
        }
        self.unsettled += u64::from(unsettled);
    }
}
