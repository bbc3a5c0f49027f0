//! Accuracy, F1, Matthews correlation and agreement, with percentile-bootstrap intervals.
//!
//! Every metric is a function of how often each combination of label, answer and reference's answer occurs: eight counts,
//! a [`Tally`]. A resample (Efron, *Annals of Statistics* 7, 1979) draws as many outcomes with replacement and counts them
//! again, so all metrics of a resample belong to the same draw, and the change against the reference is paired.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::Quiz;
use crate::report::TaskReport;
use crate::stats::quantile;

/// Resamples of an interval.
pub const RESAMPLES: usize = 10_000;

/// What is known of one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The right answer.
    pub label: bool,
    /// The model's.
    pub answer: bool,
    /// The reference's.
    pub reference: bool,
}

impl Outcome {
    fn index(self) -> usize {
        usize::from(self.label) << 2 | usize::from(self.answer) << 1 | usize::from(self.reference)
    }
}

/// How often each outcome occurs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally([u32; 8]);

/// A number that a tally has.
pub type Metric = fn(&Tally) -> f64;

impl FromIterator<Outcome> for Tally {
    fn from_iter<I: IntoIterator<Item = Outcome>>(outcomes: I) -> Self {
        let mut tally = Self::default();
        for outcome in outcomes {
            tally.0[outcome.index()] += 1;
        }
        tally
    }
}

impl Tally {
    fn count(&self, wanted: impl Fn(Outcome) -> bool) -> f64 {
        let bit = |index: usize, bit: usize| index >> bit & 1 == 1;
        let outcome = |index| Outcome {
            label: bit(index, 2),
            answer: bit(index, 1),
            reference: bit(index, 0),
        };
        let counts = self.0.iter().enumerate();
        let counts = counts.filter(|&(index, _)| wanted(outcome(index)));
        counts.map(|(_, &count)| f64::from(count)).sum()
    }

    fn share(&self, wanted: impl Fn(Outcome) -> bool) -> f64 {
        ratio(self.count(wanted), self.count(|_| true))
    }

    /// Share of right answers.
    #[must_use]
    pub fn accuracy(&self) -> f64 {
        self.share(|o| o.answer == o.label)
    }

    /// Harmonic mean of precision and recall of label 1, `2 tp / (2 tp + fp + fn)`; 0 if there is neither such a label nor
    /// such an answer.
    #[must_use]
    pub fn f1(&self) -> f64 {
        let hits = 2.0 * self.count(|o| o.answer && o.label);
        ratio(hits, hits + self.count(|o| o.answer != o.label))
    }

    /// Correlation of answer and label, `(tp tn − fp fn) / √((tp + fp)(tp + fn)(tn + fp)(tn + fn))`, from −1 to 1; 0 if all
    /// answers or all labels are the same (Matthews, *Biochimica et Biophysica Acta* 405, 1975).
    #[must_use]
    pub fn matthews(&self) -> f64 {
        let of = |answer, label| self.count(|o| (o.answer, o.label) == (answer, label));
        let (tp, tn, fp, missed) = (of(true, true), of(false, false), of(true, false), of(false, true));
        let margins = (tp + fp) * (tp + missed) * (tn + fp) * (tn + missed);
        ratio(tp * tn - fp * missed, margins.sqrt())
    }

    /// Share of answers that are the reference's.
    #[must_use]
    pub fn agreement(&self) -> f64 {
        self.share(|o| o.answer == o.reference)
    }

    /// Accuracy less that of the reference.
    #[must_use]
    pub fn accuracy_change(&self) -> f64 {
        self.accuracy() - self.share(|o| o.reference == o.label)
    }
}

/// A quotient that is 0 where there is nothing to divide by.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole == 0.0 { 0.0 } else { part / whole }
}

/// A value with its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Interval {
    /// The value over all outcomes.
    pub value: f64,
    /// 2.5th percentile of the resamples.
    pub low: f64,
    /// 97.5th percentile of the resamples.
    pub high: f64,
}

