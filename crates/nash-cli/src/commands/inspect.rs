//! `inspect`: what is in a model file.

use std::collections::BTreeMap;

use clap::Args;
use nash_core::ModelFile;
use nash_eval::report::SizeReport;
use nash_models::ModelConfig;

use crate::args::{Json, ModelArg};
use crate::out::say;
use crate::sizes::{TensorSize, file_bytes, summary, tensors};
use crate::table::table;
use crate::{format, model};

/// Show what is in a model: architecture, tensors, widths, honest bits per weight
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm inspect small
  nashswarm inspect model.gguf --tensors")]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    json: Json,
}

#[derive(serde::Serialize)]
struct Inspection {
    path: String,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ModelConfig>,
    #[serde(flatten)]
    size: SizeReport,
    tensors: Vec<TensorSize>,
}

impl Inspect {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let (path, file) = model::open(self.model.path())?;
        let tensors = tensors(&file)?;
        // A file of an unknown architecture still has tensors to look at.
        let config = model::config(&file);
        if let Err(error) = &config {
            tracing::warn!("{error}");
        }
        let inspection = Inspection {
            path: path.display().to_string(),
            format: match file {
                ModelFile::Gguf(_) => "GGUF",
                ModelFile::Packed(_) => "Nash-Swarm",
                _ => "Hugging Face",
            },
            config: config.ok(),
            size: summary(&tensors, file_bytes(&file)),
            tensors,
        };
        self.json.write(&inspection)?;
        if !self.json.replaces_table() {
            inspection.print(self.tensors);
        }
        Ok(())
    }
}

impl Inspection {
    fn print(&self, all: bool) {
        say!("{} ({})", self.path, self.format);
        if let Some(config) = &self.config {
            say!(
                "{}: {} layers, width {}, {} heads ({} for keys and values), vocabulary {}, context {}",
                config.architecture,
                config.num_layers(),
                config.hidden_size,
                config.attention.heads,
                config.attention.kv_heads,
                config.vocab_size,
                config.context_length
            );
        }
        let size = &self.size;
        say!(
            "{} weights in {}: {:.3} bits per weight over the whole file, {:.3} over the weight matrices",
            format::count(size.weights),
            format::bytes(size.file_bytes),
            size.file_bits_per_weight,
            size.linear_bits_per_weight
        );
        say!("{}", if all { self.every_tensor() } else { self.by_kind() });
    }

    fn by_kind(&self) -> comfy_table::Table {
        let mut kinds = BTreeMap::<&str, (u64, u64, u64)>::new();
        for tensor in &self.tensors {
            let sums = kinds.entry(&tensor.kind).or_default();
            *sums = (sums.0 + 1, sums.1 + tensor.weights(), sums.2 + tensor.bytes);
        }
        let mut table = table(&["type", "tensors", "weights", "bytes", "bits/weight"]);
        for (kind, (count, weights, bytes)) in kinds {
            table.add_row([
                kind.to_owned(),
                count.to_string(),
                format::count(weights),
                format::count(bytes),
                format!("{:.3}", 8.0 * bytes as f64 / weights.max(1) as f64),
            ]);
        }
        table
    }

    fn every_tensor(&self) -> comfy_table::Table {
        let mut table = table(&["tensor", "shape", "type", "bytes", "bits/weight"]);
        for tensor in &self.tensors {
            let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
            table.add_row([
                tensor.name.clone(),
                shape.join(" × "),
                tensor.kind.clone(),
                format::count(tensor.bytes),
                format!("{:.3}", tensor.bits()),
            ]);
        }
        table
    }
}
