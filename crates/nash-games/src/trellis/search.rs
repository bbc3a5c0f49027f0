//! The best response of a whole chain of codes.
//!
//! With the rest of the row fixed, a chain's change `d` of its 32 values changes the potential by `2 d·R + d H dᵀ`. Were `H` diagonal, the
//! Viterbi algorithm would find the best path exactly. It is not, so every survivor carries the residual that its own past changes
//! leave for the codes to come (per-survivor processing; Raheli, Polydoros and Tzou 1995), codes to come counting as unchanged. The path
//! found is a joint deviation of up to 32 players: it is taken only if it lowers the potential, and whether single players
//! could still gain is asked afterwards.

use nash_kernels::{CHAIN, WINDOW_BITS};

use super::{TABLE, Trellis};

/// `H` among the weights of a chain.
pub(crate) type Matrix = [[f32; CHAIN]; CHAIN];

/// States of the widest trellis (2 bits).
const STATES: usize = 16;
/// The cost of what cannot be reached.
const NEVER: f32 = 1e30;

/// A chain in play.
pub(crate) struct Chain<'a> {
    /// H among its weights; `None` if only the diagonal counts.
    pub(crate) coupling: Option<&'a Matrix>,
    /// Diagonal of H.
    pub(crate) diagonal: [f32; CHAIN],
    /// Residual `R = Δ H` at its weights.
    pub(crate) residual: [f32; CHAIN],
    /// Values now, in units of the weights.
    pub(crate) values: [f32; CHAIN],
    /// What a table entry of 1 is worth.
    pub(crate) step: f32,
    /// Which of its weights exist: a group at the end of a row can be short. The others have code 0.
    pub(crate) exists: [bool; CHAIN],
}

/// The best path of a chain, as far as survivors know: its codes.
#[inline(always)]
pub(crate) fn search(trellis: &Trellis, chain: &Chain<'_>) -> [u8; CHAIN] {
    let table = &trellis.table;
    match (trellis.bits, chain.coupling.is_some()) {
        (2, false) => search_of::<2, false>(table, chain),
        (2, true) => search_of::<2, true>(table, chain),
        (3, false) => search_of::<3, false>(table, chain),
        (3, true) => search_of::<3, true>(table, chain),
        (4, false) => search_of::<4, false>(table, chain),
        (4, true) => search_of::<4, true>(table, chain),
        (5, false) => search_of::<5, false>(table, chain),
        (5, true) => search_of::<5, true>(table, chain),
        (_, false) => search_of::<6, false>(table, chain),
        (_, true) => search_of::<6, true>(table, chain),
    }
}

#[inline(always)]
fn search_of<const BITS: usize, const COUPLED: bool>(table: &[f32; TABLE], chain: &Chain<'_>) -> [u8; CHAIN] {
    // A window is `code + state · 2^BITS`; the state of the code before it is the low bits of the window.
    let (codes, states) = (1usize << BITS, TABLE >> BITS);
    let values = table.map(|v| chain.step * v);
    let mut costs = [NEVER; STATES];
    costs[0] = 0.0;
    // Of the code now and of the one before, in turns.
    let mut residuals = [[[0.0; CHAIN]; STATES]; 2];
    if COUPLED {
        residuals[0].fill(chain.residual);
    }
    let mut chosen = [[0u8; STATES]; CHAIN];
    for s in (0..CHAIN).rev() {
        let (h, value) = (chain.diagonal[s], chain.values[s]);
        // Per window: its change of value, and what its state brings along.
        let (mut change, mut cost, mut slope) = ([0.0f32; TABLE], [0.0f32; TABLE], [0.0f32; TABLE]);
        for (change, v) in change.iter_mut().zip(&values) {
            *change = v - value;
        }
        for state in 0..states {
            cost[state * codes..][..codes].fill(costs[state]);
            let residual = if COUPLED {
                residuals[1 - s % 2][state][s]
            } else {
                chain.residual[s]
            };
            slope[state * codes..][..codes].fill(2.0 * residual);
        }
        if !chain.exists[s] {
            // Only code 0, which costs nothing.
            for (w, cost) in cost.iter_mut().enumerate().filter(|(w, _)| w % codes != 0) {
                (*cost, change[w]) = (NEVER, 0.0);
            }
            change.iter_mut().step_by(codes).for_each(|change| *change = 0.0);
        }
        let (mut best, mut window) = ([f32::INFINITY; STATES], [0u32; STATES]);
        for first in (0..TABLE).step_by(states) {
            for state in 0..states {
                let (w, d) = (first + state, change[first + state]);
                let total = cost[w] + d * (slope[w] + d * h);
                let better = total < best[state];
                best[state] = if better { total } else { best[state] };
                window[state] = if better { w as u32 } else { window[state] };
            }
        }
        costs = best;
        chosen[s] = window.map(|w| w as u8);
        if COUPLED && let Some(coupling) = chain.coupling {
            let [even, odd] = &mut residuals;
            let (old, new) = if s % 2 == 1 { (even, odd) } else { (odd, even) };
            for (new, w) in new.iter_mut().zip(window).take(states) {
                let w = w as usize % TABLE;
                carry(&old[w >> BITS], &coupling[s], change[w], new);
            }
        }
    }
    let mut state = 0;
    for other in 1..states {
        if costs[other] < costs[state] {
            state = other;
        }
    }
    let mut path = [0; CHAIN];
    for (code, chosen) in path.iter_mut().zip(&chosen) {
        let window = usize::from(chosen[state % STATES]) % TABLE;
        state = window >> BITS;
        *code = (window % codes) as u8;
    }
    path
}

