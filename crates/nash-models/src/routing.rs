//! Other rules than plain top-k for the choice of experts.
//!
//! A rule sees the ranks of a batch before the choice and may change them: prices are subtracted, rewards are added. The choice stays top-k of the ranks, and
//! the mixing weights stay those of the router. A rule belongs to the model, not to a sequence, since what it knows (which experts are in fast memory, which
//! are busy) is true for all sequences.

/// What a rule sees of one layer and one call.
#[derive(Debug)]
pub struct RoutingCall<'a> {
    /// The layer.
    pub layer: usize,
    /// `[T, d]`: what the router and the experts read.
    pub x: &'a [f32],
    /// d.
    pub width: usize,
    /// `[T, E]`: what experts are chosen by, largest first; scores with their correction.
    pub ranks: &'a mut [f32],
    /// E.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
}

/// Changes the ranks of experts before tokens choose.
pub trait RoutingPolicy: Send {
    /// Tokens stand in the order of their positions.
    fn rank(&mut self, call: RoutingCall<'_>);
}
