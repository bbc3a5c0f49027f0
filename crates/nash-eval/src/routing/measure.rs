//! The measurement of one shape, method by method.

use std::time::Instant;

use nash_games::GameError;
use nash_games::routing::{
    Balance, FLOCK, Neighbours, PriceCache, PriceRouter, RoutingGame, Rules, ScoreStatistics, Scores, cache,
    certify_game, certify_prices, load_balance,
};
use nash_kernels::Width;

use super::layer::{DenseLayer, MixtureLayer, Storage};
use super::source::{Batch, Source};
use super::{RoutingOptions, RoutingRow, RoutingShape};
use crate::EvalError;
use crate::stats::median;

/// Measures all methods on one shape. `tick` is called after each method.
///
/// # Errors
/// If there is nothing to measure, `tick` fails, or scores are not finite.
pub fn routing_rows(
    shape: RoutingShape,
    options: RoutingOptions,
    tick: &mut dyn FnMut() -> Result<(), EvalError>,
) -> Result<Vec<RoutingRow>, EvalError> {
    if options.batches == 0 || options.repeats == 0 {
        return Err(EvalError::NothingToMeasure {
            prompt: options.batches,
            generate: 0,
            repeats: options.repeats,
        });
    }
    let source = Source::new(shape, options.seed);
    let batches: Vec<Batch> = (0..=options.batches as u64)
        .map(|index| source.batch(index))
        .collect();
    let start = Instant::now();
    let flock = |b: &Batch| Neighbours::nearest(&b.states, shape.tokens, shape.width, FLOCK);
    let neighbours = batches[1..].iter().map(flock).collect::<Result<Vec<_>, _>>()?;
    let searched = start.elapsed().as_secs_f64() * 1e9 / (shape.tokens * options.batches) as f64;
    let bench = Bench {
        shape,
        options,
        batches: &batches,
        neighbours: &neighbours,
    };
    let mut rows = Vec::new();
    for prices in [Prices::None, Prices::Cold, Prices::Warm, Prices::Frozen] {
        rows.push(bench.prices(prices)?);
        tick()?;
    }
    for company in [0.0, options.company] {
        let mut row = bench.best_response(company)?;
        row.neighbour_nanoseconds_per_token = (company > 0.0).then_some(searched);
        rows.push(row);
        tick()?;
    }
    if let Some(hidden) = shape.expert_width {
        rows.extend(bench.layers(hidden)?);
        tick()?;
    }
    Ok(rows)
}

/// How experts get their prices.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Prices {
    /// They have none.
    None,
    /// Guessed from the batch, then moved.
    Cold,
    /// From the cache, then moved.
    Warm,
    /// From the cache, as they are.
    Frozen,
}

impl Prices {
    fn method(self) -> &'static str {
        match self {
            Self::None => "top-k without a game",
            Self::Cold => "prices, cold",
            Self::Warm => "prices, cached",
            Self::Frozen => "prices, cached and frozen",
        }
    }
}

struct Bench<'a> {
    shape: RoutingShape,
    options: RoutingOptions,
    /// The first fills the cache.
    batches: &'a [Batch],
    /// Of the other batches.
    neighbours: &'a [Neighbours],
}

/// What was found about the batches of a method.
#[derive(Default)]
struct Findings {
    seconds: Vec<f64>,
    iterations: Vec<usize>,
    max_regret: f64,
    max_violation: f64,
    load_cv: f64,
    score: f64,
    shared: f64,
    unconverged: u64,
}

