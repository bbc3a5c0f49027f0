//! Names of tensors: from the canonical ones of this crate to those of each file family.
//!
//! Canonical names follow `transformers`' Llama, made unambiguous where families disagree. The norms are named as
//! in Gemma 3: `input_layernorm`, `post_attention_layernorm` (on the output of attention),
//! `pre_feedforward_layernorm`, `post_feedforward_layernorm`. A template holds `{i}` for the layer, `{e}` for the
//! expert and `{p}` for `weight` or `bias`, and leaves out the leading `model.`. A template without a row is the
//! same in a Hugging Face file.

use crate::config::Family;

/// Which rows of the tensor in the file make up the canonical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// The query rows of a fused query-key-value tensor.
    Query,
    /// The key rows.
    Key,
    /// The value rows.
    Value,
    /// Rows of expert `{e}` in a stack of all experts.
    Expert(Form, Every),
}

/// How a stack keeps the matrix `[m, n]` of an expert; a bias is always in rows, `[experts, m]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `[experts, m, n]`.
    Rows,
    /// `[experts, n, m]`.
    Columns,
    /// MXFP4 codes `[experts, m, n/32, 16]`, with scales `[experts, m, n/32]` in another tensor.
    Blocks,
}

/// The stored rows of an expert that are meant: `first`, `first + step`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Every {
    pub(crate) first: usize,
    pub(crate) step: usize,
}

const ALL: Every = Every { first: 0, step: 1 };
const EVEN: Every = Every { first: 0, step: 2 };
const ODD: Every = Every { first: 1, step: 2 };

/// One canonical template and where a file may keep it. Several rows of one template are tried in order.
#[derive(Debug)]
pub(crate) struct Rule {
    canonical: &'static str,
    source: &'static str,
    part: Part,
}

const fn whole(canonical: &'static str, source: &'static str) -> Rule {
    Rule {
        canonical,
        source,
        part: Part::Whole,
    }
}

const fn part(part: Part, canonical: &'static str, source: &'static str) -> Rule {
    Rule {
        canonical,
        source,
        part,
    }
}

/// Names in Hugging Face files of one family.
#[derive(Debug)]
pub(crate) struct HfNames {
    rules: &'static [Rule],
    /// Tried in order before every source name: files differ in how deep the decoder sits.
    prefixes: &'static [&'static str],
    /// Matrices of the layers are stored `[n, m]` (GPT-2's `Conv1D`).
    pub(crate) transposed: bool,
}

const PREFIXES: &[&str] = &[
    "model.",
    "",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
];

/// Llama and all that took over its names, with the spellings of each mixture of experts.
pub(crate) const LLAMA: HfNames = HfNames {
    rules: &[
        whole(
            "layers.{i}.pre_feedforward_layernorm.{p}",
            "layers.{i}.post_attention_layernorm.{p}",
        ),
        whole("layers.{i}.mlp.router.{p}", "layers.{i}.mlp.gate.{p}"),
        whole(
            "layers.{i}.mlp.router.{p}",
            "layers.{i}.block_sparse_moe.gate.{p}",
        ),
        whole(
            "layers.{i}.mlp.router.correction_bias",
            "layers.{i}.mlp.gate.e_score_correction_bias",
        ),
        whole(
            "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
            "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.experts.{e}.up_proj.{p}",
            "layers.{i}.mlp.experts.{e}.up_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.experts.{e}.down_proj.{p}",
            "layers.{i}.mlp.experts.{e}.down_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
            "layers.{i}.block_sparse_moe.experts.{e}.w1.{p}",
        ),
        whole(
            "layers.{i}.mlp.experts.{e}.up_proj.{p}",
            "layers.{i}.block_sparse_moe.experts.{e}.w3.{p}",
        ),
        whole(
            "layers.{i}.mlp.experts.{e}.down_proj.{p}",
            "layers.{i}.block_sparse_moe.experts.{e}.w2.{p}",
        ),
        whole(
            "layers.{i}.mlp.shared_expert.gate_proj.{p}",
            "layers.{i}.mlp.shared_expert.gate_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.shared_expert.up_proj.{p}",
            "layers.{i}.mlp.shared_expert.up_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.shared_expert.down_proj.{p}",
            "layers.{i}.mlp.shared_expert.down_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.shared_expert.gate_proj.{p}",
            "layers.{i}.mlp.shared_experts.gate_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.shared_expert.up_proj.{p}",
            "layers.{i}.mlp.shared_experts.up_proj.{p}",
        ),
        whole(
            "layers.{i}.mlp.shared_expert.down_proj.{p}",
            "layers.{i}.mlp.shared_experts.down_proj.{p}",
        ),
    ],
    prefixes: PREFIXES,
    transposed: false,
};

