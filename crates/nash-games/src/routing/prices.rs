//! The price form of the routing game: every token takes its `top-k(s − p)`, prices move until loads balance.
//!
//! For given prices nobody regrets his choice, by construction. Prices that balance the loads minimise the convex dual
//! `D(p) = Σᵢ max_{|S|=k} Σ_{e∈S} (s_ie − p_e) + C Σ_e p_e` of the best balanced assignment, `C = T·k/E`. A step minimises D exactly
//! along every price, all others held (Jacobi): token i would leave, or enter, expert e where `p_e` rises, or falls, by its margin
//! `m_ie = s_ie − p_e − τ_ie`, τ being the best value it could have instead: its (k+1)-th if it has e, its k-th otherwise. So `p_e` moves
//! by the C-th largest margin (half-way to the next one), and exactly C tokens would want e. All prices moving at once is Newton's method
//! with the diagonal of the Hessian, which is a graph Laplacian: tokens compare an expert with many others, so the steps converge fast.
//! A step that does not help makes all further ones shorter.
//!
//! Rewards (experts that are in fast memory already) belong into *frozen* prices, `p − r`: balancing would price them away.
//!
//! Batches are cut into parts of 256 tokens whatever the number of threads, so choices and prices do not depend on it.

use std::sync::{Mutex, PoisonError, RwLock};

use nash_kernels::pool;

use super::select::{MAX_LANES, Select, select};
use super::{Scores, check_top_k};
use crate::error::{GameError, check_finite, check_len};

/// Tokens of a part.
const PART: usize = 256;
/// Values of one expert over a part. Not a power of two: columns of different experts must not fight for the same cache sets.
const STRIDE: usize = PART + MAX_LANES;
/// Experts whose prices one task moves.
const EXPERTS: usize = 8;
/// Factor on the length of the steps after one that did not help.
const SHORTER: f32 = 0.7;

/// When to stop moving prices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balance {
    /// Steps at most.
    pub max_steps: usize,
    /// MaxVio to reach: the largest load may be above the mean by this share.
    pub tolerance: f64,
}

impl Default for Balance {
    fn default() -> Self {
        Self {
            max_steps: 16,
            tolerance: 0.1,
        }
    }
}

/// How balancing ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balanced {
    /// Price steps made.
    pub steps: usize,
    /// MaxVio of the choices: largest load over mean load, minus 1.
    pub max_violation: f64,
    /// Whether `max_violation` is within the tolerance, or as small as whole tokens allow.
    pub settled: bool,
}

/// Chooses experts at prices, and finds the prices. Holds all memory that this needs; calls allocate only while batches grow.
#[derive(Debug)]
pub struct PriceRouter {
    experts: usize,
    top_k: usize,
    loads: Vec<u32>,
    parts: Vec<RwLock<Part>>,
    columns: Vec<Mutex<Column>>,
    best_prices: Vec<f32>,
}

/// What choosing for up to [`PART`] tokens needs and gives.
#[derive(Debug, Default)]
struct Part {
    choices: Vec<u16>,
    loads: Vec<u32>,
    /// `[E, STRIDE]`: margins.
    values: Vec<f32>,
}

/// What moving up to [`EXPERTS`] prices needs and gives.
#[derive(Debug, Default)]
struct Column {
    /// Margins of one expert over all tokens, as integers in the same order.
    keys: Vec<i32>,
    moves: [f32; EXPERTS],
}

