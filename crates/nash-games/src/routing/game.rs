//! The exact routing game: T tokens choose k of E experts, at most a given number of them the same one.
//!
//! Token i with the set `aᵢ` of experts is paid
//! `uᵢ(a) = Σ_{e∈aᵢ} [s_ie + r_e − α·L_e(a)/C] + β Σ_{j∈N(i)} |aᵢ ∩ aⱼ|`:
//! scores, rewards of experts that are at hand, congestion (separation), and company of alike tokens (alignment, cohesion);
//! L counts the token itself, `C = T·k/E`, and N is symmetric.
//!
//! **Exact potential** (Rosenthal 1973): `Φ(a) = Σᵢ Σ_{e∈aᵢ} (s_ie + r_e) − α/C · Σ_e L_e(L_e+1)/2 + β Σ_{pairs} |aᵢ ∩ aⱼ|`. If only
//! i moves, the loads without it stay, and both uᵢ and Φ change by the same differences of
//! `v_ie = s_ie + r_e − α(L_e^{−i} + 1)/C + β·|{j ∈ N(i): e ∈ aⱼ}|`. A pair counts once in Φ but moves the payoff of both ends:
//! with one-sided neighbours only one of them changes, and the argument breaks (see `tests/routing.rs` for a game that then has no equilibrium).
//!
//! **Best response**: given the others, `uᵢ = Σ_{e∈aᵢ} v_ie`, where v_ie does not depend on what else i chooses: loads without
//! i, and the choices of others, are fixed. A sum of k terms, one per distinct expert, is largest for the k largest terms. So the
//! top-k of the marginal payoffs is an exact best response among all `(E choose k)` sets.
//!
//! **Capacity**: with at most c tokens per expert, a token may stay where it is and move to experts with room. The sets open to i then depend on the
//! others (a generalised game, Debreu 1952), but top-k over the open experts is a best response by the same argument. A profile with
//! room for all exists if `E·min(c, T) ≥ T·k` (Gale 1957), and one of largest Φ among them is an equilibrium: no allowed move of one player gains. There may be
//! more of them than without limits: where all experts are full nobody can move, so the start matters; see [`RoutingGame::start`].
//!
//! **Play** is one token at a time and moves only for a gain above [`MIN_GAIN`] of the largest payoff, far above what rounding in `f64` can feign. Each move raises Φ, the
//! profiles are finitely many: play ends, in a pure Nash equilibrium. Everyone at once can cycle for ever.

use super::{MAX_TOP_K, Neighbours, Scores, check_top_k};
use crate::error::{GameError, check_finite, check_len};

/// A move must gain this share of the largest payoff that can occur.
pub const MIN_GAIN: f64 = 1e-12;

/// What tokens are paid besides scores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rules {
    /// α: what an expert with the mean load costs each of its tokens, in units of the scores.
    pub congestion: f64,
    /// β: what a shared expert with a neighbour is worth.
    pub company: f64,
    /// Tokens per expert at most.
    pub capacity: Option<usize>,
}

/// The game of one batch.
#[derive(Clone, Copy, Debug)]
pub struct RoutingGame<'a> {
    pub(super) scores: Scores<'a>,
    pub(super) top_k: usize,
    pub(super) rules: Rules,
    /// r, `[E]`, or empty for none.
    pub(super) rewards: &'a [f32],
    pub(super) neighbours: Option<&'a Neighbours>,
}

/// How play went.
#[derive(Clone, Debug, PartialEq)]
pub struct Played {
    /// Sweeps over all tokens; the last one, if settled, moved nobody.
    pub sweeps: usize,
    /// Moves made.
    pub moves: u64,
    /// Φ before the first and after each sweep.
    pub potential: Vec<f64>,
    /// Whether the last sweep moved nobody: a Nash equilibrium.
    pub settled: bool,
}

impl<'a> RoutingGame<'a> {
    /// A game without rewards and neighbours.
    ///
    /// # Errors
    /// If tokens cannot choose `top_k` experts, the experts have not enough room, or a weight is not finite.
    pub fn new(scores: Scores<'a>, top_k: usize, rules: Rules) -> Result<Self, GameError> {
        let (tokens, experts) = (scores.tokens(), scores.experts());
        check_top_k(top_k, experts)?;
        check_finite("rules", &[rules.congestion as f32, rules.company as f32])?;
        match rules.capacity {
            Some(capacity) if experts * capacity.min(tokens) < tokens * top_k => Err(GameError::Capacity {
                tokens,
                top_k,
                experts,
                capacity,
            }),
            _ => Ok(Self {
                scores,
                top_k,
                rules,
                rewards: &[],
                neighbours: None,
            }),
        }
    }

