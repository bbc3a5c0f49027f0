//! The table of architectures: what each family means by its configuration keys and tensor names.
//!
//! Adding an architecture that recombines known blocks is one more [`Family`] row here, and rows in the name
//! tables of [`crate::names`] where its tensors are called differently.

use super::{Activation, NormKind, NormPlacement, RopeStyle, Scoring};
use crate::error::{ModelError, Result};
use crate::names::{self, HfNames};

/// Whether a projection has a bias.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BiasRule {
    Never,
    Always,
    /// As this boolean key of `config.json` says (absent: no).
    Key(&'static str),
}

/// Whether queries and keys are normed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum QkNormRule {
    Never,
    PerHead,
    Full,
    /// Per head, if this key of `config.json` is true.
    Key(&'static str),
}

/// Which layers slide where no `layer_types` says so.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WindowRule {
    /// None ever.
    Never,
    /// All, if a window is given.
    All,
    /// Layers from `max_window_layers` on, if a window is given.
    FromLayer,
    /// All but every n-th, n from `sliding_window_pattern` or this.
    AllButEvery(usize),
}

/// How the width of the shared expert is given.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SharedRule {
    Never,
    /// `shared_expert_intermediate_size`, with a sigmoid gate.
    Gated,
    /// `n_shared_experts` times the width of an expert.
    Count,
}

/// Meaning of the mixture-of-experts keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MoeRule {
    pub(crate) scoring: Scoring,
    /// Where no key says otherwise.
    pub(crate) normalize: bool,
    pub(crate) correction_bias: bool,
    /// The router and the experts have biases.
    pub(crate) bias: bool,
    pub(crate) shared: SharedRule,
}

/// One architecture.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) name: &'static str,
    /// Values of `model_type`.
    pub(crate) hf: &'static [&'static str],
    /// Values of `general.architecture`.
    pub(crate) gguf: &'static [&'static str],
    pub(crate) norm: NormKind,
    pub(crate) placement: NormPlacement,
    /// Hugging Face stores norm weights minus one (GGUF files do not).
    pub(crate) hf_norm_minus_one: bool,
    /// `None`: rope; `Some(offset)`: learned positions.
    pub(crate) learned_positions: Option<usize>,
    /// Rotation style of GGUF files; Hugging Face files always use halves.
    pub(crate) gguf_rope: RopeStyle,
    pub(crate) gated: bool,
    pub(crate) activation: Activation,
    pub(crate) qkv_bias: BiasRule,
    pub(crate) out_bias: BiasRule,
    pub(crate) mlp_bias: BiasRule,
    pub(crate) qk_norm: QkNormRule,
    pub(crate) window: WindowRule,
    /// Attention has sinks.
    pub(crate) sinks: bool,
    /// In GGUF files, which do not say, the ramp of YaRN ends at whole dimensions.
    pub(crate) yarn_truncates: bool,
    /// Embeddings are multiplied by √d.
    pub(crate) scale_embedding: bool,
    pub(crate) moe: Option<MoeRule>,
    /// Values of keys that a `config.json` may leave out: those of the configuration classes of `transformers`.
    pub(crate) defaults: &'static str,
    pub(crate) names: &'static HfNames,
    /// The `quant_method` of folders whose weights the names can find.
    pub(crate) hf_quantizer: Option<&'static str>,
}

const LLAMA: Family = Family {
    name: "llama",
    hf: &["llama", "smollm", "smollm2"],
    gguf: &["llama"],
    norm: NormKind::Rms,
    placement: NormPlacement::Before,
    hf_norm_minus_one: false,
    learned_positions: None,
    gguf_rope: RopeStyle::Interleaved,
    gated: true,
    activation: Activation::Silu,
    qkv_bias: BiasRule::Key("attention_bias"),
    out_bias: BiasRule::Key("attention_bias"),
    mlp_bias: BiasRule::Key("mlp_bias"),
    qk_norm: QkNormRule::Never,
    window: WindowRule::Never,
    sinks: false,
    yarn_truncates: true,
    scale_embedding: false,
    moe: None,
    defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "max_position_embeddings": 2048}"#,
    names: &names::LLAMA,
    hf_quantizer: None,
};

const QWEN_DEFAULTS: &str = r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
    "max_position_embeddings": 32768, "use_sliding_window": false, "max_window_layers": 28,
    "decoder_sparse_step": 1, "norm_topk_prob": false}"#;

const QWEN2: Family = Family {
    name: "qwen2",
    hf: &["qwen2"],
    gguf: &["qwen2"],
    gguf_rope: RopeStyle::Half,
    qkv_bias: BiasRule::Always,
    out_bias: BiasRule::Never,
    mlp_bias: BiasRule::Never,
    window: WindowRule::FromLayer,
    defaults: QWEN_DEFAULTS,
    ..LLAMA
};

