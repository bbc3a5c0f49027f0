//! Routing rules inside a model: prices, rewards for experts in fast memory, company of alike tokens; and what they touch.
//!
//! Every layer has an unlimited slow memory and a fast one for R of its experts. They are fetched in pages of m experts, of which the least recently used makes room
//! (LRU). Tokens come in batches of B, as when B of them are decoded together; a batch touches the pages of the union of its tokens' experts, and a page that is
//! not resident then is a miss. Pages are experts in stored order, or those of [`place_experts`] for the experts that batches of another text touched together.
//!
//! The rules, all in units of the standard deviation of a token's scores over the experts, so that one number fits all layers:
//!
//! - prices `p_e`, the mean of those that balance each of the first calls ([`PriceRouter`]), then frozen;
//! - a reward r for resident experts: `top-k(s − p + r)`, but the J best by `s − p` come first whatever is resident (as in Skliar et al. 2024, arXiv 2412.00099, whose J is
//!   1 or 2). It moves the choice only, never the mixing weights;
//! - company β for each expert shared with one of 7 nearest tokens of the batch, played to the equilibrium of [`RoutingGame`].

use std::sync::{Arc, Mutex, PoisonError};

use nash_games::GameError;
use nash_games::routing::{
    Balance, FLOCK, Neighbours, Placed, PriceRouter, RoutingGame, Rules, ScoreStatistics, Scores,
    load_balance, place_experts,
};
use nash_models::{RoutingCall, RoutingPolicy};
use serde::{Deserialize, Serialize};

/// Sweeps of a game, at most.
const MAX_SWEEPS: usize = 100;
/// Experts per token that the game and the prices can handle.
const MOST: usize = 8;
/// What an expert that must be chosen is worth more: beyond any score, price and reward.
const KEPT: f32 = 1e9;
/// Tokens of a call that prices are found for, at least.
const PRICE_TOKENS: usize = 64;
/// Such calls, until prices are frozen: one call's balance is noise, their mean is not.
const PRICE_CALLS: usize = 64;

/// How experts are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertRules {
    /// R, experts of a layer in fast memory.
    pub resident: usize,
    /// m, experts that one fetch brings.
    pub page: usize,
    /// r.
    pub reward: f32,
    /// J, experts of a token that no reward drives out; at most k − 1.
    pub keep: usize,
    /// β.
    pub company: f32,
    /// Whether experts have prices.
    pub prices: bool,
    /// B, tokens that are routed together.
    pub batch: usize,
}

/// What was touched, over all layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertUse {
    /// Share of the touched pages that were not resident.
    pub miss_rate: f64,
    /// Pages that a batch had to fetch, per layer.
    pub misses_per_batch: f64,
    /// Pages of a batch, per layer.
    pub pages_per_batch: f64,
    /// Distinct experts of a batch, per layer.
    pub experts_per_batch: f64,
    /// Largest load over mean load, minus 1: mean over the layers.
    pub max_violation: f64,
    /// The rules.
    pub rules: Option<ExpertRules>,
}

/// Counts, shared with whoever wants to read them.
#[derive(Debug, Default)]
struct Counts {
    batches: u64,
    /// Experts, and pages.
    touched: u64,
    pages: u64,
    misses: u64,
    layers: Vec<LayerCounts>,
}

#[derive(Debug, Default)]
struct LayerCounts {
    /// `[E]`: tokens.
    loads: Vec<u64>,
    /// `[E, E]`: batches that touched both.
    together: Vec<f32>,
}

/// Reads what a rule inside a model has counted.
#[derive(Clone, Debug)]
pub struct UseHandle {
    counts: Arc<Mutex<Counts>>,
    rules: ExpertRules,
}

impl UseHandle {
    /// What was counted so far.
    pub fn read(&self) -> ExpertUse {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let used = counts.layers.iter().filter(|layer| !layer.loads.is_empty());
        let violation = |layer: &LayerCounts| load_balance(&layer.loads).0;
        let batches = counts.batches.max(1) as f64;
        ExpertUse {
            miss_rate: counts.misses as f64 / counts.pages.max(1) as f64,
            misses_per_batch: counts.misses as f64 / batches,
            pages_per_batch: counts.pages as f64 / batches,
            experts_per_batch: counts.touched as f64 / batches,
            max_violation: used.clone().map(violation).sum::<f64>() / used.count().max(1) as f64,
            rules: Some(self.rules),
        }
    }

    /// Pages of m experts for every layer, those together that batches touched together so far; no game for layers without experts.
    ///
    /// # Errors
    /// If a page has no room.
    pub fn place(&self) -> Result<Vec<Placed>, GameError> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let place = |layer: &LayerCounts| {
            place_experts(&layer.together, layer.loads.len(), self.rules.page, MAX_SWEEPS)
        };
        counts.layers.iter().map(place).collect()
    }
}