/// `new = old + d · h`. All 32 elements, though those from the present code on are never read: a fixed length costs less than a short one.
#[inline(always)]
fn carry(old: &[f32; CHAIN], h: &[f32; CHAIN], d: f32, new: &mut [f32; CHAIN]) {
    // By way of a value of its own, which nothing can overlap.
    let mut sum = [0.0; CHAIN];
    for ((sum, old), h) in sum.iter_mut().zip(old).zip(h) {
        *sum = old + d * h;
    }
    *new = sum;
}

/// Answers of a chain: if it `searches`, the best path found, if that gains; else the best answers of single codes, one after the other. A change by `d` has to gain more than `least · Σ h d²`.
/// Returns the number of codes that changed.
#[inline(always)]
pub(crate) fn respond(
    trellis: &Trellis,
    mut chain: Chain<'_>,
    codes: &mut [u8; CHAIN],
    searches: bool,
    least: f32,
) -> u64 {
    let path = if searches { search(trellis, &chain) } else { *codes };
    if path != *codes {
        let values = trellis.chain_values(&path);
        let change: [f32; CHAIN] = std::array::from_fn(|s| chain.step * values[s] - chain.values[s]);
        if chain.gains(&change, least) {
            let moved = codes.iter().zip(path).filter(|(a, b)| **a != *b).count();
            *codes = path;
            return moved as u64;
        }
    }
    let mut moved = 0;
    let exists = chain.exists;
    for s in (0..CHAIN).rev().filter(|&s| exists[s]) {
        moved += u64::from(respond_alone(trellis, &mut chain, codes, s, least));
    }
    moved
}

impl Chain<'_> {
    /// H between two of its weights.
    #[inline(always)]
    fn h(&self, i: usize, j: usize) -> f32 {
        match self.coupling {
            _ if i == j => self.diagonal[i],
            Some(h) => h[i][j],
            None => 0.0,
        }
    }

    /// Whether a change of values lowers the potential by more than `least · Σ h d²`.
    #[inline(always)]
    fn gains(&self, change: &[f32; CHAIN], least: f32) -> bool {
        let (mut potential, mut size) = (0.0, 0.0);
        for (i, d) in change.iter().enumerate().filter(|(i, _)| self.exists[*i]) {
            let own = self.diagonal[i] * d;
            let pull = match self.coupling {
                Some(h) => h[i].iter().zip(change).map(|(h, d)| h * d).sum(),
                None => own,
            };
            potential += d * (2.0 * self.residual[i] + pull);
            size += d * own;
        }
        potential < -least * size
    }
}

/// Weights whose value a code has a say in, at most: at 2 bits its own and two before it.
const REACH: usize = 3;

