//! A feed-forward layer of experts, and the dense layer with as many active parameters, in `f32`: what routing stands beside.
//!
//! An expert is `down · relu(up · x)`, without biases. The mixture sends each token to the experts that it chose, tokens of one expert together, and adds their
//! outputs weighted by the softmax of the chosen scores. The dense layer is one expert k times as wide.

use nash_games::GameError;
use nash_games::routing::{PriceRouter, Scores};
use nash_kernels::dense::matmul_nt;

use super::RoutingShape;
use super::source::Normal;

/// `down [d, h] · relu(up [h, d] · x)`.
#[derive(Debug)]
pub struct DenseLayer {
    up: Vec<f32>,
    down: Vec<f32>,
    width: usize,
    hidden: usize,
    inner: Vec<f32>,
}

impl DenseLayer {
    /// Random weights that keep the size of their inputs.
    pub fn random(width: usize, hidden: usize, seed: u64) -> Self {
        let mut normal = Normal::new(seed, 0);
        Self {
            up: normal.many(hidden * width, (2.0 / width as f32).sqrt()),
            down: normal.many(width * hidden, (1.0 / hidden as f32).sqrt()),
            width,
            hidden,
            inner: Vec::new(),
        }
    }

    /// Writes the outputs for `x [T, d]` to `y [T, d]`.
    ///
    /// # Panics
    /// If the lengths do not agree.
    pub fn forward(&mut self, x: &[f32], y: &mut [f32]) {
        let tokens = x.len() / self.width;
        self.inner.resize(tokens * self.hidden, 0.0);
        matmul_nt(x, &self.up, &mut self.inner, tokens, self.hidden, self.width);
        self.inner.iter_mut().for_each(|v| *v = v.max(0.0));
        matmul_nt(&self.inner, &self.down, y, tokens, self.width, self.hidden);
    }
}

/// A router and its experts.
#[derive(Debug)]
pub struct MixtureLayer {
    router: Vec<f32>,
    /// −price of each expert, `[E]`.
    prices: Vec<f32>,
    experts: Vec<DenseLayer>,
    selector: PriceRouter,
    top_k: usize,
    width: usize,
    scratch: Scratch,
}

/// Buffers that live from call to call.
#[derive(Debug, Default)]
struct Scratch {
    scores: Vec<f32>,
    choices: Vec<u16>,
    gates: Vec<f32>,
    /// (token, place among its choices), expert by expert.
    order: Vec<(u32, u8)>,
    gathered: Vec<f32>,
    outputs: Vec<f32>,
}

impl MixtureLayer {
    /// Random weights; experts `hidden` wide.
    ///
    /// # Errors
    /// If k of E experts cannot be chosen.
    pub fn random(shape: RoutingShape, hidden: usize, seed: u64) -> Result<Self, GameError> {
        let (width, experts) = (shape.width, shape.experts);
        let mut normal = Normal::new(seed, 1);
        Ok(Self {
            router: normal.many(experts * width, (1.0 / width as f32).sqrt()),
            prices: vec![0.0; experts],
            experts: (0..experts as u64)
                .map(|e| DenseLayer::random(width, hidden, seed.wrapping_add(e + 1)))
                .collect(),
            selector: PriceRouter::new(experts, shape.top_k)?,
            top_k: shape.top_k,
            width,
            scratch: Scratch::default(),
        })
    }

    /// The prices at which tokens choose, `[E]`.
    pub fn prices(&mut self) -> &mut [f32] {
        &mut self.prices
    }

    /// The router's scores of `x [T, d]`, `[T, E]`.
    pub fn scores(&self, x: &[f32]) -> Vec<f32> {
        let (tokens, experts) = (x.len() / self.width, self.experts.len());
        let mut scores = vec![0.0; tokens * experts];
        matmul_nt(x, &self.router, &mut scores, tokens, experts, self.width);
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
        let (d, k, experts) = (self.width, self.top_k, self.experts.len());
        let tokens = x.len() / d;
        let s = &mut self.scratch;
        s.scores.resize(tokens * experts, 0.0);
        s.choices.resize(tokens * k, 0);
        matmul_nt(x, &self.router, &mut s.scores, tokens, experts, d);
        let scores = Scores::new(&s.scores, experts)?;
        self.selector.select(scores, &self.prices, &mut s.choices)?;
        s.gate(experts, k);
        s.sort(self.selector.loads(), k);
        y.fill(0.0);
        let mut rest = &s.order[..];
        for (expert, &load) in self.experts.iter_mut().zip(self.selector.loads()) {
            let (seats, others) = rest.split_at(load as usize);
            rest = others;
            s.gathered.clear();
            for &(token, _) in seats {
                s.gathered.extend_from_slice(&x[token as usize * d..][..d]);
            }
            s.outputs.resize(seats.len() * d, 0.0);
            expert.forward(&s.gathered, &mut s.outputs);
            for (&(token, place), output) in seats.iter().zip(s.outputs.chunks(d)) {
                let gate = s.gates[token as usize * k + usize::from(place)];
                let y = &mut y[token as usize * d..][..d];
                y.iter_mut().zip(output).for_each(|(y, o)| *y += gate * o);
            }
        }
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

    /// The seats of each expert, expert by expert, tokens ascending.
    fn sort(&mut self, loads: &[u32], k: usize) {
        let mut next: Vec<usize> = loads
            .iter()
            .scan(0, |sum, &load| Some(std::mem::replace(sum, *sum + load as usize)))
            .collect();
        self.order.resize(self.choices.len(), (0, 0));
        for (token, choices) in (0u32..).zip(self.choices.chunks(k)) {
            for (place, &e) in (0u8..).zip(choices) {
                let next = &mut next[usize::from(e)];
                self.order[*next] = (token, place);
                *next += 1;
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
        let mut layer = MixtureLayer::random(shape, hidden, 7).unwrap();
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
                layer.experts[e].forward(x, &mut out);
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
}
