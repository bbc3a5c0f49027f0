//! Perplexity, and KL divergence of models to a reference, in one pass over the windows.
//!
//! Per window each model runs once and leaves its hidden states `[T, d]`; logits exist only for a block of
//! `BLOCK_ROWS` (64) positions at a time (two buffers of `64 · V` floats: 134 MB for a vocabulary of 262k). Rows are
//! evaluated in parallel and summed in order, so the result is the same for any number of threads.

use std::ops::ControlFlow;

use rayon::prelude::*;

use crate::report::{ComparisonReport, PerplexityReport};
use crate::softmax::{KlRow, first_non_finite, kl_row, log_sum_exp};
use crate::stats::{Moments, PairedMoments, median, quantile, share};
use crate::{EvalError, Scorer, Window, Windows};

/// Positions whose logits are held at a time.
const BLOCK_ROWS: usize = 64;

/// Called after each window with (windows done, windows in all, perplexity so far of the last model); `Break` stops
/// the measurement with [`EvalError::Cancelled`].
pub type Progress<'a> = dyn FnMut(usize, usize, f64) -> ControlFlow<()> + 'a;

/// Perplexity of a model over the windows, by the protocol of `llama-perplexity`.
///
/// # Errors
/// If the window is longer than the model's positions, a token is not in its vocabulary, a logit is NaN or infinite,
/// the model fails, or `progress` breaks.
pub fn perplexity(
    model: &mut dyn Scorer,
    windows: &Windows,
    progress: &mut Progress<'_>,
) -> Result<PerplexityReport, EvalError> {
    check(model, windows)?;
    let vocab = model.vocab();
    let mut losses = Moments::default();
    let mut logits = Vec::new();
    for (index, window) in windows.iter().enumerate() {
        let hidden = scored_hidden(model, &window)?;
        for block in Blocks::new(&window) {
            block_logits(model, &hidden, &block, index, &mut logits)?;
            let rows: Vec<f64> = logits
                .par_chunks(vocab)
                .zip(block.targets)
                .map(|(row, &target)| log_sum_exp(row).0 - f64::from(row[target as usize]))
                .collect();
            rows.into_iter().for_each(|loss| losses.push(loss));
        }
        report_progress(progress, index, windows, losses.estimate().mean)?;
    }
    Ok(perplexity_report(losses.estimate(), windows))
}

/// Compares models with a reference over the same windows: perplexity of both, KL divergence, top-1 agreement.
///
/// The reference runs once per window however many models there are. Reports are in the order of `models`.
///
/// # Errors
/// As [`perplexity`], or if the vocabularies differ in size.
pub fn compare(
    reference: &mut dyn Scorer,
    models: &mut [&mut dyn Scorer],
    windows: &Windows,
    progress: &mut Progress<'_>,
) -> Result<Vec<ComparisonReport>, EvalError> {
    check(reference, windows)?;
    let vocab = reference.vocab();
    for model in models.iter() {
        check(&**model, windows)?;
        if model.vocab() != vocab {
            return Err(EvalError::VocabularyMismatch {
                model: model.vocab(),
                reference: vocab,
            });
        }
    }
    let mut sums = vec![Sums::default(); models.len()];
    let (mut reference_logits, mut model_logits) = (Vec::new(), Vec::new());
    for (index, window) in windows.iter().enumerate() {
        let reference_hidden = scored_hidden(reference, &window)?;
        let hidden = models
            .iter_mut()
            .map(|model| scored_hidden(&mut **model, &window))
            .collect::<Result<Vec<_>, _>>()?;
        for block in Blocks::new(&window) {
            block_logits(reference, &reference_hidden, &block, index, &mut reference_logits)?;
            let norms: Vec<(f64, usize)> = reference_logits.par_chunks(vocab).map(log_sum_exp).collect();
            for ((model, hidden), sums) in models.iter_mut().zip(&hidden).zip(&mut sums) {
                block_logits(&mut **model, hidden, &block, index, &mut model_logits)?;
                let rows: Vec<KlRow> = model_logits
                    .par_chunks(vocab)
                    .zip(reference_logits.par_chunks(vocab))
                    .zip(norms.par_iter().zip(block.targets))
                    .map(|((q, p), (&norm, &target))| kl_row(q, p, norm, target as usize))
                    .collect();
                rows.into_iter().for_each(|row| sums.push(row));
            }
        }
        let last = sums.last().map_or(0.0, |sums| sums.losses.first().mean);
        report_progress(progress, index, windows, last)?;
    }
    Ok(sums.into_iter().map(|sums| sums.report(windows)).collect())
}

