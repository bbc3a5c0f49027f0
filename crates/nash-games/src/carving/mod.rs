//! The carving game: the neurons of a dense feed-forward block choose experts, and tokens choose among the experts.
//!
//! A neuron i adds `h_i(t)·w_i` to the output of its block at token t; without it the output errs by its energy
//! `a_i(t) = h_i(t)²·‖w_i‖²` (errors of different neurons are taken as orthogonal). Expert e holds a fixed number of seats, and only the
//! experts in `S(t)`, the token's choice, answer. All players share one payoff, the energy that is kept:
//!
//! `Φ = Σ_t Σ_{e∈S(t)} A_e(t)`, `A_e(t) = Σ_{i in e} a_i(t)`.
//!
//! So Φ is an exact potential (Monderer and Shapley 1996). A token's best response is the k experts of most energy. A neuron is worth
//! `u_i(e) = Σ_{t: e∈S(t)} a_i(t)` in expert e; seats are full, so neurons move in pairs that change places, whenever both together gain. Every move
//! raises Φ over a finite set: play ends in an equilibrium ([`SeatGame::play`]), which [`certify_seats`] checks with other code. An expert that
//! every token chooses is the shared expert: it needs no rule of its own.
//!
//! The start are flocks: neurons that fire together stand together ([`flocks`]). Mixtures from dense blocks: Zhang et al. 2022 (MoEfication), Pei et al.
//! 2025 (CMoE); both cluster once and do not play.
//!
//! Legend: T tokens, n neurons, E experts.

mod certificate;
mod flocks;
mod seats;

pub use certificate::{SeatCertificate, certify_seats};
pub use flocks::flocks;
pub use seats::{Played, SeatGame};

use rayon::prelude::*;

use nash_kernels::dense::{MatMut, MatRef, gemm};

/// Energy of each expert at each token, `[T, E]`, from `energies [T, n]` and the expert of each neuron.
pub fn expert_energies(energies: &[f32], seats: &[u16], experts: usize) -> Vec<f32> {
    let mut out = vec![0.0; energies.len() / seats.len().max(1) * experts];
    out.par_chunks_mut(experts.max(1))
        .zip(energies.par_chunks(seats.len().max(1)))
        .for_each(|(out, energies)| {
            for (&seat, &a) in seats.iter().zip(energies) {
                out[usize::from(seat)] += a;
            }
        });
    out
}

/// What each neuron is worth in each expert, `[n, E]`: its energy over the tokens that chose the expert. `chosen [T, E]` holds ones and zeros.
pub fn worths(energies: &[f32], chosen: &[f32], neurons: usize, experts: usize) -> Vec<f32> {
    let tokens = energies.len() / neurons.max(1);
    let mut out = vec![0.0; neurons * experts];
    gemm(
        1.0,
        MatRef::row_major(energies, tokens, neurons).t(),
        MatRef::row_major(chosen, tokens, experts),
        0.0,
        MatMut::row_major(&mut out, neurons, experts),
    );
    out
}

/// The tokens' choice: ones at the `k` largest of the first `routed` of `scores [T, E]`, and at all experts behind them, which are shared. Ties go to the lower expert.
pub fn choose(scores: &[f32], experts: usize, routed: usize, k: usize) -> Vec<f32> {
    let mut chosen = vec![1.0; scores.len()];
    chosen
        .par_chunks_mut(experts.max(1))
        .zip(scores.par_chunks(experts.max(1)))
        .for_each(|(chosen, scores)| {
            let mut order: Vec<usize> = (0..routed).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order[k.min(routed)..].iter().for_each(|&e| chosen[e] = 0.0);
        });
    chosen
}

/// The potential: energy of the chosen experts, `Σ energies [T, E] ∘ chosen [T, E]`.
pub fn kept(energies: &[f32], chosen: &[f32]) -> f64 {
    let pairs = energies.iter().zip(chosen);
    pairs.map(|(&a, &c)| f64::from(a) * f64::from(c)).sum()
}
