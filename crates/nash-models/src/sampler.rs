//! Choosing the next token from logits.
//!
//! Order: repetition penalty, then temperature 0 takes the best token; else temperature, top-k, top-p, min-p (the
//! order of `transformers`), then a draw from PCG64. The same seed and logits give the same tokens on every
//! platform. Ties go to the lower token id.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

use crate::error::{ModelError, Result};
use crate::math;

/// How to choose tokens. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by this; 0 takes the best token.
    pub temperature: f32,
    /// Only the k best tokens; 0 for all.
    pub top_k: usize,
    /// Only the fewest tokens whose probabilities reach this sum; 1 for all. (Holtzman et al. 2020)
    pub top_p: f32,
    /// Only tokens at least this fraction as probable as the best; 0 for all. (Nguyen et al. 2024)
    pub min_p: f32,
    /// Logits of recent tokens are divided by this if positive, else multiplied; 1 for none. (Keskar et al. 2019)
    pub repetition_penalty: f32,
    /// How many of the latest tokens are recent.
    pub repeat_last_n: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplingParams {
    fn validate(&self) -> Result<()> {
        let check = |ok: bool, name, value, range| {
            if ok {
                Ok(())
            } else {
                Err(ModelError::BadSampling { name, value, range })
            }
        };
        let t = self.temperature;
        check(t >= 0.0 && t.is_finite(), "temperature", t, "0 and above")?;
        check(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            self.top_p,
            "(0, 1]",
        )?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "[0, 1]")?;
        let penalty = self.repetition_penalty;
        check(
            penalty > 0.0 && penalty.is_finite(),
            "repetition_penalty",
            penalty,
            "above 0",
        )
    }
}

/// A sampler with its generator state and buffers.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: Pcg64,
    /// Candidates (logit or probability, token), reused.
    candidates: Vec<(f32, u32)>,
    penalized: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    /// [`ModelError::BadSampling`] for a parameter outside its range.
    pub fn new(params: SamplingParams) -> Result<Self> {
        params.validate()?;
        let rng = Pcg64::seed_from_u64(params.seed);
        Ok(Self {
            params,
            rng,
            candidates: Vec::new(),
            penalized: Vec::new(),
        })
    }

    /// The parameters.
    #[must_use]
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Chooses a token given `logits [vocab]` and the tokens so far (prompt and output, latest last).
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let penalized = self.penalize(logits, history);
        let logits = if penalized { &self.penalized } else { logits };
        if self.params.temperature == 0.0 || self.params.top_k == 1 {
            return argmax(logits);
        }
        self.candidates.clear();
        let inverse = 1.0 / self.params.temperature;
        self.candidates.extend(
            logits
                .iter()
                .zip(0..)
                .map(|(&logit, token)| (logit * inverse, token)),
        );
        self.filter();
        self.draw()
    }

    /// Fills `penalized`; false if there is nothing to penalise.
    fn penalize(&mut self, logits: &[f32], history: &[u32]) -> bool {
        let penalty = self.params.repetition_penalty;
        let recent = &history[history.len().saturating_sub(self.params.repeat_last_n)..];
        if penalty == 1.0 || recent.is_empty() {
            return false;
        }
        self.penalized.clear();
        self.penalized.extend_from_slice(logits);
        for &token in recent {
            // From the original, so that a token seen twice is penalised once.
            if let Some(&logit) = logits.get(token as usize) {
                self.penalized[token as usize] = if logit > 0.0 {
                    logit / penalty
                } else {
                    logit * penalty
                };
            }
        }
        true
    }

    /// Keeps the candidates that top-k, top-p and min-p allow, best first, as unnormalised probabilities.
    fn filter(&mut self) {
        let best_first = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let k = self.params.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, best_first);
            self.candidates.truncate(k);
        }
        let best = self
            .candidates
            .iter()
            .map(|c| c.0)
            .fold(f32::NEG_INFINITY, f32::max);
        self.candidates
            .iter_mut()
            .for_each(|c| c.0 = math::exp(c.0 - best));
        // The best now has probability 1 before normalisation, so min-p compares with it directly. top-p looks at
        // the distribution before min-p cut it.
        let total: f32 = self.candidates.iter().map(|c| c.0).sum();
        let min_p = self.params.min_p;
        if self.params.top_p < 1.0 {
            self.candidates.sort_unstable_by(best_first);
            let mut sum = 0.0;
            let needed = self.params.top_p * total;
            let keep = self.candidates.iter().position(|c| {
                sum += c.0;
                sum >= needed
            });
            self.candidates
                .truncate(keep.map_or(self.candidates.len(), |last| last + 1));
        }
        if min_p > 0.0 {
            self.candidates.retain(|c| c.0 >= min_p);
        }
    }

    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.0)).sum();
        // 53 random bits in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let mut left = uniform * total;
        for &(weight, token) in &self.candidates {
            left -= f64::from(weight);
            if left < 0.0 {
                return token;
            }
        }
        // Rounding at the very end, or logits without a number in them.
        self.candidates.last().map_or(0, |c| c.1)
    }
}

