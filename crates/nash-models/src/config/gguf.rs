//! Configuration from GGUF metadata and, where the metadata is silent, from the shapes of the tensors.
//!
//! Follows what llama.cpp reads (`src/models/*.cpp`), its built-in constants included.

use nash_core::Gguf;
use nash_core::gguf::{Array, Value};

use super::family::{Family, QkNormRule, SharedRule, WindowRule};
use super::hf::yarn_mscale;
use super::{
    AttentionConfig, ExpertGroups, LayerConfig, MlpConfig, ModelConfig, MoeConfig, NormConfig, NormKind,
    Positions, QkNorm, RopeConfig, RopeFrequencies, RopeScaling, Scoring, SharedExpert, check_layers,
};
use crate::error::{ModelError, Result};

impl ModelConfig {
    /// Reads the configuration of a GGUF file.
    ///
    /// # Errors
    /// Unknown architectures (listing the known ones), missing keys, absurd values.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let architecture = gguf.str("general.architecture")?;
        let family = gguf_family(gguf, architecture)?;
        let config = Keys {
            gguf,
            architecture,
            family,
        }
        .read()?;
        config.validate()?;
        Ok(config)
    }
}

/// The family of a GGUF file. Mixtral files call themselves `llama`.
pub(crate) fn gguf_family(gguf: &Gguf, architecture: &str) -> Result<&'static Family> {
    let has_experts = gguf
        .u64(&format!("{architecture}.expert_count"))
        .is_ok_and(|count| count > 0);
    match architecture {
        "llama" if has_experts => Family::from_gguf("mixtral"),
        _ => Family::from_gguf(architecture),
    }
}

/// Layers of Gemma 2 and 3 at 27B, the one size that scales scores by `hidden/heads` (llama.cpp decides the same way).
const GEMMA_27B_LAYERS: [(&str, usize); 2] = [("gemma2", 46), ("gemma3", 62)];

struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
    family: &'static Family,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A size, absent if the key is. Arrays (one value per layer) are accepted where all entries agree.
    fn size(&self, key: &str) -> Result<Option<usize>> {
        let key = self.key(key);
        let Some(value) = self.gguf.get(&key) else {
            return Ok(None);
        };
        if let Some(array) = value.as_array() {
            let sizes = array.to_i64s().unwrap_or_default();
            return match sizes
                .first()
                .map(|first| (usize::try_from(*first), sizes.iter().all(|s| s == first)))
            {
                Some((Ok(size), true)) => Ok(Some(size)),
                _ => Err(self.unsupported(format!("{key} that differs from layer to layer"))),
            };
        }
        Ok(Some(self.gguf.usize(&key)?))
    }

    fn need_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| ModelError::Config {
            key: self.key(key),
            problem: "missing".into(),
        })
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.gguf.get(&self.key(key)).and_then(|value| value.as_f64())
    }

    fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported {
            architecture: self.architecture.to_owned(),
            what,
        }
    }

    /// Shape of a tensor, outermost first.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.gguf.find(name).map(|tensor| tensor.shape.as_slice())
    }

    fn has(&self, name: &str) -> bool {
        self.gguf.find(name).is_some()
    }

    fn read(&self) -> Result<ModelConfig> {
        let family = self.family;
        let hidden_size = self.need_size("embedding_length")?;
        // Layers that predict further tokens (GLM-4.5) come last and are counted with the others.
        let further = self.size("nextn_predict_layers")?.unwrap_or(0);
        let num_layers = self.need_size("block_count")?.saturating_sub(further);
        check_layers(num_layers)?;
        let eps = match family.norm {
            NormKind::Rms => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        };
        let eps = self.number(eps).ok_or_else(|| ModelError::Config {
            key: self.key(eps),
            problem: "missing".into(),
        })?;
        let attention = self.attention(hidden_size, num_layers)?;
        let vocab_size = self
            .shape("token_embd.weight")
            .map(|shape| shape[0])
            .ok_or_else(|| ModelError::Config {
                key: "token_embd.weight".into(),
                problem: "missing: the vocabulary size is not known".into(),
            })?;
        let positions = match family.learned_positions {
            Some(offset) => Positions::Learned { offset },
            None => Positions::Rope(self.rope(attention.head_dim)?),
        };
        let context_length = match (family.learned_positions, self.shape("position_embd.weight")) {
            (Some(offset), Some(shape)) => shape[0].saturating_sub(offset),
            _ => self.need_size("context_length")?,
        };
        let layers = self.layers(num_layers, attention.window)?;
        let moe = if layers.iter().any(|layer| layer.experts) {
            self.moe()?
        } else {
            None
        };
        let intermediate = match self.size("feed_forward_length")? {
            Some(size) => size,
            None => hidden_size.saturating_mul(4),
        };
        Ok(ModelConfig {
            architecture: family.name.to_owned(),
            vocab_size,
            hidden_size,
            context_length,
            norm: NormConfig {
                kind: family.norm,
                eps: eps as f32,
                placement: family.placement,
                final_norm: true,
            },
            positions,
            mlp: MlpConfig {
                intermediate,
                activation: family.activation,
                gated: family.gated,
                bias: self.has("blk.0.ffn_up.bias"),
            },
            moe,
            layers,
            attention,
            embedding_scale: if family.scale_embedding {
                (hidden_size as f32).sqrt()
            } else {
                1.0
            },
            tie_embeddings: !self.has("output.weight"),
            logit_softcap: self
                .number("final_logit_softcapping")
                .map(|cap| cap as f32)
                .filter(|cap| *cap > 0.0),
            vocab_parts: super::VocabParts::default(),
        })
    }

    fn attention(&self, hidden_size: usize, num_layers: usize) -> Result<AttentionConfig> {
        let heads = self.need_size("attention.head_count")?;
        let head_dim = match self.size("attention.key_length")? {
            Some(dim) => dim,
            None => hidden_size / heads.max(1),
        };
        if self
            .size("attention.value_length")?
            .is_some_and(|dim| dim != head_dim)
        {
            return Err(self.unsupported("value heads of another width than key heads".into()));
        }
        let qk_norm = match self.family.qk_norm {
            QkNormRule::Full => QkNorm::Full,
            _ if !self.has("blk.0.attn_q_norm.weight") => QkNorm::None,
            _ => QkNorm::PerHead,
        };
        let big_gemma = GEMMA_27B_LAYERS.contains(&(self.family.name, num_layers));
        let width = if big_gemma {
            (hidden_size / heads.max(1)) as f64
        } else {
            head_dim as f64
        };
        let scale = self.number("attention.scale").filter(|scale| *scale > 0.0);
        Ok(AttentionConfig {
            heads,
            kv_heads: self.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            scale: scale.unwrap_or_else(|| width.powf(-0.5)) as f32,
            qkv_bias: self.has("blk.0.attn_q.bias") || self.has("blk.0.attn_qkv.bias"),
            out_bias: self.has("blk.0.attn_output.bias"),
            qk_norm,
            softcap: self
                .number("attn_logit_softcapping")
                .map(|cap| cap as f32)
                .filter(|cap| *cap > 0.0),
            window: match self.size("attention.sliding_window")? {
                Some(0) => None,
                None if self.family.name == "gemma2" => Some(4096),
                window => window,
            },
            clip: self
                .number("attention.clamp_kqv")
                .map(|clip| clip as f32)
                .filter(|clip| *clip > 0.0),
            sinks: self.family.sinks,
        })
    }

    fn layers(&self, count: usize, window: Option<usize>) -> Result<Vec<LayerConfig>> {
        let key = self.key("attention.sliding_window_pattern");
        let pattern = self.gguf.get(&key);
        let flags = match pattern.and_then(Value::as_array) {
            Some(Array::Bool(flags)) => Some(flags),
            _ => None,
        };
        let every = pattern
            .and_then(|value| value.as_u64())
            .and_then(|n| usize::try_from(n).ok());
        if flags.is_some_and(|flags| flags.len() < count) {
            return Err(ModelError::Config {
                key,
                problem: format!("fewer than {count} entries"),
            });
        }
        Ok((0..count)
            .map(|layer| {
                let sliding = match (flags, self.family.window) {
                    (Some(flags), _) => flags[layer],
                    (None, WindowRule::AllButEvery(n)) => {
                        !(layer + 1).is_multiple_of(every.unwrap_or(n).max(1))
                    }
                    (None, _) => true,
                };
                LayerConfig {
                    top_k: None,
                    sliding: sliding && window.is_some(),
                    experts: self.has(&format!("blk.{layer}.ffn_gate_inp.weight")),
                }
            })
            .collect())
    }

    fn moe(&self) -> Result<Option<MoeConfig>> {
        let Some(rule) = self.family.moe else {
            return Err(self.unsupported("a mixture of experts".into()));
        };
        // Any layer with experts shows the widths that older files leave out of their metadata.
        let rows = |kind: &str| {
            let suffix = format!(".{kind}.weight");
            let tensor = self
                .gguf
                .tensors()
                .iter()
                .find(|tensor| tensor.name.ends_with(&suffix));
            tensor
                .and_then(|tensor| tensor.shape.iter().rev().nth(1))
                .copied()
        };
        let intermediate = match self
            .size("expert_feed_forward_length")?
            .or_else(|| rows("ffn_up_exps"))
        {
            Some(size) => size,
            None => self.need_size("feed_forward_length")?,
        };
        let shared = match rule.shared {
            SharedRule::Never => None,
            SharedRule::Gated | SharedRule::Count => rows("ffn_up_shexp").map(|intermediate| SharedExpert {
                intermediate,
                gated: matches!(rule.shared, SharedRule::Gated),
            }),
        };
        let scoring = match self.size("expert_gating_func")? {
            None | Some(0) => rule.scoring,
            Some(1) => Scoring::Softmax,
            Some(2) => Scoring::Sigmoid,
            Some(other) => return Err(self.unsupported(format!("expert gating function {other}"))),
        };
        let groups = match (
            self.size("expert_group_count")?,
            self.size("expert_group_used_count")?,
        ) {
            (Some(count), Some(top_k)) if count > 1 => Some(ExpertGroups { count, top_k }),
            _ => None,
        };
        let normalize = self
            .gguf
            .get(&self.key("expert_weights_norm"))
            .and_then(|value| value.as_bool());
        let scale = self.number("expert_weights_scale").filter(|scale| *scale != 0.0);
        Ok(Some(MoeConfig {
            experts: self.need_size("expert_count")?,
            top_k: self.need_size("expert_used_count")?,
            intermediate,
            scoring,
            normalize: normalize.unwrap_or(rule.normalize),
            scale: scale.unwrap_or(1.0) as f32,
            correction_bias: self.gguf.names().any(|name| name.ends_with(".exp_probs_b.bias")),
            groups,
            shared,
            bias: rule.bias,
        }))
    }

    fn rope(&self, head_dim: usize) -> Result<RopeConfig> {
        let base = self.number("rope.freq_base").unwrap_or(10_000.0);
        let local = match (self.family.name, self.number("rope.freq_base_swa")) {
            (_, Some(base)) => Some(base),
            ("gemma3", None) => Some(10_000.0),
            _ => None,
        };
        let scaling = self.scaling()?;
        Ok(RopeConfig {
            dims: self.size("rope.dimension_count")?.unwrap_or(head_dim),
            style: self.family.gguf_rope,
            local: local.map(|base| RopeFrequencies {
                base,
                scaling: if self.family.name == "gpt_oss" {
                    scaling.clone()
                } else {
                    RopeScaling::None
                },
            }),
            global: RopeFrequencies { base, scaling },
        })
    }

    fn scaling(&self) -> Result<RopeScaling> {
        if let Some(tensor) = self.gguf.find("rope_freqs.weight") {
            return Ok(RopeScaling::Factors(tensor.to_f32()?));
        }
        let kind = self
            .gguf
            .get(&self.key("rope.scaling.type"))
            .and_then(|value| value.as_str());
        // Old files have only a linear scale, under another key.
        let factor = self
            .number("rope.scaling.factor")
            .or_else(|| self.number("rope.scale_linear"));
        let factor = factor.filter(|factor| *factor > 0.0);
        match (kind.unwrap_or("linear"), factor) {
            ("none", _) | ("linear", None) => Ok(RopeScaling::None),
            ("linear", Some(1.0)) => Ok(RopeScaling::None),
            ("linear", Some(factor)) => Ok(RopeScaling::Linear { factor }),
            ("yarn", factor) => {
                let factor = factor.unwrap_or(1.0);
                let original = match self.number("rope.scaling.original_context_length") {
                    Some(context) => context,
                    None => self.need_size("context_length")? as f64,
                };
                let given = self.number("rope.scaling.attn_factor").unwrap_or(1.0);
                Ok(RopeScaling::Yarn {
                    factor,
                    original_context: original,
                    beta_fast: self.number("rope.scaling.yarn_beta_fast").unwrap_or(32.0),
                    beta_slow: self.number("rope.scaling.yarn_beta_slow").unwrap_or(1.0),
                    attention_factor: given * yarn_mscale(factor, 1.0),
                    truncate: self.family.yarn_truncates,
                })
            }
            (other, _) => Err(self.unsupported(format!("rope scaling \"{other}\""))),
        }
    }
}
