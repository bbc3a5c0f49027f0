//! `plan`: sizes, memory and time of a compression, from the shape of a model alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args};
use nash_models::ModelConfig;
use nash_quant::{Budget, CompressOptions};
use serde_json::Value;

use crate::args::Json;
use crate::out::say;
use crate::table::table;
use crate::{format, model};

/// Tell what a compression would give and cost, without weights
///
/// Needs a config.json only, so it also plans models that do not fit on this machine.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("shape").args(["model", "preset"]).required(true))]
#[command(after_help = "Examples:
  nashswarm plan config.json --bpw 3,4.25
  nashswarm plan model.gguf
  nashswarm plan --preset gpt3 --bpw 2.5,3,4")]
pub(crate) struct Plan {
    /// config.json, model folder or GGUF file
    #[arg(value_name = "CONFIG")]
    model: Option<PathBuf>,
    /// A well-known shape
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(NAMES))]
    preset: Option<String>,
    /// Budgets in bits per weight of the whole file
    #[arg(long, value_name = "BITS,…", value_delimiter = ',', default_values_t = [3.0, 4.25])]
    bpw: Vec<f64>,
    #[command(flatten)]
    json: Json,
}

/// Configurations of well-known models, as in their `config.json`.
const PRESETS: &str = include_str!("../../assets/presets.json");

const NAMES: [&str; 12] = [
    "smollm2-135m",
    "gpt2",
    "gpt2-medium",
    "opt-125m",
    "opt-1.3b",
    "llama-7b",
    "llama-13b",
    "llama-3.1-8b",
    "llama-70b",
    "mixtral-8x7b",
    "deepseek-67b",
    "gpt3",
];

#[derive(serde::Serialize)]
struct Outcome {
    name: String,
    rows: Vec<nash_quant::Plan>,
}

impl Plan {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let (name, config) = self.shape()?;
        let mut outcome = Outcome {
            name,
            rows: Vec::new(),
        };
        for &bits in &self.bpw {
            let options = CompressOptions {
                budget: Budget::BitsPerWeight(bits),
                ..CompressOptions::default()
            };
            let plan =
                nash_quant::plan(&config, &options).with_context(|| format!("{bits} bits per weight"))?;
            outcome.rows.push(plan);
        }
        self.json.write(&outcome)?;
        if !self.json.replaces_table() {
            say!("{}: {}", outcome.name, shape_line(&config, &outcome.rows));
            say!("{}", plan_table(&outcome.rows));
        }
        Ok(())
    }

    /// Name and configuration of what was asked about.
    fn shape(&self) -> anyhow::Result<(String, ModelConfig)> {
        if let Some(preset) = &self.preset {
            return Ok((preset.clone(), preset_config(preset)?));
        }
        let path = model::resolve(self.model.as_deref().unwrap_or(Path::new("")))?;
        let json = if path.is_dir() {
            path.join("config.json")
        } else {
            path.clone()
        };
        // A configuration is enough; weights need not be there.
        let config = if json.extension().is_some_and(|extension| extension == "json") && json.is_file() {
            let text = model::read_text(&json)?;
            let value: Value =
                serde_json::from_str(&text).with_context(|| format!("{} is not JSON", json.display()))?;
            if value.get("nashswarm_model").is_some() {
                ModelConfig::from_packed(&value)?
            } else {
                ModelConfig::from_hf(&value).with_context(|| format!("cannot use {}", json.display()))?
            }
        } else {
            model::config(&model::open(&path)?.1)?
        };
        Ok((model::name(&path), config))
    }
}

fn preset_config(name: &str) -> anyhow::Result<ModelConfig> {
    let presets: Value = serde_json::from_str(PRESETS)?;
    Ok(ModelConfig::from_hf(&presets[name])?)
}

/// Architecture and sizes that do not depend on the budget.
fn shape_line(config: &ModelConfig, plans: &[nash_quant::Plan]) -> String {
    let (layers, width) = (config.num_layers(), config.hidden_size);
    let Some(plan) = plans.first() else {
        return String::new();
    };
    format!(
        "{} of {layers} layers, width {width}; {} weights, {} in 16-bit floats, {} at the least",
        config.architecture,
        format::count(plan.weights),
        format::bytes(plan.half_precision_bytes),
        format::bytes(plan.smallest_bytes)
    )
}

/// One row per budget.
pub(crate) fn plan_table(plans: &[nash_quant::Plan]) -> comfy_table::Table {
    let mut table = table(&[
        "budget",
        "file",
        "bits/weight",
        "linears",
        "tensors at bits",
        "to run",
        "to compress",
        "scratch disk",
        "time",
    ]);
    for plan in plans {
        let widths: Vec<String> = plan
            .widths
            .iter()
            .map(|(bits, count)| format!("{count} × {bits}"))
            .collect();
        table.add_row([
            format::bytes(plan.budget_bytes),
            format::bytes(plan.file_bytes),
            format!("{:.3}", plan.file_bits_per_weight),
            format!("{:.3}", plan.linear_bits_per_weight),
            widths.join(", "),
            format::bytes(plan.run_memory_bytes),
            format::bytes(plan.compress_memory_bytes),
            format::bytes(plan.scratch_bytes),
            format::duration(Duration::from_secs_f64(plan.compress_seconds)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_sizes_they_are_named_after() {
        let listed: serde_json::Map<String, Value> = serde_json::from_str(PRESETS).unwrap();
        assert_eq!(
            listed.keys().collect::<Vec<_>>(),
            NAMES.iter().collect::<Vec<_>>()
        );
        // Parameters as published, in millions; learned positions and biases included.
        let published = [
            134.5, 124.4, 354.8, 125.2, 1315.8, 6738.4, 13015.9, 8030.3, 68976.6, 46702.8, 67425.0, 174_600.0,
        ];
        for (name, millions) in NAMES.into_iter().zip(published) {
            let plan = nash_quant::plan(&preset_config(name).unwrap(), &CompressOptions::default()).unwrap();
            let off = plan.weights as f64 / (millions * 1e6) - 1.0;
            assert!(
                off.abs() < 2e-3,
                "{name}: {} weights, published {millions} M",
                plan.weights
            );
        }
    }
}
