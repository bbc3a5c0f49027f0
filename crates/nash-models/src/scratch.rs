//! Working buffers of the forward pass, kept from token to token so that decoding allocates nothing of note.

use nash_kernels::Activations;

use crate::rope::RopeTable;

/// Buffers of one sequence. Their contents have no meaning between calls, except the rope tables.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[T, d]`: input of a block after its norm.
    pub(crate) normed: Vec<f32>,
    /// `[T, d]`: output of a block.
    pub(crate) out: Vec<f32>,
    /// `[T, heads·head_dim]`.
    pub(crate) q: Vec<f32>,
    /// `[T, kv_heads·head_dim]`.
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    /// `[T, heads·head_dim]`: attention's output.
    pub(crate) heads: Vec<f32>,
    /// Partial softmax states of attention.
    pub(crate) states: Vec<f32>,
    pub(crate) mlp: MlpScratch,
    pub(crate) moe: MoeScratch,
    /// Tables of the global and of the local frequencies.
    pub(crate) rope: [RopeTable; 2],
}

/// Buffers of a feed-forward block.
#[derive(Default)]
pub(crate) struct MlpScratch {
    /// `[T, f]`.
    pub(crate) gate: Vec<f32>,
    pub(crate) up: Vec<f32>,
    /// Quantized inputs, lent to one [`crate::Input`] after the other.
    pub(crate) activations: Activations,
}

/// Buffers of a mixture of experts. A routed row is a token with one of its experts; A of them, expert by expert.
#[derive(Default)]
pub(crate) struct MoeScratch {
    /// `[T, experts]`.
    pub(crate) scores: Vec<f32>,
    /// `[T, experts]`: scores as the choice sees them.
    pub(crate) ranks: Vec<f32>,
    /// `[experts]`: the experts of one token in their order.
    pub(crate) order: Vec<usize>,
    /// `[A]`.
    pub(crate) routed: Vec<Routed>,
    /// `[A, d]`: what the experts read.
    pub(crate) gathered: Vec<f32>,
    /// `[A, f]`.
    pub(crate) gate: Vec<f32>,
    pub(crate) up: Vec<f32>,
    /// `[A, d]`: what they answer.
    pub(crate) answers: Vec<f32>,
    /// Lent to the inputs.
    pub(crate) activations: Vec<Activations>,
}

/// A token and one of the experts that it goes to.
#[derive(Clone, Copy)]
pub(crate) struct Routed {
    pub(crate) expert: usize,
    pub(crate) token: usize,
    /// Weight of the answer in the sum.
    pub(crate) weight: f32,
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

/// Gives a buffer a length; new elements are zero, old ones keep whatever they held.
pub(crate) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}
