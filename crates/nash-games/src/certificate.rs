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
    let row = |r: usize| Row {
        weights: &problem.weights[r * n..][..n],
        codes: &codes[r * n..][..n],
        scale_codes: &grid.scale_codes[r * groups..][..groups],
        unit: f64::from(f16::to_f32(grid.row_scales[r])) / 16384.0,
        bits: grid.width.bits(),
        book: &book,
    };
    let chosen: Vec<Row<'_>> = (0..problem.rows()).step_by(stride.max(1)).map(row).collect();
    let checks = chosen.par_chunks(TOGETHER);
    let rows: Vec<RowCheck> = checks
        .flat_map_iter(|rows| check(rows, problem.hessian))
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
    /// The level of every code.
    fn levels(&self) -> Vec<f64> {
        let mut levels = vec![0.0; self.codes.len()];
        for (start, codes) in (0..).step_by(GROUP).zip(self.codes.chunks(GROUP)) {
            for half in 0..2 {
                let bits = Bits::of(codes, half, self.bits);
                for s in 0..bits.len {
                    levels[start + column(half, s)] = self.level(&bits, s);
                }
            }
        }
        levels
    }

    fn level(&self, bits: &Bits, s: usize) -> f64 {
        if self.bits == 8 {
            // No code is worth −128.
            (bits.read(s, 8) as f64 - 128.0).max(-127.0)
        } else {
            self.book[bits.read(s, 6)]
        }
    }

    /// Calls `deviation(changes)` for every code that the one at column `c` could be: the columns whose values change, and by how much.
    fn deviations(&self, c: usize, levels: &[f64], mut deviation: impl FnMut(&[(usize, f64)])) {
        let (start, half) = (c / GROUP * GROUP, c / 8 % 2);
        let codes = &self.codes[start..self.codes.len().min(start + GROUP)];
        let (bits, s) = (Bits::of(codes, half, self.bits), c % GROUP / 16 * 8 + c % 8);
        let step = self.unit * f64::from(self.scale_codes[c / GROUP]);
        for code in 0..1u16 << self.bits {
            let changed = bits.with(s, code);
            let mut changes = [(0, 0.0); 3];
            // An index reaches six bits ahead: into at most two codes after its own.
            let reached = (0..=s).rev().take(6usize.div_ceil(self.bits)).zip(&mut changes);
            let mut count = 0;
            for (s, change) in reached {
                let column = start + column(half, s);
                *change = (column, step * (self.level(&changed, s) - levels[column]));
                count += 1;
            }
            deviation(&changes[..count]);
        }
    }

    /// The weights, and Δ for their `levels`.
    fn weights_and_delta(&self, levels: &[f64]) -> [Vec<f64>; 2] {
        let weights: Vec<f64> = self.weights.iter().map(|&w| f64::from(w)).collect();
        let step = |c: usize| self.unit * f64::from(self.scale_codes[c / GROUP]);
        let delta = weights.iter().zip(levels).enumerate();
        let delta = delta.map(|(c, (w, level))| step(c) * level - w).collect();
        [weights, delta]
    }

    /// What the players of the row could gain at the residual `R = Δ H`.
    fn count_gains(&self, levels: &[f64], residual: &[f64], hessian: &[f32], check: &mut RowCheck) {
        let n = self.weights.len();
        let h = |i: usize, j: usize| f64::from(hessian[i * n + j]);
        for c in 0..n {
            let mut deviations = Vec::with_capacity(1 << self.bits);
            self.deviations(c, levels, |d| {
                let pull = |i: usize| d.iter().map(|&(j, dj)| h(i, j) * dj).sum::<f64>();
                let change: f64 = d.iter().map(|&(i, di)| di * (2.0 * residual[i] + pull(i))).sum();
                deviations.push((d.iter().map(|&(i, di)| h(i, i) * di * di).sum(), -change));
            });
            check.count(deviations.into_iter());
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
    }
}

/// Rows that read the Hessian together: of a wide layer it fits no cache.
const TOGETHER: usize = 4;

/// Checks a few rows.
fn check(rows: &[Row<'_>], hessian: &[f32]) -> Vec<RowCheck> {
    let levels: Vec<Vec<f64>> = rows.iter().map(Row::levels).collect();
    let pairs = rows.iter().zip(&levels);
    let vectors: Vec<Vec<f64>> = pairs.flat_map(|(row, l)| row.weights_and_delta(l)).collect();
    let products = times_hessian(&vectors, hessian);
    let inner = |i: usize| -> f64 { vectors[i].iter().zip(&products[i]).map(|(v, hv)| v * hv).sum() };
    let checks = rows.iter().zip(&levels).enumerate().map(|(i, (row, levels))| {
        let mut check = RowCheck {
            potential: inner(2 * i + 1),
            energy: inner(2 * i),
            max_gain: 0.0,
            unsettled: 0,
        };
        row.count_gains(levels, &products[2 * i + 1], hessian, &mut check);
        check
    });
    checks.collect()
}

/// Column in its group of code `s` of a half: halves take eight columns in turns.
fn column(half: usize, s: usize) -> usize {
    16 * (s / 8) + 8 * half + s % 8
}

/// The bits of a chain: those of its codes, one after the other, lowest first.
#[derive(Clone, Copy)]
struct Bits {
    /// 16 codes each.
    words: [u128; 2],
    /// Bits per code.
    width: usize,
    /// Codes.
    len: usize,
}

impl Bits {
    /// Of the codes of a half of a group.
    fn of(codes: &[u8], half: usize, width: usize) -> Self {
        let mut bits = Self {
            words: [0; 2],
            width,
            len: 0,
        };
        for s in (0..32).take_while(|&s| column(half, s) < codes.len()) {
            bits.words[s / 16] |= u128::from(codes[column(half, s)]) << (width * (s % 16));
            bits.len += 1;
        }
        bits
    }

    /// With another code at `s`.
    fn with(mut self, s: usize, code: u16) -> Self {
        let (word, at) = (&mut self.words[s / 16], self.width * (s % 16));
        *word &= !(((1u128 << self.width) - 1) << at);
        *word |= u128::from(code) << at;
        self
    }

    /// `count` bits, at most 8, from the first of code `s` on; beyond the chain they are zero.
    fn read(&self, s: usize, count: usize) -> usize {
        let (at, word) = (
            self.width * (s % 16),
            self.words[s / 16] >> (self.width * (s % 16)),
        );
        let left = 16 * self.width - at;
        let next = if s < 16 && left < count {
            self.words[1] << left
        } else {
            0
        };
        (word | next) as usize % (1 << count)
    }
}

/// `v H` of each of the vectors, in `f64`.
fn times_hessian(vectors: &[Vec<f64>], hessian: &[f32]) -> Vec<Vec<f64>> {
    /// Columns whose sums stay in the first-level cache.
    const TILE: usize = 256;
    let n = vectors.first().map_or(0, Vec::len);
    let mut out = vec![vec![0.0f64; n]; vectors.len()];
    pulp::Arch::new().dispatch(|| {
        for tile in (0..n).step_by(TILE) {
            let tile = tile..n.min(tile + TILE);
            for (k, h) in hessian.chunks(n).enumerate() {
                let h = &h[tile.clone()];
                for (v, out) in vectors.iter().zip(&mut out) {
                    let v = v[k];
                    let sums = out[tile.clone()].iter_mut().zip(h);
                    sums.for_each(|(out, &h)| *out += v * f64::from(h));
                }
            }
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
