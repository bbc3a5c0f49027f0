//! What came of carving.

use serde::{Deserialize, Serialize};

/// One layer. Energies are shares of the energy of all neurons.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Kept at the start of the game, each token choosing the best experts.
    pub kept_at_start: f64,
    /// Kept at the equilibrium, each token choosing the best experts.
    pub kept_by_choice: f64,
    /// Kept by the first router.
    pub kept_by_first_router: f64,
    /// Kept by the router in the end.
    pub kept_by_router: f64,
    /// Kept by the router if tokens may use more or fewer experts, as many on average.
    pub kept_dynamic: f64,
    /// Kept if experts were chosen at random.
    pub random: f64,
    /// Rounds of tokens and neurons answering each other.
    pub rounds: usize,
    /// Pairs of neurons that changed places.
    pub swaps: usize,
    /// Whether the game ended in an equilibrium.
    pub settled: bool,
    /// Largest gain of a pair of neurons that was left, as a share of all energy.
    pub max_regret: f64,
    /// Times that neurons and router answered each other.
    pub router_rounds: usize,
    /// Error of the block's output on the calibration text over its energy.
    pub error: f64,
    /// The same with a fitted down projection.
    pub error_refit: f64,
    /// Experts per token.
    pub top_k: usize,
    /// KL divergence with this layer alone carved, on some calibration text (with a market).
    pub kl: f64,
}

/// What came of carving a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CarveReport {
    /// Routed experts of a layer.
    pub experts: usize,
    /// Neurons of a routed expert.
    pub width: usize,
    /// Neurons of the shared expert.
    pub shared: usize,
    /// Routed experts per token.
    pub top_k: usize,
    /// Share of the neurons that a token uses.
    pub active: f64,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
    /// Calibration tokens.
    pub tokens: usize,
    /// Seconds.
    pub seconds: f64,
}
