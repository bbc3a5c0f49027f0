//! Who keeps experts busy: nobody, an auxiliary loss, a bias, or the prices of the routing game.
//!
//! Every rule ends in one bias per expert and layer, `b`, with which a finished model chooses: `top-k(s + b)`. Neither it nor a
//! reward touches the mixing weights.
//!
//! | rule | choice in training | what moves |
//! | --- | --- | --- |
//! | none | `top-k(s)` | |
//! | auxiliary loss | `top-k(s)` | `α Σ_e f_e P_e` joins the loss: f share of choices times E, P mean of normed scores (Fedus et al. 2021, arXiv 2101.03961, eq. 4) |
//! | loss-free | `top-k(s + b)` | after each batch `b_e` moves by u towards balance (Wang et al. 2024, arXiv 2408.15664) |
//! | Nash | `top-k(s − p)` at prices that balance this batch | b is the mean of `−p` over the last batches |
//!
//! Nash starts from the prices of the batch before (the equilibrium cache); *cold* guesses them from each batch instead. *Swarm* adds company:
//! at the prices found, tokens then play the exact game with their 7 nearest neighbours to an equilibrium. *Resident* rewards, in the last quarter
//! of the training and in the finished model, the half of a layer's experts that were used last ([`nash_eval::routing`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use nash_eval::routing::{ExpertRouting, ExpertRules, UseHandle};
use nash_games::routing::{
    Balance, FLOCK, Neighbours, PriceCache, PriceRouter, RoutingGame, Rules, ScoreStatistics, Scores,
    cache::DRIFT_LIMIT, load_balance,
};
use nash_models::{RoutingCall, RoutingPolicy as _};
use serde::{Deserialize, Serialize};

use crate::model::Shape;

/// Share of the bias that a batch replaces.
const FRESH: f32 = 0.02;
/// Price steps for a batch, at most, and the MaxVio to stop at.
const BALANCE: Balance = Balance {
    max_steps: 2,
    tolerance: 0.1,
};
/// What a shared expert with a neighbour is worth, in standard deviations of a token's scores.
const COMPANY: f64 = 0.05;
/// Sweeps of the exact game, at most.
const SWEEPS: usize = 50;

/// How loads are kept equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rule {
    /// No experts: a dense model with the same active weights.
    Dense,
    /// Experts, and nothing that balances them.
    None,
    /// An auxiliary loss.
    AuxiliaryLoss,
    /// A bias that moves by a fixed step.
    LossFree,
    /// Prices from the equilibrium cache.
    Nash,
    /// Prices found anew for each batch.
    NashCold,
    /// Prices from the cache, and company of neighbours.
    NashSwarm,
    /// Prices from the cache, and a reward for experts in a fast memory of half of them.
    NashResident,
}

impl Rule {
    /// The best tried on the held-back text: α of 0.01 and 0.1; u of 0.001 (that of Wang et al., whose runs are longer), 0.01 and 0.03; a reward that
    /// halves the misses.
    pub(crate) fn usual_strength(self) -> Option<f64> {
        match self {
            Self::AuxiliaryLoss | Self::LossFree => Some(0.01),
            Self::NashResident => Some(1.0),
            _ => None,
        }
    }

    fn has_prices(self) -> bool {
        matches!(
            self,
            Self::Nash | Self::NashCold | Self::NashSwarm | Self::NashResident
        )
    }
}

/// What happened since the last [`Router::restart`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// Largest load over mean load, minus 1: mean over batches and layers.
    pub(crate) batch_violation: f64,
    /// The same of all batches together, mean over layers.
    pub(crate) global_violation: f64,
    /// Price steps per batch and layer.
    pub(crate) price_steps: f64,
    /// Share of look-ups that found prices.
    pub(crate) cache_hits: f64,
    /// Time of choosing, per batch and layer.
    pub(crate) microseconds: f64,
    /// Share of the experts asked for that a fast memory of half of them did not hold, where the rule knows of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) miss_rate: Option<f64>,
}

#[derive(Debug)]
struct LayerState {
    bias: Vec<f32>,
    loads: Vec<u64>,
}