/// The memory of a layer.
#[derive(Debug, Default)]
struct LayerState {
    /// Resident pages, the most recently used last.
    resident: Vec<u16>,
    /// `[E]` once they are found: the mean over `priced` calls.
    prices: Vec<f32>,
    priced: usize,
}

/// [`ExpertRules`] at work.
#[derive(Debug)]
pub struct ExpertRouting {
    rules: ExpertRules,
    /// By layer; stored order where there is none.
    places: Arc<[Placed]>,
    layers: Vec<LayerState>,
    counts: Arc<Mutex<Counts>>,
}

impl ExpertRouting {
    /// With empty fast memories, and pages as `places` has them for each layer; in stored order where it has none.
    pub fn new(rules: ExpertRules, places: Arc<[Placed]>) -> Self {
        Self {
            rules,
            places,
            layers: Vec::new(),
            counts: Arc::default(),
        }
    }

    /// A handle to what will be counted.
    pub fn handle(&self) -> UseHandle {
        UseHandle {
            counts: Arc::clone(&self.counts),
            rules: self.rules,
        }
    }

    /// The page of an expert.
    fn page(&self, layer: usize, e: usize) -> u16 {
        let placed = self.places.get(layer).and_then(|placed| placed.pages.get(e));
        placed.copied().unwrap_or((e / self.rules.page.max(1)) as u16)
    }

    /// Ranks one batch and lets it touch its experts.
    fn batch(&mut self, layer: usize, x: &[f32], ranks: &mut [f32], (experts, k): (usize, usize)) {
        let (rules, state) = (self.rules, &self.layers[layer]);
        let reward = |e| {
            if state.resident.contains(&self.page(layer, e)) {
                rules.reward
            } else {
                0.0
            }
        };
        let rewards: Vec<f32> = (0..experts).map(reward).collect();
        let tokens = ranks.len() / experts;
        let mut order: Vec<usize> = Vec::with_capacity(experts);
        for ranks in ranks.chunks_exact_mut(experts) {
            ranks
                .iter_mut()
                .zip(&state.prices)
                .for_each(|(rank, p)| *rank -= p);
        }
        let choices = if rules.company > 0.0 && tokens > 1 && k <= MOST {
            play(x, ranks, &rewards, (experts, k), rules.company)
        } else {
            None
        };
        // Without a reward the best come first anyway.
        let kept = if rules.reward == 0.0 {
            0
        } else {
            rules.keep.min(k - 1)
        };
        for ranks in ranks.chunks_exact_mut(experts) {
            if kept > 0 {
                by_rank(ranks, &mut order);
            }
            ranks.iter_mut().zip(&rewards).for_each(|(rank, r)| *rank += r);
            order[..kept].iter().for_each(|&e| ranks[e] += KEPT);
        }
        if let Some(choices) = &choices {
            for (ranks, choices) in ranks.chunks_exact_mut(experts).zip(choices.chunks_exact(k)) {
                choices.iter().for_each(|&e| ranks[usize::from(e)] = f32::MAX);
            }
        }
        let mut loads = vec![0u64; experts];
        for ranks in ranks.chunks_exact(experts) {
            by_rank(ranks, &mut order);
            order[..k].iter().for_each(|&e| loads[e] += 1);
        }
        self.touch(layer, &loads);
    }

    /// Counts a batch with these `loads [E]`, and fetches what it needs.
    fn touch(&mut self, layer: usize, loads: &[u64]) {
        let touched: Vec<usize> = (0..loads.len()).filter(|&e| loads[e] > 0).collect();
        let mut pages: Vec<u16> = touched.iter().map(|&e| self.page(layer, e)).collect();
        pages.sort_unstable();
        pages.dedup();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.batches += 1;
        counts.touched += touched.len() as u64;
        counts.pages += pages.len() as u64;
        let layers = counts.layers.len().max(layer + 1);
        counts.layers.resize_with(layers, LayerCounts::default);
        counts.layers[layer].add(loads, &touched);
        let resident = &mut self.layers[layer].resident;
        for page in pages {
            match resident.iter().position(|&r| r == page) {
                Some(at) => {
                    resident.remove(at);
                }
                None => counts.misses += 1,
            }
            resident.push(page);
        }
        let room = self.rules.resident / self.rules.page.max(1);
        let over = resident.len().saturating_sub(room);
        resident.drain(..over);
    }
}

