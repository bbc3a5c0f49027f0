//! Log-softmax over a row of logits, accumulated in `f64`.

/// `ln Σ exp(x)` over one row, and the index of its first largest value.
///
/// The largest logit is subtracted first, so nothing overflows. An empty row gives `(−∞, 0)`. The caller rules out
/// NaN and infinite logits, see `first_non_finite`.
pub fn log_sum_exp(row: &[f32]) -> (f64, usize) {
    let mut top = 0;
    let mut largest = f32::NEG_INFINITY;
    for (index, &x) in row.iter().enumerate() {
        if x > largest {
            (largest, top) = (x, index);
        }
    }
    let largest = f64::from(largest);
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
    (largest + sum.ln(), top)
}

/// What one scored position says about a model and its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlRow {
    /// `−ln q(target)` of the model.
    pub nll: f64,
    /// `−ln p(target)` of the reference.
    pub reference_nll: f64,
    /// `KL(p ‖ q) = Σ p (ln p − ln q)`, in nats, never below 0.
    pub kl: f64,
    /// Whether both have the same most likely token.
    pub same_top: bool,
}

/// Compares two rows of logits over the same vocabulary.
///
/// `reference` and `reference_norm` are the reference's logits and their [`log_sum_exp`], which is shared when several
/// models are compared with one reference.
pub fn kl_row(model: &[f32], reference: &[f32], reference_norm: (f64, usize), target: usize) -> KlRow {
    let (norm, top) = log_sum_exp(model);
    let (norm_p, top_p) = reference_norm;
    let kl: f64 = reference
        .iter()
        .zip(model)
        .map(|(&p, &q)| {
            let ln_p = f64::from(p) - norm_p;
            let ln_q = f64::from(q) - norm;
            ln_p.exp() * (ln_p - ln_q)
        })
        .sum();
    KlRow {
        nll: norm - f64::from(model[target]),
        reference_nll: norm_p - f64::from(reference[target]),
        // Rounding can take a divergence of zero a few ulps below it.
        kl: kl.max(0.0),
        same_top: top == top_p,
    }
}

/// The first NaN or infinite value of a row.
pub(crate) fn first_non_finite(row: &[f32]) -> Option<(usize, f32)> {
    // Without an early exit inside a chunk the check vectorises; clean rows are the common case.
    let clean = row
        .chunks(64)
        .all(|part| part.iter().fold(true, |all, x| all & x.is_finite()));
    if clean {
        None
    } else {
        row.iter().copied().enumerate().find(|(_, x)| !x.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn probabilities(row: &[f32]) -> Vec<f64> {
        let exps: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.iter().map(|x| x / sum).collect()
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_definition(pairs in prop::collection::vec((-8.0f32..8.0, -8.0f32..8.0), 1..300), pick in 0usize..300) {
            let (p, q): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let target = pick % p.len();
            let row = kl_row(&q, &p, log_sum_exp(&p), target);
            let (a, b) = (probabilities(&p), probabilities(&q));
            let kl: f64 = a.iter().zip(&b).map(|(x, y)| x * (x / y).ln()).sum();
            // Each of the V terms is at most |ln p − ln q| ≤ 16 + ln V with a few roundings.
            let tolerance = 16.0 * 22.0 * p.len() as f64 * f64::EPSILON;
            prop_assert!((row.kl - kl).abs() <= tolerance);
            prop_assert!((row.nll + b[target].ln()).abs() <= tolerance);
            prop_assert!((row.reference_nll + a[target].ln()).abs() <= tolerance);
        }

        #[test]
        fn shifting_all_logits_changes_nothing(row in prop::collection::vec(-8.0f32..8.0, 2..100)) {
            // A shift by a power of two that keeps every mantissa: 1024 moves the exponent, so allow f32 rounding of the shift.
            let shifted: Vec<f32> = row.iter().map(|x| x + 1024.0).collect();
            let kl = kl_row(&shifted, &row, log_sum_exp(&row), 0).kl;
            let rounding = f64::from(f32::EPSILON) * 1032.0;
            prop_assert!(kl <= rounding, "{kl}");
        }
    }

    #[test]
    fn huge_logits_do_not_overflow() {
        let (norm, top) = log_sum_exp(&[3.0e38, -3.0e38, 3.0e38]);
        assert!(norm.is_finite());
        assert_eq!(top, 0, "the first of equal logits is the top one");
        assert_eq!(log_sum_exp(&[]).0, f64::NEG_INFINITY);
    }

    #[test]
    fn identical_rows_have_no_divergence() {
        let row = [0.5, -1.25, 3.0];
        let same = kl_row(&row, &row, log_sum_exp(&row), 1);
        assert_eq!((same.kl, same.same_top), (0.0, true));
        assert_eq!(same.nll, same.reference_nll);
    }

    #[test]
    fn finds_the_first_value_that_is_no_number() {
        assert_eq!(first_non_finite(&[1.0, -2.0, 3.0e38]), None);
        assert_eq!(
            first_non_finite(&[1.0, f32::INFINITY, f32::NAN]),
            Some((1, f32::INFINITY))
        );
        assert_eq!(first_non_finite(&[1.0, -2.0, f32::NAN]).map(|f| f.0), Some(2));
    }
}
