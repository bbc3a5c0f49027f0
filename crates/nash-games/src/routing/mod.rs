//! The routing game of a mixture of experts: tokens are players who choose k of E experts.
//!
//! | module | holds |
//! | --- | --- |
//! | [`game`] | the exact game: congestion, rewards, neighbours, capacities; potential and sequential best response |
//! | [`prices`] | the fast form: every token takes its `top-k(s − p)`, prices move until loads balance |
//! | [`cache`] | equilibrium cache: prices per layer, from batch to batch, dropped when scores drift |
//! | [`neighbours`] | k nearest tokens by cosine, symmetrised |
//! | [`placement`] | experts that fire together share a page of slow memory |
//! | [`certificate`] | regrets and balance, computed without the solvers' code |
//!
//! Two games with different uses. Congestion *costs* a token in the exact game (Rosenthal 1973), so loads are balanced
//! as far as it pays; neighbours pull alike tokens to the same experts. In the price form there are so many tokens that
//! one alone moves no load, and the cost of an expert is the multiplier of its load limit (Bertsekas' auctions; Lewis et al. 2021,
//! BASE layers; Wang et al. 2024, loss-free balancing, whose bias is `−p`): loads are equal at the end whatever the scores.
//!
//! Legend of shapes: scores `s [T, E]` row-major (T tokens, E experts), choices `[T, k]` with the expert a token wants most first,
//! prices `p [E]`, loads `L [E]`, mean load `C = T·k/E`. Units: prices, costs and regrets are in units of the scores.

pub mod cache;
pub mod certificate;
pub mod game;
pub mod neighbours;
pub mod placement;
pub mod prices;
mod select;
mod statistics;

pub use cache::{CacheStatistics, PriceCache};
pub use certificate::{GameCertificate, PriceCertificate, certify_game, certify_prices, load_balance};
pub use game::{Played, RoutingGame, Rules};
pub use neighbours::{FLOCK, Neighbours};
pub use placement::{Placed, certify_placement, place_experts};
pub use prices::{Balance, Balanced, PriceRouter};
pub use statistics::ScoreStatistics;

use crate::error::{GameError, check_finite};

/// Experts a token may choose at most.
pub const MAX_TOP_K: usize = 8;

/// What each token thinks of each expert, `[T, E]` row-major, checked to be finite.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    values: &'a [f32],
    experts: usize,
}

impl<'a> Scores<'a> {
    /// Scores of `values.len() / experts` tokens.
    ///
    /// # Errors
    /// If `values` are not whole rows of `experts`, or a value is not finite.
    pub fn new(values: &'a [f32], experts: usize) -> Result<Self, GameError> {
        let tokens = values.len() / experts.max(1);
        crate::error::check_len("scores", tokens * experts, values.len())?;
        check_finite("scores", values)?;
        Ok(Self { values, experts })
    }

    /// Number of tokens, T.
    pub fn tokens(self) -> usize {
        self.values.len() / self.experts.max(1)
    }

    /// Number of experts, E.
    pub fn experts(self) -> usize {
        self.experts
    }

    /// The scores of one token, `[E]`.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn row(self, token: usize) -> &'a [f32] {
        &self.values[token * self.experts..][..self.experts]
    }

    /// All scores, `[T, E]`.
    pub fn values(self) -> &'a [f32] {
        self.values
    }
}

/// `Err` if tokens cannot choose `top_k` of `experts`.
fn check_top_k(top_k: usize, experts: usize) -> Result<(), GameError> {
    if (1..=MAX_TOP_K.min(experts)).contains(&top_k) && experts <= usize::from(u16::MAX) {
        Ok(())
    } else {
        Err(GameError::TopK { top_k, experts })
    }
}