/// Fast memories of the layers, and what was fetched into them.
#[derive(Debug)]
struct Memory {
    routing: ExpertRouting,
    used: UseHandle,
}

impl Memory {
    /// Of half of the `experts`; those at hand are worth `reward` more, but no token gives up its best.
    fn new(experts: usize, reward: f64) -> Self {
        let rules = ExpertRules {
            resident: experts / 2,
            page: 1,
            reward: reward as f32,
            keep: 1,
            company: 0.0,
            prices: false,
            batch: 1,
        };
        let routing = ExpertRouting::new(rules, Arc::default());
        let used = routing.handle();
        Self { routing, used }
    }
}

/// Chooses experts in all layers of one model.
#[derive(Debug)]
pub(crate) struct Router {
    rule: Rule,
    /// α of the auxiliary loss, u of the loss-free bias, r of residents.
    strength: f64,
    experts: usize,
    top_k: usize,
    /// Whether rules apply and move, or the bias alone chooses.
    training: bool,
    layers: Vec<LayerState>,
    cache: PriceCache,
    engine: PriceRouter,
    statistics: ScoreStatistics,
    prices: Vec<f32>,
    memory: Option<Memory>,
    batches: u64,
    violation: f64,
    steps: usize,
    time: Duration,
}

impl Router {
    /// With α, u or r of `strength`, where the rule has one.
    pub(crate) fn new(rule: Rule, shape: &Shape, strength: Option<f64>) -> anyhow::Result<Self> {
        let experts = shape.experts.max(1);
        let strength = strength.or(rule.usual_strength()).unwrap_or_default();
        let cached = if rule == Rule::NashCold { 0 } else { shape.layers };
        let layer = || LayerState {
            bias: vec![0.0; experts],
            loads: vec![0; experts],
        };
        Ok(Self {
            rule,
            strength,
            experts,
            top_k: shape.top_k,
            training: true,
            layers: (0..shape.layers).map(|_| layer()).collect(),
            cache: PriceCache::new(cached, DRIFT_LIMIT),
            engine: PriceRouter::new(experts, shape.top_k.min(experts))?,
            statistics: ScoreStatistics::default(),
            prices: vec![0.0; experts],
            memory: None,
            batches: 0,
            violation: 0.0,
            steps: 0,
            time: Duration::ZERO,
        })
    }

    /// The bias of a layer, `[E]`.
    pub(crate) fn bias(&self, layer: usize) -> &[f32] {
        &self.layers[layer].bias
    }

    /// Forgets what was counted; rules apply from now on if `training`.
    pub(crate) fn restart(&mut self, training: bool) {
        self.training = training;
        (self.batches, self.violation, self.steps, self.time) = (0, 0.0, 0, Duration::ZERO);
        self.layers.iter_mut().for_each(|layer| layer.loads.fill(0));
        if self.memory.is_some() {
            self.remember();
        }
    }

    /// From now on residents are rewarded, if the rule does that; fast memories are empty.
    pub(crate) fn remember(&mut self) {
        let knows = self.rule == Rule::NashResident;
        self.memory = knows.then(|| Memory::new(self.experts, self.strength));
    }

    /// What was counted.
    pub(crate) fn usage(&self) -> Usage {
        let calls = self.batches.max(1) as f64;
        let global: f64 = self.layers.iter().map(|layer| load_balance(&layer.loads).0).sum();
        let cache = self.cache.statistics();
        Usage {
            batch_violation: self.violation / calls,
            global_violation: global / self.layers.len().max(1) as f64,
            price_steps: self.steps as f64 / calls,
            cache_hits: cache.hits as f64 / (cache.hits + cache.misses).max(1) as f64,
            microseconds: self.time.as_secs_f64() * 1e6 / calls,
            miss_rate: self.memory.as_ref().map(|memory| memory.used.read().miss_rate),
        }
    }