/// Gemma 2 and 3: the canonical names are theirs.
pub(crate) const SANDWICH: HfNames = HfNames {
    rules: &[],
    prefixes: PREFIXES,
    transposed: false,
};

/// gpt-oss: gate and up alternate row by row, plain numbers are transposed, MXFP4 is in two tensors.
pub(crate) const GPT_OSS: HfNames = HfNames {
    rules: &[
        whole(
            "layers.{i}.pre_feedforward_layernorm.{p}",
            "layers.{i}.post_attention_layernorm.{p}",
        ),
        part(
            Part::Expert(Form::Rows, EVEN),
            "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
            "layers.{i}.mlp.experts.gate_up_proj_{p}",
        ),
        part(
            Part::Expert(Form::Blocks, EVEN),
            "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
            "layers.{i}.mlp.experts.gate_up_proj_blocks",
        ),
        part(
            Part::Expert(Form::Columns, EVEN),
            "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
            "layers.{i}.mlp.experts.gate_up_proj",
        ),
        part(
            Part::Expert(Form::Rows, ODD),
            "layers.{i}.mlp.experts.{e}.up_proj.{p}",
            "layers.{i}.mlp.experts.gate_up_proj_{p}",
        ),
        part(
            Part::Expert(Form::Blocks, ODD),
            "layers.{i}.mlp.experts.{e}.up_proj.{p}",
            "layers.{i}.mlp.experts.gate_up_proj_blocks",
        ),
        part(
            Part::Expert(Form::Columns, ODD),
            "layers.{i}.mlp.experts.{e}.up_proj.{p}",
            "layers.{i}.mlp.experts.gate_up_proj",
        ),
        part(
            Part::Expert(Form::Rows, ALL),
            "layers.{i}.mlp.experts.{e}.down_proj.{p}",
            "layers.{i}.mlp.experts.down_proj_{p}",
        ),
        part(
            Part::Expert(Form::Blocks, ALL),
            "layers.{i}.mlp.experts.{e}.down_proj.{p}",
            "layers.{i}.mlp.experts.down_proj_blocks",
        ),
        part(
            Part::Expert(Form::Columns, ALL),
            "layers.{i}.mlp.experts.{e}.down_proj.{p}",
            "layers.{i}.mlp.experts.down_proj",
        ),
    ],
    prefixes: PREFIXES,
    transposed: false,
};

/// GPT-2.
pub(crate) const GPT2: HfNames = HfNames {
    rules: &[
        whole("embed_tokens.{p}", "wte.{p}"),
        whole("embed_positions.{p}", "wpe.{p}"),
        whole("layers.{i}.input_layernorm.{p}", "h.{i}.ln_1.{p}"),
        part(
            Part::Query,
            "layers.{i}.self_attn.q_proj.{p}",
            "h.{i}.attn.c_attn.{p}",
        ),
        part(
            Part::Key,
            "layers.{i}.self_attn.k_proj.{p}",
            "h.{i}.attn.c_attn.{p}",
        ),
        part(
            Part::Value,
            "layers.{i}.self_attn.v_proj.{p}",
            "h.{i}.attn.c_attn.{p}",
        ),
        whole("layers.{i}.self_attn.o_proj.{p}", "h.{i}.attn.c_proj.{p}"),
        whole("layers.{i}.pre_feedforward_layernorm.{p}", "h.{i}.ln_2.{p}"),
        whole("layers.{i}.mlp.up_proj.{p}", "h.{i}.mlp.c_fc.{p}"),
        whole("layers.{i}.mlp.down_proj.{p}", "h.{i}.mlp.c_proj.{p}"),
        whole("norm.{p}", "ln_f.{p}"),
    ],
    prefixes: &["transformer.", ""],
    transposed: true,
};

