//! What a decoder language model is, as data.
//!
//! [`ModelConfig`] holds everything the forward pass needs and nothing about files. It is read from a Hugging
//! Face `config.json` ([`ModelConfig::from_hf`]), from GGUF metadata ([`ModelConfig::from_gguf`]) or back from a
//! packed folder ([`ModelConfig::from_packed`]); the table in [`family`] says what each architecture means by its
//! keys. Two sources of one model give configurations that differ only in the rope style.

mod family;
mod gguf;
mod hf;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};
pub(crate) use family::Family;
pub(crate) use gguf::gguf_family;
pub(crate) use hf::is_stored;

/// The key of `config.json` under which folders that this program wrote keep their [`ModelConfig`].
pub const STORED_KEY: &str = "nashswarm_model";

/// A decoder-only transformer. Sizes are element counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Family name of the table, such as `llama` or `gemma3`.
    pub architecture: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Positions the model was trained for; longer runs are the caller's risk (and an error with learned positions).
    pub context_length: usize,
    /// Normalisation.
    pub norm: NormConfig,
    /// How positions enter.
    pub positions: Positions,
    /// Attention, the same for every layer but for [`LayerConfig::sliding`].
    pub attention: AttentionConfig,
    /// The dense feed-forward block.
    pub mlp: MlpConfig,
    /// The mixture of experts of the layers with [`LayerConfig::experts`].
    pub moe: Option<MoeConfig>,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
    /// Embeddings are multiplied by this (Gemma: √d), 1 elsewhere.
    pub embedding_scale: f32,
    /// The output matrix is the embedding.
    pub tie_embeddings: bool,
    /// Logits become `cap·tanh(logit/cap)`.
    pub logit_softcap: Option<f32>,
    /// The parts that embedding and output matrix are cut into, each a linear of its own.
    #[serde(default, skip_serializing_if = "VocabParts::is_whole")]
    pub vocab_parts: VocabParts,
}

/// How the matrices with a row per token, `[V, d]`, are cut. Rows are in order of merges, so a range of rows has tokens of like frequency; a few
/// channels of the residual stream carry most of its energy, and their columns deserve more exact weights.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocabParts {
    /// Rows of the ranges, in order of the rows; empty if rows are not cut.
    #[serde(default)]
    pub ranges: Vec<usize>,
    /// Columns that are stored apart from the others, ascending; empty if columns are not cut.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outliers: Vec<u32>,
}

/// A segment of the columns of a vocabulary's matrix.
pub(crate) struct Segment {
    pub(crate) outliers: bool,
    /// `None` for all.
    pub(crate) columns: Option<Arc<[u32]>>,
}

impl VocabParts {
    /// Nothing is cut.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.ranges.is_empty() && self.outliers.is_empty()
    }

    /// The segments of a matrix of `d` columns, outliers first.
    pub(crate) fn segments(&self, d: usize) -> Vec<Segment> {
        let segment = |outliers, columns| Segment { outliers, columns };
        if self.outliers.is_empty() {
            return vec![segment(false, None)];
        }
        let others = (0..d as u32).filter(|c| self.outliers.binary_search(c).is_err());
        vec![
            segment(true, Some(self.outliers.as_slice().into())),
            segment(false, Some(others.collect())),
        ]
    }

    fn fits(&self, vocab: usize, d: usize) -> bool {
        let ranges = &self.ranges;
        let rows = ranges.iter().fold(0usize, |sum, &rows| sum.saturating_add(rows));
        let ascending = self.outliers.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = self.outliers.last().is_none_or(|&last| (last as usize) < d);
        (ranges.is_empty() || (ranges.len() <= 64 && !ranges.contains(&0) && rows == vocab))
            && (ascending && inside && self.outliers.len() < d)
    }
}

/// Normalisation of the residual stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NormConfig {
    /// Kind.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
    /// Where it stands.
    pub placement: NormPlacement,
    /// There is one more before the output matrix.
    pub final_norm: bool,
}

