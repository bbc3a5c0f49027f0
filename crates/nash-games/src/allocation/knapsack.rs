//! The exact optimum of additive losses under a byte budget: the multiple-choice knapsack problem.
//!
//! Player by player, a list of the undominated (bytes, loss) of the players so far is kept (Nemhauser and Ullmann 1969). A state is
//! dropped if even the Lagrangian bound on what the remaining players must lose leaves it no better than the best profile known, the
//! market's (Everett 1963): that keeps the lists short.

use crate::error::GameError;
use crate::market::{Player, check, clear_market, total};

/// States kept per player. If there are more, those with the best bounds are kept and the result may miss the optimum.
const MOST_STATES: usize = 1 << 18;
/// Prices of the bounds, relative to the market's.
const PRICES: [f64; 9] = [0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0];

struct State {
    bytes: u64,
    loss: f64,
    /// Index of the state before, and the choice made.
    before: u32,
    choice: u32,
}

/// The profile of least total loss within the budget, and whether that is proven.
///
/// # Errors
/// If a player has no choice or the smallest profile exceeds the budget.
pub fn knapsack(players: &[Player], budget: u64) -> Result<(Vec<usize>, bool), GameError> {
    check(players, budget)?;
    let market = clear_market(players, budget)?;
    let bounds = Bounds::new(players, market.price, budget);
    let mut proven = true;
    let mut layers: Vec<Vec<State>> = Vec::with_capacity(players.len());
    let root = [State {
        bytes: 0,
        loss: 0.0,
        before: 0,
        choice: 0,
    }];
    for (depth, player) in players.iter().enumerate() {
        let from = layers.last().map_or(&root[..], Vec::as_slice);
        let mut next = Vec::with_capacity(from.len() * player.choices.len());
        for (before, state) in from.iter().enumerate() {
            for (choice, &(bytes, loss)) in player.choices.iter().enumerate() {
                let state = State {
                    bytes: state.bytes.saturating_add(bytes),
                    loss: state.loss + loss,
                    before: before as u32,
                    choice: choice as u32,
                };
                // Not "no better": of equal profiles one must survive.
                if bounds.of(depth + 1, &state).is_some_and(|b| b <= market.loss) {
                    next.push(state);
                }
            }
        }
        next.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)));
        let mut least = f64::INFINITY;
        next.retain(|state| {
            let better = state.loss < least;
            least = least.min(state.loss);
            better
        });
        if next.len() > MOST_STATES {
            proven = false;
            let bound = |s: &State| bounds.of(depth + 1, s).unwrap_or(f64::INFINITY);
            next.sort_by(|a, b| bound(a).total_cmp(&bound(b)));
            next.truncate(MOST_STATES);
        }
        layers.push(next);
    }
    let last = layers.last().and_then(|states| {
        let best = states
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.loss.total_cmp(&b.1.loss))?;
        Some((best.0, best.1.loss))
    });
    // Rounding may have dropped the market's own profile at the bound.
    let Some((mut at, loss)) = last else {
        return Ok((market.chosen, proven));
    };
    if loss > market.loss {
        return Ok((market.chosen, proven));
    }
    let mut chosen = vec![0; players.len()];
    for (chosen, states) in chosen.iter_mut().zip(&layers).rev() {
        (*chosen, at) = (states[at].choice as usize, states[at].before as usize);
    }
    debug_assert!(total(players, &chosen).0 <= budget);
    Ok((chosen, proven))
}

/// What the players from each one on must lose and take at least.
struct Bounds {
    budget: u64,
    /// Smallest bytes of the players from this one on.
    bytes: Vec<u64>,
    /// (price, least loss + price · bytes of the players from this one on).
    prices: Vec<(f64, Vec<f64>)>,
}

impl Bounds {
    fn new(players: &[Player], price: f64, budget: u64) -> Self {
        let suffix = |least: &dyn Fn(&Player) -> f64| {
            let mut sums = vec![0.0; players.len() + 1];
            for (i, player) in players.iter().enumerate().rev() {
                sums[i] = sums[i + 1] + least(player);
            }
            sums
        };
        let at = |price: f64| {
            let cost = |c: &(u64, f64)| c.1 + price * c.0 as f64;
            let least = |p: &Player| p.choices.iter().map(cost).fold(f64::INFINITY, f64::min);
            (price, suffix(&least))
        };
        let mut bytes = vec![0; players.len() + 1];
        for (i, player) in players.iter().enumerate().rev() {
            bytes[i] = bytes[i + 1] + player.choices.iter().map(|c| c.0).min().unwrap_or(0);
        }
        Self {
            budget,
            bytes,
            prices: PRICES.iter().map(|share| at(share * price)).collect(),
        }
    }

    /// Least loss that a state can end with; `None` if it cannot fit.
    fn of(&self, depth: usize, state: &State) -> Option<f64> {
        let left = self.budget.checked_sub(state.bytes)?;
        if self.bytes[depth] > left {
            return None;
        }
        let bound = |(price, least): &(f64, Vec<f64>)| state.loss + least[depth] - price * left as f64;
        Some(self.prices.iter().map(bound).fold(f64::NEG_INFINITY, f64::max))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::market::tests::exhaustive;

    proptest! {
        #[test]
        fn is_the_best_of_all_profiles(
            choices in proptest::collection::vec(proptest::collection::vec((1u64..40, 0.0f64..10.0), 1..5), 1..7),
            extra in 0u64..80,
        ) {
            let players: Vec<Player> = choices.into_iter().map(|choices| Player { choices }).collect();
            let budget = crate::market::smallest(&players) + extra;
            let (chosen, proven) = knapsack(&players, budget).unwrap();
            let (bytes, loss) = total(&players, &chosen);
            prop_assert!(proven && bytes <= budget);
            // A bound and a sum of six losses below 10, in different orders.
            prop_assert!((loss - exhaustive(&players, budget)).abs() < 1e-9);
        }
    }

    #[test]
    fn two_hundred_players_are_solved_to_the_end() {
        let importance: Vec<f64> = (0..200).map(|i| 1.0 + f64::from(i * 7919 % 1000)).collect();
        let players = super::super::tests::players(&importance);
        let (chosen, proven) = knapsack(&players, 200 * 350 + 50).unwrap();
        let market = clear_market(&players, 200 * 350 + 50).unwrap();
        let loss = total(&players, &chosen).1;
        assert!(
            proven && loss <= market.loss * (1.0 + 1e-12),
            "{loss} {}",
            market.loss
        );
    }
}
