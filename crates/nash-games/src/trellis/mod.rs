//! Trellis-coded quantization: the value of a weight is looked up by a window of six bits.
//!
//! The packed format looks a weight up by its own `b` bits and the `6 − b` bits that follow it in the bit stream of its
//! chain (32 weights of one row; [`nash_kernels::chain_column`]). A code therefore has a say in the values of up to three weights, and a
//! chain of codes is a path through a trellis of `2^(6−b)` states: the bit-shift trellis of QTIP (Tseng et al. 2024, §3) with a window
//! that a single table look-up of a CPU holds. For a Gaussian its tables err 1.27, 1.50, 1.31 and 0.63 dB less than the best scalar
//! quantizers of 2, 3, 4 and 5 bits; with AVX-512, decoding costs the same.
//!
//! | module | |
//! | --- | --- |
//! | this | windows and values |
//! | `search` | the best path of whole chains: the Viterbi algorithm, with survivors that carry their own residual |
//! | `answer` | the best response of a chain: that path, or codes that move alone |
//! | `lanes` | the vector operations of the search |
//! | `fit` | the table and the scales of a tensor |
//! | `tables` | tables for a unit Gaussian, from which fitting starts |

mod answer;
mod fit;
mod lanes;
mod search;
mod tables;

use nash_kernels::{CHAIN, CHAINS, GROUP, WINDOW_BITS, chain_column};

pub(crate) use answer::Chain;
pub use fit::train_for_gaussian;
pub(crate) use fit::{fit, nearest};
pub(crate) use lanes::{Lanes, WIDE, WithLanes, dispatch};
pub(crate) use search::{Abreast, Lane, Matrix};

/// Entries of a table.
pub const TABLE: usize = 1 << WINDOW_BITS;

/// A table of values with the width of its codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Trellis {
    bits: usize,
    table: [f32; TABLE],
    /// The table by code, then by the bits that follow.
    by_code: [f32; TABLE],
    /// For each number q of windows that lead to all states: their values, by state, repeated.
    patterns: Vec<[f32; WIDE]>,
}

impl Trellis {
    /// A trellis of codes of `bits` bits (2 to 6) over a table.
    pub fn new(bits: usize, table: [f32; TABLE]) -> Self {
        let (codes, states) = (1 << bits, TABLE >> bits);
        Self {
            bits,
            table,
            by_code: std::array::from_fn(|i| table[i / states + ((i % states) << bits)]),
            patterns: (0..codes)
                .map(|q| std::array::from_fn(|i| table[q * states + i % states]))
                .collect(),
        }
    }

    /// Bits per code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The value of every window.
    pub fn table(&self) -> &[f32; TABLE] {
        &self.table
    }

    /// The windows of a chain. What lies beyond its end is zero.
    #[inline(always)]
    pub(crate) fn windows(&self, codes: &[u8; CHAIN]) -> [u8; CHAIN] {
        let mut padded = [0u8; CHAIN + WINDOW_BITS];
        padded[..CHAIN].copy_from_slice(codes);
        let mut windows = *codes;
        for k in 1..WINDOW_BITS.div_ceil(self.bits) {
            for (window, &later) in windows.iter_mut().zip(&padded[k..]) {
                *window |= later << (k * self.bits);
            }
        }
        windows.map(|window| window % TABLE as u8)
    }

    /// The values of up to 64 codes of a group; a shorter group is followed by codes 0.
    #[inline(always)]
    pub(crate) fn values(&self, codes: &[u8]) -> [f32; GROUP] {
        let (codes, mut values) = (padded(codes), [0.0; GROUP]);
        for chain in 0..CHAINS {
            scatter(&self.chain_values(&gather(&codes, chain)), &mut values, chain);
        }
        values
    }

    /// Values of a chain.
    #[inline(always)]
    pub(crate) fn chain_values(&self, codes: &[u8; CHAIN]) -> [f32; CHAIN] {
        self.windows(codes).map(|w| self.table[usize::from(w) % TABLE])
    }
}

/// Neighbouring columns that are neighbours in a chain, too.
const RUN: usize = 8;

/// A group of up to 64 elements, followed by defaults.
#[inline(always)]
pub(crate) fn padded<T: Copy + Default>(group: &[T]) -> [T; GROUP] {
    let mut padded = [T::default(); GROUP];
    padded[..group.len()].copy_from_slice(group);
    padded
}

/// The elements of a chain in a group.
#[inline(always)]
pub(crate) fn gather<T: Copy + Default>(group: &[T; GROUP], chain: usize) -> [T; CHAIN] {
    let mut elements = [T::default(); CHAIN];
    for (run, elements) in elements.chunks_exact_mut(RUN).enumerate() {
        elements.copy_from_slice(&group[chain_column(chain, run * RUN)..][..RUN]);
    }
    elements
}

/// Puts the elements of a chain into a group.
#[inline(always)]
pub(crate) fn scatter<T: Copy>(elements: &[T; CHAIN], group: &mut [T; GROUP], chain: usize) {
    for (run, elements) in elements.chunks_exact(RUN).enumerate() {
        group[chain_column(chain, run * RUN)..][..RUN].copy_from_slice(elements);
    }
}

/// Which weights of a chain exist in a group of `len`.
#[inline(always)]
pub(crate) fn exists(len: usize, chain: usize) -> [bool; CHAIN] {
    if len == GROUP {
        return [true; CHAIN];
    }
    std::array::from_fn(|s| chain_column(chain, s) < len)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Uniform variates of [−1, 1).
    pub(super) fn random<const N: usize>(seed: u64) -> [f32; N] {
        let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
        std::array::from_fn(|_| rng.random_range(-1.0f32..1.0))
    }

    #[test]
    fn windows_are_six_bits_of_the_stream() {
        for bits in 2..=6usize {
            let codes: [u8; CHAIN] = std::array::from_fn(|s| (s * 37 % (1 << bits)) as u8);
            let stream: Vec<u8> = codes
                .iter()
                .flat_map(|c| (0..bits).map(move |i| c >> i & 1))
                .chain([0; WINDOW_BITS])
                .collect();
            let windows = Trellis::new(bits, [0.0; TABLE]).windows(&codes);
            for (s, window) in windows.into_iter().enumerate() {
                let expected = (0..WINDOW_BITS).map(|i| stream[bits * s + i] << i).sum::<u8>();
                assert_eq!(window, expected, "code {s} of {bits} bits");
            }
        }
    }

    #[test]
    fn a_chain_is_gathered_and_scattered_by_its_columns() {
        let group: [usize; GROUP] = std::array::from_fn(|c| c);
        let mut back = [0; GROUP];
        for chain in 0..CHAINS {
            let elements = gather(&group, chain);
            assert_eq!(elements, std::array::from_fn(|s| chain_column(chain, s)));
            scatter(&elements, &mut back, chain);
        }
        assert_eq!(back, group);
        assert_eq!(padded(&[1, 2])[..3], [1, 2, 0]);
        assert_eq!(exists(13, 0).iter().filter(|e| **e).count(), 8);
        assert_eq!(exists(13, 1).iter().filter(|e| **e).count(), 5);
    }

    #[test]
    fn the_chains_of_a_group_cover_it() {
        let mut columns: Vec<usize> = (0..CHAINS)
            .flat_map(|c| (0..CHAIN).map(move |s| chain_column(c, s)))
            .collect();
        columns.sort_unstable();
        assert_eq!(columns, (0..GROUP).collect::<Vec<_>>());
    }
}
