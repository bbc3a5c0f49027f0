//! Routers without training: a ridge regression of what each expert is worth to a token on what the router reads.
//!
//! `scores = x·Rᵀ + c` with `R [E, d]`, `c [E]`, minimises `Σ_t ‖y_t − scores_t‖² + λ‖R‖²` over the calibration tokens, so the scores estimate
//! `E[y | x]`: ranking experts by them loses least of `y` among all rankings that are linear in x. The normal equations are solved in double precision.

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};
use nash_kernels::dense;

use crate::CarveError;

/// A linear router.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    /// `[E, d]`.
    pub(crate) weight: Vec<f32>,
    /// `[E]`.
    pub(crate) bias: Vec<f32>,
}

/// The inputs of a layer, prepared for regressions on them.
pub(crate) struct Inputs<'a> {
    /// `[T, d]`.
    x: &'a [f32],
    d: usize,
    mean: Vec<f64>,
    factor: faer::linalg::solvers::Llt<f64>,
}

impl<'a> Inputs<'a> {
    /// `x [T, d]`; λ is `ridge` times the mean energy of a channel.
    pub(crate) fn new(x: &'a [f32], d: usize, ridge: f64) -> Result<Self, CarveError> {
        let tokens = x.len() / d;
        let mut gram = vec![0.0f32; d * d];
        dense::gram_accumulate(x, tokens, d, &mut gram);
        let mut mean = vec![0.0f64; d];
        for row in x.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, &v)| *m += f64::from(v));
        }
        mean.iter_mut().for_each(|m| *m /= tokens.max(1) as f64);
        let n = tokens as f64;
        let centred = |i: usize, j: usize| f64::from(gram[i * d + j]) - n * mean[i] * mean[j];
        let energy = (0..d).map(|i| centred(i, i)).sum::<f64>() / d as f64;
        let matrix = Mat::from_fn(d, d, |i, j| {
            centred(i, j) + if i == j { ridge * energy + 1e-9 } else { 0.0 }
        });
        let factor = matrix.llt(Side::Lower).map_err(|_| CarveError::Singular)?;
        Ok(Self { x, d, mean, factor })
    }

    /// The router that estimates `y [T, E]` best.
    pub(crate) fn fit(&self, y: &[f32], experts: usize) -> Router {
        let (d, tokens) = (self.d, self.x.len() / self.d);
        let mut products = vec![0.0f32; d * experts];
        dense::gemm(
            1.0,
            dense::MatRef::row_major(self.x, tokens, d).t(),
            dense::MatRef::row_major(y, tokens, experts),
            0.0,
            dense::MatMut::row_major(&mut products, d, experts),
        );
        let mut mean = vec![0.0f64; experts];
        for row in y.chunks_exact(experts) {
            mean.iter_mut().zip(row).for_each(|(m, &v)| *m += f64::from(v));
        }
        mean.iter_mut().for_each(|m| *m /= tokens.max(1) as f64);
        let right = Mat::from_fn(d, experts, |i, e| {
            f64::from(products[i * experts + e]) - tokens as f64 * self.mean[i] * mean[e]
        });
        let solution = self.factor.solve(&right);
        let mut weight = vec![0.0; experts * d];
        let mut bias = vec![0.0; experts];
        for e in 0..experts {
            let mut constant = mean[e];
            for i in 0..d {
                weight[e * d + i] = solution[(i, e)] as f32;
                constant -= solution[(i, e)] * self.mean[i];
            }
            bias[e] = constant as f32;
        }
        Router { weight, bias }
    }
}

impl Router {
    /// Scores `[T, experts]` of `x [T, d]`.
    pub(crate) fn scores(&self, x: &[f32]) -> Vec<f32> {
        let experts = self.bias.len();
        let d = self.weight.len() / experts.max(1);
        let tokens = x.len() / d.max(1);
        let mut scores = vec![0.0; tokens * experts];
        dense::matmul_nt(x, &self.weight, &mut scores, tokens, experts, d);
        for row in scores.chunks_exact_mut(experts) {
            row.iter_mut().zip(&self.bias).for_each(|(s, b)| *s += b);
        }
        scores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_worth_is_found_again() {
        let (tokens, d, experts) = (200, 6, 3);
        let x: Vec<f32> = (0..tokens * d)
            .map(|i| (i * 7919 % 101) as f32 / 50.0 - 1.0)
            .collect();
        let r: Vec<f32> = (0..experts * d)
            .map(|i| (i * 31 % 13) as f32 / 6.0 - 1.0)
            .collect();
        let truth = Router {
            weight: r,
            bias: vec![0.5, -1.0, 2.0],
        };
        let y = truth.scores(&x);
        let found = Inputs::new(&x, d, 0.0).unwrap().fit(&y, experts);
        // Single-precision sums of 200 products of values below 4.
        for (a, b) in truth
            .weight
            .iter()
            .chain(&truth.bias)
            .zip(found.weight.iter().chain(&found.bias))
        {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
    }
}
