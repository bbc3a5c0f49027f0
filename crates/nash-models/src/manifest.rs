//! Which tensors a configuration calls for: names, shapes, places. No file is needed, so a planner can ask for
//! the sizes of a model that is not here.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::{ModelConfig, NormKind, NormPlacement, Positions, QkNorm, Segment};
use crate::names::TensorKey;

/// Where a linear sits, that is: which activations it reads. Linears of one layer and site read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// Only looked up by row, never multiplied (an embedding that is not tied to the output).
    Embedding,
    /// Query, key and value projections.
    AttnIn,
    /// Output projection of attention.
    AttnOut,
    /// Gate and up projections of the dense feed-forward block.
    MlpIn,
    /// Its down projection.
    MlpDown,
    /// The router of a mixture of experts.
    Router,
    /// Gate and up projections of this expert.
    ExpertIn(usize),
    /// Its down projection.
    ExpertDown(usize),
    /// Gate and up projections of the shared expert.
    SharedIn,
    /// Its down projection.
    SharedDown,
    /// The output matrix, or the embedding where the two are tied.
    Head,
}

/// A weight matrix `[rows, cols]` of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinearInfo {
    /// Canonical name without `.weight`.
    pub name: String,
    /// Layer, or `None` for embedding and output.
    pub layer: Option<usize>,
    /// What it reads.
    pub site: Site,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// A linear with what the loader needs.
#[derive(Debug, Clone)]
pub(crate) struct LinearSpec {
    /// The tensor of the source.
    pub(crate) key: TensorKey,
    pub(crate) info: LinearInfo,
    pub(crate) bias: bool,
    /// Where the linear is a range of the tensor's rows: the first of them, and how many the tensor has.
    pub(crate) range: Option<(usize, usize)>,
    /// Its columns of the tensor's, if not all.
    pub(crate) columns: Option<Arc<[u32]>>,
}

/// A small float tensor: norm, position table, router correction.
#[derive(Debug, Clone)]
pub(crate) struct FloatSpec {
    pub(crate) key: TensorKey,
    pub(crate) shape: Vec<usize>,
    /// A norm weight, which some families store minus one.
    pub(crate) norm_weight: bool,
}

/// All tensors of a model, in the order of the forward pass.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    pub(crate) linears: Vec<LinearSpec>,
    pub(crate) floats: Vec<FloatSpec>,
}

impl ModelConfig {
    /// The weight matrices that this configuration calls for, in the order of the forward pass.
    #[must_use]
    pub fn linears(&self) -> Vec<LinearInfo> {
        Manifest::new(self)
            .linears
            .into_iter()
            .map(|spec| spec.info)
            .collect()
    }

    /// The columns of its matrix that a part of the vocabulary has; `None` for a linear that has all.
    #[must_use]
    pub fn columns(&self, linear: &LinearInfo) -> Option<Arc<[u32]>> {
        if linear.layer.is_some() {
            return None;
        }
        let mut segments = self.vocab_parts.segments(self.hidden_size).into_iter();
        let own = segments.find(|segment| segment.outliers == is_outliers(&linear.name))?;
        own.columns
    }

    /// The other tensors (norms, biases, position tables): canonical name and shape.
    #[must_use]
    pub fn float_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let manifest = Manifest::new(self);
        let biases = manifest.linears.iter().filter(|spec| spec.bias);
        let biases = biases.map(|spec| (spec.key.bias().name(), vec![spec.info.rows]));
        let floats = manifest
            .floats
            .iter()
            .map(|spec| (spec.key.name(), spec.shape.clone()));
        floats.chain(biases).collect()
    }
}

/// What the name of a part has between that of its matrix and the number of its range.
const OUTLIERS: &str = ".outliers";

/// Name of a range of the rows of a matrix, of its outlier columns or of the others.
pub(crate) fn part_name(matrix: &str, outliers: bool, range: usize) -> String {
    format!("{matrix}{}.{range}", if outliers { OUTLIERS } else { "" })
}

/// Whether a name is that of outlier columns.
fn is_outliers(part: &str) -> bool {
    part.rsplit_once('.')
        .is_some_and(|(of, _)| of.ends_with(OUTLIERS))
}

impl LinearInfo {
    /// Name of the matrix that this linear is a part of ([`VocabParts`](crate::VocabParts)), or its own name.
    #[must_use]
    pub fn matrix(&self) -> &str {
        matrix_name(&self.name)
    }
}

/// Name of the matrix that a linear of this name is a part of, or the name.
#[must_use]
pub fn matrix_name(linear: &str) -> &str {
    match linear.rsplit_once('.') {
        Some((matrix, range)) if range.bytes().all(|b| b.is_ascii_digit()) => {
            matrix.strip_suffix(OUTLIERS).unwrap_or(matrix)
        }
        _ => linear,
    }
}

