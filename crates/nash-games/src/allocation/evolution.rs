//! Evolutionary search (EvoPress; Sieberling et al. 2024): a parent, offspring that trade levels within the budget, the best survives.

use rand::{Rng, RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

use super::{Found, bytes};
use crate::error::GameError;
use crate::market::{Player, check};

/// How to search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evolution {
    /// True losses to evaluate, the parent's included.
    pub evaluations: usize,
    /// Offspring of a generation.
    pub offspring: usize,
    /// Seed.
    pub seed: u64,
}

/// Level switches of one offspring at most; the number is the smaller of two draws (the paper's rule).
const MOST_SWITCHES: usize = 3;
/// Attempts at a switch that fits, before an offspring is left as it is.
const ATTEMPTS: usize = 256;

/// Evolves `parent`, a profile within the budget. Choices of every player stand in order of their size; of the players only sizes
/// are read. `evaluate` tells the true loss of profiles.
///
/// # Errors
/// Those of `evaluate`; if the parent does not fit the budget.
pub fn evolve<E: From<GameError>>(
    players: &[Player],
    parent: Vec<usize>,
    budget: u64,
    rule: Evolution,
    mut evaluate: impl FnMut(&[usize]) -> Result<f64, E>,
) -> Result<Found, E> {
    check(players, budget)?;
    let size = bytes(players, &parent);
    if size > budget {
        return Err(GameError::BudgetTooSmall {
            budget,
            smallest: size,
        }
        .into());
    }
    let mut rng = Pcg64Mcg::seed_from_u64(rule.seed);
    let mut best = Found {
        loss: evaluate(&parent)?,
        chosen: parent,
        evaluations: 1,
    };
    while best.evaluations < rule.evaluations {
        let generation = rule.offspring.max(1).min(rule.evaluations - best.evaluations);
        let parent = best.chosen.clone();
        for _ in 0..generation {
            let child = mutate(players, &parent, budget, &mut rng);
            let loss = evaluate(&child)?;
            best.evaluations += 1;
            if loss < best.loss {
                (best.chosen, best.loss) = (child, loss);
            }
        }
    }
    Ok(best)
}

/// A copy in which a few players went up a level and others down, so that it fits the budget.
fn mutate(players: &[Player], parent: &[usize], budget: u64, rng: &mut impl Rng) -> Vec<usize> {
    let mut child = parent.to_vec();
    let mut draw = || rng.random_range(1..=MOST_SWITCHES);
    let switches = draw().min(draw());
    let mut done = 0;
    for _ in 0..ATTEMPTS {
        if done == switches {
            break;
        }
        let mut trial = child.clone();
        let up = rng.random_range(0..players.len());
        if trial[up] + 1 >= players[up].choices.len() {
            continue;
        }
        trial[up] += 1;
        for _ in 0..ATTEMPTS {
            if bytes(players, &trial) <= budget {
                break;
            }
            let down = rng.random_range(0..players.len());
            if down != up && trial[down] > 0 {
                trial[down] -= 1;
            }
        }
        if bytes(players, &trial) <= budget {
            child = trial;
            done += 1;
        }
    }
    child
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::total;

    #[test]
    fn finds_its_way_within_the_budget_and_the_evaluations() {
        let players = super::super::tests::players(&[1.0, 50.0, 1.0, 1.0, 20.0, 1.0]);
        let (budget, start) = (6 * 400, vec![2; 6]);
        let before = total(&players, &start).1;
        let rule = Evolution {
            evaluations: 200,
            offspring: 8,
            seed: 1,
        };
        let mut calls = 0;
        let found = evolve(&players, start.clone(), budget, rule, |chosen| {
            calls += 1;
            assert!(bytes(&players, chosen) <= budget);
            Ok::<_, GameError>(total(&players, chosen).1)
        })
        .unwrap();
        assert_eq!((calls, found.evaluations), (200, 200));
        // The best profile gives the two important players a level more each.
        assert!(found.loss < 0.5 * before, "{found:?}, {before}");
        assert_eq!(found.loss, total(&players, &found.chosen).1);
        let again = evolve(&players, start, budget, rule, |chosen| {
            Ok::<_, GameError>(total(&players, chosen).1)
        });
        assert_eq!(again.unwrap(), found);
    }
}
