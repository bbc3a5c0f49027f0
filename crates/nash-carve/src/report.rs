//! What came of carving.

use serde::{Deserialize, Serialize};

/// One layer. Energies are shares of the energy of all neurons, on the calibration text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Routed experts per token.
    pub top_k: usize,
    /// Kept at the start of the game, each token choosing the best experts.
    pub kept_at_start: f64,
    /// Kept at the equilibrium, each token choosing the best experts.
    pub kept_by_choice: f64,
    /// Kept by the first router.
    pub kept_by_first_router: f64,
    /// Kept by the router in the end.
    pub kept_by_router: f64,
    /// Kept if experts were chosen at random.
    pub kept_at_random: f64,
    /// Rounds of tokens and neurons answering each other.
    pub rounds: usize,
    /// Pairs of neurons that changed places in them.
    pub swaps: usize,
    /// Whether they ended in an equilibrium.
    pub settled: bool,
    /// Largest gain of a pair of neurons that was left there.
    pub choice_regret: f64,
    /// Times that router and neurons answered each other.
    pub router_rounds: usize,
    /// Largest gain of a pair of neurons that is left, given what tokens choose by the router.
    pub max_regret: f64,
    /// Error of the block's output over its energy, `Σ‖y − ŷ‖² / Σ‖y‖²`.
    pub error: f64,
    /// KL divergence of the model with this layer alone carved, all layers choosing alike; absent without a market.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
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
    /// Share of the neurons that a token uses, the mean over the layers.
    pub active: f64,
    /// Largest gain of a pair of neurons that is left in any layer, as a share of the layer's energy.
    pub max_regret: f64,
    /// Layer by layer.
    pub layers: Vec<LayerReport>,
    /// Calibration tokens.
    pub tokens: usize,
    /// Seconds.
    pub seconds: f64,
}