impl PriceRouter {
    /// For tokens that choose `top_k`, 1 to 8, of `experts`.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn new(experts: usize, top_k: usize) -> Result<Self, GameError> {
        check_top_k(top_k, experts)?;
        Ok(Self {
            experts,
            top_k,
            loads: vec![0; experts],
            parts: Vec::new(),
            columns: (0..experts.div_ceil(EXPERTS)).map(|_| Mutex::default()).collect(),
            best_prices: Vec::with_capacity(experts),
        })
    }

    /// Writes the `top-k(s − p)` of every token to `choices [T, k]`, the largest first, ties to the lower expert.
    ///
    /// # Errors
    /// If lengths do not agree or a price is not finite.
    pub fn select(
        &mut self,
        scores: Scores<'_>,
        prices: &[f32],
        choices: &mut [u16],
    ) -> Result<(), GameError> {
        self.prepare(scores, prices, choices)?;
        self.choose(scores, prices, false);
        self.write(choices);
        Ok(())
    }

    /// Tokens at each expert, `[E]`, by the last choices written.
    pub fn loads(&self) -> &[u32] {
        &self.loads
    }

    /// Moves `prices [E]` until the loads of this batch balance, and writes the choices at them. Warm prices (of an earlier batch) need a step at
    /// most as a rule, cold ones ([`super::ScoreStatistics::guess_prices`]) a few. Ends with the best prices seen,
    /// shifted so that the lowest is 0.
    ///
    /// # Errors
    /// If lengths do not agree or a price is not finite.
    pub fn balance(
        &mut self,
        scores: Scores<'_>,
        prices: &mut [f32],
        choices: &mut [u16],
        options: Balance,
    ) -> Result<Balanced, GameError> {
        self.prepare(scores, prices, choices)?;
        if scores.tokens() == 0 {
            self.loads.fill(0);
            return Ok(Balanced {
                steps: 0,
                max_violation: 0.0,
                settled: true,
            });
        }
        let mean = (scores.tokens() * self.top_k) as f64 / self.experts as f64;
        let enough = options.tolerance.max(mean.ceil() / mean - 1.0);
        let (mut best, mut length) = (f64::INFINITY, 1.0);
        let mut steps = 0;
        loop {
            let may_move = steps < options.max_steps && self.top_k < self.experts;
            self.choose(scores, prices, may_move);
            let violation = self.largest_load() / mean - 1.0;
            if violation < best {
                best = violation;
                self.best_prices.clear();
                self.best_prices.extend_from_slice(prices);
            } else {
                length *= SHORTER;
            }
            if !may_move || violation <= enough {
                break;
            }
            self.step(scores.tokens(), prices, length);
            steps += 1;
        }
        if prices != self.best_prices.as_slice() {
            prices.copy_from_slice(&self.best_prices);
            self.choose(scores, prices, false);
        }
        self.write(choices);
        Ok(Balanced {
            steps,
            max_violation: best,
            settled: best <= enough,
        })
    }

    /// Checks the arguments and makes room for the batch.
    fn prepare(&mut self, scores: Scores<'_>, prices: &[f32], choices: &[u16]) -> Result<(), GameError> {
        check_len("scores of a token", self.experts, scores.experts())?;
        check_len("prices", self.experts, prices.len())?;
        check_len("choices", scores.tokens() * self.top_k, choices.len())?;
        check_finite("prices", prices)?;
        let parts = scores.tokens().div_ceil(PART);
        self.parts
            .resize_with(parts.max(self.parts.len()), RwLock::default);
        for (index, part) in self.parts.iter_mut().enumerate() {
            let part = part.get_mut().unwrap_or_else(PoisonError::into_inner);
            let tokens = scores.tokens().saturating_sub(index * PART).min(PART);
            part.choices.resize(tokens * self.top_k, 0);
            part.loads.resize(self.experts, 0);
            part.values.resize(self.experts * STRIDE, 0.0);
        }
        Ok(())
    }

    /// Every token takes its best experts, in its part; with `margins`, those are left in the parts too.
    fn choose(&mut self, scores: Scores<'_>, prices: &[f32], margins: bool) {
        let (top_k, row) = (self.top_k, self.experts);
        pool::run(scores.tokens().div_ceil(PART), |index| {
            let mut part = self.parts[index].write().unwrap_or_else(PoisonError::into_inner);
            let Part {
                choices,
                loads,
                values,
            } = &mut *part;
            loads.fill(0);
            let tokens = choices.len() / top_k;
            let task = Task {
                scores: &scores.values()[index * PART * row..][..tokens * row],
                prices,
                choices,
                loads,
                values,
                top_k,
            };
            task.run(margins);
        });
        self.loads.fill(0);
        for part in &mut self.parts {
            let part = part.get_mut().unwrap_or_else(PoisonError::into_inner);
            if !part.choices.is_empty() {
                self.loads
                    .iter_mut()
                    .zip(&part.loads)
                    .for_each(|(sum, load)| *sum += load);
            }
        }
    }

    /// Copies the choices out of the parts.
    fn write(&mut self, choices: &mut [u16]) {
        for (choices, part) in choices.chunks_mut(PART * self.top_k).zip(&mut self.parts) {
            let part = part.get_mut().unwrap_or_else(PoisonError::into_inner);
            choices.copy_from_slice(&part.choices);
        }
    }

    fn largest_load(&self) -> f64 {
        f64::from(self.loads.iter().copied().max().unwrap_or(0))
    }

    /// Moves every price by `length` times its C-th largest margin.
    fn step(&mut self, tokens: usize, prices: &mut [f32], length: f32) {
        let wanted = (tokens * self.top_k)
            .div_ceil(self.experts)
            .clamp(1, tokens.max(1));
        pool::run(self.columns.len(), |index| {
            let mut column = self.columns[index].lock().unwrap_or_else(PoisonError::into_inner);
            let Column { keys, moves } = &mut *column;
            let first = index * EXPERTS;
            for (e, step) in (first..self.experts).zip(moves) {
                keys.clear();
                for part in &self.parts[..tokens.div_ceil(PART)] {
                    let part = part.read().unwrap_or_else(PoisonError::into_inner);
                    let margins = &part.values[e * STRIDE..][..part.choices.len() / self.top_k];
                    keys.extend(margins.iter().map(|&m| key(m)));
                }
                let (at, below) = pulp::Arch::new().dispatch(Ranked { keys, wanted });
                *step = 0.5 * (of_key(at) + of_key(below));
            }
        });
        for (prices, column) in prices.chunks_mut(EXPERTS).zip(&mut self.columns) {
            let column = column.get_mut().unwrap_or_else(PoisonError::into_inner);
            for (price, step) in prices.iter_mut().zip(column.moves) {
                *price += length * step;
            }
        }
        let lowest = prices.iter().copied().fold(f32::INFINITY, f32::min);
        prices.iter_mut().for_each(|price| *price -= lowest);
    }
}

