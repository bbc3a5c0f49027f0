//! The reverse pass against differences of the forward pass, on the tiny golden models of every dense architecture.
//!
//! The loss is a fixed linear form of the logits, `Σ c·y`. Its slope along a random direction, by central differences with step ε, has an
//! error of order ε² from curvature (ε where a ReLU changes its mind) and δ/ε from rounding, δ ≈ 1e-6 of the loss's scale: with ε = 5e-4 both
//! stay below 2e-3 of the scale of the slopes, and 1e-2 is allowed.

#![expect(clippy::unwrap_used, reason = "a test says by panicking that it failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nash_core::ModelFile;
use nash_models::{DenseLinear, GradientTap, KvCache, Model};

const DENSE: [&str; 14] = [
    "llama",
    "llama_tied_bias",
    "llama_rope3",
    "llama_yarn",
    "mistral_window",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "opt",
    "opt_after",
];
const STEP: f32 = 5e-4;
const SEQUENCES: [usize; 2] = [9, 6];

fn golden(name: &str) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    Model::load(&ModelFile::open(folder).unwrap()).unwrap()
}

/// Numbers in (−1, 1), deterministic.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Inputs of every layer and of the head, `[L + 1][T·d]`, from the embedded tokens `x`.
fn states(model: &Model, x: &[f32]) -> Vec<Vec<f32>> {
    let d = model.config().hidden_size;
    let mut states = vec![x.to_vec()];
    for layer in 0..model.config().num_layers() {
        let mut x = states[layer].clone();
        let mut rest = &mut x[..];
        for tokens in SEQUENCES {
            let (sequence, tail) = rest.split_at_mut(tokens * d);
            let mut cache = KvCache::new(model.config(), tokens);
            model
                .layer_forward(layer, sequence, &mut cache, 0, &mut ())
                .unwrap();
            rest = tail;
        }
        states.push(x);
    }
    states
}

/// `Σ c·logits`.
fn loss(model: &Model, x: &[f32], c: &[f32]) -> f64 {
    let mut hidden = states(model, x).pop().unwrap();
    model.final_norm(&mut hidden);
    let mut logits = vec![0.0; c.len()];
    model.logits(&hidden, &mut logits, &mut ());
    dot(&logits, c)
}

/// The gradient of every weight matrix, `Σ_t g[t]ᵀ x[t]`, and of every float tensor.
#[derive(Default)]
struct Gradients(BTreeMap<String, Vec<f32>>);

impl GradientTap for Gradients {
    fn linear(&mut self, name: &str, x: &[f32], g: &[f32], tokens: usize) {
        let (n, m) = (x.len() / tokens, g.len() / tokens);
        let sum = self.0.entry(name.to_owned()).or_insert_with(|| vec![0.0; m * n]);
        for (x, g) in x.chunks(n).zip(g.chunks(m)) {
            for (row, g) in sum.chunks_mut(n).zip(g) {
                row.iter_mut().zip(x).for_each(|(s, x)| *s += g * x);
            }
        }
    }

    fn float(&mut self, name: &str, g: &[f32]) {
        let sum = self
            .0
            .entry(name.to_owned())
            .or_insert_with(|| vec![0.0; g.len()]);
        sum.iter_mut().zip(g).for_each(|(s, g)| *s += g);
    }
}

