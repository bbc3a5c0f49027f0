//! The market for bits: tensors buy formats at a price that clears a byte budget.
//!
//! Player t chooses a format f with loss `a_t(f)` (nats of KL divergence) and size `bytes_t(f)`; at price λ its payoff is
//! `−a_t(f) − λ·bytes_t(f)`. Without interactions the best responses at one price are a Nash equilibrium and the total size falls as
//! λ rises, so λ is found by bisection (Everett 1963, generalised Lagrange multipliers). Integer sizes leave a remainder that the
//! price cannot place; it is spent on the upgrades with the largest gain per byte that still fit.
//!
//! A price cannot place a player whose single step is a large part of the budget, such as the embedding of a small model with a large
//! vocabulary: either everyone else is squeezed for it, or it is given up and everyone else is flooded. Such players lead (Stackelberg 1934): every combination of
//! their formats is tried, the market of all others answers each, and they commit to what ends best.

use crate::error::GameError;

/// A player leads if a step between two of its formats takes more than this share of the budget.
const LEADER_SHARE: f64 = 0.04;
/// Leaders at most; the largest ones. Each multiplies the number of markets by the number of its formats.
const MOST_LEADERS: usize = 3;

/// One player: its choices as (bytes, loss).
#[derive(Debug, Clone, PartialEq)]
pub struct Player {
    /// Size in bytes and loss of every format on offer.
    pub choices: Vec<(u64, f64)>,
}

/// The cleared market.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MarketOutcome {
    /// Chosen format of every player, an index into its choices.
    pub chosen: Vec<usize>,
    /// The clearing price, loss per byte.
    pub price: f64,
    /// Total bytes bought.
    pub bytes: u64,
    /// Budget minus `bytes`.
    pub unspent_bytes: u64,
    /// Sum of the losses.
    pub loss: f64,
    /// Largest gain any player who answers to the price could make at it by another format that the unspent bytes allow. Zero at an equilibrium.
    pub max_regret: f64,
    /// Players who led: their formats are the best of all, each answered by the market of the others.
    pub leaders: Vec<usize>,
}

/// Clears the market.
///
/// # Errors
/// If a player has no choice or the smallest profile exceeds the budget.
pub fn clear_market(players: &[Player], budget: u64) -> Result<MarketOutcome, GameError> {
    check(players, budget)?;
    let leaders = leaders(players, budget);
    let mut best: Option<(f64, f64, Vec<usize>)> = None;
    for committed in combinations(players, &leaders) {
        let market = with_committed(players, &leaders, &committed);
        let Some((price, mut chosen)) = clear_at_a_price(&market, budget) else {
            continue;
        };
        for (&leader, &choice) in leaders.iter().zip(&committed) {
            chosen[leader] = choice;
        }
        let loss = total(players, &chosen).1;
        if best.as_ref().is_none_or(|b| loss < b.0) {
            best = Some((loss, price, chosen));
        }
    }
    let Some((loss, price, chosen)) = best else {
        let smallest = smallest(players);
        return Err(GameError::BudgetTooSmall { budget, smallest });
    };
    let bytes = total(players, &chosen).0;
    let mut outcome = MarketOutcome {
        chosen,
        price,
        bytes,
        unspent_bytes: budget - bytes,
        loss,
        max_regret: 0.0,
        leaders,
    };
    outcome.max_regret = max_regret(players, &outcome);
    Ok(outcome)
}

/// Every player can choose, and the smallest profile fits.
pub(crate) fn check(players: &[Player], budget: u64) -> Result<(), GameError> {
    if let Some(player) = players.iter().position(|p| p.choices.is_empty()) {
        return Err(GameError::NoStrategies { player });
    }
    let smallest = smallest(players);
    if smallest > budget {
        return Err(GameError::BudgetTooSmall { budget, smallest });
    }
    Ok(())
}

/// Bytes if everyone takes the smallest format.
pub(crate) fn smallest(players: &[Player]) -> u64 {
    let least = |p: &Player| p.choices.iter().map(|c| c.0).min().unwrap_or(0);
    players.iter().map(least).sum()
}

/// The players too large for a price, largest step first.
fn leaders(players: &[Player], budget: u64) -> Vec<usize> {
    let step = |player: &Player| {
        let mut bytes: Vec<u64> = player.choices.iter().map(|c| c.0).collect();
        bytes.sort_unstable();
        bytes.windows(2).map(|p| p[1] - p[0]).max().unwrap_or(0)
    };
    let mut found: Vec<(u64, usize)> = players.iter().map(step).zip(0..).collect();
    found.retain(|&(step, _)| step as f64 > LEADER_SHARE * budget as f64);
    found.sort_by_key(|&(step, player)| (std::cmp::Reverse(step), player));
    found.into_iter().take(MOST_LEADERS).map(|f| f.1).collect()
}

/// Every combination of the leaders' formats; one empty combination if nobody leads.
fn combinations(players: &[Player], leaders: &[usize]) -> Vec<Vec<usize>> {
    leaders.iter().fold(vec![Vec::new()], |found, &leader| {
        let choices = 0..players[leader].choices.len();
        let extended = |before: &Vec<usize>| {
            choices
                .clone()
                .map(|c| [&before[..], &[c]].concat())
                .collect::<Vec<_>>()
        };
        found.iter().flat_map(extended).collect()
    })
}