/// Metrics with their intervals over [`RESAMPLES`] resamples; zeros for no outcomes.
#[must_use]
pub fn intervals<const N: usize>(outcomes: &[Outcome], metrics: [Metric; N], seed: u64) -> [Interval; N] {
    if outcomes.is_empty() {
        return [Interval::default(); N];
    }
    let mut random = Pcg64::seed_from_u64(seed);
    let mut values = metrics.map(|_| Vec::with_capacity(RESAMPLES));
    for _ in 0..RESAMPLES {
        let draw = |_| outcomes[random.random_range(0..outcomes.len())];
        let tally: Tally = (0..outcomes.len()).map(draw).collect();
        for (values, metric) in values.iter_mut().zip(metrics) {
            values.push(metric(&tally));
        }
    }
    let whole: Tally = outcomes.iter().copied().collect();
    let mut out = metrics.map(|metric| Interval {
        value: metric(&whole),
        ..Interval::default()
    });
    for (interval, values) in out.iter_mut().zip(&mut values) {
        values.sort_by(f64::total_cmp);
        interval.low = quantile(values, 0.025).unwrap_or_default();
        interval.high = quantile(values, 0.975).unwrap_or_default();
    }
    out
}

/// What a model's answers to a quiz are worth, next to the reference's answers where there are any.
///
/// `answers` and `reference` come from [`answers`](super::answers) for the same quiz; `seed` is that of the resamples. Where the
/// questions are from is left out.
#[must_use]
pub fn assess(quiz: &Quiz, answers: &[bool], reference: Option<&[bool]>, seed: u64) -> TaskReport {
    let others = reference.unwrap_or(answers);
    let outcomes: Vec<Outcome> = quiz
        .questions
        .iter()
        .zip(answers.iter().zip(others))
        .map(|(question, (&answer, &reference))| Outcome {
            label: question.label,
            answer,
            reference,
        })
        .collect();
    let metrics: [Metric; 5] = [
        Tally::accuracy,
        Tally::f1,
        Tally::matthews,
        Tally::agreement,
        Tally::accuracy_change,
    ];
    let [accuracy, f1, matthews, agreement, change] = intervals(&outcomes, metrics, seed);
    // A word that is hit or missed has no second class.
    let classes = |interval: Interval| quiz.task.choices().map(|_| interval);
    let compared = |interval: Interval| reference.map(|_| interval);
    let ([f1, matthews], [agreement, change]) =
        ([f1, matthews].map(classes), [agreement, change].map(compared));
    TaskReport {
        task: quiz.task.name().to_owned(),
        data: None,
        shots: quiz.shots.len(),
        examples: outcomes.len(),
        seed,
        accuracy: accuracy.value,
        accuracy_low: accuracy.low,
        accuracy_high: accuracy.high,
        f1: f1.map(|i| i.value),
        f1_low: f1.map(|i| i.low),
        f1_high: f1.map(|i| i.high),
        matthews: matthews.map(|i| i.value),
        matthews_low: matthews.map(|i| i.low),
        matthews_high: matthews.map(|i| i.high),
        agreement: agreement.map(|i| i.value),
        agreement_low: agreement.map(|i| i.low),
        agreement_high: agreement.map(|i| i.high),
        accuracy_change: change.map(|i| i.value),
        accuracy_change_low: change.map(|i| i.low),
        accuracy_change_high: change.map(|i| i.high),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::glue::{Question, Task};

    /// Outcomes from rows of (how many, label, answer, reference).
    fn outcomes(rows: &[(usize, u8, u8, u8)]) -> Vec<Outcome> {
        let outcome = |&(count, label, answer, reference): &(usize, u8, u8, u8)| {
            let outcome = Outcome {
                label: label == 1,
                answer: answer == 1,
                reference: reference == 1,
            };
            std::iter::repeat_n(outcome, count)
        };
        rows.iter().flat_map(outcome).collect()
    }

    fn tally(rows: &[(usize, u8, u8, u8)]) -> Tally {
        outcomes(rows).into_iter().collect()
    }

    /// tp 6, fn 2, fp 1, tn 3.
    const MIXED: [(usize, u8, u8, u8); 5] = [
        (4, 1, 1, 1),
        (2, 1, 1, 0),
        (2, 1, 0, 1),
        (1, 0, 1, 0),
        (3, 0, 0, 0),
    ];

    #[test]
    fn metrics_by_hand() {
        let mixed = tally(&MIXED);
        assert_eq!(mixed.accuracy(), 9.0 / 12.0);
        // Precision 6/7, recall 6/8.
        assert!((mixed.f1() - 2.0 * (6.0 / 7.0) * 0.75 / (6.0 / 7.0 + 0.75)).abs() < 1e-15);
        assert!((mixed.matthews() - 16.0 / (7.0f64 * 8.0 * 4.0 * 5.0).sqrt()).abs() < 1e-15);
        assert_eq!(mixed.agreement(), 7.0 / 12.0);
        // The reference: 4 + 2 of label 1, 1 + 3 of label 0.
        assert!((mixed.accuracy_change() - (9.0 - 10.0) / 12.0).abs() < 1e-15);
    }

    #[test]
    fn extremes() {
        let right = tally(&[(5, 1, 1, 1), (3, 0, 0, 0)]);
        assert_eq!((right.accuracy(), right.f1(), right.matthews()), (1.0, 1.0, 1.0));
        let wrong = tally(&[(5, 1, 0, 1), (3, 0, 1, 0)]);
        assert_eq!((wrong.accuracy(), wrong.f1(), wrong.matthews()), (0.0, 0.0, -1.0));
        assert_eq!((wrong.agreement(), wrong.accuracy_change()), (0.0, -1.0));
        // One answer to everything: no correlation, however often it is right.
        let constant = tally(&[(9, 1, 1, 1), (1, 0, 1, 1)]);
        assert_eq!((constant.matthews(), constant.f1()), (0.0, 18.0 / 19.0));
        let never = tally(&[(4, 0, 0, 0)]);
        assert_eq!((never.f1(), never.accuracy()), (0.0, 1.0));
        assert_eq!(
            intervals(&[], [Tally::accuracy as Metric], 0),
            [Interval::default()]
        );
    }

    #[test]
    fn intervals_are_a_function_of_the_seed() {
        // Many different values, so that two draws hardly have the same percentiles.
        let some = outcomes(&MIXED.map(|(count, label, answer, other)| (97 * count, label, answer, other)));
        let of = |seed| intervals(&some, [Tally::accuracy as Metric, Tally::matthews], seed);
        assert_eq!(of(3), of(3));
        assert_ne!(of(3), of(4));
        let alone = intervals(&some, [Tally::matthews as Metric], 3);
        assert_eq!(alone[0], of(3)[1], "other metrics do not change the draw");
    }

    #[test]
    fn intervals_have_the_width_of_the_binomial() {
        let many = outcomes(&[(300, 1, 1, 1), (100, 0, 1, 0)]);
        let [accuracy, change] = intervals(
            &many,
            [Tally::accuracy as Metric, |tally| tally.accuracy_change()],
            1,
        );
        assert_eq!(accuracy.value, 0.75);
        // The normal interval is ±1.96 √(p q / n); a count is discrete in steps of 1/400, and a percentile of 10 000 draws has a
        // standard error of √(0.025 · 0.975 / 10⁴) / 0.0584 (the normal density at 1.96) = 2.7 % of σ.
        let sigma = (0.75f64 * 0.25 / 400.0).sqrt();
        let tolerance = 1.0 / 400.0 + 4.0 * 0.027 * sigma;
        assert!((accuracy.low - (0.75 - 1.96 * sigma)).abs() < tolerance);
        assert!((accuracy.high - (0.75 + 1.96 * sigma)).abs() < tolerance);
        // The reference is right throughout here, so the change is the accuracy less one, draw by draw.
        assert_eq!(
            (change.low, change.high),
            (accuracy.low - 1.0, accuracy.high - 1.0)
        );
        let sure = intervals(&outcomes(&[(7, 1, 1, 1)]), [Tally::accuracy as Metric], 1)[0];
        assert_eq!((sure.low, sure.high), (1.0, 1.0));
    }

    #[test]
    fn a_report_has_what_applies() {
        let question = |label| Question {
            line: 1,
            prompt: "p".into(),
            answers: vec![" a".into()],
            label,
        };
        let mut quiz = Quiz {
            task: Task::Cola,
            shots: vec![question(true)],
            questions: [true, true, false, false].map(question).to_vec(),
        };
        let answers = [true, false, false, false];
        let report = assess(&quiz, &answers, Some(&[true, true, false, true]), 0);
        assert_eq!(
            (report.task.as_str(), report.shots, report.examples),
            ("cola", 1, 4)
        );
        assert_eq!(
            (report.accuracy, report.agreement, report.accuracy_change),
            (0.75, Some(0.5), Some(0.0))
        );
        assert!(report.accuracy_low <= 0.75 && 0.75 <= report.accuracy_high);
        assert_eq!(report.f1, Some(2.0 / 3.0));
        assert!((report.matthews.unwrap() - 2.0 / 12.0f64.sqrt()).abs() < 1e-15);
        quiz.task = Task::Lambada;
        let report = assess(&quiz, &answers, None, 0);
        assert_eq!(
            (report.f1, report.matthews_low, report.agreement),
            (None, None, None)
        );
    }
}
