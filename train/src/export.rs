//! A trained model as a Hugging Face folder: `config.json`, `model.safetensors` in F16, `tokenizer.json`.
//!
//! Mixtures are saved as dots.llm1 (`Dots1ForCausalLM`), whose routers have sigmoid scores and a bias for the choice alone; dense models as Qwen3.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use burn::module::Param;
use burn::tensor::Tensor;
use half::f16;
use nash_core::atomic;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::balance::Router;
use crate::model::{EPSILON, Model, ROPE_BASE, Shape};
use crate::text::{Corpus, END};

/// Bytes of a tensor, and its shape.
type Stored = (Vec<u8>, Vec<usize>);

/// Writes `model` into `folder`, which is made if need be.
pub(crate) fn write(
    folder: &Path,
    model: &Model,
    shape: &Shape,
    router: &Router,
    corpus: &Corpus,
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    let mut put = |name: String, values: Vec<f32>, dims: &[usize]| {
        let bytes = values
            .iter()
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect();
        tensors.insert(name, (bytes, dims.to_vec()));
    };
    let d = shape.width;
    put(
        "model.embed_tokens.weight".into(),
        values(model.embedding.val())?,
        &[shape.vocabulary, d],
    );
    put("model.norm.weight".into(), values(model.norm.val())?, &[d]);
    for (index, layer) in model.layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        for (part, norm) in [
            ("input_layernorm", &layer.attention_norm),
            ("post_attention_layernorm", &layer.feed_norm),
            ("self_attn.q_norm", &layer.query_norm),
            ("self_attn.k_norm", &layer.key_norm),
        ] {
            let values = values(norm.val())?;
            let len = values.len();
            put(name(&format!("{part}.weight")), values, &[len]);
        }
        let projections = [
            ("q", &layer.query),
            ("k", &layer.key),
            ("v", &layer.value),
            ("o", &layer.output),
        ];
        for (part, weight) in projections {
            put(
                name(&format!("self_attn.{part}_proj.weight")),
                transposed(weight)?,
                &[d, d],
            );
        }
        if let Some(weight) = &layer.router {
            put(name("mlp.gate.weight"), transposed(weight)?, &[shape.experts, d]);
            put(
                name("mlp.gate.e_score_correction_bias"),
                router.bias(index).to_vec(),
                &[shape.experts],
            );
        }
        for (part, stack) in [("gate", &layer.gate), ("up", &layer.up), ("down", &layer.down)] {
            let stack = stack.val().swap_dims(1, 2);
            let [_, rows, columns] = stack.dims();
            let all = values(stack)?;
            for (e, one) in all.chunks_exact(rows * columns).enumerate() {
                let whose = if shape.experts == 0 {
                    "mlp".into()
                } else {
                    format!("mlp.experts.{e}")
                };
                put(
                    name(&format!("{whose}.{part}_proj.weight")),
                    one.to_vec(),
                    &[rows, columns],
                );
            }
        }
    }
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (bytes, dims))| Ok((name, TensorView::new(Dtype::F16, dims.clone(), bytes)?)))
        .collect::<Result<_>>()?;
    atomic::write(
        folder.join("model.safetensors"),
        safetensors::serialize(views, None)?,
    )?;
    atomic::write(folder.join("tokenizer.json"), &corpus.tokenizer)?;
    let special = json!({"eos_token": END, "bos_token": null, "add_bos_token": false, "tokenizer_class": "PreTrainedTokenizerFast"});
    atomic::write(
        folder.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&special)?,
    )?;
    atomic::write(
        folder.join("config.json"),
        serde_json::to_string_pretty(&config(shape, corpus))?,
    )?;
    Ok(())
}

fn config(shape: &Shape, corpus: &Corpus) -> serde_json::Value {
    let mut config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": false,
        "eos_token_id": corpus.end,
        "head_dim": shape.head_dim(),
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.top_k * shape.hidden,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": true,
        "torch_dtype": "float16",
        "vocab_size": shape.vocabulary,
    });
    if shape.experts > 0 {
        let mixture = json!({
            "architectures": ["Dots1ForCausalLM"],
            "model_type": "dots1",
            "first_k_dense_replace": 0,
            "moe_intermediate_size": shape.hidden,
            "n_group": 1,
            "n_routed_experts": shape.experts,
            "n_shared_experts": null,
            "norm_topk_prob": true,
            "num_experts_per_tok": shape.top_k,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
        });
        for (key, value) in mixture.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
    }
    config
}