/// Running sums of one model against the reference.
#[derive(Clone, Debug, Default)]
struct Sums {
    losses: PairedMoments,
    kl: Moments,
    all_kl: Vec<f64>,
    same_top: u64,
}

impl Sums {
    fn push(&mut self, row: KlRow) {
        self.losses.push(row.nll, row.reference_nll);
        self.kl.push(row.kl);
        self.all_kl.push(row.kl);
        self.same_top += u64::from(row.same_top);
    }

    fn report(mut self, windows: &Windows) -> ComparisonReport {
        let reference = perplexity_report(self.losses.second(), windows);
        let ratio = self.losses.difference();
        let kl = self.kl.estimate();
        let agreement = share(self.same_top, self.kl.count());
        let kl_median = median(&mut self.all_kl).unwrap_or(0.0);
        ComparisonReport {
            perplexity: perplexity_report(self.losses.first(), windows),
            reference_perplexity: reference.perplexity,
            reference_perplexity_stderr: reference.perplexity_stderr,
            log_perplexity_ratio: ratio.mean,
            log_perplexity_ratio_stderr: ratio.stderr,
            kl_mean: kl.mean,
            kl_mean_stderr: kl.stderr,
            kl_median,
            kl_p99: quantile(&self.all_kl, 0.99).unwrap_or(0.0),
            kl_max: self.all_kl.last().copied().unwrap_or(0.0),
            top1_agreement: agreement.mean,
            top1_agreement_stderr: agreement.stderr,
        }
    }
}

/// A block of scored positions.
struct Block<'a> {
    /// Index of the first position among the scored ones of the window.
    start: usize,
    /// Position of that one in the window.
    position: usize,
    targets: &'a [u32],
}

/// The scored positions of a window in blocks.
struct Blocks<'a> {
    window: &'a Window<'a>,
    start: usize,
}

impl<'a> Blocks<'a> {
    fn new(window: &'a Window<'a>) -> Self {
        Self { window, start: 0 }
    }
}

impl<'a> Iterator for Blocks<'a> {
    type Item = Block<'a>;

    fn next(&mut self) -> Option<Block<'a>> {
        let rest = &self.window.targets[self.start..];
        if rest.is_empty() {
            return None;
        }
        let targets = &rest[..rest.len().min(BLOCK_ROWS)];
        let block = Block {
            start: self.start,
            position: self.window.first + self.start,
            targets,
        };
        self.start += targets.len();
        Some(block)
    }
}

fn check(model: &dyn Scorer, windows: &Windows) -> Result<(), EvalError> {
    if let Some(limit) = model.positions()
        && windows.ctx() > limit
    {
        return Err(EvalError::ContextTooLong {
            ctx: windows.ctx(),
            limit,
        });
    }
    windows.check_vocabulary(model.vocab())
}

/// Runs a window; hidden states `[scored, d]` of the scored positions.
fn scored_hidden(model: &mut dyn Scorer, window: &Window<'_>) -> Result<Vec<f32>, EvalError> {
    let width = model.width();
    let mut hidden = model.hidden(&window.input)?;
    hidden.truncate((window.first + window.targets.len()) * width);
    hidden.drain(..window.first * width);
    Ok(hidden)
}

/// Logits `[block, V]` into `out`; an error for one that is no number.
fn block_logits(
    model: &mut dyn Scorer,
    hidden: &[f32],
    block: &Block<'_>,
    window: usize,
    out: &mut Vec<f32>,
) -> Result<(), EvalError> {
    let (rows, width, vocab) = (block.targets.len(), model.width(), model.vocab());
    out.resize(rows * vocab, 0.0);
    model.logits(&hidden[block.start * width..(block.start + rows) * width], out)?;
    for (row, logits) in out.chunks(vocab).enumerate() {
        if let Some((token, value)) = first_non_finite(logits) {
            return Err(EvalError::NonFinite {
                window,
                position: block.position + row,
                token,
                value,
            });
        }
    }
    Ok(())
}

fn report_progress(
    progress: &mut Progress<'_>,
    index: usize,
    windows: &Windows,
    loss: f64,
) -> Result<(), EvalError> {
    match progress(index + 1, windows.count(), loss.exp()) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(EvalError::Cancelled),
    }
}