const QWEN3: Family = Family {
    name: "qwen3",
    hf: &["qwen3"],
    gguf: &["qwen3"],
    qkv_bias: BiasRule::Key("attention_bias"),
    out_bias: BiasRule::Key("attention_bias"),
    qk_norm: QkNormRule::PerHead,
    ..QWEN2
};

const GEMMA: Family = Family {
    name: "gemma",
    hf: &["gemma"],
    gguf: &["gemma"],
    hf_norm_minus_one: true,
    gguf_rope: RopeStyle::Half,
    activation: Activation::GeluTanh,
    mlp_bias: BiasRule::Never,
    scale_embedding: true,
    defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "max_position_embeddings": 8192, "head_dim": 256}"#,
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    hf: &["gemma2"],
    gguf: &["gemma2"],
    placement: NormPlacement::Sandwich,
    window: WindowRule::AllButEvery(2),
    defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true, "sliding_window": 4096,
        "max_position_embeddings": 8192, "vocab_size": 256000, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0}"#,
    names: &names::SANDWICH,
    ..GEMMA
};

const GEMMA3: Family = Family {
    name: "gemma3",
    hf: &["gemma3_text", "gemma3"],
    gguf: &["gemma3"],
    qk_norm: QkNormRule::PerHead,
    window: WindowRule::AllButEvery(6),
    defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": true, "sliding_window": 4096, "max_position_embeddings": 131072,
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256}"#,
    ..GEMMA2
};

const MOE: MoeRule = MoeRule {
    scoring: Scoring::Softmax,
    normalize: false,
    correction_bias: false,
    bias: false,
    shared: SharedRule::Never,
};

/// Every architecture that can be loaded.
pub(crate) const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        name: "mistral",
        hf: &["mistral"],
        gguf: &["mistral"],
        window: WindowRule::All,
        defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8}"#,
        ..LLAMA
    },
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    Family {
        name: "gpt2",
        hf: &["gpt2"],
        gguf: &["gpt2"],
        norm: NormKind::Layer,
        learned_positions: Some(0),
        gated: false,
        activation: Activation::GeluTanh,
        qkv_bias: BiasRule::Always,
        out_bias: BiasRule::Always,
        mlp_bias: BiasRule::Always,
        defaults: r#"{"layer_norm_epsilon": 1e-5, "tie_word_embeddings": true, "n_positions": 1024}"#,
        names: &names::GPT2,
        ..LLAMA
    },
    Family {
        name: "opt",
        hf: &["opt"],
        gguf: &[],
        norm: NormKind::Layer,
        learned_positions: Some(2),
        gated: false,
        activation: Activation::Relu,
        qkv_bias: BiasRule::Key("enable_bias"),
        out_bias: BiasRule::Key("enable_bias"),
        mlp_bias: BiasRule::Key("enable_bias"),
        // The epsilon is that of torch's LayerNorm; OPT has no key for it.
        defaults: r#"{"layer_norm_eps": 1e-5, "tie_word_embeddings": true, "max_position_embeddings": 2048,
            "enable_bias": true, "layer_norm_elementwise_affine": true}"#,
        names: &names::OPT,
        ..LLAMA
    },
    Family {
        name: "mixtral",
        hf: &["mixtral"],
        gguf: &["mixtral"],
        qkv_bias: BiasRule::Never,
        out_bias: BiasRule::Never,
        window: WindowRule::All,
        moe: Some(MoeRule {
            normalize: true,
            ..MOE
        }),
        defaults: r#"{"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "num_local_experts": 8,
            "num_experts_per_tok": 2}"#,
        ..LLAMA
    },
    Family {
        name: "qwen2_moe",
        hf: &["qwen2_moe"],
        gguf: &["qwen2moe"],
        qkv_bias: BiasRule::Key("qkv_bias"),
        window: WindowRule::All,
        moe: Some(MoeRule {
            shared: SharedRule::Gated,
            ..MOE
        }),
        defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "qkv_bias": true,
            "max_position_embeddings": 32768, "use_sliding_window": false, "decoder_sparse_step": 1,
            "norm_topk_prob": false, "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 5632}"#,
        ..QWEN2
    },
    Family {
        name: "qwen3_moe",
        hf: &["qwen3_moe"],
        gguf: &["qwen3moe"],
        window: WindowRule::All,
        // GGUF files do not say it; every released model does. In config.json the default is no.
        moe: Some(MoeRule {
            normalize: true,
            ..MOE
        }),
        ..QWEN3
    },
    Family {
        name: "olmoe",
        hf: &["olmoe"],
        gguf: &["olmoe"],
        gguf_rope: RopeStyle::Half,
        qk_norm: QkNormRule::Full,
        moe: Some(MOE),
        defaults: r#"{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false}"#,
        ..LLAMA
    },
    Family {
        name: "deepseek",
        hf: &["deepseek"],
        gguf: &["deepseek"],
        moe: Some(MoeRule {
            shared: SharedRule::Count,
            ..MOE
        }),
        ..LLAMA
    },
    Family {
        name: "dots1",
        hf: &["dots1"],
        gguf: &["dots1"],
        gguf_rope: RopeStyle::Half,
        qk_norm: QkNormRule::PerHead,
        window: WindowRule::FromLayer,
        moe: Some(MoeRule {
            scoring: Scoring::Sigmoid,
            correction_bias: true,
            shared: SharedRule::Count,
            ..MOE
        }),
        defaults: r#"{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 2048, "max_window_layers": 62, "norm_topk_prob": false}"#,
        ..LLAMA
    },
    Family {
        name: "glm4_moe",
        hf: &["glm4_moe"],
        gguf: &["glm4moe"],
        gguf_rope: RopeStyle::Half,
        out_bias: BiasRule::Never,
        qk_norm: QkNormRule::Key("use_qk_norm"),
        moe: Some(MoeRule {
            scoring: Scoring::Sigmoid,
            normalize: true,
            correction_bias: true,
            shared: SharedRule::Count,
            ..MOE
        }),
        defaults: r#"{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "norm_topk_prob": true,
            "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 8}"#,
        ..LLAMA
    },
    Family {
        name: "gpt_oss",
        hf: &["gpt_oss"],
        gguf: &["gpt-oss"],
        gguf_rope: RopeStyle::Half,
        activation: Activation::ClampedSwiglu,
        window: WindowRule::AllButEvery(2),
        sinks: true,
        yarn_truncates: false,
        // A softmax over the chosen experts is one over all of them, normalized.
        moe: Some(MoeRule {
            normalize: true,
            bias: true,
            ..MOE
        }),
        defaults: r#"{"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 131072, "attention_bias": true, "head_dim": 64, "num_key_value_heads": 8,
            "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": false, "original_max_position_embeddings": 4096}}"#,
        names: &names::GPT_OSS,
        hf_quantizer: Some("mxfp4"),
        ..LLAMA
    },
];

