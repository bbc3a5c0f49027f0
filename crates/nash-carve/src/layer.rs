//! One layer: which neuron goes to which expert, and the router.

use nash_games::carving::{Played, SeatGame, certify_seats, choose, expert_energies, flocks, kept, worths};
use nash_kernels::dense::{self, MatMut, MatRef};
use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;

use crate::CarveError;
use crate::options::{CarveOptions, Division, Start};
use crate::report::LayerReport;
use crate::router::{Inputs, Router};

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
}

/// A carved block.
#[derive(Debug)]
pub(crate) struct Carved {
    /// Neurons of each expert, ascending; the last is the shared expert, which may be empty.
    pub(crate) members: Vec<Vec<usize>>,
    pub(crate) router: Router,
    /// Energy kept by the router at each number of experts per token from 0 on, a share.
    pub(crate) kept: Vec<f64>,
    /// `[T, d]`: what the dense block gives less what this one gives.
    pub(crate) lost: Vec<f32>,
    pub(crate) report: LayerReport,
}

/// A block whose neurons take seats.
struct Table<'a> {
    division: Division,
    /// Experts, the shared one included.
    all: usize,
    /// `[T, f]`.
    energies: &'a [f32],
    f: usize,
    total: f64,
}

impl Table<'_> {
    /// Share of the energy that is kept.
    fn kept(&self, seats: &[u16], chosen: &[f32]) -> f64 {
        kept(&expert_energies(self.energies, seats, self.all), chosen) / self.total
    }

    /// What tokens choose that see the energies.
    fn best_choice(&self, seats: &[u16]) -> Vec<f32> {
        self.choice(
            &expert_energies(self.energies, seats, self.all),
            self.division.top_k,
        )
    }

    fn choice(&self, scores: &[f32], k: usize) -> Vec<f32> {
        choose(scores, self.all, self.division.experts, k)
    }

    /// Scores `[T, all]` of a router, with zeros for the shared expert.
    fn scores(&self, router: &Router, x: &[f32]) -> Vec<f32> {
        let scores = router.scores(x);
        if self.all == self.division.experts {
            return scores;
        }
        let rows = scores.chunks_exact(self.division.experts);
        rows.flat_map(|row| row.iter().copied().chain([0.0])).collect()
    }

    /// What a router shall estimate, `[T, E]`: the root of each routed expert's share of the token's energy.
    fn targets(&self, seats: &[u16]) -> Vec<f32> {
        let all = expert_energies(self.energies, seats, self.all);
        let rows = all.chunks_exact(self.all);
        rows.flat_map(|row| {
            let total: f32 = row.iter().sum::<f32>().max(f32::MIN_POSITIVE);
            row[..self.division.experts]
                .iter()
                .map(move |a| (a / total).sqrt())
        })
        .collect()
    }

    /// Neurons answer to the choice of the tokens, to an equilibrium.
    fn answer(&self, seats: &mut [u16], chosen: &[f32]) -> Result<Played, CarveError> {
        let worths = worths(self.energies, chosen, self.f, self.all);
        Ok(SeatGame::new(&worths, self.all)?.play(seats, MAX_SWEEPS)?)
    }

    fn certify(&self, seats: &[u16], chosen: &[f32]) -> Result<f64, CarveError> {
        let worths = worths(self.energies, chosen, self.f, self.all);
        Ok(certify_seats(&worths, self.all, seats)?.max_regret / self.total)
    }
}