impl LayerCounts {
    fn add(&mut self, loads: &[u64], touched: &[usize]) {
        let experts = loads.len();
        self.loads.resize(experts, 0);
        self.together.resize(experts * experts, 0.0);
        self.loads
            .iter_mut()
            .zip(loads)
            .for_each(|(sum, load)| *sum += load);
        for &e in touched {
            for &f in touched.iter().filter(|&&f| f != e) {
                self.together[e * experts + f] += 1.0;
            }
        }
    }
}

impl RoutingPolicy for ExpertRouting {
    fn rank(&mut self, call: RoutingCall<'_>) {
        let RoutingCall {
            layer,
            x,
            width,
            ranks,
            experts,
            top_k,
        } = call;
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, LayerState::default);
        }
        for ranks in ranks.chunks_exact_mut(experts) {
            let scale = 1.0 / deviation(ranks).max(f32::MIN_POSITIVE);
            ranks.iter_mut().for_each(|rank| *rank *= scale);
        }
        let tokens = ranks.len() / experts;
        let state = &mut self.layers[layer];
        if self.rules.prices && state.priced < PRICE_CALLS && tokens >= PRICE_TOKENS && top_k <= MOST {
            state.reprice(ranks, experts, top_k);
        }
        let batch = self.rules.batch.max(1);
        for (x, ranks) in x.chunks(batch * width).zip(ranks.chunks_mut(batch * experts)) {
            self.batch(layer, x, ranks, (experts, top_k));
        }
    }
}

/// Experts in `order`, the highest rank first.
fn by_rank(ranks: &[f32], order: &mut Vec<usize>) {
    order.clear();
    order.extend(0..ranks.len());
    order.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]));
}

/// Standard deviation of the finite ranks of a token.
fn deviation(ranks: &[f32]) -> f32 {
    let finite = ranks.iter().filter(|r| r.is_finite());
    let (n, sum) = finite
        .clone()
        .fold((0.0f32, 0.0), |(n, sum), r| (n + 1.0, sum + r));
    let mean = sum / n.max(1.0);
    (finite.map(|r| (r - mean).powi(2)).sum::<f32>() / n.max(1.0)).sqrt()
}

impl LayerState {
    /// Takes the prices that balance the tokens of `ranks` into the mean; leaves it if they cannot be had.
    fn reprice(&mut self, ranks: &[f32], experts: usize, k: usize) {
        let Some(found) = balancing(ranks, experts, k, &self.prices) else {
            return;
        };
        self.prices.resize(experts, 0.0);
        self.priced += 1;
        let share = 1.0 / self.priced as f32;
        for (mean, price) in self.prices.iter_mut().zip(found) {
            *mean += share * (price - *mean);
        }
    }
}

/// Prices that balance the tokens of `ranks`, searched from `start`, if there is one; `None` if they cannot be had.
fn balancing(ranks: &[f32], experts: usize, k: usize, start: &[f32]) -> Option<Vec<f32>> {
    let scores = Scores::new(ranks, experts).ok()?;
    let (mut prices, mut choices) = (start.to_vec(), vec![0; scores.tokens() * k]);
    if prices.is_empty() {
        let mut statistics = ScoreStatistics::default();
        statistics.measure(scores);
        prices.resize(experts, 0.0);
        statistics.guess_prices(k, &mut prices);
    }
    let options = Balance {
        max_steps: 16,
        tolerance: 0.12,
    };
    PriceRouter::new(experts, k)
        .ok()?
        .balance(scores, &mut prices, &mut choices, options)
        .ok()?;
    // Only differences count; a common part would look like a reward.
    let mean = prices.iter().sum::<f32>() / experts as f32;
    prices.iter_mut().for_each(|p| *p -= mean);
    Some(prices)
}

