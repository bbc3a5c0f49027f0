//! Other ways to spend a byte budget than the price of [`market`](crate::market): what the market is compared with, and what refines it.
//!
//! | function | what it is | knows |
//! | --- | --- | --- |
//! | [`greedy`] | the upgrade with the largest fall of loss per byte, again and again | additive losses |
//! | [`knapsack`] | the exact optimum of the additive model (multiple-choice knapsack) | additive losses |
//! | [`clear_with_couplings`] | the market with pairwise terms, an exact potential game | additive and pairwise losses |
//! | [`evolve`] | EvoPress (Sieberling et al. 2024): offspring that trade levels, judged by the true loss | the true loss |
//! | [`refine_prices`] | a particle swarm over the price multipliers of groups of players, judged by the true loss | both |

mod evolution;
mod knapsack;
mod pairwise;
mod swarm;

pub use evolution::{Evolution, evolve};
pub use knapsack::knapsack;
pub use pairwise::{Coupling, PairwiseOutcome, clear_with_couplings, pairwise_regret};
pub use swarm::{Swarm, refine_prices};

use crate::error::GameError;
use crate::market::{Player, check, spend_remainder, total};

/// A profile found by a search, with its true loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Chosen format of every player.
    pub chosen: Vec<usize>,
    /// Its loss as evaluated.
    pub loss: f64,
    /// Evaluations used.
    pub evaluations: usize,
}

/// Starts with everyone's smallest format and buys, as long as one fits, the upgrade with the largest fall of loss per byte.
///
/// # Errors
/// If a player has no choice or the smallest profile exceeds the budget.
pub fn greedy(players: &[Player], budget: u64) -> Result<Vec<usize>, GameError> {
    check(players, budget)?;
    let least = |player: &Player| {
        let choices = player.choices.iter().enumerate();
        choices.min_by_key(|c| c.1.0).map_or(0, |c| c.0)
    };
    let mut chosen = players.iter().map(least).collect::<Vec<_>>();
    spend_remainder(players, budget, &mut chosen);
    Ok(chosen)
}

/// Bytes of a profile.
fn bytes(players: &[Player], chosen: &[usize]) -> u64 {
    total(players, chosen).0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Convex losses of different importance, sizes of 2 to 8 bits.
    pub(super) fn players(importance: &[f64]) -> Vec<Player> {
        let player = |&w: &f64| Player {
            choices: (2..=8).map(|b| (100 * b, w * 0.25f64.powi(b as i32))).collect(),
        };
        importance.iter().map(player).collect()
    }

    #[test]
    fn greedy_serves_the_most_important_first() {
        let players = players(&[1.0, 100.0, 1.0]);
        let chosen = greedy(&players, 1200).unwrap();
        assert_eq!(bytes(&players, &chosen), 1200);
        assert_eq!(chosen, [1, 4, 1]);
        assert!(greedy(&players, 599).is_err());
    }
}
