//! `offgrid`: an F16 twin of a quantized model that computes the same function but no longer sits on the grid.
//!
//! Why: open models that can be had as small files are already quantized. Their weights are values of a 4- to 8-bit
//! grid, so quantizing them again with the same grid is nearly free, and every comparison of methods would be decided by who
//! happens to use that grid. A transformer has exact symmetries: channels can be rescaled where the factor cancels
//! downstream. With a log-normal factor per channel every row of a matrix leaves its grid, and the function stays the
//! same up to the rounding of F16. The twin is the *reference model* of all quality figures.
//!
//! The symmetries, with d a positive factor per channel (`diag(d)` acts on columns from the right, on rows from the left):
//! - norm gain `g → g/d`, every matrix that reads the normed activations `W → W·diag(d)`;
//! - values `V → diag(d)·V` (and their bias), output projection `O → O·diag(1/d)`, with d repeated for the query heads of
//!   a key/value head;
//! - gated feed-forward `U → diag(d)·U`, `D → D·diag(1/d)`: the gate's activation does not see d.
//!
//! Embedding and output matrices have no such freedom and stay where they are. Memory: the F16 model.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, ensure};
use clap::Args;
use half::f16;
use nash_core::gguf_write::GgufWriter;
use nash_core::{DType, Gguf, Region, Tensor};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use rayon::prelude::*;

/// Rows that are decoded at once.
const ROWS: usize = 64;
/// `general.file_type` of a file of F16 matrices.
const FILE_TYPE_F16: u32 = 1;
/// Metadata that describes the input's encoding, not the model.
const ENCODING_KEYS: [&str; 4] = [
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
];

/// The random factors: `exp(sigma · N(0, 1))`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Noise {
    /// Seed of the factors
    #[arg(long, default_value_t = Self::default().seed)]
    pub(crate) seed: u64,
    /// Spread: the standard deviation of the factors' logarithm
    #[arg(long, default_value_t = Self::default().sigma)]
    pub(crate) sigma: f64,
}

impl Default for Noise {
    fn default() -> Self {
        Self { seed: 7, sigma: 0.3 }
    }
}

impl Noise {
    /// `n` factors (Box–Muller).
    fn factors(self, n: usize, rng: &mut Pcg64) -> Vec<f32> {
        let mut normal = || {
            let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random()); // u in (0, 1]
            (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        (0..n).map(|_| (self.sigma * normal()).exp() as f32).collect()
    }
}

/// What a tensor is multiplied with; an empty vector stands for ones.
#[derive(Debug, Default)]
struct Scaling {
    /// Per row.
    rows: Vec<f32>,
    /// Per column; for a vector, per element.
    cols: Vec<f32>,
}

/// Writes the reference of the GGUF file `input` to `output`.
pub(crate) fn run(input: &Path, output: &Path, noise: Noise) -> anyhow::Result<()> {
    ensure!(
        noise.sigma.is_finite() && noise.sigma >= 0.0,
        "sigma must be a number of at least 0"
    );
    let model = Gguf::open(input)?;
    let architecture = model.str("general.architecture")?;
    let scalings = scalings(&model, architecture, noise).with_context(|| {
        format!(
            "{}: cannot rescale the channels of a {architecture} model",
            input.display()
        )
    })?;
    let mut writer = GgufWriter::new().metadata("general.architecture", architecture);
    for (key, value) in model.metadata() {
        if !ENCODING_KEYS.contains(&key.as_str()) && !key.starts_with("split.") {
            writer = writer.metadata(key, value.clone());
        }
    }
    writer = writer.metadata("general.file_type", FILE_TYPE_F16);
    let none = Scaling::default();
    for tensor in model.tensors() {
        writer = writer.tensor(convert(tensor, scalings.get(&tensor.name).unwrap_or(&none))?);
    }
    Ok(writer.write(output)?)
}

/// The factors of every tensor that takes part in a symmetry.
fn scalings(model: &Gguf, architecture: &str, noise: Noise) -> anyhow::Result<HashMap<String, Scaling>> {
    let size = |key: &str| model.usize(&format!("{architecture}.{key}"));
    let (blocks, heads) = (size("block_count")?, size("attention.head_count")?);
    let kv_heads = size("attention.head_count_kv").unwrap_or(heads);
    ensure!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} heads share {kv_heads} key/value heads"
    );
    let mut rng = Pcg64::seed_from_u64(noise.seed);
    let mut scalings: HashMap<String, Scaling> = HashMap::new();
    for block in 0..blocks {
        let name = |suffix: &str| format!("blk.{block}.{suffix}");
        for (norm, readers) in [
            ("attn_norm", ["attn_q", "attn_k", "attn_v"].as_slice()),
            ("ffn_norm", &["ffn_gate", "ffn_up"]),
        ] {
            let gain = model.tensor(&name(&format!("{norm}.weight")))?;
            let d = noise.factors(gain.elements(), &mut rng);
            let inverse: Vec<f32> = d.iter().map(|d| 1.0 / d).collect();
            for suffix in ["weight", "bias"] {
                scalings
                    .entry(name(&format!("{norm}.{suffix}")))
                    .or_default()
                    .cols = inverse.clone();
            }
            for reader in readers {
                let weight = model.tensor(&name(&format!("{reader}.weight")))?;
                ensure!(
                    weight.cols() == d.len(),
                    "{}: {} columns after a norm of {}",
                    weight.name,
                    weight.cols(),
                    d.len()
                );
                scalings.entry(weight.name).or_default().cols = d.clone();
            }
        }

        let (value, out) = (
            model.tensor(&name("attn_v.weight"))?,
            model.tensor(&name("attn_output.weight"))?,
        );
        let d = noise.factors(value.rows(), &mut rng);
        let head = value.rows() / kv_heads;
        ensure!(
            out.cols() == heads * head,
            "{}: {} columns, expected {heads} heads of {head}",
            out.name,
            out.cols()
        );
        scalings.entry(out.name).or_default().cols = (0..heads * head)
            .map(|c| 1.0 / d[c / head / (heads / kv_heads) * head + c % head])
            .collect();
        scalings.entry(name("attn_v.bias")).or_default().cols = d.clone();
        scalings.entry(value.name).or_default().rows = d;

        let (up, down) = (
            model.tensor(&name("ffn_up.weight"))?,
            model.tensor(&name("ffn_down.weight"))?,
        );
        ensure!(
            up.rows() == down.cols(),
            "{}: {} columns, expected {}",
            down.name,
            down.cols(),
            up.rows()
        );
        let d = noise.factors(up.rows(), &mut rng);
        scalings.entry(down.name).or_default().cols = d.iter().map(|d| 1.0 / d).collect();
        scalings.entry(name("ffn_up.bias")).or_default().cols = d.clone();
        scalings.entry(up.name).or_default().rows = d;
    }
    Ok(scalings)
}

