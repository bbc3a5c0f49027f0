//! A feed-forward layer of experts, and the dense layer with as many active parameters: what routing stands beside.
//!
//! An expert is `down · relu(up · x)`, without biases. The mixture sends each token to the experts that it chose, tokens of one expert together, and adds their
//! outputs weighted by the softmax of the chosen scores. The dense layer is one expert k times as wide. Weights are `f32`, or packed: their values rounded to
//! nearest, multiplied as a packed model is, with inputs quantized to 8 bits.

use half::f16;
use nash_games::GameError;
use nash_games::routing::{PriceRouter, Scores};
use nash_kernels::dense::matmul_nt;
use nash_kernels::{
    Activations, GROUP, PackedMatrix, PackedShape, SCALE_UNIT, Unpacked, Width, pool, vectorize,
};

use super::RoutingShape;
use super::source::Normal;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// `f32`.
    Float,
    /// Codes of so many bits, and a scale per group.
    Packed(Width),
}

/// Rounds `values [m, n]` to the nearest of evenly spaced levels, with the largest of every group at the last one.
fn pack(values: &[f32], cols: usize, width: Width) -> PackedMatrix {
    let half = 1 << (width.bits() - 1);
    let reach = half - 1;
    // Units between levels: as many as fit a byte.
    let step = 127 / reach;
    let level = |window: i32| (step * (window % (2 * half) - half)).max(-127) as i8;
    let mut unpacked = Unpacked {
        codes: Vec::with_capacity(values.len()),
        scale_codes: Vec::new(),
        row_scales: Vec::new(),
        codebook: (0..width.codebook_len() as i32).map(level).collect(),
    };
    let (reach, step, half) = (reach as f32, step as f32, half as f32);
    let largest = |values: &[f32]| values.iter().fold(f32::MIN_POSITIVE, |m, w| m.max(w.abs()));
    for row in values.chunks(cols) {
        let scale = f16::from_f32(largest(row) / (reach * step * 127.0 * SCALE_UNIT));
        let unit = scale.to_f32() * SCALE_UNIT * step;
        unpacked.row_scales.push(scale);
        for group in row.chunks(GROUP) {
            let scale_code = (largest(group) / (reach * unit)).ceil().clamp(1.0, 127.0);
            unpacked.scale_codes.push(scale_code as i8);
            let code = |w: &f32| ((w / (unit * scale_code)).round().clamp(-reach, reach) + half) as u8;
            unpacked.codes.extend(group.iter().map(code));
        }
    }
    let shape = PackedShape {
        rows: values.len() / cols,
        cols,
        width,
    };
    nash_kernels::pack(shape, &unpacked).expect("codes and scales of this shape")
}

/// `down [d, h] · relu(up [h, d] · x)`.
#[derive(Debug)]
enum Expert {
    Float { up: Vec<f32>, down: Vec<f32> },
    Packed { up: PackedMatrix, down: PackedMatrix },
}

/// Experts of one shape, and buffers that live from call to call.
#[derive(Debug)]
struct Experts {
    experts: Vec<Expert>,
    width: usize,
    hidden: usize,
    /// Of each part.
    buffers: Vec<Buffers>,
    /// `[A, d]`.
    answers: Vec<f32>,
}

/// What a part of an expert's rows needs.
#[derive(Debug, Default)]
struct Buffers {
    x: Vec<f32>,
    inner: Vec<f32>,
    quantized: Activations,
}

/// Rows that a packed expert works on at a time, at most: what is between its products stays in the second-level cache of a core.
const PART: usize = 96;

/// Rows of each part of `rows`, in whole blocks of the kernels: as many parts as keep all threads busy if the experts are too few to.
fn even_part(rows: usize, experts: usize) -> usize {
    const BLOCK: usize = 8;
    let parts = rows.div_ceil(PART).max(1);
    let parts = if experts < pool::threads() {
        parts.next_multiple_of(pool::threads())
    } else {
        parts
    };
    rows.div_ceil(parts).next_multiple_of(BLOCK)
}

