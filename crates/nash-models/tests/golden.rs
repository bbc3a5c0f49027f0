//! Logits against `transformers` on tiny random models of every architecture, made by `golden/make_models.py`.
//!
//! Tolerance of the float path: both sides compute in f32 from the same 16-bit weights, in different orders of
//! summation. A product over n ≤ 72 terms has a relative error near √n·2⁻²⁴ ≈ 5e-7; a model of L ≤ 7 layers chains some
//! 6·L of them, whose independent errors add in quadrature: √42·5e-7 ≈ 3e-6 of the scale of the logits, times a few
//! for norms and peaked attention: 2e-5. (Seen: 2.1e-6.) With the f16 cache the unit is 2⁻¹¹ ≈ 5e-4 on each key and
//! value of L layers, which the average over positions shrinks and peaked attention amplifies: 1e-2. (Seen: 2.3e-3.)

#![expect(clippy::unwrap_used, reason = "a test says by panicking that it failed")]

use std::path::{Path, PathBuf};

use nash_core::ModelFile;
use nash_models::{KvCache, Model, Positions, RopeStyle, Site, Tap};

const FLOAT: f32 = 2e-5;
const HALF: f32 = 1e-2;

const CASES: [&str; 33] = [
    "llama",
    "llama_tied_bias",
    "llama_rope3",
    "llama_linear",
    "llama_yarn",
    "mistral_window",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_scaled",
    "gpt2",
    "gpt2_inner",
    "opt",
    "opt_after",
    "mixtral",
    "mixtral_window",
    "qwen2_moe",
    "qwen2_moe_mixed",
    "qwen3_moe",
    "qwen3_moe_mixed",
    "olmoe",
    "olmoe_clip",
    "dots1",
    "dots1_groups",
    "glm4_moe",
    "glm4_moe_plain",
    "glm4_moe_small",
    "gpt_oss",
    "gpt_oss_bf16",
    "gpt_oss_mxfp4",
];

struct Case {
    folder: PathBuf,
    tokens: Vec<u32>,
    /// `[tokens, vocabulary]`.
    logits: Vec<f32>,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        let tokens = serde_json::from_slice(&std::fs::read(folder.join("tokens.json")).unwrap()).unwrap();
        let bytes = std::fs::read(folder.join("logits.bin")).unwrap();
        let logits = bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        Self {
            folder,
            tokens,
            logits,
        }
    }

    fn model(&self, file: &str) -> Model {
        Model::load(&ModelFile::open(self.folder.join(file)).unwrap()).unwrap()
    }

    fn gguf(&self) -> Option<Model> {
        self.folder
            .join("model.gguf")
            .exists()
            .then(|| self.model("model.gguf"))
    }

    fn check(&self, what: &str, got: &[f32], tolerance: f32) {
        assert_eq!(got.len(), self.logits.len(), "{what}");
        let vocab = got.len() / self.tokens.len();
        let scale = self.logits.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (at, (got, want)) in got.iter().zip(&self.logits).enumerate() {
            let difference = (got - want).abs();
            assert!(
                difference <= tolerance * scale,
                "{what}: token {}, logit {}: {got}, transformers say {want} (scale {scale})",
                at / vocab,
                at % vocab
            );
        }
    }
}

/// Logits of the tokens, run in chunks of the given size.
fn logits(model: &Model, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = KvCache::new(model.config(), tokens.len());
    let mut all = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let hidden = model.forward(tokens, &mut cache, &mut ()).unwrap();
        let mut out = vec![0.0; tokens.len() * model.config().vocab_size];
        model.logits(&hidden, &mut out, &mut ());
        all.extend(out);
    }
    assert_eq!(cache.tokens(), tokens);
    all
}

#[test]
fn every_case_is_tested() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("logits.bin").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut cases = CASES.to_vec();
    cases.sort_unstable();
    assert_eq!(found, cases);
}

#[test]
fn prefill_matches_transformers() {
    for name in CASES {
        let case = Case::open(name);
        let got = logits(&case.model(""), &case.tokens, case.tokens.len());
        case.check(name, &got, FLOAT);
    }
}