fn values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor
        .inner()
        .try_into_vec_as()
        .context("a weight cannot be read")
}

/// `[in, out]` as `[out, in]`.
fn transposed(weight: &Param<Tensor<2>>) -> Result<Vec<f32>> {
    values(weight.val().transpose())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::module::Module as _;
    use burn::tensor::Device;
    use indicatif::ProgressBar;
    use nash_core::ModelFile;
    use nash_models::KvCache;

    use super::*;
    use crate::balance::Rule;
    use crate::model::Constants;
    use crate::text::consecutive;
    use crate::train::{Plan, train};

    const PLAN: Plan = Plan {
        batch: 4,
        steps: 40,
        rate: 3e-3,
        strength: None,
        seed: 3,
    };

    fn corpus(folder: &Path) -> Corpus {
        for document in 0..20 {
            let words = (0..400).map(|i| ["one", "two", "three", "many"][(i * i + document * i) % 7 % 4]);
            let text = words.collect::<Vec<_>>().join(" ");
            fs::write(folder.join(format!("{document:02}.txt")), text).unwrap();
        }
        Corpus::read(folder, 280).unwrap()
    }

    fn shape(rule: Rule, corpus: &Corpus) -> Shape {
        Shape {
            vocabulary: corpus.vocabulary,
            layers: 2,
            width: 32,
            heads: 2,
            experts: if rule == Rule::Dense { 0 } else { 4 },
            top_k: 2,
            hidden: 16,
            context: 16,
        }
    }

    /// The files of a model trained with `rule`.
    fn files(rule: Rule, corpus: &Corpus) -> BTreeMap<String, Vec<u8>> {
        let (folder, shape) = (tempfile::tempdir().unwrap(), shape(rule, corpus));
        let (model, router, _) = train(shape, rule, PLAN, corpus, &ProgressBar::hidden()).unwrap();
        write(folder.path(), &model, &shape, &router, corpus).unwrap();
        let read = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read(path).unwrap(),
            )
        };
        fs::read_dir(folder.path()).unwrap().map(read).collect()
    }

    #[test]
    fn a_saved_model_predicts_what_the_trained_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus(folder.path());
        for rule in [Rule::Dense, Rule::Nash, Rule::LossFree] {
            let shape = shape(rule, &corpus);
            let (model, mut router, outcome) =
                train(shape, rule, PLAN, &corpus, &ProgressBar::hidden()).unwrap();
            assert!(
                outcome.validation_loss < 0.5 * (shape.vocabulary as f64).ln(),
                "{outcome:?}"
            );
            let saved = folder.path().join("saved");
            write(&saved, &model, &shape, &router, &corpus).unwrap();
            let loaded = nash_models::Model::load(&ModelFile::open(&saved).unwrap()).unwrap();
            let (tokens, targets) = consecutive(&corpus.validation, (1, shape.context), 1)
                .next()
                .unwrap();
            let mut cache = KvCache::new(loaded.config(), shape.context);
            let losses = tokens.iter().zip(&targets).map(|(&token, &target)| {
                let hidden = loaded.forward(&[token], &mut cache, &mut ()).unwrap();
                let mut logits = vec![0.0; shape.vocabulary];
                loaded.logits(&hidden, &mut logits, &mut ());
                let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
                sum.ln() - f64::from(logits[target as usize])
            });
            let ours = losses.sum::<f64>() / targets.len() as f64;
            let constants = Constants::new(shape, &Device::flex());
            let (loss, _) = model.valid().loss(&constants, &tokens, &targets, &mut router);
            let theirs = f64::from(loss.into_scalar::<f32>());
            // Weights were rounded to 11 bits.
            assert!((ours - theirs).abs() < 2e-3, "{rule:?}: {ours} {theirs}");
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus(folder.path());
        assert!(files(Rule::NashSwarm, &corpus) == files(Rule::NashSwarm, &corpus));
    }
}