/// OPT.
pub(crate) const OPT: HfNames = HfNames {
    rules: &[
        whole(
            "layers.{i}.input_layernorm.{p}",
            "layers.{i}.self_attn_layer_norm.{p}",
        ),
        whole(
            "layers.{i}.self_attn.o_proj.{p}",
            "layers.{i}.self_attn.out_proj.{p}",
        ),
        whole(
            "layers.{i}.pre_feedforward_layernorm.{p}",
            "layers.{i}.final_layer_norm.{p}",
        ),
        whole("layers.{i}.mlp.up_proj.{p}", "layers.{i}.fc1.{p}"),
        whole("layers.{i}.mlp.down_proj.{p}", "layers.{i}.fc2.{p}"),
        whole("norm.{p}", "final_layer_norm.{p}"),
    ],
    prefixes: &["model.decoder.", "decoder.", ""],
    transposed: false,
};

/// GGUF, one table for all architectures: llama.cpp gives every tensor one name.
const GGUF: &[Rule] = &[
    whole("embed_tokens.{p}", "token_embd.{p}"),
    whole("embed_positions.{p}", "position_embd.{p}"),
    whole("norm.{p}", "output_norm.{p}"),
    whole("lm_head.{p}", "output.{p}"),
    whole("layers.{i}.input_layernorm.{p}", "blk.{i}.attn_norm.{p}"),
    whole("layers.{i}.self_attn.q_proj.{p}", "blk.{i}.attn_q.{p}"),
    whole("layers.{i}.self_attn.k_proj.{p}", "blk.{i}.attn_k.{p}"),
    whole("layers.{i}.self_attn.v_proj.{p}", "blk.{i}.attn_v.{p}"),
    part(
        Part::Query,
        "layers.{i}.self_attn.q_proj.{p}",
        "blk.{i}.attn_qkv.{p}",
    ),
    part(
        Part::Key,
        "layers.{i}.self_attn.k_proj.{p}",
        "blk.{i}.attn_qkv.{p}",
    ),
    part(
        Part::Value,
        "layers.{i}.self_attn.v_proj.{p}",
        "blk.{i}.attn_qkv.{p}",
    ),
    whole("layers.{i}.self_attn.o_proj.{p}", "blk.{i}.attn_output.{p}"),
    whole("layers.{i}.self_attn.q_norm.{p}", "blk.{i}.attn_q_norm.{p}"),
    whole("layers.{i}.self_attn.k_norm.{p}", "blk.{i}.attn_k_norm.{p}"),
    whole("layers.{i}.self_attn.sinks", "blk.{i}.attn_sinks.weight"),
    whole(
        "layers.{i}.post_attention_layernorm.{p}",
        "blk.{i}.post_attention_norm.{p}",
    ),
    whole("layers.{i}.pre_feedforward_layernorm.{p}", "blk.{i}.ffn_norm.{p}"),
    // GLM-4.5 and gpt-oss, whose files have no `ffn_norm`.
    whole(
        "layers.{i}.pre_feedforward_layernorm.{p}",
        "blk.{i}.post_attention_norm.{p}",
    ),
    whole(
        "layers.{i}.post_feedforward_layernorm.{p}",
        "blk.{i}.post_ffw_norm.{p}",
    ),
    whole("layers.{i}.mlp.gate_proj.{p}", "blk.{i}.ffn_gate.{p}"),
    whole("layers.{i}.mlp.up_proj.{p}", "blk.{i}.ffn_up.{p}"),
    whole("layers.{i}.mlp.down_proj.{p}", "blk.{i}.ffn_down.{p}"),
    whole("layers.{i}.mlp.router.{p}", "blk.{i}.ffn_gate_inp.{p}"),
    whole(
        "layers.{i}.mlp.router.correction_bias",
        "blk.{i}.exp_probs_b.bias",
    ),
    part(
        Part::Expert(Form::Rows, ALL),
        "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
        "blk.{i}.ffn_gate_exps.{p}",
    ),
    part(
        Part::Expert(Form::Rows, ALL),
        "layers.{i}.mlp.experts.{e}.up_proj.{p}",
        "blk.{i}.ffn_up_exps.{p}",
    ),
    part(
        Part::Expert(Form::Rows, ALL),
        "layers.{i}.mlp.experts.{e}.down_proj.{p}",
        "blk.{i}.ffn_down_exps.{p}",
    ),
    whole(
        "layers.{i}.mlp.experts.{e}.gate_proj.{p}",
        "blk.{i}.ffn_gate.{e}.{p}",
    ),
    whole("layers.{i}.mlp.experts.{e}.up_proj.{p}", "blk.{i}.ffn_up.{e}.{p}"),
    whole(
        "layers.{i}.mlp.experts.{e}.down_proj.{p}",
        "blk.{i}.ffn_down.{e}.{p}",
    ),
    whole(
        "layers.{i}.mlp.shared_expert.gate_proj.{p}",
        "blk.{i}.ffn_gate_shexp.{p}",
    ),
    whole(
        "layers.{i}.mlp.shared_expert.up_proj.{p}",
        "blk.{i}.ffn_up_shexp.{p}",
    ),
    whole(
        "layers.{i}.mlp.shared_expert.down_proj.{p}",
        "blk.{i}.ffn_down_shexp.{p}",
    ),
    whole(
        "layers.{i}.mlp.shared_expert_gate.{p}",
        "blk.{i}.ffn_gate_inp_shexp.{p}",
    ),
];