/// Kind of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / √(mean x² + ε) · w` (Zhang & Sennrich 2019).
    Rms,
    /// `(x − mean) / √(var + ε) · w + b`.
    Layer,
}

/// Where the norms of a layer stand; `f` is attention or the feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// `x + f(norm(x))`.
    Before,
    /// `x + norm'(f(norm(x)))` (Gemma 2 and 3).
    Sandwich,
    /// `norm(x + f(x))` (OPT-350M).
    AfterResidual,
}

/// How positions enter the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Rotary embedding of queries and keys.
    Rope(RopeConfig),
    /// A learned vector per position is added to the embedding.
    Learned {
        /// Position 0 reads this row of the table (OPT: 2).
        offset: usize,
    },
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// The first `dims` of each head rotate, an even number.
    pub dims: usize,
    /// Which two elements form a pair.
    pub style: RopeStyle,
    /// Frequencies of the layers with full attention.
    pub global: RopeFrequencies,
    /// Frequencies of the sliding layers where they differ (Gemma 3).
    pub local: Option<RopeFrequencies>,
}

/// Which two elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeStyle {
    /// Elements j and j + dims/2 (Hugging Face, GPT-NeoX).
    Half,
    /// Elements 2j and 2j + 1 (Meta's llama; GGUF files of the `llama` family have their rows permuted for it).
    Interleaved,
}

/// Rotation frequencies: `base^(−2j/dims)`, then scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeFrequencies {
    /// θ.
    pub base: f64,
    /// Change for longer contexts.
    pub scaling: RopeScaling,
}

/// Context extension by changed frequencies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: long waves divided, short waves kept, a ramp between.
    Llama3 {
        /// Divisor of the long waves.
        factor: f64,
        /// Waves longer than `original_context / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Waves shorter than `original_context / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context before extension.
        original_context: f64,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Divisor of the long waves.
        factor: f64,
        /// Context before extension.
        original_context: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// cos and sin are multiplied by this.
        attention_factor: f64,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
    },
    /// Frequency j divided by `factors[j]` (GGUF tensor `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttentionConfig {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub out_bias: bool,
    /// Norm of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// Scores become `cap·tanh(score/cap)`.
    pub softcap: Option<f32>,
    /// Sliding layers see the last `window` positions, their own included.
    pub window: Option<usize>,
    /// Queries, keys and values are clamped to ±clip (OLMo).
    pub clip: Option<f32>,
    /// Each head has a learned score that takes its share of the softmax and has no value (gpt-oss).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sinks: bool,
}

/// Norm of queries and keys (RMS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head, weight `[head_dim]` (Qwen3, Gemma 3).
    PerHead,
    /// Over all heads at once, weight `[heads·head_dim]` (OLMoE).
    Full,
}

/// Feed-forward block: `down(act(gate(x)) ∘ up(x))` or `down(act(up(x)))`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MlpConfig {
    /// Inner width.
    pub intermediate: usize,
    /// Nonlinearity.
    pub activation: Activation,
    /// With a gate.
    pub gated: bool,
    /// With biases.
    pub bias: bool,
}

/// Nonlinearity of the feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x·σ(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU by the error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `x·σ(1.702·x)` with `x` at most 7; the gated product is with `up` clamped to ±7, plus 1 (gpt-oss, in experts only).
    ClampedSwiglu,
}

/// Mixture of experts with plain top-k routing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoeConfig {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Inner width of an expert.
    pub intermediate: usize,
    /// Router scores to probabilities.
    pub scoring: Scoring,
    /// The chosen experts' probabilities are divided by their sum.
    pub normalize: bool,
    /// The mixing weights are multiplied by this.
    pub scale: f32,
    /// A bias per expert is added for the choice, not for the mixing weights (DeepSeek-V3).
    pub correction_bias: bool,
    /// Only the best groups of experts may be chosen (DeepSeek-V3).
    pub groups: Option<ExpertGroups>,
    /// Expert that sees every token.
    pub shared: Option<SharedExpert>,
    /// The router and the routed experts have biases (gpt-oss).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
}

