//! From a model file to a [`Model`]: finds every tensor of the manifest under the file's own name and checks its shape.

use std::collections::HashMap;
use std::sync::Arc;

use nash_core::{DType, ModelFile, Region, Tensor};

use crate::config::{
    Family, ModelConfig, MoeConfig, NormPlacement, QkNorm, VocabParts, gguf_family, is_stored,
};
use crate::error::{ModelError, Result};
use crate::feed::{Experts, Feed, Mlp};
use crate::layer::Layer;
use crate::linear::{FloatLinear, Linear, PackedLinear};
use crate::manifest::{FloatSpec, LinearSpec, Manifest};
use crate::model::Model;
use crate::names::{Every, Form, Part, TensorKey};
use crate::norm::Norm;
use crate::stacked::{MX_BYTES, MX_GROUP, Stack, Stacked};
use crate::weights::{Projection, Weights};

/// Reads configuration and weights. Weights stay in the mapped file; norms, biases and position tables become floats.
/// `cut` tells the parts of the vocabulary's matrices, if the file does not.
pub(crate) fn load(file: &ModelFile, cut: impl FnOnce(&ModelConfig) -> VocabParts) -> Result<Model> {
    let (mut config, family) = match file {
        ModelFile::Gguf(gguf) => (
            ModelConfig::from_gguf(gguf)?,
            gguf_family(gguf, gguf.str("general.architecture")?)?,
        ),
        ModelFile::Hf(folder) => {
            let config = ModelConfig::from_hf(folder.config())?;
            let family = Family::named(&config.architecture)?;
            refuse_quantized(folder.config(), family)?;
            (config, family)
        }
        ModelFile::Packed(folder) => {
            let config = ModelConfig::from_packed(folder.config())?;
            let family = Family::named(&config.architecture)?;
            (config, family)
        }
    };
    if !matches!(file, ModelFile::Packed(_)) {
        config.vocab_parts = cut(&config);
        config.validate()?;
    }
    let loader = Loader {
        file,
        canonical: match file {
            ModelFile::Gguf(_) => false,
            ModelFile::Hf(folder) => is_stored(folder.config()),
            ModelFile::Packed(_) => true,
        },
        family,
        config: &config,
    };
    let mut weights = Weights::default();
    let manifest = Manifest::new(&config);
    let mut biases = HashMap::new();
    for spec in &manifest.linears {
        weights.push(spec.info.clone(), loader.linear(spec)?);
        if spec.bias {
            let key = spec.key.bias();
            let bias = loader.vector(&FloatSpec {
                key,
                shape: vec![spec.info.rows],
                norm_weight: false,
            })?;
            biases.insert(spec.info.name.clone(), Arc::clone(&bias));
            weights.floats.push((key.name(), vec![spec.info.rows], bias));
        }
    }
    let mut floats = HashMap::new();
    for spec in &manifest.floats {
        let values = loader.vector(spec)?;
        floats.insert(spec.key.name(), Arc::clone(&values));
        weights.floats.push((spec.key.name(), spec.shape.clone(), values));
    }
    Assembly {
        config: &config,
        weights: &weights,
        biases,
        floats,
    }
    .assemble()
    .and_then(|parts| {
        let (layers, final_norm, positions) = parts;
        Model::new(config, weights, layers, final_norm, positions)
    })
}

/// Weights of another quantizer than the family's own would be read as if they were plain numbers.
fn refuse_quantized(config: &serde_json::Value, family: &Family) -> Result<()> {
    let method = config
        .get("quantization_config")
        .and_then(|q| q.get("quant_method"));
    let Some(method) = method.filter(|method| method.as_str() != family.hf_quantizer) else {
        return Ok(());
    };
    Err(ModelError::Unsupported {
        architecture: family.name.to_owned(),
        what: format!("reading weights that {method} has quantized (take the original folder)"),
    })
}

/// Where a tensor was found.
struct Found {
    tensor: Tensor,
    part: Part,
}

struct Loader<'a> {
    file: &'a ModelFile,
    /// Tensors have the names and the form of this crate.
    canonical: bool,
    family: &'static Family,
    config: &'a ModelConfig,
}

