//! The routing benchmark: what its rows say is true, whatever the times are.

use nash_eval::EvalError;
use nash_eval::routing::{RoutingOptions, RoutingShape, Source, routing_rows};

const OPTIONS: RoutingOptions = RoutingOptions {
    batches: 3,
    repeats: 2,
    seed: 5,
    congestion: 1.0,
    company: 0.1,
    tolerance: 0.12,
    max_steps: 16,
    max_sweeps: 1000,
};
const SMALL: RoutingShape = RoutingShape {
    name: "small",
    tokens: 512,
    experts: 16,
    top_k: 2,
    width: 32,
    expert_width: Some(64),
};

#[test]
fn prices_balance_and_best_responses_settle() {
    let rows = routing_rows(SMALL, OPTIONS, &mut || Ok(())).unwrap();
    let row = |method: &str| rows.iter().find(|row| row.method == method).unwrap();
    let free = row("top-k without a game");
    assert!(
        free.max_violation.unwrap() > 1.0 && free.max_regret.unwrap() > 0.5,
        "not skewed: {free:?}"
    );
    for method in ["prices, cold", "prices, cached"] {
        let priced = row(method);
        assert!(priced.max_violation.unwrap() <= OPTIONS.tolerance, "{priced:?}");
        assert_eq!(
            (priced.max_regret, priced.unconverged),
            (Some(0.0), Some(0)),
            "{method}"
        );
        // Balance costs score, but tokens still get better experts than at random.
        assert!(priced.mean_score.unwrap() < free.mean_score.unwrap() && priced.mean_score.unwrap() > 0.0);
    }
    let (cached, frozen) = (row("prices, cached"), row("prices, cached and frozen"));
    for warm in [cached, frozen] {
        assert_eq!(
            (warm.cache_hits, warm.cache_misses),
            (Some(3), Some(0)),
            "{warm:?}"
        );
    }
    assert!(frozen.max_violation.unwrap() < free.max_violation.unwrap() / 2.0);
    let (alone, flock) = (
        row("best response, no neighbours"),
        row("best response, 7 neighbours"),
    );
    for settled in [alone, flock] {
        assert_eq!(settled.unconverged, Some(0));
        assert!(
            settled.max_regret.unwrap() < 1e-9 && settled.iterations.unwrap() >= 1.0,
            "{settled:?}"
        );
        assert!(settled.load_cv.unwrap() < free.load_cv.unwrap());
    }
    assert!(flock.shared_with_neighbours.unwrap() > alone.shared_with_neighbours.unwrap());
    assert!(rows.iter().all(|row| row.nanoseconds_per_token > 0.0));
    for storage in ["f32", "packed at 8 bits", "packed at 4 bits"] {
        let share = row(&format!("whole mixture layer, {storage}"))
            .routing_share
            .unwrap();
        assert!(share > 0.0 && share < 1.0, "{share}");
        row(&format!("dense layer, as many active parameters, {storage}"));
    }
    assert_eq!(rows.len(), 12);
}

#[test]
fn batches_are_reproducible_and_differ() {
    let source = Source::new(SMALL, 1);
    assert_eq!(source.batch(0), Source::new(SMALL, 1).batch(0));
    assert_ne!(source.batch(0), source.batch(1));
    assert_ne!(source.batch(0), Source::new(SMALL, 2).batch(0));
}

#[test]
fn nothing_to_measure_and_a_stop_are_errors() {
    let none = RoutingOptions {
        repeats: 0,
        ..OPTIONS
    };
    let found = routing_rows(SMALL, none, &mut || Ok(()));
    assert!(matches!(found, Err(EvalError::NothingToMeasure { .. })));
    let found = routing_rows(SMALL, OPTIONS, &mut || Err(EvalError::Cancelled));
    assert!(matches!(found, Err(EvalError::Cancelled)));
}