/// The choices of a batch whose tokens like the company of their neighbours, at an equilibrium.
fn play(
    x: &[f32],
    ranks: &[f32],
    rewards: &[f32],
    (experts, k): (usize, usize),
    company: f32,
) -> Option<Vec<u16>> {
    let tokens = ranks.len() / experts;
    let neighbours = Neighbours::nearest(x, tokens, x.len() / tokens, FLOCK).ok()?;
    let rules = Rules {
        company: f64::from(company),
        ..Rules::default()
    };
    let game = RoutingGame::new(Scores::new(ranks, experts).ok()?, k, rules).ok()?;
    let game = game
        .with_rewards(rewards)
        .ok()?
        .with_neighbours(&neighbours)
        .ok()?;
    let mut choices = game.start();
    game.play(&mut choices, MAX_SWEEPS).ok()?;
    Some(choices)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    const RULES: ExpertRules = ExpertRules {
        resident: 2,
        page: 1,
        reward: 0.0,
        keep: 0,
        company: 0.0,
        prices: false,
        batch: 1,
    };

    fn route(rules: ExpertRules, ranks: &mut [f32], k: usize) -> ExpertUse {
        route_from(rules, Arc::default(), ranks, k).read()
    }

    fn route_from(rules: ExpertRules, places: Arc<[Placed]>, ranks: &mut [f32], k: usize) -> UseHandle {
        let mut routing = ExpertRouting::new(rules, places);
        let handle = routing.handle();
        let x: Vec<f32> = (0..ranks.len()).map(|i| (i % 5) as f32).collect();
        routing.rank(RoutingCall {
            layer: 0,
            x: &x,
            width: 4,
            ranks,
            experts: 4,
            top_k: k,
        });
        handle
    }

    #[test]
    fn experts_of_one_page_come_with_one_fetch() {
        // Eight tokens want 0 and 3, eight 1 and 2; there is room for one page of two.
        let ranks = [[2.0, 0.0, 0.0, 1.9].repeat(8), [0.0, 2.0, 1.9, 0.0].repeat(8)].concat();
        let rules = ExpertRules { page: 2, ..RULES };
        let stored = route_from(rules, Arc::default(), &mut ranks.clone(), 2);
        let used = stored.read();
        assert_eq!((used.experts_per_batch, used.pages_per_batch), (2.0, 2.0));
        assert_eq!(
            used.misses_per_batch,
            17.0 / 16.0,
            "of two pages one makes room for the other"
        );
        let places: Arc<[Placed]> = stored.place().unwrap().into();
        assert_eq!(places[0].pages, [0, 1, 1, 0]);
        let placed = route_from(rules, places, &mut ranks.clone(), 2).read();
        assert_eq!((placed.experts_per_batch, placed.pages_per_batch), (2.0, 1.0));
        assert_eq!(placed.misses_per_batch, 2.0 / 16.0);
    }

    #[test]
    fn misses_are_those_of_an_lru_cache_and_a_reward_saves_them() {
        // Favourites 0, 1, 0, 2, 1: with two places, 2 drives out 1, and 1 drives out 0.
        let favourites = [0, 1, 0, 2, 1];
        let ranks: Vec<f32> = favourites
            .iter()
            .flat_map(|&f| (0..4).map(move |e| if e == f { 1.0 } else { 0.1 * e as f32 }))
            .collect();
        let plain = route(RULES, &mut ranks.clone(), 1);
        assert_eq!(plain.miss_rate, 4.0 / 5.0);
        assert_eq!(
            (plain.experts_per_batch, plain.max_violation),
            (1.0, 2.0 / 5.0 * 4.0 - 1.0)
        );
        let mut kept = ranks.clone();
        let paid = route(ExpertRules { reward: 9.0, ..RULES }, &mut kept, 1);
        assert_eq!(paid.miss_rate, 1.0 / 5.0, "the first expert stays");
        let kept = ExpertRules {
            reward: 9.0,
            keep: 1,
            ..RULES
        };
        let both = route(kept, &mut ranks.clone(), 2);
        assert_eq!(
            both.misses_per_batch,
            (5.0 + 1.0) / 5.0,
            "every favourite is fetched, what comes second once"
        );
        assert_eq!(
            route(kept, &mut ranks.clone(), 1).miss_rate,
            1.0 / 5.0,
            "of one expert none is kept"
        );
        let batch = route(ExpertRules { batch: 5, ..RULES }, &mut ranks.clone(), 1);
        assert_eq!((batch.experts_per_batch, batch.misses_per_batch), (3.0, 3.0));
    }

    #[test]
    fn prices_balance_and_company_brings_tokens_together() {
        let mut rng = Pcg64Mcg::seed_from_u64(1);
        let flat: Vec<f32> = (0..256 * 4).map(|_| rng.random::<f32>()).collect();
        // Every expert is liked a little more than the one before.
        let ranks: Vec<f32> = flat
            .iter()
            .zip(0..)
            .map(|(r, i)| r + 0.2 * (i % 4) as f32)
            .collect();
        let plain = route(RULES, &mut ranks.clone(), 1);
        let priced = route(
            ExpertRules {
                prices: true,
                ..RULES
            },
            &mut ranks.clone(),
            1,
        );
        assert!(
            priced.max_violation < 0.2 && plain.max_violation > 0.5,
            "{plain:?} {priced:?}"
        );
        let batch = ExpertRules { batch: 8, ..RULES };
        let alone = route(batch, &mut flat.clone(), 1).experts_per_batch;
        let together = route(
            ExpertRules {
                company: 1.0,
                ..batch
            },
            &mut flat.clone(),
            1,
        )
        .experts_per_batch;
        assert!(together < alone, "{together} {alone}");
    }
}