impl Bench<'_> {
    fn prices(&self, prices: Prices) -> Result<RoutingRow, EvalError> {
        let mut at = PriceState::new(self.shape, self.options)?;
        if matches!(prices, Prices::Warm | Prices::Frozen) {
            at.route(&self.batches[0], Prices::Warm)?;
        }
        let seen = at.cache.statistics();
        let mut found = Findings::default();
        for (batch, neighbours) in self.batches[1..].iter().zip(self.neighbours) {
            // A cache that has seen the batch would know it: every repeat starts from what the batch before has left.
            let before = (at.statistics.clone(), at.prices.clone());
            let mut result = (0, true);
            for _ in 0..self.options.repeats {
                if prices == Prices::Warm {
                    at.cache.store(0, &before.0, &before.1);
                }
                let start = Instant::now();
                result = at.route(batch, prices)?;
                found.seconds.push(start.elapsed().as_secs_f64());
            }
            found.iterations.push(result.0);
            found.unconverged += u64::from(!result.1);
            self.note(&mut found, batch, neighbours, &at.choices);
            if prices == Prices::None {
                let game = self.game(batch, neighbours, self.options.company)?;
                found.max_regret = found.max_regret.max(certify_game(&game, &at.choices)?.max_regret);
            } else {
                let scores = Scores::new(&batch.scores, self.shape.experts)?;
                let certificate = certify_prices(scores, &at.prices, &at.choices)?;
                found.max_regret = found.max_regret.max(certificate.max_regret);
            }
        }
        let mut row = self.row(prices.method(), found);
        match prices {
            Prices::None => row.unconverged = None,
            Prices::Cold => {}
            Prices::Warm | Prices::Frozen => {
                let now = at.cache.statistics();
                let batches = |count: u64| count / self.options.repeats as u64;
                row.cache_hits = Some(batches(now.hits - seen.hits));
                row.cache_misses = Some(batches(now.misses - seen.misses));
            }
        }
        if matches!(prices, Prices::None | Prices::Frozen) {
            (row.iterations, row.max_iterations, row.unconverged) = (None, None, None);
        }
        Ok(row)
    }

    fn best_response(&self, company: f64) -> Result<RoutingRow, EvalError> {
        let mut found = Findings::default();
        for (batch, neighbours) in self.batches[1..].iter().zip(self.neighbours) {
            let game = self.game(batch, neighbours, company)?;
            let start = Instant::now();
            let mut choices = game.start();
            let played = game.play(&mut choices, self.options.max_sweeps)?;
            found.seconds.push(start.elapsed().as_secs_f64());
            let certificate = certify_game(&game, &choices)?;
            found.iterations.push(played.sweeps);
            found.max_regret = found.max_regret.max(certificate.max_regret);
            found.unconverged += u64::from(!played.settled || certificate.unsettled > 0);
            self.note(&mut found, batch, neighbours, &choices);
        }
        let method = if company > 0.0 {
            "best response, 7 neighbours"
        } else {
            "best response, no neighbours"
        };
        Ok(self.row(method, found))
    }

    fn game<'b>(
        &self,
        batch: &'b Batch,
        neighbours: &'b Neighbours,
        company: f64,
    ) -> Result<RoutingGame<'b>, GameError> {
        let rules = Rules {
            congestion: self.options.congestion,
            company,
            capacity: None,
        };
        let game = RoutingGame::new(
            Scores::new(&batch.scores, self.shape.experts)?,
            self.shape.top_k,
            rules,
        )?;
        if company > 0.0 {
            game.with_neighbours(neighbours)
        } else {
            Ok(game)
        }
    }

    /// Notes what choices are worth, whatever the method.
    fn note(&self, found: &mut Findings, batch: &Batch, neighbours: &Neighbours, choices: &[u16]) {
        let (k, experts) = (self.shape.top_k, self.shape.experts);
        let mut loads = vec![0u64; experts];
        let (mut score, mut shared) = (0.0, 0usize);
        for (token, set) in choices.chunks(k).enumerate() {
            for &e in set {
                loads[usize::from(e)] += 1;
                score += f64::from(batch.scores[token * experts + usize::from(e)]);
            }
            for &j in neighbours.of(token) {
                let other = &choices[j as usize * k..][..k];
                shared += set.iter().filter(|e| other.contains(e)).count();
            }
        }
        let batches = self.neighbours.len() as f64;
        let (violation, load_cv) = load_balance(&loads);
        found.max_violation = found.max_violation.max(violation);
        found.load_cv += load_cv / batches;
        found.score += score / choices.len() as f64 / batches;
        found.shared += shared as f64 / (2 * neighbours.pairs() * k).max(1) as f64 / batches;
    }

    fn row(&self, method: &str, mut found: Findings) -> RoutingRow {
        let sweeps: usize = found.iterations.iter().sum();
        RoutingRow {
            iterations: Some(sweeps as f64 / found.iterations.len().max(1) as f64),
            max_iterations: found.iterations.iter().copied().max(),
            max_regret: Some(found.max_regret),
            max_violation: Some(found.max_violation),
            load_cv: Some(found.load_cv),
            mean_score: Some(found.score),
            shared_with_neighbours: Some(found.shared),
            unconverged: Some(found.unconverged),
            ..self.timed(method, median(&mut found.seconds).unwrap_or_default())
        }
    }

    fn timed(&self, method: &str, seconds: f64) -> RoutingRow {
        RoutingRow {
            shape: self.shape.name.to_owned(),
            method: method.to_owned(),
            tokens: self.shape.tokens,
            experts: self.shape.experts,
            top_k: self.shape.top_k,
            threads: nash_kernels::pool::threads(),
            nanoseconds_per_token: seconds * 1e9 / self.shape.tokens as f64,
            milliseconds: seconds * 1e3,
            ..RoutingRow::default()
        }
    }

    /// Whole layers with experts `hidden` wide at cached prices, and a dense layer k times as wide: each in a loop of its own over the batches,
    /// as its peers are timed, so that its weights are where its last run has left them.
    fn layers(&self, hidden: usize) -> Result<Vec<RoutingRow>, EvalError> {
        let (k, experts) = (self.shape.top_k, self.shape.experts);
        let mixture = |storage| MixtureLayer::random(self.shape, hidden, storage, self.options.seed);
        let dense = |storage| DenseLayer::random(self.shape.width, k * hidden, storage, self.options.seed);
        let mut y = vec![0.0; self.batches[0].states.len()];
        // One seed, one router: scores and prices are those of all mixtures. Prices of the first batch, the layers are timed on the others.
        let router = mixture(Storage::Float)?;
        let scores = self.batches.iter().map(|batch| router.scores(&batch.states));
        let scores: Vec<Vec<f32>> = scores.collect();
        let mut at = PriceState::new(self.shape, self.options)?;
        at.balance(Scores::new(&scores[0], experts)?, Prices::Cold)?;
        let routing = self.median_seconds(|batch| {
            let scores = Scores::new(&scores[1 + batch], experts)?;
            Ok(at.router.select(scores, &at.prices, &mut at.choices)?)
        })?;
        let mut rows = Vec::new();
        for (storage, name) in storages() {
            let mut layer = mixture(storage)?;
            layer.prices().copy_from_slice(&at.prices);
            let all =
                self.median_seconds(|batch| Ok(layer.forward(&self.batches[1 + batch].states, &mut y)?))?;
            rows.push(RoutingRow {
                routing_share: Some(routing / all),
                ..self.timed(&format!("whole mixture layer, {name}"), all)
            });
        }
        for (storage, name) in storages() {
            let mut layer = dense(storage);
            let all = self.median_seconds(|batch| {
                layer.forward(&self.batches[1 + batch].states, &mut y);
                Ok(())
            })?;
            rows.push(self.timed(&format!("dense layer, as many active parameters, {name}"), all));
        }
        Ok(rows)
    }

    /// How long `work` takes on a batch: the median of several passes over all that are timed, after one that is not counted.
    fn median_seconds(&self, mut work: impl FnMut(usize) -> Result<(), EvalError>) -> Result<f64, EvalError> {
        let mut times = Vec::new();
        for pass in 0..=self.options.repeats {
            for batch in 0..self.options.batches {
                let start = Instant::now();
                work(batch)?;
                if pass > 0 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        Ok(median(&mut times).unwrap_or_default())
    }
}

/// How the layers that are timed store their weights.
fn storages() -> impl Iterator<Item = (Storage, String)> {
    let packed = |bits| {
        Some((
            Storage::Packed(Width::new(bits)?),
            format!("packed at {bits} bits"),
        ))
    };
    std::iter::once((Storage::Float, "f32".to_owned())).chain([8, 4].into_iter().filter_map(packed))
}

/// The memory of the price methods.
struct PriceState {
    options: Balance,
    top_k: usize,
    router: PriceRouter,
    cache: PriceCache,
    statistics: ScoreStatistics,
    prices: Vec<f32>,
    choices: Vec<u16>,
}

impl PriceState {
    fn new(shape: RoutingShape, options: RoutingOptions) -> Result<Self, GameError> {
        Ok(Self {
            options: Balance {
                max_steps: options.max_steps,
                tolerance: options.tolerance,
            },
            top_k: shape.top_k,
            router: PriceRouter::new(shape.experts, shape.top_k)?,
            cache: PriceCache::new(1, cache::DRIFT_LIMIT),
            statistics: ScoreStatistics::default(),
            prices: vec![0.0; shape.experts],
            choices: vec![0; shape.tokens * shape.top_k],
        })
    }

    /// Routes a batch, from its raw scores; steps made, and whether loads balance.
    fn route(&mut self, batch: &Batch, prices: Prices) -> Result<(usize, bool), GameError> {
        let scores = Scores::new(&batch.scores, self.prices.len())?;
        self.balance(scores, prices)
    }

    fn balance(&mut self, scores: Scores<'_>, prices: Prices) -> Result<(usize, bool), GameError> {
        if prices == Prices::None {
            self.prices.fill(0.0);
            self.router.select(scores, &self.prices, &mut self.choices)?;
            return Ok((0, true));
        }
        self.statistics.measure(scores);
        let cached = prices != Prices::Cold && self.cache.look_up(0, &self.statistics, &mut self.prices);
        if !cached {
            self.statistics.guess_prices(self.top_k, &mut self.prices);
        }
        if cached && prices == Prices::Frozen {
            self.router.select(scores, &self.prices, &mut self.choices)?;
            return Ok((0, true));
        }
        let balanced = self
            .router
            .balance(scores, &mut self.prices, &mut self.choices, self.options)?;
        if prices != Prices::Cold {
            self.cache.store(0, &self.statistics, &self.prices);
        }
        Ok((balanced.steps, balanced.settled))
    }
}