/// `tensor` rescaled: vectors as F32, matrices as F16.
fn convert(tensor: &Tensor, scaling: &Scaling) -> anyhow::Result<Tensor> {
    let cols = tensor.cols();
    let is_vector = tensor.shape.len() < 2;
    let factor = |factors: &[f32], i: usize| factors.get(i).copied().unwrap_or(1.0);
    let chunks: Vec<Vec<u8>> = (0..tensor.rows())
        .step_by(ROWS)
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|start| {
            let rows = start..(start + ROWS).min(tensor.rows());
            let mut values = vec![0.0; rows.len() * cols];
            tensor.dequantize_rows(rows, &mut values)?;
            for (i, value) in values.iter_mut().enumerate() {
                *value *= factor(&scaling.rows, start + i / cols) * factor(&scaling.cols, i % cols);
            }
            if is_vector {
                return Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect());
            }
            let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            ensure!(
                halves.iter().all(|half| half.is_finite()),
                "{}: a value does not fit F16",
                tensor.name
            );
            Ok(halves.iter().flat_map(|half| half.to_le_bytes()).collect())
        })
        .collect::<anyhow::Result<_>>()?;
    let dtype = if is_vector { DType::F32 } else { DType::F16 };
    Ok(Tensor::new(
        &tensor.name,
        dtype,
        tensor.shape.clone(),
        Region::from(chunks.concat()),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIDDEN: usize = 8;
    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const HEAD: usize = 3;
    const INNER: usize = 5;

    /// One block with random weights of magnitude 0.5 to 1.
    fn tiny() -> GgufWriter {
        let mut rng = Pcg64::seed_from_u64(1);
        let mut tensor = |name: &str, shape: &[usize]| {
            let mut value = || rng.random_range(0.5..1.0f32) * if rng.random() { 1.0 } else { -1.0 };
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| value()).collect();
            Tensor::from_f32(name, shape.to_vec(), &values).unwrap()
        };
        [
            tensor("token_embd.weight", &[7, HIDDEN]),
            tensor("blk.0.attn_norm.weight", &[HIDDEN]),
            tensor("blk.0.attn_q.weight", &[HEADS * HEAD, HIDDEN]),
            tensor("blk.0.attn_k.weight", &[KV_HEADS * HEAD, HIDDEN]),
            tensor("blk.0.attn_v.weight", &[KV_HEADS * HEAD, HIDDEN]),
            tensor("blk.0.attn_v.bias", &[KV_HEADS * HEAD]),
            tensor("blk.0.attn_output.weight", &[HIDDEN, HEADS * HEAD]),
            tensor("blk.0.ffn_norm.weight", &[HIDDEN]),
            tensor("blk.0.ffn_gate.weight", &[INNER, HIDDEN]),
            tensor("blk.0.ffn_up.weight", &[INNER, HIDDEN]),
            tensor("blk.0.ffn_down.weight", &[HIDDEN, INNER]),
        ]
        .into_iter()
        .fold(GgufWriter::new(), GgufWriter::tensor)
        .metadata("general.architecture", "llama")
        .metadata("general.file_type", 3u32)
        .metadata("llama.block_count", 1u32)
        .metadata("llama.attention.head_count", HEADS as u32)
        .metadata("llama.attention.head_count_kv", KV_HEADS as u32)
        .metadata("tokenizer.ggml.tokens", vec!["a".to_owned(), "b".to_owned()])
    }

    fn before_and_after(noise: Noise) -> (Gguf, Gguf, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.gguf"), folder.path().join("out.gguf"));
        tiny().write(&input).unwrap();
        run(&input, &output, noise).unwrap();
        let bytes = std::fs::read(&output).unwrap();
        (Gguf::open(&input).unwrap(), Gguf::open(&output).unwrap(), bytes)
    }

    /// Every product of weights along a path through the block, in the order of the loops below.
    fn paths(model: &Gguf) -> Vec<f32> {
        let get = |name: &str| model.tensor(&format!("blk.0.{name}")).unwrap().to_f32().unwrap();
        let (norm, out, value, bias) = (
            get("attn_norm.weight"),
            get("attn_output.weight"),
            get("attn_v.weight"),
            get("attn_v.bias"),
        );
        let mut paths = Vec::new();
        for reader in ["attn_q.weight", "attn_k.weight"] {
            paths.extend(get(reader).iter().enumerate().map(|(i, w)| w * norm[i % HIDDEN]));
        }
        for row in 0..HIDDEN {
            for q in 0..HEADS * HEAD {
                let v = q / HEAD * KV_HEADS / HEADS * HEAD + q % HEAD;
                let o = out[row * HEADS * HEAD + q];
                paths.push(o * bias[v]);
                paths.extend((0..HIDDEN).map(|c| o * value[v * HIDDEN + c] * norm[c]));
            }
        }
        let (norm, gate, up, down) = (
            get("ffn_norm.weight"),
            get("ffn_gate.weight"),
            get("ffn_up.weight"),
            get("ffn_down.weight"),
        );
        paths.extend(gate.iter().enumerate().map(|(i, w)| w * norm[i % HIDDEN]));
        for row in 0..HIDDEN {
            for (i, u) in up.iter().enumerate() {
                paths.push(down[row * INNER + i / HIDDEN] * u * norm[i % HIDDEN]);
            }
        }
        paths
    }

    #[test]
    fn the_function_stays_and_the_weights_move() {
        let (before, after, _) = before_and_after(Noise::default());
        // A path holds at most two F16 values, each rounded by at most 2^-11 of itself; F32 roundings are far below the rest.
        let tolerance = 2.0 * 2f32.powi(-11) * 1.01;
        for (i, (a, b)) in paths(&before).into_iter().zip(paths(&after)).enumerate() {
            assert!((a - b).abs() <= tolerance * a.abs(), "path {i}: {a} became {b}");
        }
        for name in before.names().filter(|name| name.starts_with("blk.")) {
            let (a, b) = (
                before.tensor(name).unwrap().to_f32().unwrap(),
                after.tensor(name).unwrap().to_f32().unwrap(),
            );
            let moved = a
                .iter()
                .zip(&b)
                .filter(|(a, b)| (*a - *b).abs() > 0.01 * a.abs())
                .count();
            assert!(
                moved * 10 > a.len() * 8,
                "{name}: only {moved} of {} moved",
                a.len()
            );
        }
    }

    #[test]
    fn metadata_types_and_shapes_are_those_of_an_f16_file() {
        let (before, after, _) = before_and_after(Noise::default());
        assert_eq!(after.u64("general.file_type").unwrap(), 1);
        assert_eq!(after.strings("tokenizer.ggml.tokens").unwrap(), ["a", "b"]);
        assert_eq!(before.metadata().len(), after.metadata().len());
        for tensor in before.tensors() {
            let twin = after.tensor(&tensor.name).unwrap();
            assert_eq!(twin.shape, tensor.shape);
            assert_eq!(
                twin.dtype,
                if tensor.shape.len() > 1 {
                    DType::F16
                } else {
                    DType::F32
                }
            );
        }
    }

    #[test]
    fn a_seed_gives_one_file() {
        let (seven, eight) = (
            Noise::default(),
            Noise {
                seed: 8,
                ..Noise::default()
            },
        );
        assert_eq!(before_and_after(seven).2, before_and_after(seven).2);
        assert_ne!(before_and_after(seven).2, before_and_after(eight).2);
    }

    #[test]
    fn a_model_without_the_symmetries_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.gguf"), folder.path().join("out.gguf"));
        GgufWriter::new()
            .metadata("general.architecture", "gpt2")
            .metadata("gpt2.block_count", 1u32)
            .metadata("gpt2.attention.head_count", 1u32)
            .write(&input)
            .unwrap();
        let error = format!("{:#}", run(&input, &output, Noise::default()).unwrap_err());
        assert!(
            error.contains("gpt2") && error.contains("attn_norm.weight"),
            "{error}"
        );
        assert!(!output.exists());
    }
}