fn perplexity_report(loss: crate::stats::Estimate, windows: &Windows) -> PerplexityReport {
    let perplexity = loss.mean.exp();
    PerplexityReport {
        perplexity,
        perplexity_stderr: perplexity * loss.stderr,
        ctx: windows.ctx(),
        chunks: windows.count(),
        scored_tokens: (windows.count() * windows.scored()) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model that predicts from the current token alone: row `token` of a table of logits is its hidden state.
    struct Bigram {
        table: Vec<Vec<f32>>,
        runs: usize,
    }

    impl Bigram {
        /// Logits `scale · ((i·7 + j·13 + salt) mod 11 − 5)`.
        fn new(vocab: usize, scale: f32, salt: usize) -> Self {
            let row = |i: usize| {
                (0..vocab)
                    .map(|j| scale * (((i * 7 + j * 13 + salt) % 11) as f32 - 5.0))
                    .collect()
            };
            Self {
                table: (0..vocab).map(row).collect(),
                runs: 0,
            }
        }

        fn ln_p(&self, from: u32, to: usize) -> f64 {
            let row = &self.table[from as usize];
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            f64::from(row[to]) - sum.ln()
        }
    }

    impl Scorer for Bigram {
        fn vocab(&self) -> usize {
            self.table.len()
        }
        fn width(&self) -> usize {
            self.table.len()
        }
        fn positions(&self) -> Option<usize> {
            Some(400)
        }
        fn hidden(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError> {
            self.runs += 1;
            Ok(tokens
                .iter()
                .flat_map(|&token| self.table[token as usize].clone())
                .collect())
        }
        fn logits(&mut self, hidden: &[f32], out: &mut [f32]) -> Result<(), EvalError> {
            out.copy_from_slice(hidden);
            Ok(())
        }
    }

    fn text(length: u32, vocab: u32) -> Vec<u32> {
        (0..length).map(|i| (i * i + i / 3) % vocab).collect()
    }

    /// (from, to) of every scored prediction, straight from the protocol's words.
    fn scored(text: &[u32], ctx: usize, bos: Option<u32>) -> Vec<(u32, usize)> {
        let mut pairs = Vec::new();
        for window in text.chunks_exact(ctx) {
            let mut input = window.to_vec();
            input[0] = bos.unwrap_or(input[0]);
            (ctx / 2..ctx - 1)
                .for_each(|position| pairs.push((input[position], window[position + 1] as usize)));
        }
        pairs
    }

    fn go(_: usize, _: usize, _: f64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn perplexity_is_the_definition() {
        // ctx 300 scores 149 positions: two whole blocks of 64 and a tail of 21.
        let text = text(650, 17);
        let mut model = Bigram::new(17, 0.3, 0);
        let windows = Windows::new(text.clone(), 300, None, Some(3)).unwrap();
        let report = perplexity(&mut model, &windows, &mut go).unwrap();
        let losses: Vec<f64> = scored(&text, 300, Some(3))
            .iter()
            .map(|&(a, b)| -model.ln_p(a, b))
            .collect();
        let n = losses.len() as f64;
        let mean = losses.iter().sum::<f64>() / n;
        let variance = losses.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        // n additions of values below 8, then exp of a mean below 4: relative error n · 8 · ε at the most.
        let tolerance = n * 8.0 * f64::EPSILON;
        assert!(
            (report.perplexity / mean.exp() - 1.0).abs() < tolerance,
            "{} {}",
            report.perplexity,
            mean.exp()
        );
        assert!(
            (report.perplexity_stderr / (mean.exp() * (variance / (n - 1.0)).sqrt()) - 1.0).abs() < tolerance
        );
        assert_eq!((report.scored_tokens, report.chunks, report.ctx), (298, 2, 300));
    }

    #[test]
    fn divergence_is_the_definition_and_the_reference_runs_once() {
        let text = text(650, 17);
        let mut reference = Bigram::new(17, 0.3, 0);
        let (mut near, mut same) = (Bigram::new(17, 0.28, 0), Bigram::new(17, 0.3, 0));
        let mut far = Bigram::new(17, 0.3, 5);
        let windows = Windows::new(text.clone(), 300, None, None).unwrap();
        let reports = compare(
            &mut reference,
            &mut [&mut near, &mut same, &mut far],
            &windows,
            &mut go,
        )
        .unwrap();
        assert_eq!((reference.runs, near.runs), (2, 2));

        let pairs = scored(&text, 300, None);
        let kl = |model: &Bigram, from: u32| -> f64 {
            let term = |j: usize| {
                let ln_p = reference.ln_p(from, j);
                ln_p.exp() * (ln_p - model.ln_p(from, j))
            };
            (0..17).map(term).sum()
        };
        let mut all: Vec<f64> = pairs.iter().map(|&(from, _)| kl(&far, from)).collect();
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        all.sort_by(f64::total_cmp);
        let tolerance = n * 16.0 * f64::EPSILON;
        let got = &reports[2];
        assert!((got.kl_mean - mean).abs() < tolerance);
        assert!((got.kl_median - (all[148] + all[149]) / 2.0).abs() < tolerance);
        assert!((got.kl_max - all[297]).abs() < tolerance);
        assert!((got.kl_p99 - quantile(&all, 0.99).unwrap()).abs() < tolerance);
        let top = |model: &Bigram, from: u32| {
            let row = &model.table[from as usize];
            (0..17).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
        };
        let agreeing = pairs
            .iter()
            .filter(|&&(from, _)| top(&far, from) == top(&reference, from))
            .count();
        assert!((got.top1_agreement - agreeing as f64 / n).abs() < 1e-15);

        assert_eq!((reports[1].kl_max, reports[1].top1_agreement), (0.0, 1.0));
        assert_eq!(
            (
                reports[1].log_perplexity_ratio,
                reports[1].log_perplexity_ratio_stderr
            ),
            (0.0, 0.0)
        );
        assert_eq!(reports[1].perplexity.perplexity, reports[1].reference_perplexity);
        assert!(0.0 < reports[0].kl_mean && reports[0].kl_mean < got.kl_mean);
        let alone = perplexity(&mut near, &windows, &mut go).unwrap();
        assert_eq!(alone, reports[0].perplexity, "both paths score alike");
    }

    #[test]
    fn a_logit_that_is_no_number_is_an_error_with_its_place() {
        let mut model = Bigram::new(5, 0.3, 0);
        // Token 4 comes first at a scored position 6 of window 1.
        let text = vec![0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 4, 3];
        model.table[4][2] = f32::NAN;
        let windows = Windows::new(text, 8, None, None).unwrap();
        let error = perplexity(&mut model, &windows, &mut go).unwrap_err();
        assert!(
            matches!(error, EvalError::NonFinite { window: 1, position: 6, token: 2, value } if value.is_nan()),
            "{error}"
        );
        let error = compare(&mut Bigram::new(5, 0.3, 0), &mut [&mut model], &windows, &mut go).unwrap_err();
        assert!(matches!(error, EvalError::NonFinite { .. }), "{error}");
    }

    #[test]
    fn requests_that_cannot_be_met() {
        let windows = Windows::new(text(900, 17), 401, None, None).unwrap();
        let error = perplexity(&mut Bigram::new(17, 1.0, 0), &windows, &mut go).unwrap_err();
        assert!(
            matches!(error, EvalError::ContextTooLong { ctx: 401, limit: 400 }),
            "{error}"
        );
        let windows = Windows::new(text(900, 17), 300, None, None).unwrap();
        let error = perplexity(&mut Bigram::new(16, 1.0, 0), &windows, &mut go).unwrap_err();
        assert!(
            matches!(error, EvalError::TokenOutOfVocabulary { token: 16, vocab: 16 }),
            "{error}"
        );
        let error = compare(
            &mut Bigram::new(17, 1.0, 0),
            &mut [&mut Bigram::new(18, 1.0, 0)],
            &windows,
            &mut go,
        )
        .unwrap_err();
        assert!(
            matches!(
                error,
                EvalError::VocabularyMismatch {
                    model: 18,
                    reference: 17
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn progress_counts_windows_and_can_stop() {
        let windows = Windows::new(text(900, 17), 300, None, None).unwrap();
        let mut seen = Vec::new();
        let error = perplexity(
            &mut Bigram::new(17, 0.1, 0),
            &windows,
            &mut |done, all, perplexity| {
                assert!(perplexity > 1.0);
                seen.push((done, all));
                if done == 2 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        )
        .unwrap_err();
        assert!(matches!(error, EvalError::Cancelled));
        assert_eq!(seen, [(1, 3), (2, 3)]);
    }
}
