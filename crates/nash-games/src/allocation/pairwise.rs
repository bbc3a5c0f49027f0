//! The market with pairwise terms (design of CoopQ: additive losses fail where errors add up coherently).
//!
//! Players t and s that are neighbours lose together `b_ts(f, g) = c_ts · √(a_t(f) · a_s(g))` beyond what each loses alone: to second order the excess of two changes
//! grows with the root of the product of their own losses. The term is the same for both, so
//! `Φ = Σ a_t + Σ b_ts + λ · bytes` is an exact potential, sequential best responses lower it and end in an equilibrium at the price λ; the price is bisected until the
//! bytes fit.

use super::bytes;
use crate::error::GameError;
use crate::market::{Player, check, clear_market, spend_by};

/// Two neighbours.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coupling {
    /// The players.
    pub players: [usize; 2],
    /// c: excess loss over the root of the product of the own losses.
    pub strength: f64,
}

/// The cleared market.
#[derive(Debug, Clone, PartialEq)]
pub struct PairwiseOutcome {
    /// Chosen format of every player.
    pub chosen: Vec<usize>,
    /// Price, loss per byte.
    pub price: f64,
    /// Loss with the pairwise terms.
    pub loss: f64,
    /// Bytes.
    pub bytes: u64,
    /// Largest gain any player could make at the price by another format that the unspent bytes allow.
    pub max_regret: f64,
}

/// Sweeps of best responses at one price, at most; the potential ends play long before.
const MOST_SWEEPS: usize = 1000;

struct Game<'a> {
    players: &'a [Player],
    /// Per player: (neighbour, strength).
    neighbours: Vec<Vec<(usize, f64)>>,
}

/// Clears the market with couplings.
///
/// # Errors
/// If a player has no choice, a coupling names a player who is not there, or the smallest profile exceeds the budget.
pub fn clear_with_couplings(
    players: &[Player],
    couplings: &[Coupling],
    budget: u64,
) -> Result<PairwiseOutcome, GameError> {
    check(players, budget)?;
    let additive = clear_market(players, budget)?;
    let mut neighbours = vec![Vec::new(); players.len()];
    for &Coupling {
        players: [a, b],
        strength,
    } in couplings
    {
        if a == b || a.max(b) >= players.len() {
            return Err(GameError::NoStrategies { player: a.max(b) });
        }
        neighbours[a].push((b, strength));
        neighbours[b].push((a, strength));
    }
    let game = Game { players, neighbours };
    let (mut low, mut high) = (0.0, additive.price.max(1e-15));
    let mut chosen = game.settle(additive.chosen.clone(), high);
    while bytes(players, &chosen) > budget {
        (low, high) = (high, 4.0 * high);
        chosen = game.settle(additive.chosen.clone(), high);
    }
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        let candidate = game.settle(additive.chosen.clone(), middle);
        if bytes(players, &candidate) <= budget {
            (high, chosen) = (middle, candidate);
        } else {
            low = middle;
        }
    }
    spend_by(players, budget, &mut chosen, |chosen, t, f| {
        let now = game.loss(chosen, t, chosen[t]);
        let gain = now - game.loss(chosen, t, f);
        // A gain within the rounding of the sums is none.
        if gain > 1e-12 * now.abs() { gain } else { 0.0 }
    });
    let mut outcome = PairwiseOutcome {
        price: high,
        loss: pairwise_loss(players, couplings, &chosen),
        bytes: bytes(players, &chosen),
        chosen,
        max_regret: 0.0,
    };
    outcome.max_regret = pairwise_regret(players, couplings, &outcome, budget);
    Ok(outcome)
}

impl Game<'_> {
    /// What player t loses with format f, the others' formats given: its own loss and all its pairwise terms.
    fn loss(&self, chosen: &[usize], t: usize, f: usize) -> f64 {
        let own = self.players[t].choices[f].1;
        let pairs = self.neighbours[t].iter();
        own + pairs
            .map(|&(s, c)| c * (own * self.players[s].choices[chosen[s]].1).max(0.0).sqrt())
            .sum::<f64>()
    }

    /// Best responses one after the other until nobody moves.
    fn settle(&self, mut chosen: Vec<usize>, price: f64) -> Vec<usize> {
        for _ in 0..MOST_SWEEPS {
            let mut moved = false;
            for t in 0..self.players.len() {
                let cost = |f: usize| self.loss(&chosen, t, f) + price * self.players[t].choices[f].0 as f64;
                let now = cost(chosen[t]);
                let best = (0..self.players[t].choices.len()).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
                // A gain within the rounding of the sums is none.
                if let Some(best) = best.filter(|&f| cost(f) < now - 1e-12 * now.abs()) {
                    (chosen[t], moved) = (best, true);
                }
            }
            if !moved {
                break;
            }
        }
        chosen
    }
}

/// Loss of a profile with its pairwise terms.
fn pairwise_loss(players: &[Player], couplings: &[Coupling], chosen: &[usize]) -> f64 {
    let own = |t: usize| players[t].choices[chosen[t]].1;
    let pair = |c: &Coupling| c.strength * (own(c.players[0]) * own(c.players[1])).max(0.0).sqrt();
    (0..players.len()).map(own).sum::<f64>() + couplings.iter().map(pair).sum::<f64>()
}

/// The largest gain a player could make at the price without exceeding the budget: differences of whole profiles, none of the solver's code.
pub fn pairwise_regret(
    players: &[Player],
    couplings: &[Coupling],
    outcome: &PairwiseOutcome,
    budget: u64,
) -> f64 {
    let mut worst = 0.0f64;
    for (t, player) in players.iter().enumerate() {
        for f in 0..player.choices.len() {
            let mut other = outcome.chosen.clone();
            other[t] = f;
            let size = bytes(players, &other);
            if size > budget {
                continue;
            }
            let payment = outcome.price * size.saturating_sub(outcome.bytes) as f64;
            worst = worst.max(outcome.loss - pairwise_loss(players, couplings, &other) - payment);
        }
    }
    worst
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn clears_without_regret(
            importance in proptest::collection::vec(0.1f64..100.0, 2..9),
            pairs in proptest::collection::vec((0usize..9, 0usize..9, -0.5f64..2.0), 0..12),
            extra in 0u64..2000,
        ) {
            let players = super::super::tests::players(&importance);
            let n = players.len();
            let couplings: Vec<Coupling> = pairs
                .into_iter()
                .map(|(a, b, strength)| Coupling { players: [a % n, b % n], strength })
                .filter(|c| c.players[0] != c.players[1])
                .collect();
            let budget = n as u64 * 200 + extra;
            let outcome = clear_with_couplings(&players, &couplings, budget).unwrap();
            prop_assert!(outcome.bytes <= budget);
            prop_assert!(outcome.max_regret <= 1e-9 * (1.0 + outcome.loss.abs()), "{outcome:?}");
        }
    }

    #[test]
    fn coupled_players_get_more() {
        let players = super::super::tests::players(&[1.0; 4]);
        let together = Coupling {
            players: [0, 1],
            strength: 6.0,
        };
        let outcome = clear_with_couplings(&players, &[together], 4 * 400).unwrap();
        assert!(outcome.chosen[0] + outcome.chosen[1] > outcome.chosen[2] + outcome.chosen[3]);
        let additive = clear_with_couplings(&players, &[], 4 * 400).unwrap();
        assert_eq!(additive.chosen, clear_market(&players, 4 * 400).unwrap().chosen);
    }
}
