//! The best path of a chain of codes.
//!
//! With the rest of the row fixed, a chain's change `d` of its 32 values changes the potential by `2 d·R + d H dᵀ`. Were `H` diagonal, the
//! Viterbi algorithm would find the best path exactly. It is not, so every survivor carries the residual that its own past changes
//! leave for the codes to come (per-survivor processing; Raheli, Polydoros and Tzou 1995), codes to come counting as unchanged. The path
//! found is a joint deviation of up to 32 players: it is taken only if it lowers the potential, and whether single players
//! could still gain is asked afterwards.
//!
//! A trellis of codes of `b` bits has `2^(6−b)` states. Chains of `16 / states` rows are searched side by side, one state of one chain in each of 16
//! lanes: lane `i` is state `i mod states` of chain `i div states`. So a survivor takes over another's residual by a permutation.

use nash_kernels::CHAIN;

use super::lanes::{Lanes, WIDE};
use super::{TABLE, Trellis};

/// `H` among the weights of a chain.
pub(crate) type Matrix = [[f32; CHAIN]; CHAIN];

/// The cost of what cannot be reached.
const NEVER: f32 = 1e30;

/// Chains of different rows at the same columns, or of one row under different scales, to be searched side by side.
pub(crate) struct Abreast {
    /// Residual `R = Δ H` of each code, `[code][lane]`. Used up by the search.
    residual: [[f32; WIDE]; CHAIN],
    /// Value of each weight now, `[code][lane]`.
    values: [[f32; WIDE]; CHAIN],
    /// Diagonal of H, `[code][lane]`.
    diagonal: [[f32; WIDE]; CHAIN],
    /// What a table entry of 1 is worth, per lane.
    steps: [f32; WIDE],
    /// The window chosen for each code and state, `[code][lane]`.
    chosen: [[u32; WIDE]; CHAIN],
}

/// One chain as the search sees it.
#[derive(Clone, Copy)]
pub(crate) struct Lane<'a> {
    /// Residual at its weights.
    pub(crate) residual: &'a [f32; CHAIN],
    /// Values now, in units of the weights.
    pub(crate) values: &'a [f32; CHAIN],
    /// Diagonal of H.
    pub(crate) diagonal: &'a [f32; CHAIN],
    /// What a table entry of 1 is worth.
    pub(crate) step: f32,
}

impl Abreast {
    /// Room for the chains of one search.
    pub(crate) fn new() -> Self {
        Self {
            residual: [[0.0; WIDE]; CHAIN],
            values: [[0.0; WIDE]; CHAIN],
            diagonal: [[1.0; WIDE]; CHAIN],
            steps: [0.0; WIDE],
            chosen: [[0; WIDE]; CHAIN],
        }
    }

    /// How many chains of codes of `bits` bits (2 to 6) are searched together.
    pub(crate) fn chains(bits: usize) -> usize {
        WIDE / (TABLE >> bits).max(1)
    }

    /// Puts a chain into place `index` of those that are searched together.
    #[inline(always)]
    pub(crate) fn set(&mut self, bits: usize, index: usize, lane: Lane<'_>) {
        let states = TABLE >> bits;
        let lanes = index * states..(index + 1) * states;
        self.steps[lanes.clone()].fill(lane.step);
        for s in 0..CHAIN {
            self.residual[s][lanes.clone()].fill(lane.residual[s]);
            self.values[s][lanes.clone()].fill(lane.values[s]);
            self.diagonal[s][lanes.clone()].fill(lane.diagonal[s]);
        }
    }

    /// The best path of each chain as far as survivors know, into `paths`, at most as many as are searched together. `coupling`: H among the
    /// weights of a chain, the same for all; `None` if only the diagonal counts. `exists`: the weights there are, a group at the end of a
    /// row can be short; the others have code 0.
    #[inline(always)]
    pub(crate) fn search<L: Lanes>(
        &mut self,
        lanes: L,
        trellis: &Trellis,
        coupling: Option<&Matrix>,
        exists: &[bool; CHAIN],
        paths: &mut [[u8; CHAIN]],
    ) {
        match trellis.bits {
            2 => self.search_of::<L, 2, 4>(lanes, trellis, coupling, exists, paths),
            3 => self.search_of::<L, 3, 8>(lanes, trellis, coupling, exists, paths),
            4 => self.search_of::<L, 4, 16>(lanes, trellis, coupling, exists, paths),
            5 => self.search_of::<L, 5, 32>(lanes, trellis, coupling, exists, paths),
            _ => self.search_of::<L, 6, 64>(lanes, trellis, coupling, exists, paths),
        }
    }

