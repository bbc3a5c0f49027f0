//! The carved model as a folder: `model.safetensors` under canonical names, `config.json` with our configuration.

use std::path::Path;

use half::f16;
use nash_core::DType;
use nash_core::packed_write::{PackedLayout, PackedWriter, TensorSpec};
use nash_models::{Linear, LinearInfo, Model, ModelConfig, ModelError, STORED_KEY, decode_rows};
use serde_json::{Map, json};

use crate::CarveError;
use crate::layer::Carved;
use crate::report::CarveReport;

/// Writes the tokenizer's text files into a folder.
pub type SaveTokenizer<'a> = dyn Fn(&Path) -> std::io::Result<()> + 'a;

/// A linear of the dense model.
fn linear<'m>(model: &'m Model, name: &str) -> Result<&'m dyn Linear, CarveError> {
    let found = model.linear(name).ok_or_else(|| ModelError::NoSuchLinear {
        name: name.to_owned(),
    })?;
    Ok(found.as_ref())
}

/// A weight matrix as floats, `[m, n]`.
pub(crate) fn matrix(model: &Model, name: &str) -> Result<Vec<f32>, CarveError> {
    let linear = linear(model, name)?;
    Ok(decode_rows(linear, 0..linear.rows()))
}

/// Where the values of a tensor come from.
enum Source<'a> {
    /// A matrix of the dense model, as it is.
    Matrix(&'a str),
    /// Some of its rows.
    Rows(String, &'a [usize]),
    /// Some of its columns.
    Columns(String, &'a [usize]),
    Values(&'a [f32]),
}

struct Planned<'a> {
    name: String,
    shape: Vec<usize>,
    source: Source<'a>,
}

/// Writes the folder.
pub(crate) fn write(
    model: &Model,
    config: &ModelConfig,
    layers: &[Carved],
    report: &CarveReport,
    (out, save_tokenizer): (&Path, &SaveTokenizer<'_>),
) -> Result<(), CarveError> {
    let linears = model.linears();
    let floats = model.float_tensors();
    let mut plan = Vec::new();
    let stays = |info: &LinearInfo| {
        !info.name.contains(".mlp.") || info.layer.is_some_and(|layer| !config.layers[layer].experts)
    };
    for info in linears.iter().filter(|info| stays(info)) {
        plan.push(Planned {
            name: format!("{}.weight", info.name),
            shape: vec![info.rows, info.cols],
            source: Source::Matrix(&info.name),
        });
    }
    let mixtures = layers
        .iter()
        .enumerate()
        .filter(|(layer, _)| config.layers[*layer].experts);
    for (layer, carved) in mixtures {
        plan_layer(&mut plan, config.hidden_size, layer, carved);
    }
    for (name, shape, values) in &floats {
        plan.push(Planned {
            name: name.clone(),
            shape: shape.clone(),
            source: Source::Values(values),
        });
    }
    // Two passes over the values, so that one tensor at a time is in memory: a type for each, then the bytes.
    let mut specs = Vec::with_capacity(plan.len());
    for tensor in &plan {
        specs.push(TensorSpec::Float {
            name: tensor.name.clone(),
            dtype: tensor.dtype(model)?,
            shape: tensor.shape.clone(),
        });
    }
    let mut writer = PackedWriter::create(out, PackedLayout::new(specs)?)?;
    for tensor in &plan {
        writer.float(&tensor.name, &tensor.values(model)?)?;
    }
    save_tokenizer(out).map_err(|source| CarveError::Io {
        path: out.into(),
        source,
    })?;
    let mut map = Map::new();
    map.insert("model_type".into(), json!(config.architecture));
    map.insert(STORED_KEY.into(), json!(config));
    map.insert("nashswarm_carving".into(), json!(report));
    writer.finish_floats(map)?;
    Ok(())
}

fn plan_layer<'a>(plan: &mut Vec<Planned<'a>>, d: usize, layer: usize, carved: &'a Carved) {
    let mlp = format!("model.layers.{layer}.mlp");
    let experts = carved.members.len() - 1;
    plan.push(Planned {
        name: format!("{mlp}.router.weight"),
        shape: vec![experts, d],
        source: Source::Values(&carved.router.weight),
    });
    plan.push(Planned {
        name: format!("{mlp}.router.correction_bias"),
        shape: vec![experts],
        source: Source::Values(&carved.router.bias),
    });
    for (e, members) in carved
        .members
        .iter()
        .enumerate()
        .filter(|(_, members)| !members.is_empty())
    {
        let expert = if e == experts {
            "shared_expert".into()
        } else {
            format!("experts.{e}")
        };
        for part in ["gate_proj", "up_proj"] {
            plan.push(Planned {
                name: format!("{mlp}.{expert}.{part}.weight"),
                shape: vec![members.len(), d],
                source: Source::Rows(format!("{mlp}.{part}"), members),
            });
        }
        plan.push(Planned {
            name: format!("{mlp}.{expert}.down_proj.weight"),
            shape: vec![d, members.len()],
            source: Source::Columns(format!("{mlp}.down_proj"), members),
        });
    }
}

fn some_columns(whole: &[f32], rows: usize, columns: &[usize]) -> Vec<f32> {
    let lines = whole.chunks_exact(whole.len() / rows);
    lines.flat_map(|row| columns.iter().map(|&c| row[c])).collect()
}

impl Planned<'_> {
    fn values(&self, model: &Model) -> Result<Vec<f32>, CarveError> {
        Ok(match &self.source {
            Source::Matrix(name) => matrix(model, name)?,
            Source::Values(values) => values.to_vec(),
            Source::Rows(name, rows) => decode_rows(linear(model, name)?, rows.iter().copied()),
            Source::Columns(name, columns) => some_columns(&matrix(model, name)?, self.shape[0], columns),
        })
    }

    /// F16 for a matrix that it holds exactly, else F32.
    fn dtype(&self, model: &Model) -> Result<DType, CarveError> {
        if let Source::Values(_) = self.source {
            return Ok(DType::F32);
        }
        let exact = |v: &f32| f16::from_f32(*v).to_f32() == *v;
        Ok(if self.values(model)?.iter().all(exact) {
            DType::F16
        } else {
            DType::F32
        })
    }
}