/// A tensor of the model: a canonical template with its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TensorKey {
    /// Canonical template, such as `layers.{i}.mlp.up_proj.{p}`.
    pub(crate) template: &'static str,
    pub(crate) layer: usize,
    pub(crate) expert: usize,
    /// What `{p}` stands for: `weight` or `bias`.
    pub(crate) property: &'static str,
}

impl TensorKey {
    /// Key of a weight.
    pub(crate) const fn weight(template: &'static str, layer: usize, expert: usize) -> Self {
        Self {
            template,
            layer,
            expert,
            property: "weight",
        }
    }

    /// The bias that goes with a weight.
    pub(crate) const fn bias(self) -> Self {
        Self {
            property: "bias",
            ..self
        }
    }

    fn fill(&self, template: &str) -> String {
        template
            .replace("{i}", &self.layer.to_string())
            .replace("{e}", &self.expert.to_string())
            .replace("{p}", self.property)
    }

    /// Canonical name.
    pub(crate) fn name(&self) -> String {
        let prefix = if self.template.starts_with("lm_head") {
            ""
        } else {
            "model."
        };
        format!("{prefix}{}", self.fill(self.template))
    }

    /// Canonical name without `.weight` or `.bias`.
    pub(crate) fn base(&self) -> String {
        let name = self.name();
        match name.strip_suffix(self.property) {
            Some(base) => base.trim_end_matches('.').to_owned(),
            None => name,
        }
    }

    /// Names to try in a Hugging Face file of the family, best first.
    pub(crate) fn hf_candidates(&self, family: &Family) -> Vec<(String, Part)> {
        let names = family.names;
        let mut sources: Vec<(String, Part)> = self.sources(names.rules).collect();
        if sources.is_empty() {
            sources.push((self.fill(self.template), Part::Whole));
        }
        let with_prefix = |prefix: &str| {
            sources
                .iter()
                .map(|(name, part)| (format!("{prefix}{name}"), *part))
                .collect::<Vec<_>>()
        };
        names
            .prefixes
            .iter()
            .flat_map(|prefix| with_prefix(prefix))
            .collect()
    }

    /// Names to try in a GGUF file, best first.
    pub(crate) fn gguf_candidates(&self) -> Vec<(String, Part)> {
        self.sources(GGUF).collect()
    }

    fn sources<'a>(&'a self, rules: &'a [Rule]) -> impl Iterator<Item = (String, Part)> + 'a {
        rules
            .iter()
            .filter(|rule| rule.canonical == self.template)
            // A source without a property is that of the weight.
            .filter(|rule| self.property == "weight" || rule.source.contains("{p}"))
            .map(|rule| (self.fill(rule.source), rule.part))
    }
}