impl Manifest {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let mut manifest = Self::default();
        let d = config.hidden_size;
        let head = if config.tie_embeddings {
            Site::Head
        } else {
            Site::Embedding
        };
        manifest.vocabulary(config, "embed_tokens.{p}", head);
        if let Positions::Learned { offset } = config.positions {
            let rows = config.context_length + offset;
            manifest.float(
                TensorKey::weight("embed_positions.{p}", 0, 0),
                vec![rows, d],
                false,
            );
        }
        for layer in 0..config.num_layers() {
            manifest.attention(config, layer);
            manifest.feed_forward(config, layer);
        }
        if config.norm.final_norm {
            manifest.norm(config, "norm.{p}", 0);
        }
        if !config.tie_embeddings {
            manifest.vocabulary(config, "lm_head.{p}", Site::Head);
        }
        manifest
    }

    /// A matrix `[vocab, d]`, whole or in ranges of rows.
    fn vocabulary(&mut self, config: &ModelConfig, template: &'static str, site: Site) {
        let (rows, d) = (config.vocab_size, config.hidden_size);
        self.linear((template, 0), None, site, [rows, d], false);
        if config.vocab_parts.is_whole() {
            return;
        }
        let Some(whole) = self.linears.pop() else { return };
        for Segment { outliers, columns } in config.vocab_parts.segments(d) {
            let all = [rows];
            let ranges = &config.vocab_parts.ranges;
            let mut first = 0;
            for (i, &count) in if ranges.is_empty() { &all[..] } else { ranges }
                .iter()
                .enumerate()
            {
                let mut part = whole.clone();
                part.info.name = part_name(&whole.info.name, outliers, i);
                part.info.rows = count;
                part.info.cols = columns.as_ref().map_or(d, |c| c.len());
                part.range = Some((first, rows));
                part.columns.clone_from(&columns);
                first += count;
                self.linears.push(part);
            }
        }
    }

    fn attention(&mut self, config: &ModelConfig, layer: usize) {
        let (a, d) = (&config.attention, config.hidden_size);
        let (q, kv) = (config.q_dim(), config.kv_dim());
        let at = Some(layer);
        self.norm(config, "layers.{i}.input_layernorm.{p}", layer);
        self.linear(
            ("layers.{i}.self_attn.q_proj.{p}", 0),
            at,
            Site::AttnIn,
            [q, d],
            a.qkv_bias,
        );
        self.linear(
            ("layers.{i}.self_attn.k_proj.{p}", 0),
            at,
            Site::AttnIn,
            [kv, d],
            a.qkv_bias,
        );
        self.linear(
            ("layers.{i}.self_attn.v_proj.{p}", 0),
            at,
            Site::AttnIn,
            [kv, d],
            a.qkv_bias,
        );
        let normed = match a.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((a.head_dim, a.head_dim)),
            QkNorm::Full => Some((q, kv)),
        };
        if let Some((q, k)) = normed {
            self.float(
                TensorKey::weight("layers.{i}.self_attn.q_norm.{p}", layer, 0),
                vec![q],
                true,
            );
            self.float(
                TensorKey::weight("layers.{i}.self_attn.k_norm.{p}", layer, 0),
                vec![k],
                true,
            );
        }
        if a.sinks {
            let key = TensorKey::weight("layers.{i}.self_attn.sinks", layer, 0);
            self.float(key, vec![a.heads], false);
        }
        self.linear(
            ("layers.{i}.self_attn.o_proj.{p}", 0),
            at,
            Site::AttnOut,
            [d, q],
            a.out_bias,
        );
        if config.norm.placement == NormPlacement::Sandwich {
            self.norm(config, "layers.{i}.post_attention_layernorm.{p}", layer);
        }
    }

    fn feed_forward(&mut self, config: &ModelConfig, layer: usize) {
        let (d, mlp, at) = (config.hidden_size, &config.mlp, Some(layer));
        self.norm(config, "layers.{i}.pre_feedforward_layernorm.{p}", layer);
        match config.moe.as_ref().filter(|_| config.layers[layer].experts) {
            None => {
                let (f, bias) = (mlp.intermediate, mlp.bias);
                if mlp.gated {
                    self.linear(("layers.{i}.mlp.gate_proj.{p}", 0), at, Site::MlpIn, [f, d], bias);
                }
                self.linear(("layers.{i}.mlp.up_proj.{p}", 0), at, Site::MlpIn, [f, d], bias);
                self.linear(
                    ("layers.{i}.mlp.down_proj.{p}", 0),
                    at,
                    Site::MlpDown,
                    [d, f],
                    bias,
                );
            }
            Some(moe) => {
                self.linear(
                    ("layers.{i}.mlp.router.{p}", 0),
                    at,
                    Site::Router,
                    [moe.experts, d],
                    moe.bias,
                );
                if moe.correction_bias {
                    let key = TensorKey::weight("layers.{i}.mlp.router.correction_bias", layer, 0);
                    self.float(key, vec![moe.experts], false);
                }
                let f = moe.intermediate;
                for e in 0..moe.experts {
                    let (read, down) = (Site::ExpertIn(e), Site::ExpertDown(e));
                    self.linear(
                        ("layers.{i}.mlp.experts.{e}.gate_proj.{p}", e),
                        at,
                        read,
                        [f, d],
                        moe.bias,
                    );
                    self.linear(
                        ("layers.{i}.mlp.experts.{e}.up_proj.{p}", e),
                        at,
                        read,
                        [f, d],
                        moe.bias,
                    );
                    self.linear(
                        ("layers.{i}.mlp.experts.{e}.down_proj.{p}", e),
                        at,
                        down,
                        [d, f],
                        moe.bias,
                    );
                }
                if let Some(shared) = moe.shared {
                    let (f, read) = (shared.intermediate, Site::SharedIn);
                    self.linear(
                        ("layers.{i}.mlp.shared_expert.gate_proj.{p}", 0),
                        at,
                        read,
                        [f, d],
                        false,
                    );
                    self.linear(
                        ("layers.{i}.mlp.shared_expert.up_proj.{p}", 0),
                        at,
                        read,
                        [f, d],
                        false,
                    );
                    let down = ("layers.{i}.mlp.shared_expert.down_proj.{p}", 0);
                    self.linear(down, at, Site::SharedDown, [d, f], false);
                    if shared.gated {
                        let key = TensorKey::weight("layers.{i}.mlp.shared_expert_gate.{p}", layer, 0);
                        self.float(key, vec![1, d], false);
                    }
                }
            }
        }
        if config.norm.placement == NormPlacement::Sandwich {
            self.norm(config, "layers.{i}.post_feedforward_layernorm.{p}", layer);
        }
    }

    /// `template` comes with its expert number, `shape` is `[rows, cols]`.
    fn linear(
        &mut self,
        (template, expert): (&'static str, usize),
        layer: Option<usize>,
        site: Site,
        [rows, cols]: [usize; 2],
        bias: bool,
    ) {
        let key = TensorKey::weight(template, layer.unwrap_or(0), expert);
        let info = LinearInfo {
            name: key.base(),
            layer,
            site,
            rows,
            cols,
        };
        self.linears.push(LinearSpec {
            key,
            info,
            bias,
            range: None,
            columns: None,
        });
    }

    fn float(&mut self, key: TensorKey, shape: Vec<usize>, norm_weight: bool) {
        self.floats.push(FloatSpec {
            key,
            shape,
            norm_weight,
        });
    }

    fn norm(&mut self, config: &ModelConfig, template: &'static str, layer: usize) {
        let key = TensorKey::weight(template, layer, 0);
        self.float(key, vec![config.hidden_size], true);
        if config.norm.kind == NormKind::Layer {
            self.float(key.bias(), vec![config.hidden_size], false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parameter_count_of_a_published_model() {
        // Qwen1.5-MoE-A2.7B: 14,315,784,192 parameters (model card, safetensors header).
        let config = ModelConfig::from_hf(&json!({"model_type": "qwen2_moe", "vocab_size": 151_936,
            "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
            "intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_experts": 60, "num_experts_per_tok": 4}))
        .unwrap();
        let linears: usize = config.linears().iter().map(|info| info.rows * info.cols).sum();
        let floats: usize = config
            .float_tensors()
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        assert_eq!(linears + floats, 14_315_784_192);
    }

    #[test]
    fn canonical_names() {
        let config = ModelConfig::from_hf(&json!({"model_type": "gpt2", "vocab_size": 100, "n_embd": 64,
            "n_layer": 1, "n_head": 4}))
        .unwrap();
        let names: Vec<String> = config.linears().into_iter().map(|info| info.name).collect();
        assert_eq!(
            names,
            [
                "model.embed_tokens",
                "model.layers.0.self_attn.q_proj",
                "model.layers.0.self_attn.k_proj",
                "model.layers.0.self_attn.v_proj",
                "model.layers.0.self_attn.o_proj",
                "model.layers.0.mlp.up_proj",
                "model.layers.0.mlp.down_proj"
            ]
        );
        let floats: Vec<String> = config.float_tensors().into_iter().map(|(name, _)| name).collect();
        assert!(floats.contains(&"model.layers.0.self_attn.q_proj.bias".to_owned()));
        assert!(floats.contains(&"model.embed_positions.weight".to_owned()));
        assert!(floats.contains(&"model.norm.bias".to_owned()));
    }
}
