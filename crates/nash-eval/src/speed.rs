//! Tokens per second of prefill and decode, measured as `llama-bench` does.

use std::time::Instant;

use crate::EvalError;
use crate::report::SpeedReport;
use crate::scorer::Decoder;
use crate::stats::median;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct SpeedOptions {
    /// Tokens of the prompt, read in one pass; 0 leaves prefill out.
    pub prompt_tokens: usize,
    /// Tokens generated one by one; 0 leaves decode out.
    pub generate_tokens: usize,
    /// Tokens of context that come before either and are not timed.
    pub depth: usize,
    /// Repeats, of which the median is reported; one more of each comes first and is not counted.
    pub repeats: usize,
}

impl Default for SpeedOptions {
    fn default() -> Self {
        Self {
            prompt_tokens: 512,
            generate_tokens: 128,
            depth: 0,
            repeats: 5,
        }
    }
}

/// Measures prefill and decode with the threads of [`nash_kernels::pool`].
///
/// Prefill and decode take turns, so that a slow moment of the machine falls on both. The tokens are pseudo-random and
/// the same in every run. The first pass of all is a single token, as after a cold start. `tick` is called after each pass; bandwidths are
/// left to the caller.
///
/// # Errors
/// If there is nothing to measure, or the model fails.
pub fn speed(
    model: &mut dyn Decoder,
    options: SpeedOptions,
    tick: &mut dyn FnMut() -> Result<(), EvalError>,
) -> Result<SpeedReport, EvalError> {
    let SpeedOptions {
        prompt_tokens: prompt,
        generate_tokens: generate,
        depth,
        repeats,
    } = options;
    if repeats == 0 || (prompt == 0 && generate == 0) {
        return Err(EvalError::NothingToMeasure {
            prompt,
            generate,
            repeats,
        });
    }
    let tokens = tokens(depth + prompt.max(generate), model.vocab());
    let (context, tokens) = tokens.split_at(depth);
    let (mut prefill_samples, mut decode_samples) = (Vec::new(), Vec::new());
    // One token warms the caches of decode as well as all of them would.
    let first = seconds(model, &[], tokens[..1].chunks(1))?;
    tick()?;
    for repeat in 0..=repeats {
        let warm = repeat > 0;
        if prompt > 0 {
            let seconds = seconds(model, context, tokens[..prompt].chunks(prompt))?;
            prefill_samples.extend(warm.then_some(prompt as f64 / seconds));
            tick()?;
        }
        if generate > 0 && warm {
            let seconds = seconds(model, context, tokens[..generate].chunks(1))?;
            decode_samples.extend([generate as f64 / seconds]);
            tick()?;
        }
    }
    Ok(SpeedReport {
        prefill_tokens_per_second: median(&mut prefill_samples.clone()),
        decode_tokens_per_second: median(&mut decode_samples.clone()),
        prompt_tokens: prompt,
        generated_tokens: generate,
        depth,
        first_token_seconds: Some(first),
        threads: nash_kernels::pool::threads(),
        prefill_samples,
        decode_samples,
        bytes_per_token: None,
        bandwidth: None,
        bandwidth_share: None,
    })
}

/// Seconds of feeding `parts` after `context`, whose time is not counted.
fn seconds<'t>(
    model: &mut dyn Decoder,
    context: &[u32],
    parts: impl Iterator<Item = &'t [u32]> + Clone,
) -> Result<f64, EvalError> {
    model.restart(context.len() + parts.clone().map(<[u32]>::len).sum::<usize>())?;
    if !context.is_empty() {
        model.feed(context)?;
    }
    let start = Instant::now();
    for part in parts {
        model.feed(part)?;
    }
    // A clock that has not moved yet must not give an infinite rate.
    Ok(start.elapsed().as_secs_f64().max(1e-9))
}

/// Pseudo-random tokens (the generator of Knuth's MMIX), the same in every run.
fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 1u64;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab.max(1) as u64) as u32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what it was fed; sleeps a millisecond a token.
    #[derive(Default)]
    struct Fake {
        passes: Vec<Vec<usize>>,
    }

    impl Decoder for Fake {
        fn vocab(&self) -> usize {
            10
        }
        fn restart(&mut self, _capacity: usize) -> Result<(), EvalError> {
            self.passes.push(Vec::new());
            Ok(())
        }
        fn feed(&mut self, tokens: &[u32]) -> Result<(), EvalError> {
            assert!(tokens.iter().all(|&token| token < 10));
            std::thread::sleep(std::time::Duration::from_millis(tokens.len() as u64));
            self.passes.last_mut().unwrap().push(tokens.len());
            Ok(())
        }
    }

    #[test]
    fn prefill_is_one_pass_and_decode_one_token_at_a_time() {
        let mut fake = Fake::default();
        let mut ticks = 0;
        let options = SpeedOptions {
            prompt_tokens: 4,
            generate_tokens: 3,
            depth: 2,
            repeats: 2,
        };
        let report = speed(&mut fake, options, &mut || {
            ticks += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(
            fake.passes,
            [
                vec![1],
                vec![2, 4],
                vec![2, 4],
                vec![2, 1, 1, 1],
                vec![2, 4],
                vec![2, 1, 1, 1]
            ],
            "warm-up, then two repeats in turn, each after two tokens of context"
        );
        assert_eq!(ticks, 6);
        // A sleep is never shorter than asked for.
        assert!(report.first_token_seconds.unwrap() >= 1e-3);
        assert_eq!(
            (report.prefill_samples.len(), report.decode_samples.len()),
            (2, 2)
        );
        // A sleep is never shorter than asked for: at most 1000 tokens per second.
        assert!(report.prefill_tokens_per_second.unwrap() <= 1000.0);
        assert!(report.decode_tokens_per_second.unwrap() <= 1000.0);
    }

    #[test]
    fn leaves_out_what_was_not_asked_for() {
        let mut fake = Fake::default();
        let options = SpeedOptions {
            prompt_tokens: 0,
            generate_tokens: 2,
            depth: 0,
            repeats: 1,
        };
        let report = speed(&mut fake, options, &mut || Ok(())).unwrap();
        assert_eq!(report.prefill_tokens_per_second, None);
        let nothing = SpeedOptions {
            prompt_tokens: 0,
            generate_tokens: 0,
            depth: 0,
            repeats: 1,
        };
        assert!(speed(&mut fake, nothing, &mut || Ok(())).is_err());
        assert!(
            speed(
                &mut fake,
                SpeedOptions {
                    repeats: 0,
                    ..options
                },
                &mut || Ok(())
            )
            .is_err()
        );
    }

    #[test]
    fn a_tick_stops_the_measurement() {
        let stopped = speed(&mut Fake::default(), SpeedOptions::default(), &mut || {
            Err(EvalError::Cancelled)
        });
        assert!(matches!(stopped, Err(EvalError::Cancelled)));
    }
}