    /// The experts of every token, `[T, k]`, for `scores [T, E]`; `states` gives the router's input `[T, d]` to rules that look at it.
    pub(crate) fn choose(
        &mut self,
        layer: usize,
        scores: &[f32],
        states: impl FnOnce() -> Vec<f32>,
    ) -> Vec<u16> {
        let start = Instant::now();
        let choices = self
            .try_choose(layer, scores, states)
            .expect("scores of a finite model");
        self.time += start.elapsed();
        let mut loads = vec![0u64; self.experts];
        choices.iter().for_each(|&e| loads[usize::from(e)] += 1);
        self.batches += 1;
        self.violation += load_balance(&loads).0;
        let state = &mut self.layers[layer];
        state
            .loads
            .iter_mut()
            .zip(&loads)
            .for_each(|(sum, load)| *sum += load);
        if self.training && self.rule == Rule::LossFree {
            let mean = choices.len() as f64 / self.experts as f64;
            for (bias, &load) in state.bias.iter_mut().zip(&loads) {
                *bias += (self.strength * (mean - load as f64).signum()) as f32;
            }
        }
        choices
    }

    fn try_choose(
        &mut self,
        layer: usize,
        values: &[f32],
        states: impl FnOnce() -> Vec<f32>,
    ) -> anyhow::Result<Vec<u16>> {
        let scores = Scores::new(values, self.experts)?;
        let mut choices = vec![0; scores.tokens() * self.top_k];
        let bias = &mut self.layers[layer].bias;
        if !(self.training && self.rule.has_prices()) {
            self.prices
                .iter_mut()
                .zip(bias)
                .for_each(|(price, bias)| *price = -*bias);
            self.engine.select(scores, &self.prices, &mut choices)?;
            self.stay(layer, scores, &mut choices)?;
            return Ok(choices);
        }
        self.statistics.measure(scores);
        if !self.cache.look_up(layer, &self.statistics, &mut self.prices) {
            self.statistics.guess_prices(self.top_k, &mut self.prices);
        }
        let balanced = self
            .engine
            .balance(scores, &mut self.prices, &mut choices, BALANCE)?;
        self.steps += balanced.steps;
        self.cache.store(layer, &self.statistics, &self.prices);
        let mean = self.prices.iter().sum::<f32>() / self.experts as f32;
        let fresh = if bias.iter().all(|&b| b == 0.0) {
            1.0
        } else {
            FRESH
        };
        for (bias, price) in bias.iter_mut().zip(&self.prices) {
            *bias += fresh * (mean - price - *bias);
        }
        if self.rule == Rule::NashSwarm {
            let states = states();
            let neighbours = Neighbours::nearest(
                &states,
                scores.tokens(),
                states.len() / scores.tokens().max(1),
                FLOCK,
            )?;
            let rules = Rules {
                company: COMPANY * spread(scores),
                ..Rules::default()
            };
            let rewards: Vec<f32> = self.prices.iter().map(|price| -price).collect();
            let game = RoutingGame::new(scores, self.top_k, rules)?;
            game.with_rewards(&rewards)?
                .with_neighbours(&neighbours)?
                .play(&mut choices, SWEEPS)?;
        }
        self.stay(layer, scores, &mut choices)?;
        Ok(choices)
    }

    /// Chooses again, at the prices found, token by token with the reward for what is in fast memory then; nothing without a memory.
    fn stay(&mut self, layer: usize, scores: Scores<'_>, choices: &mut [u16]) -> anyhow::Result<()> {
        let Some(memory) = &mut self.memory else {
            return Ok(());
        };
        let mut ranks = scores.values().to_vec();
        for ranks in ranks.chunks_exact_mut(self.experts) {
            ranks
                .iter_mut()
                .zip(&self.prices)
                .for_each(|(rank, price)| *rank -= price);
        }
        memory.routing.rank(RoutingCall {
            layer,
            x: &vec![0.0; scores.tokens()],
            width: 1,
            ranks: &mut ranks,
            experts: self.experts,
            top_k: self.top_k,
        });
        self.prices.fill(0.0);
        self.engine
            .select(Scores::new(&ranks, self.experts)?, &self.prices, choices)?;
        Ok(())
    }