    /// Pays `rewards [E]` to the tokens of each expert.
    ///
    /// # Errors
    /// If there is not one per expert, or one is not finite.
    pub fn with_rewards(self, rewards: &'a [f32]) -> Result<Self, GameError> {
        check_len("rewards", self.scores.experts(), rewards.len())?;
        check_finite("rewards", rewards)?;
        Ok(Self { rewards, ..self })
    }

    /// Pays for the company of neighbours.
    ///
    /// # Errors
    /// If the graph is over another number of tokens.
    pub fn with_neighbours(self, neighbours: &'a Neighbours) -> Result<Self, GameError> {
        check_len("neighbours", self.scores.tokens(), neighbours.tokens())?;
        Ok(Self {
            neighbours: Some(neighbours),
            ..self
        })
    }

    /// Mean load C.
    pub(super) fn mean_load(&self) -> f64 {
        (self.scores.tokens() * self.top_k) as f64 / self.scores.experts() as f64
    }

    /// Every token's best experts as if it were alone, `[T, k]`; with capacities, the best that still have room, in the order of the tokens, each of
    /// whom leaves enough room for those after it (it may leave out at most as many experts that all others need
    /// as Gale's condition has slack).
    pub fn start(&self) -> Vec<u16> {
        let (tokens, k) = (self.scores.tokens(), self.top_k);
        let mut choices = vec![0; tokens * k];
        let mut room = vec![self.rules.capacity.unwrap_or(tokens); self.scores.experts()];
        let mut values = vec![0.0; self.scores.experts()];
        for (token, choices) in choices.chunks_mut(k).enumerate() {
            let left = tokens - token;
            let needed = room.iter().filter(|&&r| r >= left).count();
            let slack = room.iter().map(|&r| r.min(left)).sum::<usize>() - left * k;
            let alone = |e: usize| f64::from(self.scores.row(token)[e]) + self.reward(e);
            let mut taken = 0;
            for (least, wanted) in [(left, needed.saturating_sub(slack)), (1, k)] {
                for (e, value) in values.iter_mut().enumerate() {
                    let open = room[e] >= least && !choices[..taken].contains(&(e as u16));
                    *value = if open { alone(e) } else { f64::NEG_INFINITY };
                }
                let count = wanted - taken.min(wanted);
                choices[taken..taken + count].copy_from_slice(&largest(&values, count).0[..count]);
                taken += count;
            }
            choices.iter().for_each(|&e| room[usize::from(e)] -= 1);
        }
        choices
    }

    /// Tokens at each expert, `[E]`.
    ///
    /// # Errors
    /// If `choices` are not k allowed experts per token.
    pub fn loads(&self, choices: &[u16]) -> Result<Vec<u32>, GameError> {
        check_len("choices", self.scores.tokens() * self.top_k, choices.len())?;
        let mut loads = vec![0u32; self.scores.experts()];
        for (token, set) in choices.chunks(self.top_k).enumerate() {
            for (i, &e) in set.iter().enumerate() {
                let expert = usize::from(e);
                let full = |load: u32| self.rules.capacity.is_some_and(|c| load as usize > c);
                let known = loads.get_mut(expert).filter(|_| !set[..i].contains(&e));
                let load = known.ok_or(GameError::Choice { token, expert })?;
                *load += 1;
                if full(*load) {
                    return Err(GameError::Choice { token, expert });
                }
            }
        }
        Ok(loads)
    }

    /// Φ.
    ///
    /// # Errors
    /// If `choices` are not k allowed experts per token.
    pub fn potential(&self, choices: &[u16]) -> Result<f64, GameError> {
        let loads = self.loads(choices)?;
        let k = self.top_k;
        let mut potential = 0.0;
        for (token, set) in choices.chunks(k).enumerate() {
            let row = self.scores.row(token);
            for &e in set {
                potential += f64::from(row[usize::from(e)]) + self.reward(usize::from(e));
            }
            for &j in self.neighbours.map_or(&[][..], |n| n.of(token)) {
                let other = &choices[j as usize * k..][..k];
                let shared = set.iter().filter(|e| other.contains(e)).count();
                // Each pair is seen from both ends.
                potential += 0.5 * self.rules.company * shared as f64;
            }
        }
        let crowds = loads.iter().map(|&l| f64::from(l) * (f64::from(l) + 1.0) / 2.0);
        Ok(potential - self.congestion_per_token() * crowds.sum::<f64>())
    }