impl Experts {
    /// Random weights, by a seed for each expert, that keep the size of their inputs.
    fn random(width: usize, hidden: usize, storage: Storage, seeds: impl Iterator<Item = u64>) -> Self {
        let expert = |seed| {
            let mut normal = Normal::new(seed, 0);
            let up = normal.many(hidden * width, (2.0 / width as f32).sqrt());
            let down = normal.many(width * hidden, (1.0 / hidden as f32).sqrt());
            match storage {
                Storage::Float => Expert::Float { up, down },
                Storage::Packed(bits) => Expert::Packed {
                    up: pack(&up, width, bits),
                    down: pack(&down, hidden, bits),
                },
            }
        };
        Self {
            experts: seeds.map(expert).collect(),
            width,
            hidden,
            buffers: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// What the experts answer, `[A, d]`, to the given rows of `x [T, d]`: so many for the first one, so many for the second. Threads
    /// take parts of the rows of one expert through both of its products.
    fn answer(&mut self, x: &[f32], mut rows: &[u32], loads: &[u32]) -> &[f32] {
        let (d, h) = (self.width, self.hidden);
        let all = lines(&mut self.answers, rows.len() * d);
        let mut answers = &mut *all;
        let mut parts = Vec::new();
        for (expert, &load) in self.experts.iter().zip(loads) {
            let longest = match expert {
                Expert::Float { .. } => load as usize,
                Expert::Packed { .. } => even_part(load as usize, loads.len()),
            };
            let mut of_expert = rows.split_off(..load as usize).unwrap_or_default();
            while !of_expert.is_empty() {
                let part = of_expert
                    .split_off(..longest.min(of_expert.len()))
                    .unwrap_or_default();
                let answers = answers.split_off_mut(..part.len() * d).unwrap_or_default();
                parts.push((expert, part, answers, self.buffers.pop().unwrap_or_default()));
            }
        }
        // The largest first, so that threads end at about the same time.
        parts.sort_by_key(|(_, rows, ..)| std::cmp::Reverse(rows.len()));
        pool::for_each_chunk(&mut parts, 1, |_, parts| {
            for (expert, rows, answers, buffers) in parts {
                let input = |at: usize| &x[rows[at] as usize * d..][..d];
                expert.answer(rows.len(), input, buffers, answers, [d, h]);
            }
        });
        self.buffers
            .extend(parts.into_iter().map(|(.., buffers)| buffers));
        all
    }
}

impl Expert {
    /// Writes the answers `[A, d]` to rows of inputs.
    fn answer<'x>(
        &self,
        rows: usize,
        input: impl Fn(usize) -> &'x [f32] + Sync,
        Buffers { x, inner, quantized }: &mut Buffers,
        answers: &mut [f32],
        [d, h]: [usize; 2],
    ) {
        let inner = lines(inner, rows * h);
        match self {
            Self::Float { up, down } => {
                x.clear();
                x.extend((0..rows).flat_map(&input));
                matmul_nt(x, up, inner, rows, h, d);
                inner.iter_mut().for_each(|v| *v = v.max(0.0));
                matmul_nt(inner, down, answers, rows, d, h);
            }
            Self::Packed { up, down } => {
                quantized.quantize_rows(rows, d, input);
                nash_kernels::matmul(up.as_ref(), quantized, inner);
                vectorize(
                    #[inline(always)]
                    || inner.iter_mut().for_each(|v| *v = v.max(0.0)),
                );
                quantized.quantize(inner, rows, h);
                nash_kernels::matmul(down.as_ref(), quantized, answers);
            }
        }
    }
}

/// Floats of a buffer that begin with a line of the cache, of which kernels store one at a time; they hold anything before. The buffer never shrinks: what is
/// cut off would be cleared when it is needed again.
fn lines(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    const LINE: usize = 64 / size_of::<f32>();
    if buffer.len() < len + LINE {
        buffer.resize(len + LINE, 0.0);
    }
    let first = buffer.as_ptr().align_offset(64).min(LINE);
    &mut buffer[first..first + len]
}

/// Where the rows of each expert begin.
fn starts(loads: &[u32]) -> Vec<usize> {
    let next = |sum: &mut usize, load: &u32| Some(std::mem::replace(sum, *sum + *load as usize));
    loads.iter().scan(0, next).collect()
}

/// One expert that every token uses.
#[derive(Debug)]
pub struct DenseLayer {
    expert: Experts,
    rows: Vec<u32>,
}

impl DenseLayer {
    /// Random weights that keep the size of their inputs.
    pub fn random(width: usize, hidden: usize, storage: Storage, seed: u64) -> Self {
        Self {
            expert: Experts::random(width, hidden, storage, std::iter::once(seed)),
            rows: Vec::new(),
        }
    }

