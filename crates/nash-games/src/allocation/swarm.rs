//! A particle swarm over prices (Kennedy and Eberhart 1995, with the constriction of Clerc and Kennedy 2002).
//!
//! The additive losses of the market are measured on single tensors; together they cost more, and not everywhere by the same factor. A particle is a vector
//! of log-multipliers, one per group of players: the losses of group g count `exp(x_g)` times, which is as if its members paid a price `exp(−x_g)`
//! times the others'. Every particle's market is cleared and judged by the true loss. A particle follows its own best place and the
//! best one among its 7 nearest neighbours, as starlings do (Ballerini et al. 2008).

use rand::{RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

use super::Found;
use crate::error::GameError;
use crate::market::{Player, clear_market};

/// How to search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swarm {
    /// Particles; the first starts at the plain market.
    pub particles: usize,
    /// True losses to evaluate.
    pub evaluations: usize,
    /// Seed.
    pub seed: u64,
}

/// Neighbours that a particle sees.
const NEIGHBOURS: usize = 7;
/// χ of Clerc and Kennedy, by which velocity and pulls are scaled.
const CONSTRICTION: f64 = 0.7298;
/// φ/2: the pull of the own best place, and that of the neighbours'.
const PULL: f64 = 2.05;
/// Half the range of the first log-multipliers: a factor of 2 either way.
const SPREAD: f64 = std::f64::consts::LN_2;

struct Particle {
    x: Vec<f64>,
    velocity: Vec<f64>,
    best: Vec<f64>,
    best_loss: f64,
}

/// Refines the market of `players` within `budget`. `groups[t]` is the group of player t; groups count from 0. `evaluate` tells the true loss
/// of profiles; a profile met before is not evaluated again.
///
/// # Errors
/// Those of `evaluate` and of [`clear_market`].
pub fn refine_prices<E: From<GameError>>(
    players: &[Player],
    groups: &[usize],
    budget: u64,
    rule: Swarm,
    mut evaluate: impl FnMut(&[usize]) -> Result<f64, E>,
) -> Result<Found, E> {
    let count = groups.iter().max().map_or(0, |g| g + 1);
    let mut rng = Pcg64Mcg::seed_from_u64(rule.seed);
    let mut known: Vec<(Vec<usize>, f64)> = Vec::new();
    let mut flock: Vec<Particle> = (0..rule.particles.max(1))
        .map(|i| {
            let mut draw = |spread: f64| -> Vec<f64> {
                (0..count).map(|_| spread * rng.random_range(-1.0..1.0)).collect()
            };
            let (x, velocity) = (draw(if i == 0 { 0.0 } else { SPREAD }), draw(0.5 * SPREAD));
            Particle {
                best: x.clone(),
                x,
                velocity,
                best_loss: f64::INFINITY,
            }
        })
        .collect();
    // Profiles met again cost nothing; a swarm that has settled would never use its evaluations up.
    let rounds = 2 * rule.evaluations.div_ceil(flock.len()).max(1);
    'search: for round in 0..rounds {
        for i in 0..flock.len() {
            if round > 0 {
                steer(&mut flock, i, &mut rng);
            }
            let chosen = respond(players, groups, budget, &flock[i].x)?;
            let loss = match known.iter().find(|k| k.0 == chosen) {
                Some(&(_, loss)) => loss,
                None if known.len() >= rule.evaluations.max(1) => break 'search,
                None => {
                    let loss = evaluate(&chosen)?;
                    known.push((chosen, loss));
                    loss
                }
            };
            let particle = &mut flock[i];
            if loss < particle.best_loss {
                (particle.best_loss, particle.best) = (loss, particle.x.clone());
            }
        }
    }
    let evaluations = known.len();
    let best = known.into_iter().min_by(|a, b| a.1.total_cmp(&b.1));
    // The first particle's first profile is always known.
    let (chosen, loss) = best.ok_or(GameError::NoStrategies { player: 0 })?;
    Ok(Found {
        chosen,
        loss,
        evaluations,
    })
}

/// Moves a particle.
fn steer(flock: &mut [Particle], i: usize, rng: &mut Pcg64Mcg) {
    let distance = |j: &usize| -> f64 {
        let pairs = flock[i].x.iter().zip(&flock[*j].x);
        pairs.map(|(a, b)| (a - b).powi(2)).sum()
    };
    let mut near: Vec<usize> = (0..flock.len()).filter(|&j| j != i).collect();
    near.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.cmp(b)));
    near.truncate(NEIGHBOURS);
    near.push(i);
    near.sort_by(|&a, &b| flock[a].best_loss.total_cmp(&flock[b].best_loss).then(a.cmp(&b)));
    let leader = flock[near[0]].best.clone();
    let Particle {
        x, velocity, best, ..
    } = &mut flock[i];
    for (((x, v), own), lead) in x.iter_mut().zip(velocity).zip(best).zip(leader) {
        let [a, b]: [f64; 2] = [rng.random(), rng.random()];
        *v = CONSTRICTION * (*v + PULL * (a * (*own - *x) + b * (lead - *x)));
        *x += *v;
    }
}

/// The market in which the losses of every group count `exp(x)` times.
fn respond(players: &[Player], groups: &[usize], budget: u64, x: &[f64]) -> Result<Vec<usize>, GameError> {
    let scaled: Vec<Player> = players
        .iter()
        .zip(groups)
        .map(|(player, &group)| Player {
            choices: player
                .choices
                .iter()
                .map(|&(bytes, loss)| (bytes, loss * x[group].exp()))
                .collect(),
        })
        .collect();
    Ok(clear_market(&scaled, budget)?.chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::total;

    /// The true loss of the second group is 30 times what was measured.
    #[test]
    fn finds_what_single_measurements_did_not_tell() {
        let measured = super::super::tests::players(&[1.0; 12]);
        let truth = super::super::tests::players(&[1., 1., 1., 1., 1., 1., 30., 30., 30., 30., 30., 30.]);
        let groups: Vec<usize> = (0..12).map(|i| i / 6).collect();
        let budget = 12 * 400;
        let rule = Swarm {
            particles: 8,
            evaluations: 60,
            seed: 3,
        };
        let calls = std::cell::Cell::new(0);
        let judge = |chosen: &[usize]| {
            calls.set(calls.get() + 1);
            Ok::<_, GameError>(total(&truth, chosen).1)
        };
        let market = judge(&clear_market(&measured, budget).unwrap().chosen).unwrap();
        let found = refine_prices(&measured, &groups, budget, rule, judge).unwrap();
        assert!(
            calls.get() <= 61 && found.evaluations == calls.get() - 1,
            "{found:?}"
        );
        assert!(found.loss < 0.6 * market, "{} {market}", found.loss);
        assert!(total(&measured, &found.chosen).0 <= budget);
        let again = refine_prices(&measured, &groups, budget, rule, judge).unwrap();
        assert_eq!(again, found);
    }
}
