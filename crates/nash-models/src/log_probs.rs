//! Log-probabilities of logits, and how far apart two of them are.
//!
//! Exponentials are those of the forward pass, to 2 ulp; sums are of 256 values in `f32`, of those in `f64`.

use nash_kernels::vectorize;

use crate::math::{exp, max, sum};

/// Values that are summed in `f32`.
const BLOCK: usize = 256;

/// Logits become natural log-probabilities: `x − ln Σ exp x`.
pub fn log_softmax(row: &mut [f32]) {
    let largest = max(f32::NEG_INFINITY, row);
    let sum = block_sums(row, row, |v, _| exp(v - largest));
    let shift = largest + sum.ln() as f32;
    row.iter_mut().for_each(|v| *v -= shift);
}

/// Kullback–Leibler divergence `Σ p (ln p − ln q)` in nats, from log-probabilities.
///
/// # Panics
/// If the lengths differ.
pub fn kl_divergence(ln_p: &[f32], ln_q: &[f32]) -> f64 {
    assert_eq!(ln_p.len(), ln_q.len(), "two distributions over one vocabulary");
    block_sums(ln_p, ln_q, |p, q| exp(p) * (p - q))
}

/// `Σ term(a, b)`.
fn block_sums(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let mut terms = [0.0; BLOCK];
            let mut total = 0.0;
            for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
                let terms = &mut terms[..a.len()];
                for ((out, &a), &b) in terms.iter_mut().zip(a).zip(b) {
                    *out = term(a, b);
                }
                total += f64::from(sum(terms));
            }
            total
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_matches_the_definition() {
        for len in [1, 3, 255, 256, 1000] {
            let row = |rate: f32| -> Vec<f32> { (0..len).map(|i| 8.0 * (i as f32 * rate).sin()).collect() };
            let (p, q) = (row(0.7), row(1.1));
            let exact = |row: &[f32]| -> Vec<f64> {
                let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
                row.iter().map(|&v| f64::from(v) - sum.ln()).collect()
            };
            let (exact_p, exact_q) = (exact(&p), exact(&q));
            let expected: f64 = exact_p.iter().zip(&exact_q).map(|(p, q)| p.exp() * (p - q)).sum();
            let (mut p, mut q) = (p, q);
            log_softmax(&mut p);
            log_softmax(&mut q);
            let off = |row: &[f32], exact: &[f64]| {
                let errors = row.iter().zip(exact).map(|(&v, e)| (f64::from(v) - e).abs());
                errors.fold(0.0, f64::max)
            };
            assert!(off(&p, &exact_p) < 4e-6 && off(&q, &exact_q) < 4e-6, "{len}");
            assert!(
                (kl_divergence(&p, &q) - expected).abs() < 1e-5 * (1.0 + expected),
                "{len}"
            );
            assert_eq!(kl_divergence(&p, &p), 0.0);
        }
    }

    #[test]
    fn excluded_tokens_have_no_share() {
        let mut row = [1.0, f32::MIN, 1.0];
        log_softmax(&mut row);
        assert!((row[0] + std::f32::consts::LN_2).abs() < 1e-6 && row[1] < -1e30);
    }
}