/// Router scores to probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// The logits rank the experts, and each chosen one counts with weight 1: experts that were parts of one dense block.
    Unit,
}

/// Group-limited routing: a group's score is the sum of its two best experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertGroups {
    /// Groups of equal size.
    pub count: usize,
    /// Groups allowed per token.
    pub top_k: usize,
}

/// Expert that sees every token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedExpert {
    /// Inner width.
    pub intermediate: usize,
    /// Its output is multiplied by `σ(w·x)` (Qwen2-MoE).
    pub gated: bool,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// Attention is limited to [`AttentionConfig::window`].
    pub sliding: bool,
    /// The feed-forward block is the mixture of experts.
    pub experts: bool,
    /// Experts per token in this layer, if not [`MoeConfig::top_k`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
}

impl ModelConfig {
    /// Reads the configuration that the packer wrote into `config.json` under `nashswarm_model`.
    ///
    /// # Errors
    /// The key is missing or does not hold a consistent configuration.
    pub fn from_packed(config_json: &serde_json::Value) -> Result<Self> {
        let value = config_json.get(STORED_KEY).ok_or_else(|| ModelError::Config {
            key: "nashswarm_model".into(),
            problem: "missing from config.json; is this a packed model?".into(),
        })?;
        let config = Self::deserialize(value).map_err(|error| ModelError::Config {
            key: "nashswarm_model".into(),
            problem: error.to_string(),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Number of layers.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn q_dim(&self) -> usize {
        self.attention.heads * self.attention.head_dim
    }

    /// Width of all key heads together.
    #[must_use]
    pub fn kv_dim(&self) -> usize {
        self.attention.kv_heads * self.attention.head_dim
    }

    /// The window of a layer: how many positions it sees, its own included; `None` for all.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        if self.layers[layer].sliding {
            self.attention.window
        } else {
            None
        }
    }

    /// Bytes of KV cache per position (f16).
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * 2 * self.kv_dim() * self.num_layers()
    }

    /// Checks that the numbers fit together; every reader calls it, so that the forward pass need not.
    ///
    /// # Errors
    /// Names the first inconsistent value.
    pub fn validate(&self) -> Result<()> {
        let require = |ok: bool, key: &str, problem: String| {
            if ok {
                Ok(())
            } else {
                Err(ModelError::Config {
                    key: key.into(),
                    problem,
                })
            }
        };
        let sized = |key: &str, value: usize| {
            // Products of two sizes must stay far from overflow, also on files that lie.
            require(
                (1..=1 << 28).contains(&value),
                key,
                format!("{value} is not a sensible size"),
            )
        };
        sized("vocab_size", self.vocab_size)?;
        sized("hidden_size", self.hidden_size)?;
        sized("context_length", self.context_length)?;
        require(
            self.vocab_parts.fits(self.vocab_size, self.hidden_size),
            "vocab_parts",
            format!(
                "{:?} do not cut a matrix of {} rows and {} columns",
                self.vocab_parts, self.vocab_size, self.hidden_size
            ),
        )?;
        check_layers(self.layers.len())?;
        self.validate_attention(&require, &sized)?;
        require(
            self.norm.eps.is_finite() && self.norm.eps >= 0.0,
            "norm eps",
            format!("{} is not a small positive number", self.norm.eps),
        )?;
        require(
            self.embedding_scale.is_finite(),
            "embedding_scale",
            format!("{} is not finite", self.embedding_scale),
        )?;
        if self.layers.iter().any(|layer| !layer.experts) {
            sized("mlp intermediate size", self.mlp.intermediate)?;
            require(
                self.mlp.activation != Activation::ClampedSwiglu,
                "mlp activation",
                "a clamped SwiGLU outside of experts".into(),
            )?;
        }
        match &self.moe {
            Some(moe) => {
                let fits = |k: usize| (1..=moe.experts).contains(&k);
                require(
                    self.layers.iter().all(|layer| layer.top_k.is_none_or(fits)),
                    "experts per token of a layer",
                    format!("is not between 1 and {}", moe.experts),
                )?;
                require(
                    moe.scoring != Scoring::Unit || (!moe.normalize && moe.groups.is_none()),
                    "experts",
                    "of weight 1 are neither normalized nor in groups".into(),
                )?;
                require(
                    moe.experts.saturating_mul(self.layers.len()) <= 1 << 18,
                    "experts",
                    format!("{} in {} layers are too many", moe.experts, self.layers.len()),
                )?;
                moe.validate(&require, &sized)
            }
            None => require(
                self.layers.iter().all(|layer| !layer.experts),
                "layers",
                "a layer has experts, but the model has none".into(),
            ),
        }
    }

