//! Streaming statistics: one value at a time, `f64`, no second pass.
//!
//! The standard errors are those of `llama-perplexity`: `sqrt((E[x²] − E[x]²) / (n − 1))`. The sums here are centred
//! (Welford, *Technometrics* 4, 1962), which is the same number without the cancellation.

use serde::{Deserialize, Serialize};

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its standard error; 0 for fewer than two values.
    pub stderr: f64,
}

/// Mean and variance of a stream of values.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    count: u64,
    mean: f64,
    /// Σ (x − mean)².
    squares: f64,
}

impl Moments {
    /// Takes one value.
    pub fn push(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
    }

    /// Number of values taken.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Mean and standard error; zeros for an empty stream.
    pub fn estimate(&self) -> Estimate {
        let stderr = if self.count < 2 {
            0.0
        } else {
            let n = self.count as f64;
            (self.squares / n / (n - 1.0)).sqrt()
        };
        Estimate {
            mean: self.mean,
            stderr,
        }
    }
}

/// Moments of two streams taken in pairs, and of their difference.
///
/// Two models scored on the same tokens err together: the standard error of the difference of their mean losses is far
/// smaller than the two standard errors suggest.
#[derive(Clone, Copy, Debug, Default)]
pub struct PairedMoments {
    first: Moments,
    second: Moments,
    difference: Moments,
}

impl PairedMoments {
    /// Takes one pair.
    pub fn push(&mut self, first: f64, second: f64) {
        self.first.push(first);
        self.second.push(second);
        self.difference.push(first - second);
    }

    /// Mean and standard error of the first stream.
    pub fn first(&self) -> Estimate {
        self.first.estimate()
    }

    /// Mean and standard error of the second stream.
    pub fn second(&self) -> Estimate {
        self.second.estimate()
    }

    /// Mean and standard error of first − second, covariance included.
    pub fn difference(&self) -> Estimate {
        self.difference.estimate()
    }
}

/// A share of events with its binomial standard error `sqrt(p (1 − p) / (n − 1))`.
pub fn share(events: u64, count: u64) -> Estimate {
    if count == 0 {
        return Estimate::default();
    }
    let p = events as f64 / count as f64;
    let stderr = if count < 2 {
        0.0
    } else {
        (p * (1.0 - p) / (count - 1) as f64).sqrt()
    };
    Estimate { mean: p, stderr }
}

/// The quantile of sorted values at `fraction` in `[0, 1]`, linear between neighbours (the rule of `llama-perplexity`
/// and NumPy's default). `None` for no values.
pub fn quantile(sorted: &[f64], fraction: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = fraction.clamp(0.0, 1.0) * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    let weight = place - below as f64;
    Some(sorted[below] * (1.0 - weight) + sorted[above] * weight)
}

/// The median; sorts the values. `None` for no values.
pub fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    quantile(values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// llama.cpp's `mean_and_uncertainty`, from plain sums.
    fn plain(values: &[f64]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        (mean, (variance / (n - 1.0)).sqrt())
    }

    /// Rounding of n additions of values up to `scale`: n · ε · scale, doubled for the two passes.
    fn tolerance(values: &[f64]) -> f64 {
        let scale = values.iter().fold(1.0f64, |a, x| a.max(x.abs()));
        2.0 * values.len() as f64 * f64::EPSILON * scale
    }

    proptest! {
        #[test]
        fn moments_are_the_plain_definitions(values in prop::collection::vec(-50.0..50.0f64, 2..400)) {
            let mut stream = Moments::default();
            values.iter().for_each(|&x| stream.push(x));
            let (mean, stderr) = plain(&values);
            let got = stream.estimate();
            prop_assert!((got.mean - mean).abs() <= tolerance(&values));
            // d(sqrt(v)) = dv / (2 sqrt v): compare squares instead, so that v near 0 needs no special case.
            let scale = values.iter().fold(1.0f64, |a, x| a.max(x.abs()));
            prop_assert!((got.stderr.powi(2) - stderr.powi(2)).abs() <= tolerance(&values) * 2.0 * scale);
        }

        #[test]
        fn difference_counts_the_covariance(pairs in prop::collection::vec((-9.0..9.0f64, -9.0..9.0f64), 2..200)) {
            let mut stream = PairedMoments::default();
            pairs.iter().for_each(|&(a, b)| stream.push(a, b));
            let a: Vec<f64> = pairs.iter().map(|p| p.0).collect();
            let b: Vec<f64> = pairs.iter().map(|p| p.1).collect();
            let n = pairs.len() as f64;
            let ((mean_a, err_a), (mean_b, err_b)) = (plain(&a), plain(&b));
            let covariance = pairs.iter().map(|p| (p.0 - mean_a) * (p.1 - mean_b)).sum::<f64>() / n / (n - 1.0);
            let squared = err_a * err_a + err_b * err_b - 2.0 * covariance;
            let got = stream.difference();
            prop_assert!((got.mean - (mean_a - mean_b)).abs() <= 3.0 * tolerance(&a));
            prop_assert!((got.stderr * got.stderr - squared).abs() <= 1e3 * n * f64::EPSILON);
        }

        #[test]
        fn quantile_is_monotone_and_within_range(mut values in prop::collection::vec(-5.0..5.0f64, 1..60), a in 0.0..1.0f64, b in 0.0..1.0f64) {
            values.sort_by(f64::total_cmp);
            let (low, high) = (a.min(b), a.max(b));
            let (x, y) = (quantile(&values, low).unwrap(), quantile(&values, high).unwrap());
            prop_assert!(x <= y + 1e-12);
            prop_assert!(values[0] - 1e-12 <= x && y <= values[values.len() - 1] + 1e-12);
        }
    }

    #[test]
    fn quantiles_of_five() {
        let sorted = [1.0, 2.0, 3.0, 4.0, 10.0];
        assert_eq!(quantile(&sorted, 0.0), Some(1.0));
        assert_eq!(quantile(&sorted, 0.5), Some(3.0));
        assert_eq!(quantile(&sorted, 1.0), Some(10.0));
        assert_eq!(quantile(&sorted, 0.875), Some(7.0));
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn shares() {
        assert_eq!(share(0, 0), Estimate::default());
        assert_eq!(
            share(1, 1),
            Estimate {
                mean: 1.0,
                stderr: 0.0
            }
        );
        let half = share(50, 101);
        assert!((half.mean - 50.0 / 101.0).abs() < 1e-15);
        assert!((half.stderr - (50.0 * 51.0 / 101.0f64.powi(2) / 100.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn a_constant_stream_has_no_error_and_large_offsets_do_not_cancel() {
        let mut stream = Moments::default();
        for step in 0..1000 {
            stream.push(1e9 + f64::from(step % 2));
        }
        let got = stream.estimate();
        // Variance of a fair coin: 1/4.
        assert!((got.stderr - (0.25f64 / 999.0).sqrt()).abs() < 1e-6);
        assert_eq!(stream.count(), 1000);
    }
}
