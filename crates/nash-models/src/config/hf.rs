//! Configuration from a Hugging Face `config.json`.
//!
//! Missing keys take the defaults of the family's table row, which are those of `transformers`. Both forms of the
//! rope keys are read: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.

use serde_json::Value;

use super::family::{BiasRule, Family, QkNormRule, SharedRule, WindowRule};
use super::{
    Activation, AttentionConfig, ExpertGroups, LayerConfig, MlpConfig, ModelConfig, MoeConfig, NormConfig,
    NormPlacement, Positions, QkNorm, RopeConfig, RopeFrequencies, RopeScaling, RopeStyle, STORED_KEY,
    SharedExpert, check_layers,
};
use crate::error::{ModelError, Result};
use crate::math::SWIGLU_LIMIT;

impl ModelConfig {
    /// Reads a Hugging Face `config.json`. Multimodal files are read through their `text_config`; a configuration of ours counts before all keys.
    ///
    /// # Errors
    /// Unknown architectures (listing the known ones), unsupported variants, missing or absurd values.
    pub fn from_hf(config_json: &Value) -> Result<Self> {
        if is_stored(config_json) {
            return Self::from_packed(config_json);
        }
        let json = config_json
            .get("text_config")
            .filter(|text| text.is_object())
            .unwrap_or(config_json);
        let model_type = json
            .get("model_type")
            .or_else(|| config_json.get("model_type"))
            .and_then(Value::as_str);
        let model_type =
            model_type.ok_or_else(|| bad("model_type", "missing; is this the config.json of a model?"))?;
        let family = Family::from_hf(model_type)?;
        let defaults = serde_json::from_str(family.defaults)
            .map_err(|error| bad(family.name, &format!("defaults: {error}")))?;
        let config = Keys {
            json,
            defaults,
            family,
        }
        .read()?;
        config.validate()?;
        Ok(config)
    }
}

/// Whether a `config.json` holds a configuration of ours, as folders that this program wrote do: their tensors have canonical names.
pub(crate) fn is_stored(config_json: &Value) -> bool {
    config_json.get(STORED_KEY).is_some()
}

fn bad(key: &str, problem: &str) -> ModelError {
    ModelError::Config {
        key: key.to_owned(),
        problem: problem.to_owned(),
    }
}

/// A JSON object with the family's defaults behind it.
struct Keys<'a> {
    json: &'a Value,
    defaults: Value,
    family: &'static Family,
}