/// The players once the leaders have no other format than the one they committed to.
fn with_committed(players: &[Player], leaders: &[usize], committed: &[usize]) -> Vec<Player> {
    let mut market = players.to_vec();
    for (&leader, &choice) in leaders.iter().zip(committed) {
        market[leader].choices = vec![players[leader].choices[choice]];
    }
    market
}

/// The price at which the best responses fit the budget, and the responses with the remainder spent; `None` if the smallest do not fit.
fn clear_at_a_price(players: &[Player], budget: u64) -> Option<(f64, Vec<usize>)> {
    if smallest(players) > budget {
        return None;
    }
    // At price 0 everyone buys the best; raise the price until the total fits, then bisect.
    let (mut low, mut high) = (0.0, f64::INFINITY);
    let mut chosen = respond_all(players, 0.0);
    if total(players, &chosen).0 > budget {
        let mut price = 1e-12;
        loop {
            chosen = respond_all(players, price);
            if total(players, &chosen).0 <= budget {
                high = price;
                break;
            }
            low = price;
            price *= 4.0;
        }
        for _ in 0..200 {
            let middle = 0.5 * (low + high);
            if middle <= low || middle >= high {
                break;
            }
            let candidate = respond_all(players, middle);
            if total(players, &candidate).0 <= budget {
                high = middle;
                chosen = candidate;
            } else {
                low = middle;
            }
        }
    }
    spend_remainder(players, budget, &mut chosen);
    Some((if high.is_finite() { high } else { 0.0 }, chosen))
}

/// The largest gain a player could make at the price of `outcome` without exceeding the budget; shares no code with the search for the price.
pub fn max_regret(players: &[Player], outcome: &MarketOutcome) -> f64 {
    let mut worst = 0.0f64;
    let followers = players.iter().zip(&outcome.chosen).enumerate();
    for (_, (player, &now)) in followers.filter(|(t, _)| !outcome.leaders.contains(t)) {
        let (bytes, loss) = player.choices[now];
        for &(other_bytes, other_loss) in &player.choices {
            let affordable = other_bytes <= bytes + outcome.unspent_bytes;
            // A player whom the remainder upgraded past its best response would sell back; bytes no one else can use cost it nothing.
            let payment = if other_bytes > bytes {
                outcome.price * (other_bytes - bytes) as f64
            } else {
                0.0
            };
            if affordable {
                worst = worst.max(loss - other_loss - payment);
            }
        }
    }
    worst
}

/// Best response to a price: least loss + price · bytes; ties go to fewer bytes, then to the earlier choice.
fn respond(player: &Player, price: f64) -> usize {
    let cost = |&(bytes, loss): &(u64, f64)| loss + price * bytes as f64;
    let mut best = 0;
    for (i, choice) in player.choices.iter().enumerate().skip(1) {
        let order = cost(choice)
            .total_cmp(&cost(&player.choices[best]))
            .then(choice.0.cmp(&player.choices[best].0));
        if order.is_lt() {
            best = i;
        }
    }
    best
}

fn respond_all(players: &[Player], price: f64) -> Vec<usize> {
    players.iter().map(|p| respond(p, price)).collect()
}

pub(crate) fn total(players: &[Player], chosen: &[usize]) -> (u64, f64) {
    players
        .iter()
        .zip(chosen)
        .fold((0, 0.0), |(bytes, loss), (p, &c)| {
            (bytes + p.choices[c].0, loss + p.choices[c].1)
        })
}

/// Buys, as long as one fits, the upgrade with the largest fall of loss per byte.
pub(crate) fn spend_remainder(players: &[Player], budget: u64, chosen: &mut [usize]) {
    spend_by(players, budget, chosen, |chosen, t, f| {
        players[t].choices[chosen[t]].1 - players[t].choices[f].1
    });
}