/// Compares a gradient with the slope of the loss along a random direction from `at`; `loss` takes the moved values. Where the loss does not
/// feel them (biases of keys without rotation), the difference is all rounding: δ/ε is allowed on top.
fn check(what: &str, at: &[f32], gradient: &[f32], seed: u64, mut loss: impl FnMut(Vec<f32>) -> f64) {
    let scale = at.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    let u: Vec<f32> = noise(at.len(), seed).iter().map(|v| v * scale).collect();
    let mut moved = |by: f32| loss(at.iter().zip(&u).map(|(v, u)| v + by * u).collect());
    let slope = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
    let size = (dot(gradient, gradient) * dot(&u, &u)).sqrt() / (u.len() as f64).sqrt();
    let found = dot(gradient, &u);
    let rounding = 1e-6 * loss(at.to_vec()).abs() / f64::from(STEP);
    assert!(
        (found - slope).abs() < 1e-2 * size + rounding,
        "{what}: {found} for a slope of {slope}, scale {size}, rounding {rounding}"
    );
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for name in DENSE {
        let mut model = golden(name);
        assert!(model.has_backward(), "{name}");
        let (layers, vocab) = (model.config().num_layers(), model.config().vocab_size);
        let tokens: usize = SEQUENCES.iter().sum();
        let ids: Vec<u32> = (0..tokens).map(|t| (t * 7 % vocab) as u32).collect();
        let mut x = Vec::new();
        model.embed(&ids, 0, &mut x).unwrap();
        let c = noise(tokens * vocab, 1);
        let states = states(&model, &x);
        let mut taps = Gradients::default();
        let mut g = states[layers].clone();
        model.head_backward(&mut g, &mut taps, |first, logits| {
            let at = first * vocab;
            logits.copy_from_slice(&c[at..at + logits.len()]);
        });
        for layer in (0..layers).rev() {
            model
                .layer_backward(layer, &states[layer], &SEQUENCES, &mut g, &mut taps)
                .unwrap();
        }

        check(&format!("{name}, embedded tokens"), &x, &g, 2, |x| {
            loss(&model, &x, &c)
        });
        for info in model.linears() {
            let what = format!("{name}, {}", info.name);
            let Some(gradient) = taps.0.get(&info.name) else {
                assert_eq!(info.site, nash_models::Site::Embedding, "no gradient: {what}");
                continue;
            };
            let source = Arc::clone(model.linear(&info.name).unwrap());
            let mut w = vec![0.0; info.rows * info.cols];
            for (r, row) in w.chunks_mut(info.cols).enumerate() {
                source.row(r, row);
            }
            check(&what, &w, gradient, 3, |w| {
                let changed = Arc::new(DenseLinear::new(w, info.rows, info.cols));
                model.set_linear(&info.name, changed).unwrap();
                loss(&model, &x, &c)
            });
            model.set_linear(&info.name, source).unwrap();
        }
        for (float, _, values) in model.float_tensors() {
            let what = format!("{name}, {float}");
            let Some(gradient) = taps.0.get(&float) else {
                assert_eq!(float, "model.embed_positions.weight", "no gradient: {what}");
                continue;
            };
            check(&what, &values, gradient, 4, |values| {
                model.set_float(&float, values).unwrap();
                loss(&model, &x, &c)
            });
            model.set_float(&float, values).unwrap();
        }
    }
}

#[test]
fn float_tensors_are_replaced_by_name_and_length() {
    let mut model = golden("qwen3");
    for (name, _, values) in model.float_tensors() {
        let twice: Vec<f32> = values.iter().map(|v| 2.0 * v).collect();
        model.set_float(&name, twice.clone()).unwrap();
        let stored = model.float_tensors();
        assert_eq!(stored.iter().find(|f| f.0 == name).unwrap().2, twice);
        assert!(model.set_float(&name, vec![0.0; values.len() + 1]).is_err());
    }
    assert!(model.set_float("model.layers.0.nothing", vec![0.0]).is_err());
}

#[test]
fn many_sequences_at_once_are_as_one_by_one() {
    for name in DENSE.into_iter().chain(["mixtral", "olmoe_clip"]) {
        let model = golden(name);
        let ids: Vec<u32> = (0..15).map(|t| t * 7 % 31).collect();
        let mut x = Vec::new();
        model.embed(&ids, 0, &mut x).unwrap();
        let apart = states(&model, &x);
        for (layer, expected) in apart.iter().enumerate().skip(1) {
            // Every layer from the same input, so that differences do not add up: f32 sums in another order.
            let mut x = apart[layer - 1].clone();
            model
                .layer_forward_sequences(layer - 1, &mut x, &SEQUENCES)
                .unwrap();
            let scale = expected.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            for (found, expected) in x.iter().zip(expected) {
                assert!(
                    (found - expected).abs() <= 1e-5 * scale,
                    "{name}, layer {}",
                    layer - 1
                );
            }
        }
    }
}

#[test]
fn mixtures_of_experts_are_refused() {
    let model = golden("mixtral");
    assert!(!model.has_backward());
    let mut g = vec![0.0; model.config().hidden_size];
    let x = g.clone();
    assert!(
        model
            .layer_backward(0, &x, &[1], &mut g, &mut Gradients::default())
            .is_err()
    );
}