impl Block<'_> {
    /// Carves the block.
    pub(crate) fn carve(&self, division: Division, options: &CarveOptions) -> Result<Carved, CarveError> {
        let energies = self.energies();
        let table = Table {
            division,
            all: division.experts + usize::from(division.shared > 0),
            energies: &energies,
            f: self.f,
            total: energies.iter().map(|&a| f64::from(a)).sum(),
        };
        let mut seats = self.start(&energies, division, options)?;
        let mut report = LayerReport {
            top_k: division.top_k,
            kept_at_start: table.kept(&seats, &table.best_choice(&seats)),
            ..LayerReport::default()
        };
        // Tokens and neurons answer each other until neither gains.
        while report.rounds < MAX_ROUNDS && !report.settled {
            let chosen = table.best_choice(&seats);
            let played = table.answer(&mut seats, &chosen)?;
            report.rounds += 1;
            report.swaps += played.swaps;
            report.settled = played.settled && played.swaps == 0;
        }
        let chosen = table.best_choice(&seats);
        report.kept_by_choice = table.kept(&seats, &chosen);
        report.choice_regret = table.certify(&seats, &chosen)?;

        let router = self.lead(&table, &mut seats, options.router_rounds, &mut report)?;
        let scores = table.scores(&router, self.x);
        let chosen = table.choice(&scores, division.top_k);
        report.kept_by_router = table.kept(&seats, &chosen);
        report.max_regret = table.certify(&seats, &chosen)?;
        report.kept_at_random = (division.shared + division.top_k * division.width) as f64 / self.f as f64;
        let ks = 0..=division.experts;
        let kept = ks
            .map(|k| table.kept(&seats, &table.choice(&scores, k)))
            .collect();

        let lost = self.lost(&seats, &chosen, table.all);
        report.error = relative(&self.product(self.h), &lost, self.d);
        let mut members = vec![Vec::new(); division.experts + 1];
        for (neuron, &seat) in seats.iter().enumerate() {
            members[usize::from(seat)].push(neuron);
        }
        Ok(Carved {
            members,
            router,
            kept,
            lost,
            report,
        })
    }

    /// The router leads: it is fitted, neurons answer to what tokens choose by it, it is fitted again, as long as more energy is kept. Neurons have the last word, so
    /// that they are in equilibrium with the router that is returned.
    fn lead(
        &self,
        table: &Table<'_>,
        seats: &mut [u16],
        rounds: usize,
        report: &mut LayerReport,
    ) -> Result<Router, CarveError> {
        let (experts, k) = (table.division.experts, table.division.top_k);
        let inputs = Inputs::new(self.x, self.d, RIDGE)?;
        let mut router = inputs.fit(&table.targets(seats), experts);
        let mut chosen = table.choice(&table.scores(&router, self.x), k);
        report.kept_by_first_router = table.kept(seats, &chosen);
        for round in 0.. {
            table.answer(seats, &chosen)?;
            let kept = table.kept(seats, &chosen);
            if round == rounds {
                break;
            }
            let refit = inputs.fit(&table.targets(seats), experts);
            let rechosen = table.choice(&table.scores(&refit, self.x), k);
            if table.kept(seats, &rechosen) <= kept {
                break;
            }
            (router, chosen) = (refit, rechosen);
            report.router_rounds += 1;
        }
        Ok(router)
    }

    /// Energies `[T, f]`, each token's divided by its own total plus the median one: a few tokens of huge activations must not decide alone.
    fn energies(&self) -> Vec<f32> {
        let mut norms = vec![0.0f32; self.f];
        for row in self.down.chunks_exact(self.f) {
            norms.iter_mut().zip(row).for_each(|(n, w)| *n += w * w);
        }
        let mut energies = vec![0.0; self.h.len()];
        energies
            .par_chunks_mut(self.f)
            .zip(self.h.par_chunks(self.f))
            .for_each(|(out, h)| {
                for ((out, h), n) in out.iter_mut().zip(h).zip(&norms) {
                    *out = h * h * n;
                }
            });
        let totals: Vec<f64> = energies
            .par_chunks(self.f)
            .map(|row| row.iter().map(|&v| f64::from(v)).sum())
            .collect();
        let middle = median(totals.clone());
        energies
            .par_chunks_mut(self.f)
            .zip(&totals)
            .for_each(|(row, total)| {
                let weight = (1.0 / (total + middle)) as f32;
                row.iter_mut().for_each(|v| *v *= weight);
            });
        energies
    }

    /// The start of the game.
    fn start(
        &self,
        energies: &[f32],
        division: Division,
        options: &CarveOptions,
    ) -> Result<Vec<u16>, CarveError> {
        let Division {
            experts,
            shared,
            width,
            ..
        } = division;
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

    /// What the neurons of experts that were not chosen would add to the output, `[T, d]`.
    fn lost(&self, seats: &[u16], chosen: &[f32], all: usize) -> Vec<f32> {
        let mut absent = self.h.to_vec();
        absent
            .par_chunks_mut(self.f)
            .zip(chosen.par_chunks(all))
            .for_each(|(h, chosen)| {
                for (h, &e) in h.iter_mut().zip(seats) {
                    *h *= 1.0 - chosen[usize::from(e)];
                }
            });
        self.product(&absent)
    }

    /// `h [T, f] · downᵀ`, `[T, d]`.
    fn product(&self, h: &[f32]) -> Vec<f32> {
        let tokens = h.len() / self.f;
        let mut y = vec![0.0; tokens * self.d];
        dense::gemm(
            1.0,
            MatRef::row_major(h, tokens, self.f),
            MatRef::row_major(self.down, self.d, self.f).t(),
            0.0,
            MatMut::row_major(&mut y, tokens, self.d),
        );
        y
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
    let middle = median(each.iter().map(|e| e.0).collect());
    let weighted = each
        .iter()
        .map(|(y, lost)| (y / (y + middle), lost / (y + middle)));
    let (y, lost) = weighted.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    lost / y
}