    /// What the auxiliary loss adds for `choices [T, k]` made with `scores [T, E]`.
    pub(crate) fn penalty(&self, scores: Tensor<2>, choices: &[u16]) -> Option<Tensor<1>> {
        if !(self.training && self.rule == Rule::AuxiliaryLoss) {
            return None;
        }
        let mut shares = vec![0.0f32; self.experts];
        let share = self.experts as f32 / choices.len() as f32;
        choices.iter().for_each(|&e| shares[usize::from(e)] += share);
        let shares = Tensor::<1>::from_data(TensorData::from(shares.as_slice()), &scores.device());
        let probabilities = scores.clone() / scores.sum_dim(1);
        let mean = probabilities.mean_dim(0).squeeze_dim(0);
        Some((mean * shares).sum().mul_scalar(self.strength))
    }
}

/// Root mean square deviation of a token's scores from their mean.
fn spread(scores: Scores<'_>) -> f64 {
    let count = scores.experts() as f64;
    let variance = |row: &[f32]| {
        let mean = row.iter().map(|&s| f64::from(s)).sum::<f64>() / count;
        row.iter().map(|&s| (f64::from(s) - mean).powi(2)).sum::<f64>() / count
    };
    let sum: f64 = scores.values().chunks_exact(scores.experts()).map(variance).sum();
    (sum / scores.tokens().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    const SHAPE: Shape = Shape {
        vocabulary: 8,
        layers: 1,
        width: 4,
        heads: 1,
        experts: 4,
        top_k: 1,
        hidden: 4,
        context: 4,
    };

    /// Scores in which every expert is liked more than the one before it.
    fn skewed(tokens: usize) -> Vec<f32> {
        let mut rng = Pcg64Mcg::seed_from_u64(1);
        (0..tokens * 4)
            .map(|i| 0.2 * (i % 4) as f32 + rng.random::<f32>())
            .collect()
    }

    #[test]
    fn every_rule_that_moves_a_bias_ends_balanced_without_the_batch() {
        let scores = skewed(256);
        for rule in [Rule::None, Rule::LossFree, Rule::Nash, Rule::NashCold] {
            let mut router = Router::new(rule, &SHAPE, None).unwrap();
            for _ in 0..800 {
                router.choose(0, &scores, Vec::new);
            }
            router.restart(false);
            router.choose(0, &scores, Vec::new);
            let usage = router.usage();
            assert_eq!(
                usage.batch_violation < 0.15,
                rule != Rule::None,
                "{rule:?} {usage:?}"
            );
            assert_eq!(usage.batch_violation, usage.global_violation);
        }
    }

    #[test]
    fn the_cache_saves_price_steps() {
        let steps = |rule| {
            let mut router = Router::new(rule, &SHAPE, None).unwrap();
            for _ in 0..20 {
                router.choose(0, &skewed(256), Vec::new);
            }
            router.usage()
        };
        let (cold, cached) = (steps(Rule::NashCold), steps(Rule::Nash));
        assert!(
            cached.cache_hits > 0.9 && cold.cache_hits == 0.0,
            "{cached:?} {cold:?}"
        );
        assert!(cached.price_steps <= cold.price_steps, "{cached:?} {cold:?}");
    }

    #[test]
    fn a_reward_saves_misses_and_none_changes_nothing() {
        let shape = Shape { top_k: 2, ..SHAPE };
        let scores = skewed(256);
        let route = |rule, reward| {
            let mut router = Router::new(rule, &shape, reward).unwrap();
            router.remember();
            let choices: Vec<u16> = (0..50)
                .flat_map(|_| router.choose(0, &scores, Vec::new))
                .collect();
            (choices, router.usage().miss_rate)
        };
        let (plain, unknown) = route(Rule::Nash, None);
        let (same, all) = route(Rule::NashResident, Some(0.0));
        let (_, fewer) = route(Rule::NashResident, Some(1.0));
        assert!(unknown.is_none() && plain == same);
        // The first of two choices stays where it is.
        assert!(fewer.unwrap() < 0.8 * all.unwrap(), "{fewer:?} {all:?}");
    }
}