/// Index of the largest value, the lowest on ties; NaN never wins.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0u32);
    for (&logit, token) in logits.iter().zip(0..) {
        if logit > best.0 {
            best = (logit, token);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(params: SamplingParams) -> Sampler {
        Sampler::new(params).unwrap()
    }

    /// How often each of four tokens is drawn.
    fn frequencies(params: SamplingParams, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut sampler = sampler(params);
        let mut counts = vec![0usize; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, &[]) as usize] += 1;
        }
        counts.into_iter().map(|c| c as f64 / draws as f64).collect()
    }

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -1.0];

    #[test]
    fn greedy_takes_the_best_and_the_lower_id_on_ties() {
        let mut greedy = sampler(SamplingParams::default());
        assert_eq!(greedy.sample(&LOGITS, &[]), 1);
        assert_eq!(greedy.sample(&[2.0, 5.0, 5.0], &[]), 1);
        assert_eq!(greedy.sample(&[f32::NAN, 5.0], &[]), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let params = SamplingParams {
            temperature: 0.8,
            seed: 7,
            ..Default::default()
        };
        let n = 40_000;
        let got = frequencies(params, &LOGITS, n);
        let weights: Vec<f64> = LOGITS.iter().map(|l| (f64::from(*l) / 0.8).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (got, weight) in got.iter().zip(&weights) {
            let p = weight / total;
            // Five standard deviations of a binomial.
            assert!(
                (got - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(),
                "{got} {p}"
            );
        }
    }

    #[test]
    fn filters_cut_what_they_should() {
        let base = SamplingParams {
            temperature: 1.0,
            seed: 3,
            ..Default::default()
        };
        let support = |params: SamplingParams| -> Vec<usize> {
            let f = frequencies(params, &LOGITS, 4000);
            (0..4).filter(|&i| f[i] > 0.0).collect()
        };
        assert_eq!(support(base.clone()), [0, 1, 2, 3]);
        assert_eq!(
            support(SamplingParams {
                top_k: 2,
                ..base.clone()
            }),
            [1, 2]
        );
        assert_eq!(
            support(SamplingParams {
                top_k: 1,
                ..base.clone()
            }),
            [1]
        );
        // Probabilities: 0.089, 0.657, 0.242, 0.012.
        assert_eq!(
            support(SamplingParams {
                top_p: 0.6,
                ..base.clone()
            }),
            [1]
        );
        assert_eq!(
            support(SamplingParams {
                top_p: 0.8,
                ..base.clone()
            }),
            [1, 2]
        );
        assert_eq!(
            support(SamplingParams {
                min_p: 0.1,
                ..base.clone()
            }),
            [0, 1, 2]
        );
        assert_eq!(support(SamplingParams { min_p: 0.5, ..base }), [1]);
    }

    #[test]
    fn repetition_penalty_counts_recent_tokens_once() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            repeat_last_n: 2,
            ..Default::default()
        };
        let mut sampler = sampler(params);
        assert_eq!(sampler.sample(&LOGITS, &[1, 1]), 2, "3 / 2 < 2");
        assert_eq!(
            sampler.sample(&LOGITS, &[1, 0, 0]),
            1,
            "token 1 is not recent any more"
        );
        assert_eq!(
            sampler.sample(&[-1.0, -1.5], &[0]),
            1,
            "negative logits are multiplied"
        );
    }

    #[test]
    fn same_seed_same_tokens() {
        let run = |seed| {
            let mut s = sampler(SamplingParams {
                temperature: 1.5,
                seed,
                ..Default::default()
            });
            (0..50).map(|_| s.sample(&LOGITS, &[])).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn bad_parameters_are_refused() {
        for params in [
            SamplingParams {
                temperature: -1.0,
                ..Default::default()
            },
            SamplingParams {
                temperature: f32::NAN,
                ..Default::default()
            },
            SamplingParams {
                top_p: 0.0,
                ..Default::default()
            },
            SamplingParams {
                min_p: 1.5,
                ..Default::default()
            },
            SamplingParams {
                repetition_penalty: 0.0,
                ..Default::default()
            },
        ] {
            assert!(Sampler::new(params).is_err());
        }
    }
}