    #[inline(always)]
    fn search_of<L: Lanes, const BITS: u32, const CODES: usize>(
        &mut self,
        lanes: L,
        trellis: &Trellis,
        coupling: Option<&Matrix>,
        exists: &[bool; CHAIN],
        paths: &mut [[u8; CHAIN]],
    ) {
        let states = TABLE >> BITS;
        let state: [u32; WIDE] = std::array::from_fn(|i| (i % states) as u32);
        let chain: [u32; WIDE] = std::array::from_fn(|i| (i / states * states) as u32);
        let (state, chain) = (lanes.load_wholes(&state), lanes.load_wholes(&chain));
        // A window is `code + state · 2^BITS`, and the state of the code before it the low bits of the window: for the new state, window
        // `q · states + state` comes from the state `window >> BITS`. Where that does not depend on the new state, several q share it.
        let step = lanes.load(&self.steps);
        let mut table = [step; CODES];
        for (entry, pattern) in table.iter_mut().zip(&trellis.patterns) {
            *entry = lanes.multiply(step, lanes.load(pattern));
        }
        let per_origin = (CODES / states).max(1);
        let first: [f32; WIDE] = std::array::from_fn(|i| if i % states == 0 { 0.0 } else { NEVER });
        let mut costs = lanes.load(&first);
        for s in (0..CHAIN).rev() {
            let (h, value) = (lanes.load(&self.diagonal[s]), lanes.load(&self.values[s]));
            let residual = lanes.load(&self.residual[s]);
            let slopes = lanes.add(residual, residual);
            let mut best = lanes.splat(f32::INFINITY);
            let (mut change, mut window) = (lanes.splat(0.0), lanes.splat_wholes(0));
            for first in (0..CODES).step_by(per_origin) {
                let windows = lanes.add_wholes(lanes.splat_wholes((first * states) as u32), state);
                let origin = lanes.add_wholes(lanes.shift_right::<BITS>(windows), chain);
                let (cost, slope) = (lanes.permute(costs, origin), lanes.permute(slopes, origin));
                for (q, &entry) in table.iter().enumerate().skip(first).take(per_origin) {
                    let mut d = lanes.subtract(entry, value);
                    let mut total = lanes.fused(d, lanes.fused(d, h, slope), cost);
                    let windows = lanes.add_wholes(lanes.splat_wholes((q * states) as u32), state);
                    if !exists[s] {
                        // Only code 0, which costs nothing.
                        let blocked = std::array::from_fn(|i| {
                            let other = !(q * states + i % states).is_multiple_of(CODES);
                            if other { NEVER } else { 0.0 }
                        });
                        (d, total) = (lanes.splat(0.0), lanes.add(cost, lanes.load(&blocked)));
                    }
                    let better = lanes.less(total, best);
                    best = lanes.select(better, total, best);
                    change = lanes.select(better, d, change);
                    window = lanes.select_wholes(better, windows, window);
                }
            }
            costs = best;
            lanes.store_wholes(window, &mut self.chosen[s]);
            if let Some(coupling) = coupling {
                let origin = lanes.add_wholes(lanes.shift_right::<BITS>(window), chain);
                for (residual, &h) in self.residual[..s].iter_mut().zip(&coupling[s]) {
                    let of_origin = lanes.permute(lanes.load(residual), origin);
                    lanes.store(lanes.fused(change, lanes.splat(h), of_origin), residual);
                }
            }
        }
        let mut ends = [0.0; WIDE];
        lanes.store(costs, &mut ends);
        self.trace_back(BITS as usize, &ends, paths);
    }

    /// Follows the cheapest end of each chain.
    #[inline(always)]
    fn trace_back(&self, bits: usize, ends: &[f32; WIDE], paths: &mut [[u8; CHAIN]]) {
        let (codes, states) = (1usize << bits, TABLE >> bits);
        for (path, (chain, ends)) in paths.iter_mut().zip(ends.chunks_exact(states).enumerate()) {
            let mut state = 0;
            for other in 1..states {
                if ends[other] < ends[state] {
                    state = other;
                }
            }
            for (code, chosen) in path.iter_mut().zip(&self.chosen) {
                let window = chosen[(chain * states + state) % WIDE] as usize % TABLE;
                state = window >> bits;
                *code = (window % codes) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::{Plain, WithLanes, dispatch};
    use super::super::tests::random;
    use super::*;

    /// A search of all chains that go together.
    struct Search<'a> {
        trellis: &'a Trellis,
        lanes: &'a [Lane<'a>],
        coupling: Option<&'a Matrix>,
        exists: [bool; CHAIN],
    }

    impl WithLanes for Search<'_> {
        type Output = Vec<[u8; CHAIN]>;

        fn run<L: Lanes>(self, lanes: L) -> Self::Output {
            let mut abreast = Abreast::new();
            for (index, &lane) in self.lanes.iter().enumerate() {
                abreast.set(self.trellis.bits, index, lane);
            }
            let mut paths = vec![[0; CHAIN]; self.lanes.len()];
            abreast.search(lanes, self.trellis, self.coupling, &self.exists, &mut paths);
            paths
        }
    }