    /// Writes the outputs for `x [T, d]` to `y [T, d]`.
    ///
    /// # Panics
    /// If the lengths do not agree.
    pub fn forward(&mut self, x: &[f32], y: &mut [f32]) {
        let tokens = (x.len() / self.expert.width) as u32;
        self.rows.clear();
        self.rows.extend(0..tokens);
        y.copy_from_slice(self.expert.answer(x, &self.rows, &[tokens]));
    }
}

/// A router and its experts.
#[derive(Debug)]
pub struct MixtureLayer {
    router: Vec<f32>,
    /// −price of each expert, `[E]`.
    prices: Vec<f32>,
    experts: Experts,
    selector: PriceRouter,
    top_k: usize,
    scratch: Scratch,
}

/// Buffers that live from call to call.
#[derive(Debug, Default)]
struct Scratch {
    scores: Vec<f32>,
    choices: Vec<u16>,
    gates: Vec<f32>,
    /// The token of each row, expert by expert.
    rows: Vec<u32>,
    /// The row of each choice, `[T, k]`.
    seats: Vec<usize>,
}

/// Tokens whose answers one task adds up.
const TOKENS: usize = 32;

impl MixtureLayer {
    /// Random weights; experts `hidden` wide.
    ///
    /// # Errors
    /// If k of E experts cannot be chosen.
    pub fn random(
        shape: RoutingShape,
        hidden: usize,
        storage: Storage,
        seed: u64,
    ) -> Result<Self, GameError> {
        let (width, experts) = (shape.width, shape.experts);
        let mut normal = Normal::new(seed, 1);
        let seeds = (0..experts as u64).map(|e| seed.wrapping_add(e + 1));
        Ok(Self {
            router: normal.many(experts * width, (1.0 / width as f32).sqrt()),
            prices: vec![0.0; experts],
            experts: Experts::random(width, hidden, storage, seeds),
            selector: PriceRouter::new(experts, shape.top_k)?,
            top_k: shape.top_k,
            scratch: Scratch::default(),
        })
    }

    /// The prices at which tokens choose, `[E]`.
    pub fn prices(&mut self) -> &mut [f32] {
        &mut self.prices
    }

    /// The router's scores of `x [T, d]`, `[T, E]`.
    pub fn scores(&self, x: &[f32]) -> Vec<f32> {
        let (tokens, experts) = (x.len() / self.experts.width, self.prices.len());
        let mut scores = vec![0.0; tokens * experts];
        matmul_nt(x, &self.router, &mut scores, tokens, experts, self.experts.width);
        scores
    }

    /// Writes the outputs for `x [T, d]` to `y [T, d]`.
    ///
    /// # Errors
    /// If a score is not finite.
    ///
    /// # Panics
    /// If the lengths do not agree.
    pub fn forward(&mut self, x: &[f32], y: &mut [f32]) -> Result<(), GameError> {
        let (d, k, experts) = (self.experts.width, self.top_k, self.prices.len());
        let tokens = x.len() / d;
        let s = &mut self.scratch;
        s.scores.resize(tokens * experts, 0.0);
        s.choices.resize(tokens * k, 0);
        matmul_nt(x, &self.router, &mut s.scores, tokens, experts, d);
        let scores = Scores::new(&s.scores, experts)?;
        self.selector.select(scores, &self.prices, &mut s.choices)?;
        s.gate(experts, k);
        s.sort(self.selector.loads(), k);
        let answers = self.experts.answer(x, &s.rows, self.selector.loads());
        pool::for_each_chunk(y, TOKENS * d, |chunk, y| {
            let seats = s.seats[chunk * TOKENS * k..].chunks(k);
            let gates = s.gates[chunk * TOKENS * k..].chunks(k);
            for ((y, seats), gates) in y.chunks_mut(d).zip(seats).zip(gates) {
                y.fill(0.0);
                for (&seat, gate) in seats.iter().zip(gates) {
                    let answer = &answers[seat * d..][..d];
                    y.iter_mut().zip(answer).for_each(|(y, o)| *y += gate * o);
                }
            }
        });
        Ok(())
    }
}

impl Scratch {
    /// Softmax of the chosen scores of each token.
    fn gate(&mut self, experts: usize, k: usize) {
        self.gates.clear();
        for (row, choices) in self.scores.chunks(experts).zip(self.choices.chunks(k)) {
            let at = self.gates.len();
            self.gates.extend(choices.iter().map(|&e| row[usize::from(e)]));
            let gates = &mut self.gates[at..];
            let largest = gates.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            gates.iter_mut().for_each(|g| *g = (*g - largest).exp());
            let total: f32 = gates.iter().sum();
            gates.iter_mut().for_each(|g| *g /= total);
        }
    }

