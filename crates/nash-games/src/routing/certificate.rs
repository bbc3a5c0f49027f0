//! Certificates of routings: the regret of every token and the balance of the experts, by a route that shares no code with the solvers.
//!
//! The solvers keep loads up to date move by move and pick experts with sorted lists; here loads are counted anew, whole payoffs
//! are computed from their definition, and a token's regret is found by exchanges: with payoffs that add up over experts, the best deviation swaps
//! the worst of what a token has for the best of what it has not, then the second worst for the second best, as long as that gains.

use super::game::RoutingGame;
use super::{Scores, check_top_k};
use crate::error::{GameError, check_len};

/// What the check of an equilibrium of the exact game found.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GameCertificate {
    /// Tokens checked: all.
    pub players: u64,
    /// The largest gain any single token could still make, in units of the scores.
    pub max_regret: f64,
    /// Tokens that could gain more than a billionth of the largest payoff: 0 at an equilibrium.
    pub unsettled: u64,
    /// Largest load over mean load, minus 1.
    pub max_violation: f64,
    /// Standard deviation of the loads over their mean.
    pub load_cv: f64,
}

/// What the check of choices at prices found.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PriceCertificate {
    /// Tokens checked: all.
    pub players: u64,
    /// The largest gain any single token could still make at the prices, in units of the scores.
    pub max_regret: f64,
    /// Largest load over mean load, minus 1.
    pub max_violation: f64,
    /// Standard deviation of the loads over their mean.
    pub load_cv: f64,
    /// `Σ_e p_e (C − L_e) / T`, complementary slackness: by so much per token, in units of the scores, the best balanced assignment
    /// could at most have a higher total score than these choices (negative: the choices beat every balanced one). 0 if loads are balanced exactly.
    pub slackness: f64,
}

/// Checks the choices of every token of a game.
///
/// # Errors
/// If `choices [T, k]` are not allowed.
pub fn certify_game(game: &RoutingGame<'_>, choices: &[u16]) -> Result<GameCertificate, GameError> {
    let (k, experts) = (game.top_k, game.scores.experts());
    let loads = count(choices, game.scores, k)?;
    if let Some(capacity) = game.rules.capacity
        && let Some(expert) = loads.iter().position(|&l| l > capacity as u64)
    {
        let token = choices
            .iter()
            .rposition(|&e| usize::from(e) == expert)
            .unwrap_or(0)
            / k;
        return Err(GameError::Choice { token, expert });
    }
    let per_token = game.rules.congestion / game.mean_load();
    let mut certificate = GameCertificate::default();
    for (token, set) in choices.chunks(k).enumerate() {
        let worth = |e: usize| {
            let here = set.contains(&(e as u16));
            if !here && game.rules.capacity.is_some_and(|c| loads[e] >= c as u64) {
                return None;
            }
            // With this token, which is counted already where it is.
            let load = (loads[e] + u64::from(!here)) as f64;
            let company = game.neighbours.map_or(0, |n| {
                let with = |&&j: &&u32| choices[j as usize * k..][..k].contains(&(e as u16));
                n.of(token).iter().filter(with).count()
            });
            let reward = game.rewards.get(e).copied().unwrap_or(0.0);
            let score = f64::from(game.scores.row(token)[e]) + f64::from(reward);
            Some(score - per_token * load + game.rules.company * company as f64)
        };
        let regret = regret(set, (0..experts).map(worth));
        certificate.max_regret = certificate.max_regret.max(regret);
        certificate.unsettled += u64::from(regret > 1e-9 * game.largest_payoff());
        certificate.players += 1;
    }
    (certificate.max_violation, certificate.load_cv) = load_balance(&loads);
    Ok(certificate)
}

/// Checks that `choices [T, k]` are every token's `top-k(s − p)` and how balanced they are.
///
/// # Errors
/// If lengths do not agree or choices are not k experts per token.
pub fn certify_prices(
    scores: Scores<'_>,
    prices: &[f32],
    choices: &[u16],
) -> Result<PriceCertificate, GameError> {
    check_len("prices", scores.experts(), prices.len())?;
    let tokens = scores.tokens();
    let k = choices.len() / tokens.max(1);
    let mut certificate = PriceCertificate::default();
    if tokens == 0 {
        return Ok(certificate);
    }
    let loads = count(choices, scores, k)?;
    for (token, set) in choices.chunks(k).enumerate() {
        // As tokens see it: the difference of two f32 as an f32.
        let worth = scores
            .row(token)
            .iter()
            .zip(prices)
            .map(|(s, p)| Some(f64::from(s - p)));
        certificate.max_regret = certificate.max_regret.max(regret(set, worth));
        certificate.players += 1;
    }
    (certificate.max_violation, certificate.load_cv) = load_balance(&loads);
    let mean = (tokens * k) as f64 / loads.len() as f64;
    let unsold = loads
        .iter()
        .zip(prices)
        .map(|(&l, &p)| f64::from(p) * (mean - l as f64));
    certificate.slackness = unsold.sum::<f64>() / tokens as f64;
    Ok(certificate)
}

/// What the best deviation from `set` gains. `worth` has what each expert would pay; nothing if it is closed.
fn regret(set: &[u16], worth: impl Iterator<Item = Option<f64>>) -> f64 {
    let (mut have, mut could) = (Vec::new(), Vec::new());
    for (e, worth) in worth.enumerate() {
        let Some(worth) = worth else { continue };
        let side = if set.contains(&(e as u16)) {
            &mut have
        } else {
            &mut could
        };
        side.push(worth);
    }
    have.sort_by(f64::total_cmp);
    could.sort_by(|a, b| b.total_cmp(a));
    could
        .iter()
        .zip(&have)
        .map(|(new, old)| (new - old).max(0.0))
        .sum()
}

/// Tokens at each expert.
fn count(choices: &[u16], scores: Scores<'_>, k: usize) -> Result<Vec<u64>, GameError> {
    check_top_k(k, scores.experts())?;
    check_len("choices", scores.tokens() * k, choices.len())?;
    let mut loads = vec![0; scores.experts()];
    for (token, set) in choices.chunks(k).enumerate() {
        for (i, &e) in set.iter().enumerate() {
            let expert = usize::from(e);
            if expert >= loads.len() || set[i + 1..].contains(&e) {
                return Err(GameError::Choice { token, expert });
            }
            loads[expert] += 1;
        }
    }
    Ok(loads)
}

/// MaxVio (largest over mean, minus 1) and coefficient of variation of `loads [E]`; zeros without load.
pub fn load_balance(loads: &[u64]) -> (f64, f64) {
    let mean = loads.iter().sum::<u64>() as f64 / loads.len().max(1) as f64;
    if mean == 0.0 {
        return (0.0, 0.0);
    }
    let largest = loads.iter().copied().max().unwrap_or(0) as f64;
    let variance = loads.iter().map(|&l| (l as f64 - mean).powi(2)).sum::<f64>() / loads.len() as f64;
    (largest / mean - 1.0, variance.sqrt() / mean)
}
