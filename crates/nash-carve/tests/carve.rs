//! A carved model is the dense one when all of its experts answer, and its experts are in equilibrium.

#![expect(clippy::unwrap_used, reason = "a test says by panicking that it failed")]

use std::path::{Path, PathBuf};

use nash_carve::{CarveError, CarveOptions, CarveReport, ChannelKind, Start, carve, channel_sparsity};
use nash_core::ModelFile;
use nash_models::{KvCache, Model, Scoring};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../nash-models/tests/golden")
        .join(name)
}

fn load(path: &Path) -> Model {
    Model::load(&ModelFile::open(path).unwrap()).unwrap()
}

fn options(active: f64) -> CarveOptions {
    // 48 windows of 32 pseudo-random tokens.
    let token = |i: u32| (i.wrapping_mul(2_654_435_761) >> 16) % 60;
    CarveOptions {
        experts: Some(8),
        shared: Some(8),
        active,
        start: Start::Flocks,
        market: false,
        router_rounds: 3,
        windows: (0..48)
            .map(|w| (0..32).map(|t| token(32 * w + t)).collect())
            .collect(),
        seed: 0,
    }
}

fn carved(model: &Model, options: &CarveOptions) -> (tempfile::TempDir, CarveReport) {
    let dir = tempfile::tempdir().unwrap();
    let report = carve(model, options, dir.path(), &|_| Ok(()), &mut |_, _| true).unwrap();
    (dir, report)
}

fn logits(model: &Model) -> Vec<f32> {
    let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 50).collect();
    let mut cache = KvCache::new(model.config(), tokens.len());
    let hidden = model.forward(&tokens, &mut cache, &mut ()).unwrap();
    let mut out = vec![0.0; tokens.len() * model.config().vocab_size];
    model.logits(&hidden, &mut out, &mut ());
    out
}

#[test]
fn all_experts_together_are_the_dense_model() {
    // Two families: one with biases on queries, keys and values.
    for name in ["llama", "qwen2"] {
        let dense = load(&golden(name));
        for shared in [8, 0] {
            let asked = CarveOptions {
                shared: Some(shared),
                ..options(1.0)
            };
            let (dir, report) = carved(&dense, &asked);
            let mixture = load(dir.path());
            let moe = mixture.config().moe.as_ref().unwrap();
            assert_eq!((moe.experts, moe.top_k, moe.scoring), (8, 8, Scoring::Unit));
            assert_eq!((report.active, report.shared), (1.0, shared));
            let (a, b) = (logits(&dense), logits(&mixture));
            let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            // The 72 products of an output are summed in another order: 72 roundings of the largest sum per layer, a few layers, some gain.
            let tolerance = 72.0 * f32::EPSILON * 16.0 * largest;
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() <= tolerance, "{name}: {a} {b}");
            }
        }
    }
}

#[test]
fn experts_are_in_equilibrium_and_the_router_beats_chance() {
    let dense = load(&golden("llama"));
    let (dir, report) = carved(&dense, &options(0.5));
    // Sums of 1536 shares below 1 in single precision.
    assert!(
        report.max_regret < 1536.0 * f64::from(f32::EPSILON),
        "{}",
        report.max_regret
    );
    for layer in &report.layers {
        assert!(
            layer.settled && layer.kept_by_choice >= layer.kept_at_start,
            "{layer:?}"
        );
        assert!(layer.kept_by_router > layer.kept_at_random, "{layer:?}");
        assert!((0.0..1.0).contains(&layer.error), "{layer:?}");
    }
    let mixture = load(dir.path());
    assert!(logits(&mixture).iter().all(|v| v.is_finite()));
    // The same input gives the same bytes.
    let (again, _) = carved(&dense, &options(0.5));
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(bytes(dir.path()) == bytes(again.path()));
}

#[test]
fn a_market_divides_the_same_number_of_experts() {
    let dense = load(&golden("llama"));
    let (dir, report) = carved(
        &dense,
        &CarveOptions {
            market: true,
            ..options(0.5)
        },
    );
    let spent: usize = report.layers.iter().map(|layer| layer.top_k).sum();
    let even = carved(&dense, &options(0.5)).1.layers[0].top_k;
    assert!(
        spent <= even * report.layers.len() && report.active <= 0.5,
        "{report:?}"
    );
    assert!(
        report
            .layers
            .iter()
            .all(|layer| layer.kl.is_some_and(f64::is_finite))
    );
    let model = load(dir.path());
    assert!(logits(&model).iter().all(|v| v.is_finite()));
    let config = model.config().clone();
    let moe = config.moe.unwrap();
    // A layer with all experts is stored as the dense block.
    let of = |layer: &nash_models::LayerConfig| match layer.experts {
        true => layer.top_k.unwrap_or(moe.top_k),
        false => moe.experts,
    };
    let stored: usize = config.layers.iter().map(of).sum();
    assert_eq!(stored, spent);
}

#[test]
fn what_cannot_be_carved_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let attempt = |name: &str, options: &CarveOptions| {
        carve(
            &load(&golden(name)),
            options,
            dir.path(),
            &|_| Ok(()),
            &mut |_, _| true,
        )
        .unwrap_err()
    };
    for name in ["qwen2_moe", "gpt2"] {
        assert!(
            matches!(attempt(name, &options(0.5)), CarveError::NotDense { .. }),
            "{name}"
        );
    }
    let short = CarveOptions {
        windows: vec![vec![1; 32]],
        ..options(0.5)
    };
    assert!(matches!(
        attempt("llama", &short),
        CarveError::TooShort { tokens: 32, .. }
    ));
    assert!(matches!(
        attempt("llama", &options(0.1)),
        CarveError::Active { .. }
    ));
    let stopped = carve(
        &load(&golden("llama")),
        &options(0.5),
        dir.path(),
        &|_| Ok(()),
        &mut |_, _| false,
    );
    assert!(matches!(stopped, Err(CarveError::Cancelled)));
    assert!(
        !dir.path().join("config.json").exists(),
        "nothing half done opens"
    );
}

#[test]
fn thresholds_keep_the_share_that_was_asked_for() {
    let mut dense = load(&golden("llama"));
    let whole = logits(&dense);
    let windows = options(1.0).windows;
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    for kind in [ChannelKind::Largest, ChannelKind::Above, ChannelKind::Gate] {
        let mut last = 0.0;
        for share in [1.0, 0.75, 0.25] {
            let rule = channel_sparsity(&dense, kind, share, &windows).unwrap();
            dense.set_channels(Some(rule)).unwrap();
            let far = distance(&whole, &logits(&dense));
            dense.set_channels(None).unwrap();
            assert!(
                far >= last && (share < 1.0) == (far > 0.0),
                "{kind:?} {share}: {far} after {last}"
            );
            last = far;
        }
    }
}