    /// Gives each choice its row, expert by expert, tokens ascending.
    fn sort(&mut self, loads: &[u32], k: usize) {
        let mut next = starts(loads);
        self.rows.resize(self.choices.len(), 0);
        self.seats.clear();
        for (token, choices) in (0u32..).zip(self.choices.chunks(k)) {
            for &e in choices {
                let seat = next[usize::from(e)];
                next[usize::from(e)] += 1;
                self.rows[seat] = token;
                self.seats.push(seat);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_is_the_weighted_sum_of_its_experts() {
        let shape = RoutingShape {
            name: "small",
            tokens: 21,
            experts: 5,
            top_k: 2,
            width: 12,
            expert_width: None,
        };
        let (d, hidden) = (shape.width, 16);
        let mut layer = MixtureLayer::random(shape, hidden, Storage::Float, 7).unwrap();
        layer.prices().copy_from_slice(&[0.3, 0.0, 0.1, 0.5, 0.2]);
        let x = Normal::new(3, 0).many(shape.tokens * d, 1.0);
        let mut y = vec![f32::NAN; x.len()];
        // Twice: buffers of the first call must not show in the second.
        layer.forward(&x[..5 * d], &mut y[..5 * d]).unwrap();
        layer.forward(&x, &mut y).unwrap();
        let scores = layer.scores(&x);
        for (token, y) in y.chunks(d).enumerate() {
            let (x, scores) = (&x[token * d..][..d], &scores[token * 5..][..5]);
            let mut order: Vec<usize> = (0..5).collect();
            order.sort_by(|&a, &b| (scores[b] - layer.prices[b]).total_cmp(&(scores[a] - layer.prices[a])));
            let mut expected = vec![0.0; d];
            let total: f32 = order[..2].iter().map(|&e| scores[e].exp()).sum();
            for &e in &order[..2] {
                let mut out = vec![0.0; d];
                let mut loads = [0; 5];
                loads[e] = 1;
                out.copy_from_slice(layer.experts.answer(x, &[0], &loads));
                let gate = scores[e].exp() / total;
                expected
                    .iter_mut()
                    .zip(&out)
                    .for_each(|(sum, o)| *sum += gate * o);
            }
            // Sums of 16 products of values of order 1, in another order.
            for (y, expected) in y.iter().zip(&expected) {
                assert!((y - expected).abs() < 16.0 * 4.0 * f32::EPSILON, "{y} {expected}");
            }
        }
    }

    #[test]
    fn a_packed_layer_answers_nearly_as_the_layer_in_floats() {
        let (d, h) = (100, 72);
        let x = Normal::new(3, 0).many(9 * d, 1.0);
        let answer = |storage| {
            let mut y = vec![f32::NAN; x.len()];
            DenseLayer::random(d, h, storage, 5).forward(&x, &mut y);
            y
        };
        let energy = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
        let exact = answer(Storage::Float);
        for (bits, levels) in [(8, 127.0), (4, 7.0)] {
            let packed = answer(Storage::Packed(Width::new(bits).unwrap()));
            let error = energy(&mut exact.iter().zip(&packed).map(|(a, b)| a - b))
                / energy(&mut exact.iter().copied());
            // Four roundings: weights and inputs of two products, within half a step of the largest of 64 normal values, 2.5 deviations,
            // over the number of levels; inputs have 127.
            let one = |levels: f32| (2.5 / levels).powi(2) / 12.0;
            let expected = 2.0 * (one(levels) + one(127.0));
            assert!(
                error > 0.5 * expected && error < 2.0 * expected,
                "{bits} bits: {error}, expected {expected}"
            );
        }
    }
}