/// The arguments of [`Select`] before the length of its list is known to the compiler.
struct Task<'a> {
    scores: &'a [f32],
    prices: &'a [f32],
    choices: &'a mut [u16],
    loads: &'a mut [u32],
    values: &'a mut [f32],
    top_k: usize,
}

impl Task<'_> {
    fn run(self, margins: bool) {
        match self.top_k + usize::from(margins) {
            1 => self.with::<1>(margins),
            2 => self.with::<2>(margins),
            3 => self.with::<3>(margins),
            4 => self.with::<4>(margins),
            5 => self.with::<5>(margins),
            6 => self.with::<6>(margins),
            7 => self.with::<7>(margins),
            8 => self.with::<8>(margins),
            _ => self.with::<9>(margins),
        }
    }

    fn with<const K: usize>(self, margins: bool) {
        // Without margins nothing stays: one block, over and over, in the nearest cache.
        let stride = if margins { STRIDE } else { MAX_LANES };
        let Self {
            scores,
            prices,
            choices,
            loads,
            values,
            top_k,
        } = self;
        select::<K>(Select {
            scores,
            prices,
            choices,
            loads,
            values: &mut values[..prices.len() * stride],
            stride,
            top_k,
        });
    }
}

/// A float as an integer of the same order.
fn key(value: f32) -> i32 {
    let bits = value.to_bits().cast_signed();
    bits ^ ((bits >> 31).cast_unsigned() >> 1).cast_signed()
}

/// The float of a [`key`].
fn of_key(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31).cast_unsigned() >> 1).cast_signed()).cast_unsigned())
}

/// The `wanted`-th largest key, counting from 1, and the one after it (itself if there is none).
struct Ranked<'a> {
    keys: &'a [i32],
    wanted: usize,
}

impl pulp::NullaryFnOnce for Ranked<'_> {
    type Output = (i32, i32);

    /// Bit by bit, the largest bound that at least `wanted` keys reach: 33 passes without a branch, less time than moving keys about.
    #[inline(always)]
    fn call(self) -> (i32, i32) {
        let reach = |bound: i32| self.keys.iter().map(|&k| u32::from(k >= bound)).sum::<u32>() as usize;
        let mut at = i32::MIN;
        for bit in (0..32).rev() {
            let bound = at.wrapping_add(1i32.wrapping_shl(bit));
            if reach(bound) >= self.wanted {
                at = bound;
            }
        }
        if reach(at) > self.wanted {
            return (at, at);
        }
        let below = self.keys.iter().map(|&k| if k < at { k } else { i32::MIN });
        let below = below.max().unwrap_or(at);
        (at, if below == i32::MIN { at } else { below })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_are_those_of_a_sort(mut values in proptest::collection::vec(-3.0f32..3.0, 1..200), wanted in 1usize..200) {
            let wanted = wanted.min(values.len());
            let keys: Vec<i32> = values.iter().map(|&v| key(v)).collect();
            let (at, below) = pulp::Arch::new().dispatch(Ranked { keys: &keys, wanted });
            values.sort_by(|a, b| b.total_cmp(a));
            prop_assert_eq!(of_key(at), values[wanted - 1]);
            prop_assert_eq!(of_key(below), values[wanted.min(values.len() - 1)]);
        }
    }
}