/// The same for losses that depend on the others: `gain(chosen, t, f)` is the fall of loss if player t takes format f.
pub(crate) fn spend_by(
    players: &[Player],
    budget: u64,
    chosen: &mut [usize],
    gain: impl Fn(&[usize], usize, usize) -> f64,
) {
    loop {
        let left = budget - total(players, chosen).0;
        let mut best: Option<(f64, usize, usize)> = None;
        for (t, player) in players.iter().enumerate() {
            let bytes = player.choices[chosen[t]].0;
            for (f, &(other_bytes, _)) in player.choices.iter().enumerate() {
                let gain = gain(chosen, t, f);
                if gain > 0.0 && other_bytes <= bytes + left {
                    let rate = gain / (other_bytes.saturating_sub(bytes).max(1)) as f64;
                    if best.is_none_or(|b| rate > b.0) {
                        best = Some((rate, t, f));
                    }
                }
            }
        }
        let Some((_, t, f)) = best else { break };
        chosen[t] = f;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn players() -> impl Strategy<Value = Vec<Player>> {
        proptest::collection::vec(proptest::collection::vec((1u64..40, 0.0f64..10.0), 1..4), 1..6)
            .prop_map(|p| p.into_iter().map(|choices| Player { choices }).collect())
    }

    /// Least loss over all profiles that fit.
    pub(crate) fn exhaustive(players: &[Player], budget: u64) -> f64 {
        match players.split_first() {
            None => 0.0,
            Some((first, rest)) => first
                .choices
                .iter()
                .filter(|c| c.0 <= budget)
                .map(|c| c.1 + exhaustive(rest, budget - c.0))
                .fold(f64::INFINITY, f64::min),
        }
    }

    /// Weak duality (Everett 1963): whatever the leaders commit to, no profile that fits can be better than the outcome by more than what
    /// the budget is worth at the price that answers this commitment. Without leaders that is the price of the outcome; with leaders
    /// it need not be: the best profile may go with another commitment, whose market has another price.
    fn duality_holds(players: &[Player], budget: u64, outcome: &MarketOutcome) -> Result<(), TestCaseError> {
        for committed in combinations(players, &outcome.leaders) {
            let market = with_committed(players, &outcome.leaders, &committed);
            if let Some((price, _)) = clear_at_a_price(&market, budget) {
                let bound = exhaustive(&market, budget) + price * budget as f64;
                prop_assert!(
                    outcome.loss <= bound + 1e-9,
                    "{committed:?} at {price}: {outcome:?}"
                );
                prop_assert!(!outcome.leaders.is_empty() || price == outcome.price);
            }
        }
        Ok(())
    }

    /// A case that a random run found: the best profile goes with a commitment whose market cannot place three bytes at its price, and the
    /// outcome's own price is zero. Leaders find the best of what prices reach, not of all profiles.
    #[test]
    fn the_best_profile_may_be_out_of_reach_of_prices() {
        let of = |choices: [(u64, f64); 2]| Player {
            choices: choices.to_vec(),
        };
        let players = [
            of([(36, 4.1), (22, 6.0)]),
            of([(12, 1.0), (11, 2.0)]),
            of([(10, 2.3), (7, 4.1)]),
            of([(33, 6.9), (20, 7.4)]),
        ];
        let outcome = clear_market(&players, 77).unwrap();
        assert_eq!(
            (outcome.chosen.as_slice(), outcome.price),
            (&[1, 0, 0, 0][..], 0.0)
        );
        assert!(exhaustive(&players, 77) < outcome.loss - 0.1);
        duality_holds(&players, 77, &outcome).unwrap();
    }

    proptest! {
        #[test]
        fn fits_the_budget_and_leaves_no_regret(players in players(), extra in 0u64..60) {
            let smallest: u64 = players.iter().map(|p| p.choices.iter().map(|c| c.0).min().unwrap()).sum();
            let budget = smallest + extra;
            let outcome = clear_market(&players, budget).unwrap();
            prop_assert!(outcome.bytes + outcome.unspent_bytes == budget);
            prop_assert!(outcome.max_regret <= 1e-9, "{outcome:?}");
            prop_assert!(outcome.loss + 1e-9 >= exhaustive(&players, budget));
            duality_holds(&players, budget, &outcome)?;
            if outcome.leaders.len() == players.len() {
                prop_assert!(outcome.loss <= exhaustive(&players, budget) + 1e-9, "{outcome:?}");
            }
        }

        #[test]
        fn below_the_smallest_size_is_an_error(players in players()) {
            let smallest: u64 = players.iter().map(|p| p.choices.iter().map(|c| c.0).min().unwrap()).sum();
            let found = clear_market(&players, smallest - 1);
            prop_assert_eq!(found, Err(GameError::BudgetTooSmall { budget: smallest - 1, smallest }));
        }
    }

    #[test]
    fn a_player_too_large_for_a_price_leads() {
        let giant = Player {
            choices: vec![(600, 1.0), (900, 0.3), (1200, 0.08)],
        };
        let small = Player {
            choices: (2..=8).map(|bits| (bits, 0.25f64.powi(bits as i32))).collect(),
        };
        let mut players = vec![small; 100];
        players.push(giant);
        // Beside the giant at 900 the others have four bytes each. At any price at which it stays there they want more than fits.
        let outcome = clear_market(&players, 1300).unwrap();
        assert_eq!((outcome.leaders.as_slice(), outcome.chosen[100]), (&[100][..], 1));
        assert!(
            (outcome.loss - (0.3 + 100.0 * 0.25f64.powi(4))).abs() < 1e-9,
            "{outcome:?}"
        );
        assert_eq!(outcome.unspent_bytes, 0);
    }

    #[test]
    fn a_price_splits_players_by_their_need() {
        let needy = Player {
            choices: vec![(2, 8.0), (4, 1.0)],
        };
        let content = Player {
            choices: vec![(2, 0.5), (4, 0.4)],
        };
        let outcome = clear_market(&[content, needy], 6).unwrap();
        assert_eq!(outcome.chosen, [0, 1]);
        assert_eq!(outcome.unspent_bytes, 0);
    }
}