impl Keys<'_> {
    /// The first of these keys that is present and not null; the object before the defaults.
    fn get(&self, keys: &[&str]) -> Option<&Value> {
        [self.json, &self.defaults]
            .into_iter()
            .flat_map(|source| keys.iter().filter_map(|key| source.get(key)))
            .find(|value| !value.is_null())
    }

    fn size(&self, keys: &[&str]) -> Result<Option<usize>> {
        self.get(keys)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(|| bad(keys[0], &format!("{value} is not a whole number")))
            })
            .transpose()
    }

    fn need_size(&self, keys: &[&str]) -> Result<usize> {
        self.size(keys)?.ok_or_else(|| bad(&keys.join(" or "), "missing"))
    }

    fn number(&self, keys: &[&str]) -> Result<Option<f64>> {
        self.get(keys).map(|value| number(keys[0], value)).transpose()
    }

    fn flag(&self, key: &str) -> Result<bool> {
        self.get(&[key]).map_or(Ok(false), |value| {
            value
                .as_bool()
                .ok_or_else(|| bad(key, &format!("{value} is neither true nor false")))
        })
    }

    fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported {
            architecture: self.family.name.to_owned(),
            what,
        }
    }

    fn read(&self) -> Result<ModelConfig> {
        self.refuse_variants()?;
        let family = self.family;
        let hidden_size = self.need_size(&["hidden_size", "n_embd"])?;
        let num_layers = self.need_size(&["num_hidden_layers", "n_layer"])?;
        check_layers(num_layers)?;
        let attention = self.attention(hidden_size)?;
        let positions = match family.learned_positions {
            Some(offset) => Positions::Learned { offset },
            None => Positions::Rope(self.rope(attention.head_dim)?),
        };
        let before = family.name != "opt" || self.get(&["do_layer_norm_before"]) != Some(&Value::Bool(false));
        let intermediate = self.size(&["intermediate_size", "ffn_dim", "n_inner"])?;
        let moe = self.moe()?;
        Ok(ModelConfig {
            architecture: family.name.to_owned(),
            vocab_size: self.need_size(&["vocab_size"])?,
            hidden_size,
            context_length: self.need_size(&["max_position_embeddings", "n_positions"])?,
            norm: NormConfig {
                kind: family.norm,
                eps: self
                    .number(&["rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"])?
                    .ok_or_else(|| bad("rms_norm_eps", "missing"))? as f32,
                placement: if before {
                    family.placement
                } else {
                    NormPlacement::AfterResidual
                },
                final_norm: before,
            },
            positions,
            mlp: MlpConfig {
                intermediate: intermediate.unwrap_or(hidden_size.saturating_mul(4)),
                activation: self.activation()?,
                gated: family.gated,
                bias: self.bias(family.mlp_bias)?,
            },
            layers: self.layers(num_layers, attention.window, moe.is_some())?,
            moe,
            attention,
            embedding_scale: if family.scale_embedding {
                (hidden_size as f32).sqrt()
            } else {
                1.0
            },
            tie_embeddings: self.flag("tie_word_embeddings")?,
            logit_softcap: self.number(&["final_logit_softcapping"])?.map(|cap| cap as f32),
            vocab_parts: super::VocabParts::default(),
        })
    }

    /// Variants of known families that would silently compute something else.
    fn refuse_variants(&self) -> Result<()> {
        if let (Some(proj), Some(hidden)) =
            (self.size(&["word_embed_proj_dim"])?, self.size(&["hidden_size"])?)
            && proj != hidden
        {
            return Err(self.unsupported(format!(
                "word_embed_proj_dim {proj} other than hidden_size {hidden}"
            )));
        }
        let truths = [
            ("scale_attn_by_inverse_layer_idx", false),
            ("_remove_final_layer_norm", false),
            ("use_bidirectional_attention", false),
            ("scale_attn_weights", true),
            ("layer_norm_elementwise_affine", true),
        ];
        for (key, needed) in truths {
            if self.get(&[key]).is_some() && self.flag(key)? != needed {
                return Err(self.unsupported(format!("{key} = {}", !needed)));
            }
        }
        if let Some(limit) = self.number(&["swiglu_limit"])?
            && limit != f64::from(SWIGLU_LIMIT)
        {
            return Err(self.unsupported(format!("swiglu_limit {limit}")));
        }
        if self.size(&["moe_layer_freq"])?.is_some_and(|freq| freq != 1) {
            return Err(self.unsupported("moe_layer_freq other than 1".into()));
        }
        Ok(())
    }

    fn bias(&self, rule: BiasRule) -> Result<bool> {
        match rule {
            BiasRule::Never => Ok(false),
            BiasRule::Always => Ok(true),
            BiasRule::Key(key) => self.flag(key),
        }
    }

    fn attention(&self, hidden_size: usize) -> Result<AttentionConfig> {
        let family = self.family;
        let heads = self.need_size(&["num_attention_heads", "n_head"])?;
        let head_dim = match self.size(&["head_dim"])? {
            Some(dim) => dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(bad(
                    "head_dim",
                    &format!("missing, and {hidden_size}/{heads} is not whole"),
                ));
            }
        };
        let qk_norm = match family.qk_norm {
            QkNormRule::Never => QkNorm::None,
            QkNormRule::PerHead => QkNorm::PerHead,
            QkNormRule::Full => QkNorm::Full,
            QkNormRule::Key(key) if self.flag(key)? => QkNorm::PerHead,
            QkNormRule::Key(_) => QkNorm::None,
        };
        let slides = !matches!(family.window, WindowRule::Never)
            && (self.get(&["use_sliding_window"]).is_none() || self.flag("use_sliding_window")?);
        let scale = self
            .number(&["query_pre_attn_scalar"])?
            .unwrap_or(head_dim as f64);
        Ok(AttentionConfig {
            heads,
            kv_heads: self.size(&["num_key_value_heads"])?.unwrap_or(heads),
            head_dim,
            scale: scale.powf(-0.5) as f32,
            qkv_bias: self.bias(family.qkv_bias)?,
            out_bias: self.bias(family.out_bias)?,
            qk_norm,
            softcap: self.number(&["attn_logit_softcapping"])?.map(|cap| cap as f32),
            window: if slides {
                self.size(&["sliding_window"])?
            } else {
                None
            },
            clip: self.number(&["clip_qkv"])?.map(|clip| clip as f32),
            sinks: family.sinks,
        })
    }

    fn activation(&self) -> Result<Activation> {
        // Gemma's old key `hidden_act: gelu` means the tanh form; `transformers` reads only the new key.
        let keys: &[&str] = if self.family.scale_embedding {
            &["hidden_activation"]
        } else {
            &["hidden_act", "activation_function"]
        };
        match self.get(keys).and_then(Value::as_str) {
            // gpt-oss says "silu", which `transformers` does not read.
            _ if self.family.activation == Activation::ClampedSwiglu => Ok(self.family.activation),
            None => Ok(self.family.activation),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh") => {
                Ok(Activation::GeluTanh)
            }
            Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
            Some("relu") => Ok(Activation::Relu),
            Some(other) => Err(self.unsupported(format!("activation \"{other}\""))),
        }
    }

    fn layers(&self, count: usize, window: Option<usize>, moe: bool) -> Result<Vec<LayerConfig>> {
        let dense_first = self.size(&["first_k_dense_replace"])?.unwrap_or(0);
        let step = self.size(&["decoder_sparse_step"])?.unwrap_or(1).max(1);
        let dense_only: Vec<u64> = self
            .get(&["mlp_only_layers"])
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_u64).collect())
            .unwrap_or_default();
        let types = self.get(&["layer_types"]).and_then(Value::as_array);
        if let Some(types) = types
            && types.len() != count
        {
            return Err(bad(
                "layer_types",
                &format!("{} entries for {count} layers", types.len()),
            ));
        }
        let from = self.size(&["max_window_layers"])?.unwrap_or(0);
        let every = self.size(&["sliding_window_pattern"])?;
        (0..count)
            .map(|layer| {
                let sliding = match types.map(|types| types[layer].as_str()) {
                    Some(Some("full_attention")) => false,
                    Some(Some("sliding_attention")) => true,
                    Some(other) => return Err(self.unsupported(format!("layer type {other:?}"))),
                    None => match self.family.window {
                        WindowRule::Never => false,
                        WindowRule::All => true,
                        WindowRule::FromLayer => layer >= from,
                        WindowRule::AllButEvery(n) => !(layer + 1).is_multiple_of(every.unwrap_or(n).max(1)),
                    },
                };
                let experts = moe
                    && layer >= dense_first
                    && (layer + 1).is_multiple_of(step)
                    && !dense_only.contains(&(layer as u64));
                Ok(LayerConfig {
                    top_k: None,
                    sliding: sliding && window.is_some(),
                    experts,
                })
            })
            .collect()
    }

    fn moe(&self) -> Result<Option<MoeConfig>> {
        let Some(rule) = self.family.moe else {
            return Ok(None);
        };
        let Some(experts) = self.size(&["num_local_experts", "num_experts", "n_routed_experts"])? else {
            return Ok(None);
        };
        if experts == 0 {
            return Ok(None);
        }
        let intermediate = self.need_size(&["moe_intermediate_size", "intermediate_size"])?;
        let shared = match rule.shared {
            SharedRule::Never => None,
            SharedRule::Gated => Some(SharedExpert {
                intermediate: self.need_size(&["shared_expert_intermediate_size"])?,
                gated: true,
            }),
            SharedRule::Count => {
                let count = self.size(&["n_shared_experts"])?.unwrap_or(0);
                (count > 0).then(|| SharedExpert {
                    intermediate: count.saturating_mul(intermediate),
                    gated: false,
                })
            }
        };
        let groups = match (self.size(&["n_group"])?, self.size(&["topk_group"])?) {
            (Some(count), Some(top_k)) if count > 1 => Some(ExpertGroups { count, top_k }),
            _ => None,
        };
        Ok(Some(MoeConfig {
            experts,
            top_k: self.need_size(&["num_experts_per_tok"])?,
            intermediate,
            scoring: rule.scoring,
            normalize: if self.get(&["norm_topk_prob"]).is_some() {
                self.flag("norm_topk_prob")?
            } else {
                rule.normalize
            },
            scale: self.number(&["routed_scaling_factor"])?.unwrap_or(1.0) as f32,
            correction_bias: rule.correction_bias,
            groups,
            shared,
            bias: rule.bias,
        }))
    }

    fn rope(&self, head_dim: usize) -> Result<RopeConfig> {
        let parameters = self.json.get("rope_parameters").filter(|value| value.is_object());
        // Gemma 3 keeps one object per layer type.
        let by_type = |kind: &str| {
            parameters
                .and_then(|p| p.get(kind))
                .filter(|value| value.is_object())
        };
        let full = by_type("full_attention").or(parameters);
        let base_of = |p: Option<&Value>| {
            p.and_then(|p| p.get("rope_theta"))
                .map(|v| number("rope_theta", v))
                .transpose()
        };
        let base = match base_of(full)? {
            Some(base) => base,
            None => self.number(&["rope_theta"])?.unwrap_or(10_000.0),
        };
        let scaling = full.or_else(|| {
            let given = self.json.get("rope_scaling");
            given
                .or_else(|| self.defaults.get("rope_scaling"))
                .filter(|value| value.is_object() || value.is_string())
        });
        let global = RopeFrequencies {
            base,
            scaling: self.scaling(scaling)?,
        };
        let local_base = match base_of(by_type("sliding_attention"))? {
            Some(base) => Some(base),
            None => self.number(&["rope_local_base_freq"])?,
        };
        let fraction = full
            .and_then(|p| p.get("partial_rotary_factor"))
            .map(|v| number("partial_rotary_factor", v))
            .transpose()?;
        let fraction = match fraction {
            Some(fraction) => fraction,
            None => self.number(&["partial_rotary_factor"])?.unwrap_or(1.0),
        };
        Ok(RopeConfig {
            dims: (head_dim as f64 * fraction) as usize,
            style: RopeStyle::Half,
            global,
            local: local_base.map(|base| RopeFrequencies {
                base,
                scaling: RopeScaling::None,
            }),
        })
    }

    fn scaling(&self, object: Option<&Value>) -> Result<RopeScaling> {
        let Some(object) = object else {
            return Ok(RopeScaling::None);
        };
        let get = |key: &str| {
            object
                .get(key)
                .filter(|value| !value.is_null())
                .map(|value| number(key, value))
                .transpose()
        };
        let need = |key: &str| get(key)?.ok_or_else(|| bad(&format!("rope_scaling.{key}"), "missing"));
        let original = || match get("original_max_position_embeddings")? {
            Some(context) => Ok(context),
            None => self
                .need_size(&["max_position_embeddings"])
                .map(|context| context as f64),
        };
        let kind = object
            .get("rope_type")
            .or_else(|| object.get("type"))
            .and_then(Value::as_str);
        match kind.unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: need("factor")?,
            }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: original()?,
            }),
            "yarn" => {
                let factor = need("factor")?;
                let attention_factor =
                    match (get("attention_factor")?, get("mscale")?, get("mscale_all_dim")?) {
                        (Some(given), _, _) => given,
                        (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                            yarn_mscale(factor, m) / yarn_mscale(factor, all)
                        }
                        _ => yarn_mscale(factor, 1.0),
                    };
                Ok(RopeScaling::Yarn {
                    factor,
                    original_context: original()?,
                    beta_fast: get("beta_fast")?.unwrap_or(32.0),
                    beta_slow: get("beta_slow")?.unwrap_or(1.0),
                    attention_factor,
                    truncate: object.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                })
            }
            other => Err(self.unsupported(format!("rope scaling \"{other}\""))),
        }
    }
}