impl Loader<'_> {
    fn path(&self) -> String {
        self.file
            .path()
            .map_or_else(|| "model".into(), |path| path.display().to_string())
    }

    fn find(&self, key: TensorKey) -> Result<Found> {
        let candidates = match self.file {
            _ if self.canonical => vec![(key.name(), Part::Whole)],
            ModelFile::Gguf(_) => key.gguf_candidates(),
            _ => key.hf_candidates(self.family),
        };
        for (name, part) in &candidates {
            if let Some(tensor) = self.file.find(name) {
                return Ok(Found {
                    tensor: tensor.clone(),
                    part: *part,
                });
            }
        }
        let tried: Vec<String> = candidates.into_iter().map(|(name, _)| name).collect();
        Err(self.missing(key, &tried.join(", ")))
    }

    fn missing(&self, key: TensorKey, tried: &str) -> ModelError {
        ModelError::MissingTensor {
            file: self.path(),
            tensor: key.name(),
            tried: tried.to_owned(),
        }
    }

    fn check_shape(&self, tensor: &Tensor, expected: &[usize]) -> Result<()> {
        self.check(&tensor.name, &tensor.shape, expected)
    }

    fn check(&self, tensor: &str, found: &[usize], expected: &[usize]) -> Result<()> {
        // Leading ones say nothing: a gate `[1, d]` is stored as `[d]` in GGUF files.
        let significant = |shape: &[usize]| shape.iter().copied().skip_while(|n| *n == 1).collect::<Vec<_>>();
        if significant(found) == significant(expected) {
            return Ok(());
        }
        Err(ModelError::WrongShape {
            file: self.path(),
            tensor: tensor.to_owned(),
            expected: expected.to_vec(),
            found: found.to_vec(),
        })
    }

    /// Rows of the stored tensor that make up the part, and all rows it must have.
    fn rows(&self, part: Part, rows: usize) -> (usize, usize) {
        let (q, kv) = (self.config.q_dim(), self.config.kv_dim());
        match part {
            Part::Whole | Part::Expert(..) => (0, rows),
            Part::Query => (0, q + 2 * kv),
            Part::Key => (q, q + 2 * kv),
            Part::Value => (q + kv, q + 2 * kv),
        }
    }

    fn linear(&self, spec: &LinearSpec) -> Result<Arc<dyn Linear>> {
        let (rows, cols) = (spec.info.rows, spec.info.cols);
        if let ModelFile::Packed(folder) = self.file
            && let Some(packed) = folder.packed_tensors().get(&spec.info.name)
        {
            self.check(
                &spec.info.name,
                &[packed.shape().rows, packed.shape().cols],
                &[rows, cols],
            )?;
            return Ok(Arc::new(PackedLinear::new(packed.clone())));
        }
        let Found { tensor, part } = self.find(spec.key)?;
        if let Part::Expert(form, every) = part {
            return Ok(Arc::new(self.expert(spec, tensor, form, every)?));
        }
        let (first, all) = spec.range.unwrap_or(self.rows(part, rows));
        let conv1d = self.family.names.transposed
            && spec.info.layer.is_some()
            && matches!(self.file, ModelFile::Hf(_))
            && !self.canonical;
        if conv1d {
            self.check_shape(&tensor, &[cols, all])?;
            return Ok(Arc::new(FloatLinear::new(transpose(
                &tensor,
                first..first + rows,
            )?)));
        }
        let stored = spec.columns.as_ref().map_or(cols, |_| self.config.hidden_size);
        self.check_shape(&tensor, &[all, stored])?;
        let linear = FloatLinear::from_rows(tensor, first, rows)?;
        Ok(Arc::new(match &spec.columns {
            Some(columns) => linear.with_columns(Arc::clone(columns)),
            None => linear,
        }))
    }

    fn experts(&self) -> usize {
        self.config.moe.as_ref().map_or(0, |moe| moe.experts)
    }

    /// An expert's matrix in a stack.
    fn expert(&self, spec: &LinearSpec, tensor: Tensor, form: Form, every: Every) -> Result<FloatLinear> {
        let (rows, cols, expert) = (spec.info.rows, spec.info.cols, spec.key.expert);
        let (experts, stored) = (self.experts(), rows * every.step);
        let stack = match form {
            Form::Rows => {
                self.check_shape(&tensor, &[experts, stored, cols])?;
                if every.step == 1 {
                    return FloatLinear::from_rows(tensor, expert * rows, rows);
                }
                Stack::Rows(tensor)
            }
            Form::Columns => {
                self.check_shape(&tensor, &[experts, cols, stored])?;
                if !Stacked::reads_columns_of(tensor.dtype) {
                    return Err(self.unreadable(&tensor));
                }
                Stack::Columns(tensor)
            }
            Form::Blocks => {
                let name = tensor.name.trim_end_matches("blocks").to_owned() + "scales";
                let scales = self.file.find(&name).cloned();
                let scales = scales.ok_or_else(|| self.missing(spec.key, &name))?;
                let bytes = [&tensor, &scales];
                if let Some(other) = bytes.into_iter().find(|t| t.dtype != DType::U8) {
                    return Err(self.unreadable(other));
                }
                if !cols.is_multiple_of(MX_GROUP) {
                    return Err(self.unreadable(&tensor));
                }
                let groups = cols / MX_GROUP;
                self.check_shape(&tensor, &[experts, stored, groups, MX_BYTES])?;
                self.check_shape(&scales, &[experts, stored, groups])?;
                Stack::Blocks {
                    codes: tensor,
                    scales,
                }
            }
        };
        Ok(FloatLinear::stacked(Stacked {
            stack,
            expert,
            every,
            shape: [rows, cols],
        }))
    }

    fn unreadable(&self, tensor: &Tensor) -> ModelError {
        ModelError::Unsupported {
            architecture: self.config.architecture.clone(),
            what: format!(
                "{}: reading experts from tensor {} of type {} and shape {:?}",
                self.path(),
                tensor.name,
                tensor.dtype,
                tensor.shape
            ),
        }
    }

    fn vector(&self, spec: &FloatSpec) -> Result<Arc<[f32]>> {
        let Found { tensor, part } = self.find(spec.key)?;
        let elements: usize = spec.shape.iter().product();
        let mut values = match part {
            Part::Whole => {
                self.check_shape(&tensor, &spec.shape)?;
                tensor.to_f32()?
            }
            Part::Expert(_, every) => {
                let (expert, stored) = (spec.key.expert, elements * every.step);
                self.check_shape(&tensor, &[self.experts(), stored])?;
                let mut row = vec![0.0; stored];
                tensor.dequantize_rows(expert..expert + 1, &mut row)?;
                row.into_iter().skip(every.first).step_by(every.step).collect()
            }
            Part::Query | Part::Key | Part::Value => {
                let (first, all) = self.rows(part, elements);
                self.check_shape(&tensor, &[all])?;
                tensor.to_f32()?[first..first + elements].to_vec()
            }
        };
        let minus_one = self.family.hf_norm_minus_one && matches!(self.file, ModelFile::Hf(_));
        if spec.norm_weight && minus_one && !self.canonical {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        Ok(values.into())
    }
}