/// Architectures that are known to need what the forward pass has not.
const REFUSED: &[(&str, &str)] = &[
    ("deepseek_v2", LATENT),
    ("deepseek_v3", LATENT),
    ("deepseek2", LATENT),
    ("kimi_k2", LATENT),
    ("glm4_moe_lite", LATENT),
];
const LATENT: &str = "multi-head latent attention (MLA)";

impl Family {
    /// The family of a `model_type`.
    ///
    /// # Errors
    /// [`ModelError::UnknownArchitecture`] with the list of known ones; [`ModelError::Unsupported`] with what is missing.
    pub(crate) fn from_hf(model_type: &str) -> Result<&'static Self> {
        Self::find(model_type, |family| family.hf)
    }

    /// The family of a `general.architecture`.
    ///
    /// # Errors
    /// [`ModelError::UnknownArchitecture`] with the list of known ones; [`ModelError::Unsupported`] with what is missing.
    pub(crate) fn from_gguf(architecture: &str) -> Result<&'static Self> {
        Self::find(architecture, |family| family.gguf)
    }

    /// The family of this name, as [`super::ModelConfig::architecture`] holds it.
    ///
    /// # Errors
    /// [`ModelError::UnknownArchitecture`] with the list of known ones.
    pub(crate) fn named(name: &str) -> Result<&'static Self> {
        FAMILIES.iter().find(|family| family.name == name).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
            ModelError::UnknownArchitecture {
                found: name.to_owned(),
                known: known.join(", "),
            }
        })
    }

    fn find(name: &str, names: impl Fn(&Self) -> &'static [&'static str]) -> Result<&'static Self> {
        if let Some((_, what)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            return Err(ModelError::Unsupported {
                architecture: name.to_owned(),
                what: (*what).to_owned(),
            });
        }
        FAMILIES
            .iter()
            .find(|family| names(family).contains(&name))
            .ok_or_else(|| {
                let known: Vec<&str> = FAMILIES.iter().flat_map(&names).copied().collect();
                ModelError::UnknownArchitecture {
                    found: name.to_owned(),
                    known: known.join(", "),
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_defaults_parse() {
        let mut seen = std::collections::BTreeSet::new();
        for family in FAMILIES {
            assert!(seen.insert(family.name), "{} twice", family.name);
            let defaults: serde_json::Value = serde_json::from_str(family.defaults).unwrap();
            assert!(defaults.is_object(), "{}", family.name);
        }
    }

    #[test]
    fn unknown_architecture_lists_the_known_ones() {
        let error = Family::from_hf("mamba").unwrap_err().to_string();
        assert!(
            error.contains("mamba") && error.contains("llama") && error.contains("qwen2_moe"),
            "{error}"
        );
        assert!(Family::from_gguf("opt").is_err(), "there is no GGUF form of OPT");
        for refused in [Family::from_hf("deepseek_v3"), Family::from_gguf("deepseek2")] {
            let error = refused.unwrap_err().to_string();
            assert!(
                error.contains("deepseek") && error.contains("latent attention"),
                "{error}"
            );
        }
    }
}
