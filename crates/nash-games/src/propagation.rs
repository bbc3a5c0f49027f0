//! Targets that make up for errors made before: quantization error propagation (Arai and Ichikawa 2025, "Quantization Error Propagation",
//! eq. 5; the same correction as GPTAQ, Li et al. 2025).
//!
//! A linear that reads `x̂` from the compressed prefix, where the source read `x`, should give what the source gave: `Ŵ x̂ ≈ W x`. With
//! `Ĥ = E[x̂ x̂ᵀ]` (damped) and the drift `C = E[(x − x̂) x̂ᵀ]` that is the same as rounding the target `W + α W C Ĥ⁻¹` under `Ĥ`, α = 1. On little
//! calibration text a smaller α is better: what the drift of one text asks for is partly noise.

use faer::Side;
use faer::linalg::solvers::Solve as _;
use nash_kernels::dense::{MatMut, MatRef, gemm};

use crate::error::{GameError, check_finite, check_len};

/// `W + α W C Ĥ⁻¹`, `[m, n]`, of `weights [m, n]`, `drift C [n, n]` and `hessian Ĥ [n, n]` (damped).
///
/// # Errors
/// If the lengths do not agree, the Hessian is not positive definite or the result is not finite.
pub fn shifted_targets(
    weights: &[f32],
    drift: &[f32],
    hessian: &[f32],
    n: usize,
    strength: f32,
) -> Result<Vec<f32>, GameError> {
    check_len("drift", n * n, drift.len())?;
    check_len("Hessian", n * n, hessian.len())?;
    let m = weights.len() / n.max(1);
    check_len("weights", m * n, weights.len())?;
    let mut shift = vec![0.0f32; m * n];
    let w = MatRef::row_major(weights, m, n);
    let c = MatRef::row_major(drift, n, n);
    gemm(strength, w, c, 0.0, MatMut::row_major(&mut shift, m, n));
    let factor = faer::MatRef::from_row_major_slice(hessian, n, n)
        .llt(Side::Lower)
        .map_err(|_| GameError::NotPositiveDefinite { size: n })?;
    factor.rsolve_in_place(faer::MatMut::from_row_major_slice_mut(&mut shift, m, n));
    shift.iter_mut().zip(weights).for_each(|(s, w)| *s += w);
    check_finite("shifted targets", &shift)?;
    Ok(shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The target is the least-squares solution: the gradient of `E|W x − W' x̂|² + λ|W' − W|²` vanishes there.
    #[test]
    fn the_target_is_the_regression_on_the_drifted_inputs() {
        let (m, n, tokens, damping) = (3, 5, 40, 0.05);
        let noise = |i: usize, j: usize, k: usize| ((i * 31 + j * 17 + k * 7) as f32 * 0.73).sin();
        let x = |t: usize, i: usize| noise(t, i, 1);
        let drifted = |t: usize, i: usize| noise(t, i, 1) + 0.2 * noise(t, i, 2);
        let weights: Vec<f32> = (0..m * n).map(|k| noise(k, 3, 3)).collect();
        let (mut h, mut c) = (vec![0.0; n * n], vec![0.0; n * n]);
        for i in 0..n {
            for j in 0..n {
                for t in 0..tokens {
                    h[i * n + j] += drifted(t, i) * drifted(t, j) / tokens as f32;
                    c[i * n + j] += (x(t, i) - drifted(t, i)) * drifted(t, j) / tokens as f32;
                }
            }
            h[i * n + i] += damping;
        }
        let target = shifted_targets(&weights, &c, &h, n, 1.0).unwrap();
        for r in 0..m {
            for j in 0..n {
                let mut gradient = damping * (target[r * n + j] - weights[r * n + j]);
                for t in 0..tokens {
                    let error: f32 = (0..n)
                        .map(|i| target[r * n + i] * drifted(t, i) - weights[r * n + i] * x(t, i))
                        .sum();
                    gradient += error * drifted(t, j) / tokens as f32;
                }
                assert!(gradient.abs() < 1e-4, "row {r}, column {j}: {gradient}");
            }
        }
        assert_eq!(shifted_targets(&weights, &c, &h, n, 0.0).unwrap(), weights);
        assert!(shifted_targets(&weights, &c[1..], &h, n, 1.0).is_err());
        assert!(shifted_targets(&weights, &c, &vec![0.0; n * n], n, 1.0).is_err());
    }
}
