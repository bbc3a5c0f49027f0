//! What a batch of scores looks like to each expert: enough to guess its price, and to notice that scores have drifted.

use super::Scores;

/// Mean and spread of the scores of each expert over the tokens of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScoreStatistics {
    /// Mean score, `[E]`.
    pub mean: Vec<f32>,
    /// Standard deviation over the tokens, `[E]`.
    pub deviation: Vec<f32>,
}

impl ScoreStatistics {
    /// Of a batch; zeros if it is empty. Reuses the memory of `self`.
    pub fn measure(&mut self, scores: Scores<'_>) {
        let experts = scores.experts();
        for v in [&mut self.mean, &mut self.deviation] {
            v.clear();
            v.resize(experts, 0.0);
        }
        let Some(first) = scores.values().chunks_exact(experts.max(1)).next() else {
            return;
        };
        // Sums of differences to the first token, not of the scores: a large common value would cost their digits.
        pulp::Arch::new().dispatch(Sums {
            scores: scores.values(),
            first,
            sums: &mut self.mean,
            squares: &mut self.deviation,
        });
        let tokens = scores.tokens() as f32;
        for ((mean, deviation), first) in self.mean.iter_mut().zip(&mut self.deviation).zip(first) {
            *mean /= tokens;
            *deviation = (*deviation / tokens - *mean * *mean).max(0.0).sqrt();
            *mean += first;
        }
    }

    /// How far the mean scores have moved since `earlier`: root mean square over the experts, without the part common to all (which no
    /// token can feel), in units of the root mean square deviation that `earlier` had. Infinite for another number of experts.
    pub fn drift_since(&self, earlier: &Self) -> f64 {
        if self.mean.len() != earlier.mean.len() {
            return f64::INFINITY;
        }
        let count = self.mean.len().max(1) as f64;
        let moves = || self.mean.iter().zip(&earlier.mean).map(|(a, b)| f64::from(a - b));
        let common = moves().sum::<f64>() / count;
        let moved = moves().map(|m| (m - common).powi(2)).sum::<f64>();
        let spread = earlier
            .deviation
            .iter()
            .map(|&d| f64::from(d).powi(2))
            .sum::<f64>();
        if moved == 0.0 {
            0.0
        } else {
            (moved / spread).sqrt()
        }
    }

    /// Prices at which each expert would sell `top_k / E` of the tokens if their scores were normal and all other thresholds zero:
    /// `mean + z·deviation`. A start that a step or two turn into balance. Writes `[E]`.
    ///
    /// # Panics
    /// If `prices` has another length.
    pub fn guess_prices(&self, top_k: usize, prices: &mut [f32]) {
        assert_eq!(prices.len(), self.mean.len(), "a price per expert");
        let z = upper_normal_quantile(top_k as f64 / prices.len().max(1) as f64) as f32;
        for ((price, mean), deviation) in prices.iter_mut().zip(&self.mean).zip(&self.deviation) {
            *price = mean + z * deviation;
        }
    }
}

struct Sums<'a> {
    scores: &'a [f32],
    first: &'a [f32],
    sums: &'a mut [f32],
    squares: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for row in self.scores.chunks_exact(self.first.len()) {
            let sums = self.sums.iter_mut().zip(self.squares.iter_mut());
            for ((score, first), (sum, square)) in row.iter().zip(self.first).zip(sums) {
                let d = score - first;
                *sum += d;
                *square += d * d;
            }
        }
    }
}

/// z with `P(Z > z) = tail` for a standard normal Z, within 5·10⁻⁴ (Abramowitz and Stegun 1964, 26.2.23).
fn upper_normal_quantile(tail: f64) -> f64 {
    let half = tail.min(1.0 - tail).max(1e-9);
    let t = (-2.0 * half.ln()).sqrt();
    let below = 2.515517 + t * (0.802853 + t * 0.010328);
    let above = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308));
    (t - below / above) * if tail > 0.5 { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_normal() {
        for (tail, z) in [
            (0.5, 0.0),
            (0.125, 1.1503),
            (0.03125, 1.8627),
            (0.25, 0.6745),
            (0.75, -0.6745),
        ] {
            assert!((upper_normal_quantile(tail) - z).abs() < 5e-4, "{tail}");
        }
    }

    #[test]
    fn mean_deviation_and_drift() {
        let of = |values: &[f32]| {
            let mut statistics = ScoreStatistics::default();
            statistics.measure(Scores::new(values, 2).unwrap());
            statistics
        };
        let a = of(&[1.0, 100.0, 3.0, 104.0]);
        assert_eq!((a.mean[0], a.mean[1]), (2.0, 102.0));
        assert_eq!((a.deviation[0], a.deviation[1]), (1.0, 2.0));
        // A shift of all scores of a token changes no choice and is no drift.
        assert_eq!(of(&[6.0, 105.0, 8.0, 109.0]).drift_since(&a), 0.0);
        // One expert up by 2: ±1 around the common part, over a spread of √((1 + 4)/2).
        let moved = of(&[3.0, 100.0, 5.0, 104.0]).drift_since(&a);
        assert!((moved - (2.0f64 / 5.0).sqrt()).abs() < 1e-6, "{moved}");
        assert_eq!(of(&[]).drift_since(&ScoreStatistics::default()), f64::INFINITY);
    }
}
