//! What routing costs and how well it balances: the methods of `nash_games::routing` on synthetic scores of several shapes.
//!
//! Every method routes the same batches of one seeded source ([`Source`]). Batch 0 fills the cache; the others are measured, with
//! prices several times each, and the median time is reported. What is counted: for prices, everything from raw scores to choices and loads (check of the scores,
//! statistics, cache, steps, selection); for best response, play from the tokens' own favourites to equilibrium, without
//! the search for neighbours, which has a field of its own. The plan's shape adds whole mixture layers and dense layers with as many
//! active parameters ([`MixtureLayer`], [`DenseLayer`]), in floats and packed.
//!
//! Shapes: T tokens, E experts, k of them per token, d hidden width, h hidden width of an expert.

mod layer;
mod measure;
mod policy;
mod source;

pub use layer::{DenseLayer, MixtureLayer, Storage};
pub use measure::routing_rows;
pub use nash_games::routing::Placed;
pub use policy::{ExpertRouting, ExpertRules, ExpertUse, UseHandle};
pub use source::{Batch, Source};

use serde::{Deserialize, Serialize};

/// A batch to route.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoutingShape {
    /// What it is called.
    pub name: &'static str,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// k.
    pub top_k: usize,
    /// d.
    pub width: usize,
    /// h, if the whole layer is to be timed too.
    pub expert_width: Option<usize>,
}

impl RoutingShape {
    /// The shapes of the benchmark: the one of the plan's prototype (8 sequences of 32 tokens), then those of today's mixtures.
    pub const ALL: [Self; 4] = [
        Self {
            name: "plan",
            tokens: 256,
            experts: 8,
            top_k: 2,
            width: 256,
            expert_width: Some(1024),
        },
        Self::modern("e64", 64),
        Self::modern("e128", 128),
        Self::modern("e256", 256),
    ];

    const fn modern(name: &'static str, experts: usize) -> Self {
        Self {
            name,
            tokens: 2048,
            experts,
            top_k: 8,
            width: 2048,
            expert_width: None,
        }
    }
}

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoutingOptions {
    /// Batches measured, besides the one that fills the cache.
    pub batches: usize,
    /// Times each is measured.
    pub repeats: usize,
    /// Seed of the scores.
    pub seed: u64,
    /// α of the exact game, in units of the scores.
    pub congestion: f64,
    /// β of the exact game.
    pub company: f64,
    /// MaxVio at which prices rest.
    pub tolerance: f64,
    /// Price steps at most.
    pub max_steps: usize,
    /// Sweeps of best response at most.
    pub max_sweeps: usize,
}

impl Default for RoutingOptions {
    fn default() -> Self {
        Self {
            batches: 8,
            repeats: 5,
            seed: 0,
            congestion: 1.0,
            company: 0.1,
            tolerance: 0.12,
            max_steps: 16,
            max_sweeps: 1000,
        }
    }
}

/// One method on one shape. Absent: does not apply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoutingRow {
    /// Name of the shape.
    pub shape: String,
    /// What was done.
    pub method: String,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// k.
    pub top_k: usize,
    /// Threads at work.
    pub threads: usize,
    /// Median time of a batch over its tokens.
    pub nanoseconds_per_token: f64,
    /// Median time of a batch.
    pub milliseconds: f64,
    /// Price steps, or sweeps of best response: mean over the batches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iterations: Option<f64>,
    /// The same, the most that a batch took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_iterations: Option<usize>,
    /// Largest gain a token had left, over all batches, in units of the scores: at the prices, or in the exact game for best response and
    /// for plain top-k (which plays no game: what it would leave on the table).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_regret: Option<f64>,
    /// Largest load over mean load, minus 1: the worst batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_violation: Option<f64>,
    /// Standard deviation of the loads over their mean: mean over the batches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_cv: Option<f64>,
    /// Mean score of the chosen experts, in units of the scores: what balance costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_score: Option<f64>,
    /// Share of a token's experts that a neighbour of it has too, mean over all pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_with_neighbours: Option<f64>,
    /// Batches whose prices came from the cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_hits: Option<u64>,
    /// Batches for which there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_misses: Option<u64>,
    /// Batches that were not in equilibrium, or not in balance, at the limit of the iterations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unconverged: Option<u64>,
    /// Time to find the neighbours of a batch, per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neighbour_nanoseconds_per_token: Option<f64>,
    /// Share of a mixture layer's time that routing takes, the router's own matrix product not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing_share: Option<f64>,
}

/// All that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoutingReport {
    /// Shape by shape, method by method.
    pub rows: Vec<RoutingRow>,
}