    fn validate_attention(
        &self,
        require: &impl Fn(bool, &str, String) -> Result<()>,
        sized: &impl Fn(&str, usize) -> Result<()>,
    ) -> Result<()> {
        let a = &self.attention;
        sized("attention heads", a.heads)?;
        sized("attention kv_heads", a.kv_heads)?;
        sized("head_dim", a.head_dim)?;
        require(
            a.heads <= 1 << 14 && a.head_dim <= 1 << 14,
            "attention heads",
            format!("{} heads of {} are too many", a.heads, a.head_dim),
        )?;
        require(
            a.heads.is_multiple_of(a.kv_heads),
            "attention heads",
            format!("{} query heads cannot share {} key heads", a.heads, a.kv_heads),
        )?;
        require(
            a.scale.is_finite(),
            "attention scale",
            format!("{} is not finite", a.scale),
        )?;
        require(
            a.window != Some(0),
            "attention window",
            "a window of 0 sees nothing".into(),
        )?;
        if let Positions::Rope(rope) = &self.positions {
            require(
                rope.dims.is_multiple_of(2) && (2..=a.head_dim).contains(&rope.dims),
                "rope dims",
                format!("{} of a head of {} cannot rotate", rope.dims, a.head_dim),
            )?;
            for frequencies in std::iter::once(&rope.global).chain(&rope.local) {
                require(
                    frequencies.base.is_finite() && frequencies.base > 0.0,
                    "rope base",
                    format!("{} is not positive", frequencies.base),
                )?;
                if let RopeScaling::Factors(factors) = &frequencies.scaling {
                    require(
                        factors.len() == rope.dims / 2 && factors.iter().all(|f| f.is_finite() && *f > 0.0),
                        "rope_freqs",
                        format!("{} factors for {} frequencies", factors.len(), rope.dims / 2),
                    )?;
                }
            }
        }
        Ok(())
    }
}

/// Refuses numbers of layers that no model has, before anything is made for each of them.
fn check_layers(count: usize) -> Result<()> {
    if (1..=4096).contains(&count) {
        return Ok(());
    }
    Err(ModelError::Config {
        key: "layers".into(),
        problem: format!("{count} is not a sensible number of layers"),
    })
}

impl MoeConfig {
    fn validate(
        &self,
        require: &impl Fn(bool, &str, String) -> Result<()>,
        sized: &impl Fn(&str, usize) -> Result<()>,
    ) -> Result<()> {
        sized("expert intermediate size", self.intermediate)?;
        require(
            (1..=1 << 16).contains(&self.experts) && (1..=self.experts).contains(&self.top_k),
            "experts",
            format!("cannot choose {} of {} experts", self.top_k, self.experts),
        )?;
        if let Some(shared) = self.shared {
            sized("shared expert intermediate size", shared.intermediate)?;
        }
        if let Some(groups) = self.groups {
            let fits = groups.count > 0
                && self.experts.is_multiple_of(groups.count)
                && (1..=groups.count).contains(&groups.top_k)
                && self.top_k <= groups.top_k * (self.experts / groups.count);
            require(
                fits,
                "expert groups",
                format!(
                    "{} of {} groups cannot give {} of {} experts",
                    groups.top_k, groups.count, self.top_k, self.experts
                ),
            )?;
        }
        Ok(())
    }
}