#[test]
fn gguf_files_match_transformers() {
    let mut checked = 0;
    for name in CASES {
        let case = Case::open(name);
        let Some(model) = case.gguf() else { continue };
        checked += 1;
        case.check(
            &format!("{name}.gguf"),
            &logits(&model, &case.tokens, case.tokens.len()),
            FLOAT,
        );
        let mut config = model.config().clone();
        let mut other = case.model("").config().clone();
        // What the two formats legitimately say differently.
        for config in [&mut config, &mut other] {
            if let Positions::Rope(rope) = &mut config.positions {
                rope.style = RopeStyle::Half;
                rope.global.scaling = nash_models::RopeScaling::None;
                rope.local = None;
            }
            for layer in &mut config.layers {
                layer.sliding &= config.attention.window.is_some();
            }
            config.architecture.clear();
            config.embedding_scale = 0.0;
            config.context_length = 0;
            config.mlp.intermediate = 0;
        }
        assert_eq!(config, other, "{name}");
    }
    assert!(checked >= 12, "only {checked} GGUF files");
}

#[test]
fn decode_agrees_with_prefill_up_to_the_half_precision_cache() {
    for name in CASES {
        let case = Case::open(name);
        for (file, chunk) in [("", 1), ("", 7)] {
            let got = logits(&case.model(file), &case.tokens, chunk);
            case.check(&format!("{name} in chunks of {chunk}"), &got, HALF);
        }
    }
}

/// Layer, site, tokens and columns of every call.
#[derive(Default)]
struct Recorder {
    seen: Vec<(usize, Site, usize, usize)>,
}

impl Tap for Recorder {
    fn input(&mut self, layer: usize, site: Site, x: &[f32], tokens: usize, cols: usize) {
        assert_eq!(x.len(), tokens * cols);
        assert!(x.iter().all(|v| v.is_finite()));
        self.seen.push((layer, site, tokens, cols));
    }
}

#[test]
fn the_tap_sees_the_input_of_every_linear() {
    for name in [
        "llama",
        "gemma3",
        "opt",
        "qwen2_moe",
        "dots1",
        "mixtral",
        "gpt_oss",
    ] {
        let case = Case::open(name);
        let model = case.model("");
        let mut cache = KvCache::new(model.config(), case.tokens.len());
        let mut tap = Recorder::default();
        let hidden = model.forward(&case.tokens, &mut cache, &mut tap).unwrap();
        let mut out = vec![0.0; case.tokens.len() * model.config().vocab_size];
        model.logits(&hidden, &mut out, &mut tap);
        let head = model.config().num_layers();
        for info in model.linears().iter().filter(|info| info.site != Site::Embedding) {
            let layer = info.layer.unwrap_or(head);
            let seen: Vec<_> = tap
                .seen
                .iter()
                .filter(|s| (s.0, s.1) == (layer, info.site))
                .collect();
            assert_eq!(seen.len(), 1, "{name}: {info:?}");
            assert_eq!(seen[0].3, info.cols, "{name}: {info:?}");
            if !matches!(info.site, Site::ExpertIn(_) | Site::ExpertDown(_)) {
                assert_eq!(seen[0].2, case.tokens.len(), "{name}: {info:?}");
            }
        }
        if let Some(moe) = &model.config().moe {
            let routed: usize = tap
                .seen
                .iter()
                .filter(|s| matches!(s.1, Site::ExpertIn(_)))
                .map(|s| s.2)
                .sum();
            let sparse = model.config().layers.iter().filter(|layer| layer.experts).count();
            assert_eq!(routed, case.tokens.len() * moe.top_k * sparse, "{name}");
        }
    }
}

#[test]
fn layers_one_by_one_equal_the_whole() {
    let case = Case::open("gemma3");
    let model = case.model("");
    let mut cache = KvCache::new(model.config(), 64);
    let mut x = Vec::new();
    model.embed(&case.tokens, 0, &mut x).unwrap();
    for layer in 0..model.config().num_layers() {
        model
            .layer_forward(layer, &mut x, &mut cache, 0, &mut ())
            .unwrap();
    }
    model.final_norm(&mut x);
    let mut whole = KvCache::new(model.config(), 64);
    assert_eq!(x, model.forward(&case.tokens, &mut whole, &mut ()).unwrap());
}
