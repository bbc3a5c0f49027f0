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
    let book: Vec<f64> = if grid.codebook.is_empty() {
        (-128..128).map(|v: i32| f64::from(v.max(-127))).collect()
    } else {
        grid.codebook.iter().map(|&v| f64::from(v)).collect()
    };
    let rows: Vec<RowCheck> = (0..problem.rows())
        .into_par_iter()
        .step_by(stride.max(1))
        .map(|r| {
            let row = Row {
                weights: &problem.weights[r * n..][..n],
                codes: &codes[r * n..][..n],
                scale_codes: &grid.scale_codes[r * groups..][..groups],
                unit: f64::from(f16::to_f32(grid.row_scales[r])) / 16384.0,
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
    book: &'a [f64],
}

struct RowCheck {
    potential: f64,
    energy: f64,
    max_gain: f64,
    unsettled: u64,
}

impl Row<'_> {
    fn check(&self, hessian: &[f32]) -> RowCheck {
        let n = self.weights.len();
        let step = |c: usize| self.unit * f64::from(self.scale_codes[c / GROUP]);
        let level = |c: usize| self.book[usize::from(self.codes[c])];
        let delta: Vec<f64> = (0..n)
            .map(|c| step(c) * level(c) - f64::from(self.weights[c]))
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
        for c in 0..n {
            let h = f64::from(hessian[c * n + c]);
            check.count(
                h,
                self.book.iter().map(|v| {
                    let d = step(c) * (v - level(c));
                    (d, -d * (2.0 * residual[c] + d * h))
                }),
            );
        }
        for g in 0..self.scale_codes.len() {
            let (start, end) = (g * GROUP, n.min((g + 1) * GROUP));
            let v: Vec<f64> = (start..end).map(|c| self.unit * level(c)).collect();
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
            check.count(
                curvature,
                (1..=127).map(|code| {
                    let d = f64::from(code) - f64::from(self.scale_codes[g]);
                    (d, -d * (slope + d * curvature))
                }),
            );
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
    /// Notes one player's deviations, given as (distance, gain); `curvature` is the player's second derivative of Φ / 2.
    fn count(&mut self, curvature: f64, deviations: impl Iterator<Item = (f64, f64)>) {
        let mut unsettled = false;
        for (d, gain) in deviations {
            self.max_gain = self.max_gain.max(gain);
            // Twice the solver's threshold: its f32 residual may hide gains just above it.
            unsettled |= gain > 2.0 * f64::from(MIN_GAIN) * curvature * d * d;
        }
        self.unsettled += u64::from(unsettled);
    }
}