    /// The last few weights exist, so that all paths can be tried.
    #[test]
    fn without_coupling_the_path_is_the_best_of_all() {
        for bits in 2..=4usize {
            for seed in 0..10 {
                let trellis = Trellis::new(bits, random(seed));
                let exists: [bool; CHAIN] = std::array::from_fn(|s| s < 4);
                let chains: Vec<[[f32; CHAIN]; 3]> = (0..Abreast::chains(bits) as u64)
                    .map(|chain| {
                        let targets: [f32; CHAIN] = random(100 * (chain + 1) + seed);
                        let diagonal = random::<CHAIN>(7000 + 100 * chain + seed).map(|v| v + 1.1);
                        [
                            std::array::from_fn(|s| -diagonal[s] * targets[s]),
                            diagonal,
                            targets,
                        ]
                    })
                    .collect();
                let lanes: Vec<Lane<'_>> = chains
                    .iter()
                    .map(|[residual, diagonal, _]| Lane {
                        residual,
                        values: &[0.0; CHAIN],
                        diagonal,
                        step: 1.0,
                    })
                    .collect();
                let search = Search {
                    trellis: &trellis,
                    lanes: &lanes,
                    coupling: None,
                    exists,
                };
                for (found, [_, diagonal, targets]) in dispatch(search).iter().zip(&chains) {
                    let cost = |codes: &[u8; CHAIN]| -> f32 {
                        let values = trellis.chain_values(codes).into_iter().enumerate().take(4);
                        values
                            .map(|(s, v)| diagonal[s] * ((v - targets[s]).powi(2) - targets[s].powi(2)))
                            .sum()
                    };
                    let mut best = f32::INFINITY;
                    for path in 0..1usize << (4 * bits) {
                        let code = |s: usize| (path >> (bits * s) & ((1 << bits) - 1)) as u8;
                        best = best.min(cost(&std::array::from_fn(
                            |s| if exists[s] { code(s) } else { 0 },
                        )));
                    }
                    // 4 terms of magnitude below 10.
                    assert!((cost(found) - best).abs() < 1e-4, "{bits} bits, seed {seed}");
                    assert!(found[4..].iter().all(|&code| code == 0));
                }
            }
        }
    }

    /// Chains side by side do not see each other, and arrays find what this CPU's registers find.
    #[test]
    fn every_instruction_set_finds_the_same_paths_alone_and_together() {
        for bits in 2..=6usize {
            let trellis = Trellis::new(bits, random(bits as u64));
            let root: [[f32; CHAIN]; CHAIN] = std::array::from_fn(|i| random(40 + i as u64));
            let h: Matrix = std::array::from_fn(|i| {
                std::array::from_fn(|j| root[i].iter().zip(&root[j]).map(|(a, b)| a * b).sum())
            });
            let diagonal = std::array::from_fn(|s| h[s][s]);
            let chains: Vec<[[f32; CHAIN]; 2]> = (0..Abreast::chains(bits) as u64)
                .map(|chain| [random::<CHAIN>(500 + chain).map(|v| 9.0 * v), random(900 + chain)])
                .collect();
            let lanes: Vec<Lane<'_>> = chains
                .iter()
                .enumerate()
                .map(|(i, [residual, values])| Lane {
                    residual,
                    values,
                    diagonal: &diagonal,
                    step: 0.5 + i as f32 * 0.1,
                })
                .collect();
            let search = |lanes| Search {
                trellis: &trellis,
                lanes,
                coupling: Some(&h),
                exists: [true; CHAIN],
            };
            let together = dispatch(search(&lanes));
            assert_eq!(together, search(&lanes).run(Plain), "{bits} bits");
            for (i, path) in together.iter().enumerate() {
                assert_eq!(
                    dispatch(search(&lanes[i..=i]))[0],
                    *path,
                    "{bits} bits, chain {i}"
                );
            }
        }
    }
}
