//! One layer: which neuron goes to which expert, and the router.

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};
use half::f16;
use nash_games::carving::{SeatGame, certify_seats, choose, expert_energies, flocks, kept, worths};
use nash_kernels::dense::{self, MatMut, MatRef};
use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;

use crate::options::{CarveOptions, Division, Start};
use crate::report::LayerReport;
use crate::router::{Inputs, Router};
use crate::CarveError;

/// Tokens whose activity decides the flocks: enough to compare neurons, and few enough to compare all pairs.
const FLOCK_TOKENS: usize = 2048;
/// Rounds of tokens and neurons answering each other, at most.
const MAX_ROUNDS: usize = 30;
/// Sweeps of a seat game, at most.
const MAX_SWEEPS: usize = 1000;
/// λ of the router's regression, as a share of the mean energy of a channel per token.
const RIDGE: f64 = 1e-3;

/// What a block reads and computes on the calibration text.
pub(crate) struct Block<'a> {
    /// `[T, d]`.
    pub(crate) x: &'a [f32],
    /// `[T, f]`: what the down projection reads.
    pub(crate) h: &'a [f32],
    /// `[d, f]`.
    pub(crate) down: &'a [f32],
    pub(crate) d: usize,
    pub(crate) f: usize,
    /// `[T, d]`: what the output should have besides, to make up for errors of the layers before; empty for nothing.
    pub(crate) wish: Vec<f32>,
}

/// A carved block.
#[derive(Debug)]
pub(crate) struct Carved {
    /// Neurons of each expert, ascending; the last is the shared expert, which may be empty.
    pub(crate) members: Vec<Vec<usize>>,
    pub(crate) router: Router,
    /// `[E, d]`.
    pub(crate) stand_ins: Vec<f32>,
    /// The down projection fitted to what the router chooses, `[d, f]`, if asked for.
    pub(crate) down: Option<Vec<f32>>,
    /// Energy kept by the router at each number of experts per token from 0 on.
    pub(crate) kept: Vec<f64>,
    /// `[T, d]`: what the dense block gives less what this one gives.
    pub(crate) lost: Vec<f32>,
    pub(crate) report: LayerReport,
}