/// The best answer of the code at `s`, taken if it gains.
#[inline(always)]
fn respond_alone(
    trellis: &Trellis,
    chain: &mut Chain<'_>,
    codes: &mut [u8; CHAIN],
    s: usize,
    least: f32,
) -> bool {
    let windows = trellis.windows(codes);
    let next = windows.get(s + 1).map_or(0, |&w| usize::from(w));
    let reach = WINDOW_BITS.div_ceil(trellis.bits).min(s + 1).min(REACH);
    // Changes of the values at s, s − 1, s − 2 if the code becomes `code`.
    let changes = |code: usize| {
        let (mut window, mut d) = (next, [0.0f32; REACH]);
        for (k, d) in d.iter_mut().enumerate().take(reach) {
            let own = if k == 0 { code } else { usize::from(codes[s - k]) };
            window = (own | window << trellis.bits) % TABLE;
            *d = chain.step * trellis.table[window] - chain.values[s - k];
        }
        d
    };
    let (mut best, mut least_change) = (None, 0.0f32);
    for code in (0..1usize << trellis.bits).filter(|&code| code != usize::from(codes[s])) {
        let d = changes(code);
        let (mut potential, mut size) = (0.0, 0.0);
        for k in 0..reach {
            let mut pull = 2.0 * chain.residual[s - k];
            for (l, d) in d.iter().enumerate().take(reach) {
                pull += chain.h(s - k, s - l) * d;
            }
            potential += d[k] * pull;
            size += chain.diagonal[s - k] * d[k] * d[k];
        }
        if potential < -least * size && potential < least_change {
            (best, least_change) = (Some((code, d)), potential);
        }
    }
    let Some((code, d)) = best else {
        return false;
    };
    codes[s] = code as u8;
    for (k, d) in d.into_iter().enumerate().take(reach) {
        chain.values[s - k] += d;
        for (i, residual) in chain.residual.iter_mut().enumerate() {
            *residual += match chain.coupling {
                Some(h) => d * h[s - k][i],
                None if i == s - k => d * chain.diagonal[i],
                None => 0.0,
            };
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    /// The last five weights exist, so that all paths can be tried.
    #[test]
    fn without_coupling_the_path_is_the_best_of_all() {
        for bits in 2..=4usize {
            for seed in 0..20 {
                let table: [f32; TABLE] = random(TABLE, seed).try_into().unwrap();
                let trellis = Trellis::new(bits, table);
                let targets: [f32; CHAIN] = random(CHAIN, seed + 100).try_into().unwrap();
                let diagonal: [f32; CHAIN] = random(CHAIN, seed + 200)
                    .iter()
                    .map(|v| v + 1.1)
                    .collect::<Vec<_>>()
                    .try_into()
                    .unwrap();
                let exists: [bool; CHAIN] = std::array::from_fn(|s| s < 4);
                let chain = Chain {
                    coupling: None,
                    diagonal,
                    residual: std::array::from_fn(|s| -diagonal[s] * targets[s]),
                    values: [0.0; CHAIN],
                    step: 1.0,
                    exists,
                };
                let cost = |codes: &[u8; CHAIN]| -> f32 {
                    trellis
                        .chain_values(codes)
                        .iter()
                        .enumerate()
                        .filter(|(s, _)| exists[*s])
                        .map(|(s, v)| diagonal[s] * ((v - targets[s]).powi(2) - targets[s].powi(2)))
                        .sum()
                };
                let found = search(&trellis, &chain);
                let mut best = f32::INFINITY;
                for path in 0..1usize << (4 * bits) {
                    let codes = std::array::from_fn(|s| {
                        if exists[s] {
                            (path >> (bits * s) & ((1 << bits) - 1)) as u8
                        } else {
                            0
                        }
                    });
                    best = best.min(cost(&codes));
                }
                // 4 terms of magnitude below 10.
                assert!((cost(&found) - best).abs() < 1e-4, "{bits} bits, seed {seed}");
            }
        }
    }

    #[test]
    fn an_answer_lowers_the_potential_until_nobody_gains() {
        for bits in 2..=6usize {
            let trellis = Trellis::new(bits, random(TABLE, 7).try_into().unwrap());
            let root = random(CHAIN * CHAIN, 8);
            let h: Matrix = std::array::from_fn(|i| {
                std::array::from_fn(|j| {
                    (0..CHAIN)
                        .map(|k| root[i * CHAIN + k] * root[j * CHAIN + k])
                        .sum()
                })
            });
            let target = random(CHAIN, 9);
            let mut codes = [0u8; CHAIN];
            let potential = |codes: &[u8; CHAIN]| -> (f32, [f32; CHAIN]) {
                let delta: Vec<f32> = trellis
                    .chain_values(codes)
                    .iter()
                    .zip(&target)
                    .map(|(v, t)| v - t)
                    .collect();
                let residual: [f32; CHAIN] =
                    std::array::from_fn(|i| h[i].iter().zip(&delta).map(|(h, d)| h * d).sum());
                (delta.iter().zip(&residual).map(|(d, r)| d * r).sum(), residual)
            };
            let mut last = potential(&codes).0;
            for round in 0.. {
                let chain = Chain {
                    coupling: Some(&h),
                    diagonal: std::array::from_fn(|s| h[s][s]),
                    residual: potential(&codes).1,
                    values: trellis.chain_values(&codes),
                    step: 1.0,
                    exists: [true; CHAIN],
                };
                if respond(&trellis, chain, &mut codes, round < 3, 1e-3) == 0 {
                    break;
                }
                let now = potential(&codes).0;
                assert!(
                    now < last && round < 50,
                    "{bits} bits, round {round}: {last} to {now}"
                );
                last = now;
            }
            for (s, code) in (0..CHAIN).flat_map(|s| (0..1u8 << bits).map(move |c| (s, c))) {
                let mut other = codes;
                other[s] = code;
                assert!(potential(&other).0 > last * 0.99, "{bits} bits: code {s} gains");
            }
        }
    }
}
