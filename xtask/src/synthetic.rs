//! `synthetic`: a random model of a published shape, written tensor by tensor, to measure time, memory and speed at sizes that no package has.
//!
//! Weights are approximately normal (the sum of four uniform numbers), with a spread of `1/√n` and a tenth of the channels twice as
//! large, so that importances differ as in real models. Tokens are bytes. What such a model says means nothing: neither do its divergences.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use nash_core::atomic::AtomicFile;
use rand::{RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

/// Published shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// LLaMA 7B: d 4096, 32 layers, 32 heads, f 11008, vocabulary 32000
    #[value(name = "llama-7b")]
    Llama7B,
    /// LLaMA 3.2 1B: d 2048, 16 layers, 32 heads over 8, f 8192, vocabulary 128256, tied
    #[value(name = "llama-1b")]
    Llama1B,
    /// For trying out: d 256, 4 layers
    Tiny,
}

struct Dimensions {
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    feed: usize,
    vocab: usize,
    tied: bool,
}

impl Shape {
    fn dimensions(self) -> Dimensions {
        let [hidden, layers, heads, kv_heads, feed, vocab, tied] = match self {
            Self::Llama7B => [4096, 32, 32, 32, 11008, 32000, 0],
            Self::Llama1B => [2048, 16, 32, 8, 8192, 128_256, 1],
            Self::Tiny => [256, 4, 4, 2, 640, 4096, 1],
        };
        Dimensions {
            hidden,
            layers,
            heads,
            kv_heads,
            feed,
            vocab,
            tied: tied == 1,
        }
    }
}

/// Values made at a time.
const CHUNK: usize = 1 << 18;

/// Writes the model as a Hugging Face folder with 16-bit weights; `layers` of its layers, or all.
pub(crate) fn run(shape: Shape, layers: Option<usize>, seed: u64, dir: &Path) -> anyhow::Result<()> {
    let mut d = shape.dimensions();
    d.layers = layers.unwrap_or(d.layers);
    ensure!(d.layers > 0, "a model has at least one layer");
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let tensors = tensors(&d);
    let (mut header, mut end) = (Map::new(), 0u64);
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        let entry = json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut json = serde_json::to_vec(&Value::Object(header))?;
    json.resize((8 + json.len()).next_multiple_of(64) - 8, b' ');
    let bar = ProgressBar::new(end).with_style(ProgressStyle::with_template(
        "{wide_bar} {bytes}/{total_bytes} {eta}",
    )?);
    let mut file = AtomicFile::create(dir.join("model.safetensors"))?;
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(&json)?;
    for (index, (_, shape)) in tensors.iter().enumerate() {
        let count = shape.iter().product::<usize>();
        let cols = *shape.last().unwrap_or(&1);
        let seed = seed ^ ((index as u64) << 32);
        // A few chunks at a time, so that memory stays small and every core has work.
        let chunks: Vec<usize> = (0..count).step_by(CHUNK).collect();
        for some in chunks.chunks(16) {
            let made: Vec<Vec<f16>> = some
                .par_iter()
                .map(|&first| values(first, CHUNK.min(count - first), cols, shape.len() == 1, seed))
                .collect();
            for values in made {
                file.write_all(bytemuck::cast_slice(values.reinterpret_cast()))?;
                bar.inc(2 * values.len() as u64);
            }
        }
    }
    file.commit()?;
    bar.finish_and_clear();
    write_texts(&d, dir)?;
    println!("{}: {} bytes of weights", dir.display(), end);
    Ok(())
}

/// Names and shapes in the order of the file.
fn tensors(d: &Dimensions) -> Vec<(String, Vec<usize>)> {
    let kv = d.hidden / d.heads * d.kv_heads;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![d.vocab, d.hidden])];
    for layer in 0..d.layers {
        for (name, shape) in [
            ("input_layernorm", vec![d.hidden]),
            ("self_attn.q_proj", vec![d.hidden, d.hidden]),
            ("self_attn.k_proj", vec![kv, d.hidden]),
            ("self_attn.v_proj", vec![kv, d.hidden]),
            ("self_attn.o_proj", vec![d.hidden, d.hidden]),
            ("post_attention_layernorm", vec![d.hidden]),
            ("mlp.gate_proj", vec![d.feed, d.hidden]),
            ("mlp.up_proj", vec![d.feed, d.hidden]),
            ("mlp.down_proj", vec![d.hidden, d.feed]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![d.hidden]));
    if !d.tied {
        tensors.push(("lm_head.weight".to_owned(), vec![d.vocab, d.hidden]));
    }
    tensors
}

/// Values `first..first + count` of a tensor with rows of `cols`; norms are ones.
fn values(first: usize, count: usize, cols: usize, norm: bool, seed: u64) -> Vec<f16> {
    if norm {
        return vec![f16::ONE; count];
    }
    let mut rng = Pcg64Mcg::seed_from_u64(seed.wrapping_add(first as u64));
    // The sum of four numbers that are uniform over 2^16 has a standard deviation of 2^16 / √3.
    let unit = 3f32.sqrt() / 65536.0 / (cols as f32).sqrt();
    (first..first + count)
        .map(|i| {
            let bits: u64 = rng.random();
            let sum: i64 = (0..4).map(|k| (bits >> (16 * k) & 0xffff) as i64).sum();
            let spread = if (i % cols).is_multiple_of(10) { 2.0 } else { 1.0 };
            f16::from_f32((sum - 131_070) as f32 * unit * spread)
        })
        .collect()
}

/// Configuration, and a byte-level tokenizer without merges.
fn write_texts(d: &Dimensions, dir: &Path) -> anyhow::Result<()> {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": d.vocab,
        "hidden_size": d.hidden, "num_hidden_layers": d.layers, "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads, "intermediate_size": d.feed, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": d.tied
    });
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    // GPT-2 spells a byte that cannot be printed as the next character from U+0100 on.
    let mut others = 256u32..;
    let mut vocabulary = Map::new();
    for byte in 0..256u32 {
        let code = if printable(&byte) {
            Some(byte)
        } else {
            others.next()
        };
        let spelled = code.and_then(char::from_u32).context("a character")?;
        vocabulary.insert(spelled.to_string(), json!(byte));
    }
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []}
    });
    for (name, value) in [("config.json", config), ("tokenizer.json", tokenizer)] {
        let path = dir.join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nash_core::ModelFile;

    use super::*;

    #[test]
    fn a_small_one_opens_and_has_the_shape_and_spread_it_says() {
        let dir = tempfile::tempdir().unwrap();
        run(Shape::Tiny, Some(1), 7, dir.path()).unwrap();
        let file = ModelFile::open(dir.path()).unwrap();
        let up = file.find("model.layers.0.mlp.up_proj.weight").unwrap();
        assert_eq!(up.shape, [640, 256]);
        let w = up.to_f32().unwrap();
        let variance = |columns: &dyn Fn(usize) -> bool| {
            let chosen = w
                .iter()
                .enumerate()
                .filter(|(i, _)| columns(i % 256))
                .map(|(_, v)| v);
            let count = chosen.clone().count() as f32;
            chosen.map(|v| v * v).sum::<f32>() / count * 256.0
        };
        // 147 thousand values: the variance is known to half a percent.
        let usual = variance(&|c| !c.is_multiple_of(10));
        let strong = variance(&|c| c.is_multiple_of(10));
        assert!(
            (usual - 1.0).abs() < 0.03 && (strong - 4.0).abs() < 0.3,
            "{usual} {strong}"
        );
    }
}