/// Columns `columns` of a plain-number matrix `[n, m]` as a matrix `[columns, n]` of its own.
fn transpose(tensor: &Tensor, columns: std::ops::Range<usize>) -> Result<Tensor> {
    let (n, m, size) = (tensor.rows(), tensor.cols(), tensor.dtype.block_bytes());
    let mut bytes = Vec::with_capacity(columns.len() * n * size);
    for column in columns.clone() {
        for row in 0..n {
            let at = (row * m + column) * size;
            bytes.extend_from_slice(&tensor.data[at..at + size]);
        }
    }
    Ok(Tensor::new(
        tensor.name.clone(),
        tensor.dtype,
        vec![columns.len(), n],
        Region::from(bytes),
    )?)
}

/// Puts loaded weights into the blocks that use them.
struct Assembly<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    biases: HashMap<String, Arc<[f32]>>,
    floats: HashMap<String, Arc<[f32]>>,
}

type Parts = (Vec<Layer>, Option<Norm>, Option<Arc<[f32]>>);

impl Assembly<'_> {
    fn assemble(&self) -> Result<Parts> {
        let layers = (0..self.config.num_layers())
            .map(|layer| self.layer(layer))
            .collect::<Result<_>>()?;
        let final_norm = if self.config.norm.final_norm {
            Some(self.norm("norm.{p}", 0)?)
        } else {
            None
        };
        let positions = self.floats.get("model.embed_positions.weight").cloned();
        Ok((layers, final_norm, positions))
    }

    fn layer(&self, i: usize) -> Result<Layer> {
        let sandwich = self.config.norm.placement == NormPlacement::Sandwich;
        let post = |template| {
            if sandwich {
                self.norm(template, i).map(Some)
            } else {
                Ok(None)
            }
        };
        let qk = |template| {
            if self.config.attention.qk_norm == QkNorm::None {
                return Ok(None);
            }
            // RMS also where the rest is LayerNorm; no family mixes them so far.
            self.norm(template, i).map(Some)
        };
        Ok(Layer {
            attn_norm: self.norm("layers.{i}.input_layernorm.{p}", i)?,
            q: self.projection("layers.{i}.self_attn.q_proj.{p}", i, 0)?,
            k: self.projection("layers.{i}.self_attn.k_proj.{p}", i, 0)?,
            v: self.projection("layers.{i}.self_attn.v_proj.{p}", i, 0)?,
            q_norm: qk("layers.{i}.self_attn.q_norm.{p}")?,
            k_norm: qk("layers.{i}.self_attn.k_norm.{p}")?,
            sinks: self.float("layers.{i}.self_attn.sinks", i),
            o: self.projection("layers.{i}.self_attn.o_proj.{p}", i, 0)?,
            attn_post_norm: post("layers.{i}.post_attention_layernorm.{p}")?,
            mlp_norm: self.norm("layers.{i}.pre_feedforward_layernorm.{p}", i)?,
            feed: self.feed(i)?,
            mlp_post_norm: post("layers.{i}.post_feedforward_layernorm.{p}")?,
        })
    }

    fn feed(&self, i: usize) -> Result<Feed> {
        let Some(moe) = self.config.moe.as_ref().filter(|_| self.config.layers[i].experts) else {
            return Ok(Feed::Dense(Mlp {
                gate: self
                    .config
                    .mlp
                    .gated
                    .then(|| self.projection("layers.{i}.mlp.gate_proj.{p}", i, 0))
                    .transpose()?,
                up: self.projection("layers.{i}.mlp.up_proj.{p}", i, 0)?,
                down: self.projection("layers.{i}.mlp.down_proj.{p}", i, 0)?,
            }));
        };
        let expert = |e| -> Result<Mlp> {
            Ok(Mlp {
                gate: Some(self.projection("layers.{i}.mlp.experts.{e}.gate_proj.{p}", i, e)?),
                up: self.projection("layers.{i}.mlp.experts.{e}.up_proj.{p}", i, e)?,
                down: self.projection("layers.{i}.mlp.experts.{e}.down_proj.{p}", i, e)?,
            })
        };
        let shared = || -> Result<Mlp> {
            Ok(Mlp {
                gate: Some(self.projection("layers.{i}.mlp.shared_expert.gate_proj.{p}", i, 0)?),
                up: self.projection("layers.{i}.mlp.shared_expert.up_proj.{p}", i, 0)?,
                down: self.projection("layers.{i}.mlp.shared_expert.down_proj.{p}", i, 0)?,
            })
        };
        Ok(Feed::Experts(Box::new(Experts {
            config: MoeConfig {
                top_k: self.config.layers[i].top_k.unwrap_or(moe.top_k),
                ..moe.clone()
            },
            router: self.projection("layers.{i}.mlp.router.{p}", i, 0)?,
            correction: self.float("layers.{i}.mlp.router.correction_bias", i),
            experts: (0..moe.experts).map(expert).collect::<Result<_>>()?,
            shared: moe.shared.map(|_| shared()).transpose()?,
            shared_gate: self.float("layers.{i}.mlp.shared_expert_gate.{p}", i),
        })))
    }

    /// A float tensor, if the model has it.
    fn float(&self, template: &'static str, layer: usize) -> Option<Arc<[f32]>> {
        let key = TensorKey::weight(template, layer, 0);
        self.floats.get(&key.name()).cloned()
    }

    fn projection(&self, template: &'static str, layer: usize, expert: usize) -> Result<Projection> {
        let name = TensorKey::weight(template, layer, expert).base();
        let slot = self
            .weights
            .slot(&name)
            .ok_or_else(|| ModelError::NoSuchLinear { name: name.clone() })?;
        Ok(Projection {
            slot,
            bias: self.biases.get(&name).cloned(),
        })
    }

    fn norm(&self, template: &'static str, layer: usize) -> Result<Norm> {
        let key = TensorKey::weight(template, layer, 0);
        let weight = self.float(template, layer);
        let weight = weight.ok_or_else(|| ModelError::NoSuchLinear { name: key.name() })?;
        let norm = &self.config.norm;
        Ok(Norm {
            name: key.base(),
            kind: norm.kind,
            eps: norm.eps,
            weight,
            bias: self.floats.get(&key.bias().name()).cloned(),
        })
    }
}