/// Entropy correction of YaRN: `0.1·m·ln s + 1`.
pub(super) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

fn number(key: &str, value: &Value) -> Result<f64> {
    value
        .as_f64()
        .ok_or_else(|| bad(key, &format!("{value} is not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96})
    }

    #[test]
    fn llama_with_defaults() {
        let config = ModelConfig::from_hf(&llama()).unwrap();
        assert_eq!(config.attention.head_dim, 16);
        assert_eq!(config.attention.scale, 0.25);
        assert!(!config.attention.qkv_bias && !config.tie_embeddings);
        let round: ModelConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(round, config);
        let packed = json!({"nashswarm_model": config});
        assert_eq!(ModelConfig::from_packed(&packed).unwrap(), config);
    }

    #[test]
    fn errors_name_the_key() {
        let without = |key: &str| {
            let mut value = llama();
            value.as_object_mut().unwrap().remove(key);
            ModelConfig::from_hf(&value).unwrap_err().to_string()
        };
        assert!(without("hidden_size").contains("hidden_size"));
        assert!(without("model_type").contains("model_type"));
        let with = |key: &str, v: Value| {
            let mut value = llama();
            value[key] = v;
            ModelConfig::from_hf(&value).unwrap_err().to_string()
        };
        assert!(with("hidden_size", json!("many")).contains("whole number"));
        assert!(with("hidden_size", json!(1u64 << 62)).contains("hidden_size"));
        assert!(with("num_key_value_heads", json!(3)).contains("cannot share"));
        assert!(with("num_attention_heads", json!(0)).contains("head_dim"));
        assert!(with("num_hidden_layers", json!(0)).contains("layers"));
        assert!(with("hidden_act", json!("mish")).contains("mish"));
        assert!(with("rope_scaling", json!({"rope_type": "longrope"})).contains("longrope"));
        assert!(with("rope_scaling", json!({"rope_type": "linear"})).contains("factor"));
        assert!(with("model_type", json!("rwkv")).contains("known:"));
    }

    #[test]
    fn opt_350m_is_refused_by_name() {
        let opt = json!({"model_type": "opt", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 32});
        let error = ModelConfig::from_hf(&opt).unwrap_err().to_string();
        assert!(error.contains("word_embed_proj_dim 32"), "{error}");
    }

    #[test]
    fn gemma3_multimodal_file_with_few_keys() {
        let gemma = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}});
        let config = ModelConfig::from_hf(&gemma).unwrap();
        let sliding = config.layers.iter().filter(|layer| layer.sliding).count();
        assert_eq!(
            (sliding, config.layers[5].sliding, config.attention.window),
            (29, false, Some(1024))
        );
        let Positions::Rope(rope) = config.positions else {
            panic!("rope")
        };
        assert_eq!(rope.global.scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(rope.local.unwrap().base, 10_000.0);
        assert!(config.tie_embeddings);
    }

    #[test]
    fn both_spellings_of_the_rope_keys() {
        let with = |changes: Value| {
            let mut value = llama();
            value
                .as_object_mut()
                .unwrap()
                .extend(changes.as_object().unwrap().clone());
            ModelConfig::from_hf(&value).unwrap()
        };
        let scaling = json!({"rope_type": "linear", "factor": 4.0});
        let old = with(json!({"rope_theta": 5e5, "rope_scaling": scaling}));
        let new = with(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}));
        assert_eq!(old, new);
        let Positions::Rope(rope) = old.positions else {
            panic!("rope")
        };
        assert_eq!((rope.global.base, rope.dims), (5e5, 16));
        assert_eq!(rope.global.scaling, RopeScaling::Linear { factor: 4.0 });
        // The oldest files name the kind `type`.
        let oldest = with(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
        let Positions::Rope(rope) = oldest.positions else {
            panic!("rope")
        };
        assert_eq!(rope.global.scaling, RopeScaling::Linear { factor: 4.0 });

        let gemma = json!({"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 6, "rope_parameters": {
                "full_attention": {"rope_theta": 7e5, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 9e3, "rope_type": "default"}}});
        let Positions::Rope(rope) = ModelConfig::from_hf(&gemma).unwrap().positions else {
            panic!("rope")
        };
        assert_eq!((rope.global.base, rope.local.unwrap().base), (7e5, 9e3));
        assert_eq!(rope.global.scaling, RopeScaling::Linear { factor: 8.0 });
    }
}
