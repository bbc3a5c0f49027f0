//! Targets that make up for errors made before: quantization error propagation (Arai and Ichikawa 2025, "Quantization Error Propagation",
//! eq. 5; the same correction as GPTAQ, Li et al. 2025).
//!
//! A linear that reads `x̂` from the compressed prefix, where the source read `x`, should give what the source gave: `Ŵ x̂ ≈ W x`. With
//! `Ĥ = E[x̂ x̂ᵀ] + Λ` (damped) and the drift `C = E[(x − x̂) x̂ᵀ]` that is the same as rounding the target `W + α W C Ĥ⁻¹` under `Ĥ`, α = 1. On little
//! calibration text a smaller α is better: what the drift of one text asks for is partly noise.
//!
//! With fewer tokens T than inputs n nothing of `[n, n]` is needed. Let `X̂ [T, n]` hold the inputs and `D` their drift, token by token: then `C Ĥ⁻¹ =
//! Dᵀ K⁻¹ X̂ Λ⁻¹ / T` with `K = 1 + X̂ Λ⁻¹ X̂ᵀ / T`, `[T, T]` (the push-through identity).

use faer::Side;
use faer::linalg::solvers::{Llt, Solve as _};
use nash_kernels::dense::{self, MatMut, MatRef, gemm};
use nash_kernels::heap::zeros;

use crate::error::{GameError, check_finite, check_len};

/// What the linears of one site read in the compressed model, and how far that is from what they read in the source.
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// `x̂ [T, n]`, from the compressed prefix.
    pub compressed: Vec<f32>,
    /// `x [T, n]`, from the source.
    pub source: Vec<f32>,
    /// `Ĥ = E[x̂ x̂ᵀ] + Λ`, `[n, n]`.
    pub hessian: &'a [f32],
    /// The diagonal of `Λ [n]`, positive.
    pub damping: &'a [f32],
}

/// `C Ĥ⁻¹`, ready to be multiplied by the weights of the linears of a site.
pub struct Correction {
    n: usize,
    factors: Factors,
}

/// Whichever is smaller.
enum Factors {
    Inputs {
        /// `C [n, n]`.
        drift: Vec<f32>,
        /// Of `Ĥ`.
        cholesky: Llt<f32>,
    },
    Tokens {
        /// `D / √T [T, n]`.
        drift: Vec<f32>,
        /// `X̂ Λ^(−1/2) / √T [T, n]`.
        whitened: Vec<f32>,
        /// `Λ^(−1/2)`.
        whitening: Vec<f32>,
        /// Of `K`.
        cholesky: Llt<f32>,
    },
}

impl Correction {
    /// Of the inputs of a site.
    ///
    /// # Errors
    /// If the lengths do not agree or `Ĥ` is not positive definite.
    pub fn new(inputs: Inputs<'_>) -> Result<Self, GameError> {
        let Inputs {
            compressed,
            source,
            hessian,
            damping,
        } = inputs;
        let n = damping.len();
        let tokens = compressed.len() / n.max(1);
        check_len("inputs", tokens * n, compressed.len())?;
        check_len("inputs of the source", tokens * n, source.len())?;
        check_len("Hessian", n * n, hessian.len())?;
        let share = 1.0 / tokens.max(1) as f32;
        let mut difference = source;
        difference
            .iter_mut()
            .zip(&compressed)
            .for_each(|(x, other)| *x -= other);
        let factors = if through_tokens(n, tokens) {
            let root = share.sqrt();
            let whitening: Vec<f32> = damping.iter().map(|d| d.sqrt().recip()).collect();
            let mut whitened = compressed;
            for row in whitened.chunks_mut(n) {
                row.iter_mut().zip(&whitening).for_each(|(x, w)| *x *= w * root);
            }
            let mut kernel = zeros(tokens * tokens);
            (0..tokens).for_each(|t| kernel[t * tokens + t] = 1.0);
            dense::gram(
                MatRef::row_major(&whitened, tokens, n).t(),
                MatMut::row_major(&mut kernel, tokens, tokens),
            );
            difference.iter_mut().for_each(|d| *d *= root);
            Factors::Tokens {
                drift: difference,
                cholesky: factor(&kernel, tokens)?,
                whitened,
                whitening,
            }
        } else {
            let mut drift = zeros(n * n);
            gemm(
                share,
                MatRef::row_major(&difference, tokens, n).t(),
                MatRef::row_major(&compressed, tokens, n),
                0.0,
                MatMut::row_major(&mut drift, n, n),
            );
            let cholesky = factor(hessian, n)?;
            Factors::Inputs { drift, cholesky }
        };
        Ok(Self { n, factors })
    }