    /// Lets the tokens answer one after the other, sweep by sweep, until nobody moves or `max_sweeps` are over.
    ///
    /// # Errors
    /// If `choices` are not k allowed experts per token.
    pub fn play(&self, choices: &mut [u16], max_sweeps: usize) -> Result<Played, GameError> {
        let mut loads = self.loads(choices)?;
        let mut played = Played {
            sweeps: 0,
            moves: 0,
            potential: vec![self.potential(choices)?],
            settled: false,
        };
        let threshold = MIN_GAIN * self.largest_payoff();
        let mut values = vec![0.0; self.scores.experts()];
        while played.sweeps < max_sweeps && !played.settled {
            let before = played.moves;
            for token in 0..self.scores.tokens() {
                played.moves += u64::from(self.answer(token, choices, &mut loads, &mut values, threshold));
            }
            played.sweeps += 1;
            played.settled = played.moves == before;
            played.potential.push(self.potential(choices)?);
        }
        Ok(played)
    }

    /// Moves one token to its best response if that gains more than `threshold`.
    fn answer(
        &self,
        token: usize,
        choices: &mut [u16],
        loads: &mut [u32],
        values: &mut [f64],
        threshold: f64,
    ) -> bool {
        let k = self.top_k;
        let own = token * k..(token + 1) * k;
        choices[own.clone()]
            .iter()
            .for_each(|&e| loads[usize::from(e)] -= 1);
        let room = self
            .rules
            .capacity
            .map_or(u32::MAX, |c| c.try_into().unwrap_or(u32::MAX));
        let cost = self.congestion_per_token();
        for (e, ((value, &score), &load)) in values
            .iter_mut()
            .zip(self.scores.row(token))
            .zip(&*loads)
            .enumerate()
        {
            let paid = f64::from(score) + self.reward(e) - cost * (f64::from(load) + 1.0);
            *value = if load < room { paid } else { f64::NEG_INFINITY };
        }
        for &j in self.neighbours.map_or(&[][..], |n| n.of(token)) {
            for &e in &choices[j as usize * k..][..k] {
                values[usize::from(e)] += self.rules.company;
            }
        }
        let stay: f64 = choices[own.clone()].iter().map(|&e| values[usize::from(e)]).sum();
        let (best, paid) = largest(values, k);
        let moves = paid - stay > threshold;
        if moves {
            choices[own.clone()].copy_from_slice(&best[..k]);
        }
        choices[own].iter().for_each(|&e| loads[usize::from(e)] += 1);
        moves
    }

    /// α/C: what each token at an expert costs every other one there.
    fn congestion_per_token(&self) -> f64 {
        self.rules.congestion / self.mean_load().max(f64::MIN_POSITIVE)
    }

    fn reward(&self, expert: usize) -> f64 {
        self.rewards.get(expert).copied().map_or(0.0, f64::from)
    }

    /// A bound of the size of every payoff and of every term of it.
    pub(super) fn largest_payoff(&self) -> f64 {
        let size = |values: &[f32]| values.iter().fold(0.0f32, |a, v| a.max(v.abs()));
        let degree = (0..self.scores.tokens()).map(|t| self.neighbours.map_or(0, |n| n.of(t).len()));
        self.top_k as f64
            * (f64::from(size(self.scores.values()))
                + f64::from(size(self.rewards))
                + self.congestion_per_token().abs() * self.scores.tokens() as f64
                + self.rules.company.abs() * degree.max().unwrap_or(0) as f64)
    }
}

/// The `k` largest values, largest first, ties to the lower index, and their sum. Closed experts are −∞ and come last.
fn largest(values: &[f64], k: usize) -> ([u16; MAX_TOP_K], f64) {
    let (mut index, mut best) = ([0; MAX_TOP_K], [f64::NEG_INFINITY; MAX_TOP_K]);
    for (e, &value) in values.iter().enumerate() {
        if k > 0 && value > best[k - 1] {
            let mut at = k - 1;
            while at > 0 && value > best[at - 1] {
                (best[at], index[at]) = (best[at - 1], index[at - 1]);
                at -= 1;
            }
            (best[at], index[at]) = (value, e as u16);
        }
    }
    (index, best[..k].iter().sum())
}