impl Block<'_> {
    /// Carves the block.
    pub(crate) fn carve(&self, division: Division, options: &CarveOptions) -> Result<Carved, CarveError> {
        let Division { experts, top_k, .. } = division;
        let all = experts + usize::from(division.shared > 0);
        let means = self.means();
        let energies = self.energies(options.stand_ins.then_some(&means));
        let total: f64 = energies.iter().map(|&a| f64::from(a)).sum();
        let mut seats = self.start(&energies, division, options)?;
        let mut report = LayerReport::default();
        let share = |seats: &[u16], chosen: &[f32]| kept(&expert_energies(&energies, seats, all), chosen) / total;
        let oracle = |seats: &[u16]| choose(&expert_energies(&energies, seats, all), all, experts, top_k);
        report.top_k = top_k;
        report.kept_at_start = share(&seats, &oracle(&seats));

        // Tokens and neurons answer each other until neither gains.
        for _ in 0..MAX_ROUNDS {
            let chosen = oracle(&seats);
            let worths = worths(&energies, &chosen, self.f, all);
            let played = SeatGame::new(&worths, all)?.play(&mut seats, MAX_SWEEPS)?;
            report.rounds += 1;
            report.swaps += played.swaps;
            if played.swaps == 0 {
                report.settled = true;
                report.max_regret = certify_seats(&worths, all, &seats)?.max_regret / total;
                break;
            }
        }
        report.kept_by_choice = share(&seats, &oracle(&seats));

        // The router leads; neurons answer to what it chooses.
        let inputs = Inputs::new(self.x, self.d, RIDGE)?;
        let scale: Vec<f32> = energies.par_chunks(self.f).map(|row| row.iter().sum::<f32>()).collect();
        let target = |seats: &[u16]| {
            let mut y: Vec<f32> = expert_energies(&energies, seats, all)
                .chunks_exact(all)
                .flat_map(|row| row[..experts].to_vec())
                .collect();
            for (row, &s) in y.chunks_exact_mut(experts).zip(&scale) {
                row.iter_mut().for_each(|v| *v = options.target.apply(*v, s));
            }
            y
        };
        let pad = |scores: Vec<f32>| -> Vec<f32> {
            if all == experts {
                return scores;
            }
            scores.chunks_exact(experts).flat_map(|row| row.iter().copied().chain([0.0])).collect()
        };
        let mut router = inputs.fit(&target(&seats), experts);
        let mut chosen = choose(&pad(router.scores(self.x)), all, experts, top_k);
        let mut best = share(&seats, &chosen);
        report.kept_by_first_router = best;
        for _ in 0..options.router_rounds {
            let worths = worths(&energies, &chosen, self.f, all);
            let mut moved = seats.clone();
            SeatGame::new(&worths, all)?.play(&mut moved, MAX_SWEEPS)?;
            let refit = inputs.fit(&target(&moved), experts);
            let rechosen = choose(&pad(refit.scores(self.x)), all, experts, top_k);
            let now = share(&moved, &rechosen);
            if now <= best {
                break;
            }
            (seats, router, chosen, best) = (moved, refit, rechosen, now);
            report.router_rounds += 1;
        }
        report.kept_by_router = best;

        let mut members = vec![Vec::new(); experts + 1];
        for (neuron, &seat) in seats.iter().enumerate() {
            members[usize::from(seat)].push(neuron);
        }
        let scores = pad(router.scores(self.x));
        let of_experts = expert_energies(&energies, &seats, all);
        let kept = (0..=experts).map(|k| kept(&of_experts, &choose(&scores, all, experts, k)) / total).collect();
        report.kept_dynamic = {
            let mut every: Vec<f32> = scores.chunks_exact(all).flat_map(|r| r[..experts].to_vec()).collect();
            let n = every.len() - top_k * (self.h.len() / self.f);
            let at = n.min(every.len() - 1);
            let t = *every.select_nth_unstable_by(at, f32::total_cmp).1;
            let mask: Vec<f32> = scores.iter().enumerate().map(|(i, &s)| if i % all >= experts || s >= t { 1.0 } else { 0.0 }).collect();
            nash_games::carving::kept(&of_experts, &mask) / total
        };
        let stand_ins = if options.stand_ins {
            self.stand_ins(&members[..experts], &chosen, all)
        } else {
            Vec::new()
        };
        let part = self.part(&members, &chosen, all);
        let y = self.product(self.h, self.down);
        let mut lost = y.clone();
        subtract(&mut lost, &self.product(&part, self.down));
        for (lost, chosen) in lost.chunks_exact_mut(self.d).zip(chosen.chunks_exact(all)) {
            for (row, _) in stand_ins.chunks_exact(self.d).zip(chosen).filter(|(_, c)| **c == 0.0) {
                subtract(lost, row);
            }
        }
        report.error = relative(&y, &lost, self.d);
        let down = match options.refit {
            None => None,
            Some(ridge) => {
                let fitted = self.refit(&part, &y, &lost, ridge)?;
                lost.clone_from(&y);
                subtract(&mut lost, &self.product(&part, &fitted));
                report.error_refit = relative(&y, &lost, self.d);
                Some(fitted)
            }
        };
        report.random = (top_k as f64 * (self.f - division.shared) as f64 / experts as f64
            + division.shared as f64)
            / self.f as f64;
        Ok(Carved {
            members,
            router,
            stand_ins,
            down,
            kept,
            lost,
            report,
        })
    }

    fn means(&self) -> Vec<f32> {
        let mut means = vec![0.0f64; self.f];
        for row in self.h.chunks_exact(self.f) {
            means.iter_mut().zip(row).for_each(|(m, &h)| *m += f64::from(h));
        }
        let tokens = (self.h.len() / self.f) as f64;
        means.into_iter().map(|m| (m / tokens) as f32).collect()
    }

    /// Energies `[T, f]`, each token's divided by its own total plus the mean one: a few tokens of huge activations must not decide alone.
    fn energies(&self, means: Option<&Vec<f32>>) -> Vec<f32> {
        let mut norms = vec![0.0f32; self.f];
        for row in self.down.chunks_exact(self.f) {
            norms.iter_mut().zip(row).for_each(|(n, w)| *n += w * w);
        }
        let zeros = vec![0.0; self.f];
        let means = means.unwrap_or(&zeros);
        let mut energies = vec![0.0; self.h.len()];
        energies
            .par_chunks_mut(self.f)
            .zip(self.h.par_chunks(self.f))
            .for_each(|(out, h)| {
                for (((out, h), m), n) in out.iter_mut().zip(h).zip(means).zip(&norms) {
                    *out = (h - m) * (h - m) * n;
                }
            });
        let totals: Vec<f64> = energies
            .par_chunks(self.f)
            .map(|row| row.iter().map(|&v| f64::from(v)).sum())
            .collect();
        let mean = median(totals.clone());
        energies
            .par_chunks_mut(self.f)
            .zip(&totals)
            .for_each(|(row, total)| {
                let weight = (1.0 / (total + mean)) as f32;
                row.iter_mut().for_each(|v| *v *= weight);
            });
        energies
    }

    /// The start of the game.
    fn start(&self, energies: &[f32], division: Division, options: &CarveOptions) -> Result<Vec<u16>, CarveError> {
        let Division { experts, shared, width, .. } = division;
        let mut order: Vec<usize> = (0..self.f).collect();
        match options.start {
            Start::InOrder => {}
            Start::Random => order.shuffle(&mut Pcg64Mcg::seed_from_u64(options.seed)),
            Start::Flocks => {
                let mut totals = vec![0.0f64; self.f];
                for row in energies.chunks_exact(self.f) {
                    totals.iter_mut().zip(row).for_each(|(t, &a)| *t += f64::from(a));
                }
                order.sort_by(|&a, &b| totals[b].total_cmp(&totals[a]).then(a.cmp(&b)));
            }
        }
        // The first of the order are shared.
        let mut seats = vec![experts as u16; self.f];
        let routed = &order[shared..];
        if options.start != Start::Flocks {
            for (place, &neuron) in routed.iter().enumerate() {
                seats[neuron] = (place / width) as u16;
            }
            return Ok(seats);
        }
        let tokens = self.h.len() / self.f;
        let step = tokens.div_ceil(FLOCK_TOKENS).max(1);
        let seen: Vec<usize> = (0..tokens).step_by(step).collect();
        let activity: Vec<f32> = routed
            .par_iter()
            .flat_map_iter(|&i| seen.iter().map(move |&t| energies[t * self.f + i].sqrt()))
            .collect();
        let found = flocks(&activity, routed.len(), &vec![width; experts])?;
        for (&neuron, seat) in routed.iter().zip(found) {
            seats[neuron] = seat;
        }
        Ok(seats)
    }

    /// The mean answer of each expert to the tokens that did not choose it, `[E, d]`; the mean over all tokens where everybody chose it.
    fn stand_ins(&self, members: &[Vec<usize>], chosen: &[f32], all: usize) -> Vec<f32> {
        let mut out = vec![0.0; members.len() * self.d];
        out.par_chunks_mut(self.d).zip(members).enumerate().for_each(|(e, (out, members))| {
            let mut sums = vec![0.0f64; members.len()];
            let mut absent = 0u64;
            for (h, chosen) in self.h.chunks_exact(self.f).zip(chosen.chunks_exact(all)) {
                if chosen[e] == 0.0 {
                    absent += 1;
                    sums.iter_mut().zip(members).for_each(|(s, &i)| *s += f64::from(h[i]));
                }
            }
            let scale = 1.0 / absent.max(1) as f64;
            for (out, row) in out.iter_mut().zip(self.down.chunks_exact(self.f)) {
                let sum: f64 = members.iter().zip(&sums).map(|(&i, s)| s * f64::from(row[i])).sum();
                *out = (sum * scale) as f32;
            }
        });
        out
    }

    /// What the chosen experts compute: `h` with the neurons of the others at zero, `[T, f]`.
    fn part(&self, members: &[Vec<usize>], chosen: &[f32], all: usize) -> Vec<f32> {
        let mut seat = vec![0usize; self.f];
        for (e, members) in members.iter().enumerate() {
            members.iter().for_each(|&i| seat[i] = e);
        }
        let mut part = self.h.to_vec();
        part.par_chunks_mut(self.f)
            .zip(chosen.par_chunks(all))
            .for_each(|(h, chosen)| {
                for (h, &e) in h.iter_mut().zip(&seat) {
                    *h *= chosen.get(e).copied().unwrap_or(1.0);
                }
            });
        part
    }

    /// `h [T, f] · downᵀ`, `[T, d]`.
    fn product(&self, h: &[f32], down: &[f32]) -> Vec<f32> {
        let tokens = h.len() / self.f;
        let mut y = vec![0.0; tokens * self.d];
        dense::gemm(
            1.0,
            MatRef::row_major(h, tokens, self.f),
            MatRef::row_major(down, self.d, self.f).t(),
            0.0,
            MatMut::row_major(&mut y, tokens, self.d),
        );
        y
    }

    /// The down projection `W'` that errs least on what the chosen experts compute: `Σ_t ‖lost + wish − (W' − W) part‖² / (‖y‖² + mean) + λ‖W' − W‖²`,
    /// λ a share of the mean energy of a neuron.
    fn refit(&self, part: &[f32], y: &[f32], lost: &[f32], ridge: f64) -> Result<Vec<f32>, CarveError> {
        let (d, f) = (self.d, self.f);
        let tokens = part.len() / f;
        let energies: Vec<f64> = y.chunks_exact(d).map(energy).collect();
        let mean = median(energies.clone());
        let weights: Vec<f32> = energies.iter().map(|e| (mean / (e + mean)).sqrt() as f32).collect();
        let mut z = part.to_vec();
        let mut r = lost.to_vec();
        if !self.wish.is_empty() {
            r.iter_mut().zip(&self.wish).for_each(|(r, w)| *r += w);
        }
        for ((z, r), &w) in z.chunks_exact_mut(f).zip(r.chunks_exact_mut(d)).zip(&weights) {
            z.iter_mut().for_each(|v| *v *= w);
            r.iter_mut().for_each(|v| *v *= w);
        }
        let mut gram = vec![0.0f32; f * f];
        dense::gram_accumulate(&z, tokens, f, &mut gram);
        let mut right = vec![0.0f32; f * d];
        dense::gemm(
            1.0,
            MatRef::row_major(&z, tokens, f).t(),
            MatRef::row_major(&r, tokens, d),
            0.0,
            MatMut::row_major(&mut right, f, d),
        );
        let mean = (0..f).map(|i| f64::from(gram[i * f + i])).sum::<f64>() / f as f64;
        let own = |i: usize| (f64::from(gram[i * f + i]) * mean).sqrt();
        let matrix = Mat::from_fn(f, f, |i, j| {
            f64::from(gram[i * f + j]) + if i == j { ridge * own(i) + 1e-6 * mean } else { 0.0 }
        });
        let factor = matrix.llt(Side::Lower).map_err(|_| CarveError::Singular)?;
        let change = factor.solve(&Mat::from_fn(f, d, |i, j| f64::from(right[i * d + j])));
        let fitted = self.down.iter().enumerate().map(|(k, &w)| {
            // As it will be stored.
            f16::from_f64(f64::from(w) + change[(k % f, k / f)]).to_f32()
        });
        Ok(fitted.collect())
    }
}

/// The median, 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

fn subtract(from: &mut [f32], v: &[f32]) {
    from.iter_mut().zip(v).for_each(|(a, b)| *a -= b);
}

fn energy(v: &[f32]) -> f64 {
    v.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
}

/// `Σ‖lost‖² / Σ‖y‖²`, tokens weighted as energies are.
fn relative(y: &[f32], lost: &[f32], d: usize) -> f64 {
    let each: Vec<(f64, f64)> = y
        .chunks_exact(d)
        .zip(lost.chunks_exact(d))
        .map(|(y, lost)| (energy(y), energy(lost)))
        .collect();
    let mean = median(each.iter().map(|e| e.0).collect());
    let weighted = each.iter().map(|(y, lost)| (y / (y + mean), lost / (y + mean)));
    let (y, lost) = weighted.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    lost / y
}