    /// `W + α W C Ĥ⁻¹` of `weights W [m, n]` and α = `strength`.
    ///
    /// # Errors
    /// If the lengths do not agree or the result is not finite.
    pub fn target(&self, weights: &[f32], strength: f32) -> Result<Vec<f32>, GameError> {
        let n = self.n;
        let m = weights.len() / n.max(1);
        check_len("weights", m * n, weights.len())?;
        let w = MatRef::row_major(weights, m, n);
        let mut target = match &self.factors {
            Factors::Inputs { drift, cholesky } => {
                let mut shift = zeros(m * n);
                let c = MatRef::row_major(drift, n, n);
                gemm(strength, w, c, 0.0, MatMut::row_major(&mut shift, m, n));
                cholesky.rsolve_in_place(faer::MatMut::from_row_major_slice_mut(&mut shift, m, n));
                shift
            }
            Factors::Tokens {
                drift,
                whitened,
                whitening,
                cholesky,
            } => {
                let tokens = drift.len() / n.max(1);
                let mut errors = zeros(m * tokens);
                let d = MatRef::row_major(drift, tokens, n).t();
                gemm(strength, w, d, 0.0, MatMut::row_major(&mut errors, m, tokens));
                cholesky.rsolve_in_place(faer::MatMut::from_row_major_slice_mut(&mut errors, m, tokens));
                let mut shift = zeros(m * n);
                gemm(
                    1.0,
                    MatRef::row_major(&errors, m, tokens),
                    MatRef::row_major(whitened, tokens, n),
                    0.0,
                    MatMut::row_major(&mut shift, m, n),
                );
                for row in shift.chunks_mut(n) {
                    row.iter_mut().zip(whitening).for_each(|(s, w)| *s *= w);
                }
                shift
            }
        };
        target.iter_mut().zip(weights).for_each(|(s, w)| *s += w);
        check_finite("shifted targets", &target)?;
        Ok(target)
    }
}

/// Whether a drift is corrected through tokens instead of inputs: where there are fewer of them.
pub fn through_tokens(inputs: usize, tokens: usize) -> bool {
    tokens < inputs
}

fn factor(matrix: &[f32], size: usize) -> Result<Llt<f32>, GameError> {
    faer::MatRef::from_row_major_slice(matrix, size, size)
        .llt(Side::Lower)
        .map_err(|_| GameError::NotPositiveDefinite { size })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The target is the least-squares solution: the gradient of `E|W x − W' x̂|² + |(W' − W) Λ^½|²` vanishes there. With more tokens than inputs, and
    /// with fewer.
    #[test]
    fn the_target_is_the_regression_on_the_drifted_inputs() {
        let (m, n) = (3, 5);
        let noise = |i: usize, j: usize, k: usize| ((i * 31 + j * 17 + k * 7) as f32 * 0.73).sin();
        let weights: Vec<f32> = (0..m * n).map(|k| noise(k, 3, 3)).collect();
        let damping: Vec<f32> = (0..n).map(|i| 0.05 + 0.02 * i as f32).collect();
        for tokens in [40, 5, 3, 1] {
            let x: Vec<f32> = (0..tokens * n).map(|i| noise(i / n, i % n, 1)).collect();
            let compressed: Vec<f32> = (0..tokens * n)
                .map(|i| x[i] + 0.2 * noise(i / n, i % n, 2))
                .collect();
            let mut hessian = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..n {
                    let products = compressed.chunks(n).map(|x| x[i] * x[j]);
                    hessian[i * n + j] = products.sum::<f32>() / tokens as f32;
                }
                hessian[i * n + i] += damping[i];
            }
            let inputs = Inputs {
                compressed: compressed.clone(),
                source: x.clone(),
                hessian: &hessian,
                damping: &damping,
            };
            let correction = Correction::new(inputs.clone()).unwrap();
            let target = correction.target(&weights, 1.0).unwrap();
            for (r, (target, weights)) in target.chunks(n).zip(weights.chunks(n)).enumerate() {
                for j in 0..n {
                    let mut gradient = damping[j] * (target[j] - weights[j]);
                    for (x, other) in x.chunks(n).zip(compressed.chunks(n)) {
                        let errors = (0..n).map(|i| target[i] * other[i] - weights[i] * x[i]);
                        gradient += errors.sum::<f32>() * other[j] / tokens as f32;
                    }
                    assert!(
                        gradient.abs() < 1e-5,
                        "{tokens} tokens, row {r}, column {j}: {gradient}"
                    );
                }
            }
            assert_eq!(correction.target(&weights, 0.0).unwrap(), weights);
            assert!(correction.target(&weights[1..], 1.0).is_err());
            let source = x[1..].to_vec();
            assert!(Correction::new(Inputs { source, ..inputs }).is_err());
        }
        let indefinite = Inputs {
            compressed: vec![1.0; 4],
            source: vec![1.0; 4],
            hessian: &[0.0; 4],
            damping: &[1.0; 2],
        };
        assert!(Correction::new(indefinite).is_err());
    }
}
