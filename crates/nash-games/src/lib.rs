//! Potential games for compression and expert routing, with checked equilibria. Knows nothing of language models.
//!
//! | module | the game or its part |
//! | --- | --- |
//! | [`grid`] | what a strategy is worth: scales, codebook, nearest value |
//! | [`codebook`] | fitting codebooks and scales to weights (weighted Lloyd) |
//! | [`trellis`] | values looked up by windows of the bit stream: trellis-coded quantization |
//! | [`rounding`] | weights choose codes, groups choose scales; best response to a Nash equilibrium |
//! | [`leader`] | the leader–follower start (GPTQ / LDLQ order) |
//! | [`allocation`] | what the market is compared with, and what refines it: greedy, knapsack, pairwise, evolution, particle swarm |
//! | [`propagation`] | targets that make up for the errors of the layers before |
//! | [`market`] | tensors buy bits at a price that clears the byte budget |
//! | [`carving`] | neurons of a dense block choose experts, tokens choose among them; certificates |
//! | [`routing`] | tokens choose experts: congestion, neighbours, prices, cached equilibria, their certificates |
//! | [`certificate`] | regret of every player, computed without the solvers' code |
//!
//! Legend of shapes: weight `W [m, n]` row-major (m outputs, n inputs), Hessian `H [n, n]` symmetric,
//! `G = ceil(n / 64)` scale groups per row.
#![forbid(unsafe_code)]

pub mod allocation;
pub mod carving;
pub mod certificate;
pub mod codebook;
mod error;
pub mod grid;
pub mod leader;
pub mod market;
pub mod propagation;
pub mod rounding;
pub mod routing;
pub mod trellis;

pub use certificate::{RoundingCertificate, certify_rounding};
pub use error::GameError;
pub use grid::{Grid, Levels};
pub use market::{MarketOutcome, Player, clear_market};
pub use rounding::{BestResponse, Problem, Trace};
