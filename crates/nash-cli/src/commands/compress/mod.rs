//! `compress`: makes a packed model.

mod summary;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgGroup, Args, ValueEnum, value_parser};
use nash_eval::memory;
use nash_eval::report::{Report, Row};
use nash_kernels::Width;
use nash_models::ModelConfig;
use nash_quant::{Allocation, Budget, Codebook, CompressOptions, Effort, Inventory, Method, Sensitivity};

use crate::args::{Json, Threads, Work};
use crate::calibration::{Source, calibration};
use crate::commands::plan::plan_table;
use crate::model::Loaded;
use crate::out::say;
use crate::sizes::size_report;
use crate::ui::Ui;
use crate::{format, model};

/// Compress a model to a budget: bits per weight, a file size, or what fits this machine
///
/// The budget counts the whole file: every tensor, scale, codebook, embedding and header. Which tensor gets how many bits
/// is decided by a market, how each weight is rounded by a game; both end in an equilibrium that is checked and that
/// `verify` can check again. The same seed gives the same bytes for any number of threads.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("budget").args(["bpw", "size", "fit_ram"]))]
#[command(after_help = "Examples:
  nashswarm compress model.gguf -o small                         4.25 bits per weight
  nashswarm compress model.gguf -o small --bpw 3 --dry-run       what would come out, at what cost
  nashswarm compress ./Llama-3.2-1B -o small --size 500MB --calibration text.txt
  nashswarm compress model.gguf -o small --tensor-type '*.down_proj=4' --tensor-type 'lm_head=6'
  nashswarm compress model.gguf -o small --time-budget 5m        what can be done in five minutes
  nashswarm compress model.gguf -o small --resume                go on after an interruption")]
pub(crate) struct Compress {
    /// Model to compress: GGUF file, model folder, or name of a fetched model
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "DIR", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Bits per weight of the whole file [default: 4.25]
    #[arg(long, value_name = "BITS", value_parser = bits)]
    bpw: Option<f64>,
    /// Size of the whole file, such as 48MB
    #[arg(long, value_name = "SIZE", value_parser = format::parse_bytes)]
    size: Option<u64>,
    /// As large as runs comfortably in the memory that is free now
    #[arg(long)]
    fit_ram: bool,
    /// Text to calibrate on: a file, `book` (comes with the program) or `self` (the model writes it)
    #[arg(long, value_name = "FILE|book|self", default_value = "book", value_parser = value_parser!(Source))]
    calibration: Source,
    /// Tokens to calibrate on [default: 8192 with normal effort]
    #[arg(long, value_name = "N")]
    calibration_tokens: Option<usize>,
    /// How much work to do [default: normal; short for models of more than a billion weights]
    #[arg(long, value_enum, value_name = "EFFORT")]
    effort: Option<Work>,
    /// The most work that is estimated to fit in this time on this machine, such as 90s, 5m or 2h. Says which effort that
    /// is, so that it can be repeated: the result depends on the effort alone
    #[arg(long, value_name = "TIME", value_parser = format::parse_duration, conflicts_with = "effort")]
    time_budget: Option<Duration>,
    /// Fix the width of tensors: PATTERN may have `*`, WIDTH is 2, 3, 4, 5, 6 or 8; the first match counts
    #[arg(long, value_name = "PATTERN=WIDTH", value_parser = tensor_type)]
    tensor_type: Vec<(String, Width)>,
    /// How weights are rounded
    #[arg(long, value_enum, default_value_t = Rounding::Nash)]
    method: Rounding,
    /// How the bytes are divided among the tensors [default: market; swarm with thorough effort]
    #[arg(long, value_enum, value_name = "NAME")]
    allocation: Option<Division>,
    /// What a weight's value is looked up by [default: trellis; scalar below short effort]
    #[arg(long, value_enum)]
    codebook: Option<Lookup>,
    /// How it is known what a tensor's rounding costs the whole model
    #[arg(long, value_enum, default_value_t = Losses::Measured)]
    losses: Losses,
    /// Solve the layers one after the other, each making up for this share (0 to 1) of the errors of those before it [default: 0.3; 0 below short effort]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    propagate: Option<f32>,
    /// Tune norms and biases to the rounded weights, going over the calibration text N times [default: 0; 2 with thorough
    /// effort]
    #[arg(long, value_name = "N")]
    tune: Option<usize>,
    /// Seed of every random choice
    #[arg(short, long, value_name = "N", default_value_t = 0, env = "NASHSWARM_SEED")]
    seed: u64,
    #[command(flatten)]
    threads: Threads,
    /// Show what would come out, and its cost in time and memory; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on where an interrupted compression stopped
    #[arg(long)]
    resume: bool,
    /// Keep intermediate results in this folder; further budgets for the same model and options start from them
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Replace the folder if it exists
    #[arg(long, conflicts_with = "resume")]
    force: bool,
    #[command(flatten)]
    json: Json,
}

/// Names of the methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rounding {
    /// The games
    Nash,
    /// Baseline: nearest level of a uniform grid, one width everywhere
    Rtn,
    /// Baseline: GPTQ with act-order on a uniform grid, one width everywhere
    Gptq,
}

/// Names of the allocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Division {
    /// At the clearing price of measured losses; equally where that turns out better
    Market,
    /// The market, refined by a particle swarm on the loss of the whole model
    Swarm,
    /// Equally
    Uniform,
    /// Baseline: the largest fall of the measured loss per byte first
    Greedy,
    /// Baseline: the exact optimum of the measured losses
    Knapsack,
    /// Baseline: the market with measured pairwise effects
    Pairwise,
    /// Baseline: evolutionary search on the loss of the whole model (EvoPress)
    Evolution,
}

impl From<Division> for Allocation {
    fn from(division: Division) -> Self {
        match division {
            Division::Market => Self::Market,
            Division::Swarm => Self::Swarm,
            Division::Uniform => Self::Uniform,
            Division::Greedy => Self::Greedy,
            Division::Knapsack => Self::Knapsack,
            Division::Pairwise => Self::Pairwise,
            Division::Evolution => Self::Evolution,
        }
    }
}

/// Names of the codebooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Lookup {
    /// Six bits of the stream, the weight's own and those that follow: errs least, decodes as fast with AVX-512
    Trellis,
    /// The weight's own bits: decodes faster where there is no AVX-512
    Scalar,
}

impl From<Lookup> for Codebook {
    fn from(lookup: Lookup) -> Self {
        match lookup {
            Lookup::Trellis => Self::Trellis,
            Lookup::Scalar => Self::Scalar,
        }
    }
}

/// Names of the ways to know losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Losses {
    /// The KL divergence with one tensor rounded is measured
    Measured,
    /// Measured; one reverse pass weights the tokens of the rounding game
    Weighted,
    /// Predicted from one reverse pass, which also weights tokens: faster, better from about 4 bits on, worse below
    Gradient,
}

impl From<Losses> for Sensitivity {
    fn from(losses: Losses) -> Self {
        match losses {
            Losses::Measured => Self::Measured,
            Losses::Weighted => Self::Weighted,
            Losses::Gradient => Self::Gradient,
        }
    }
}

impl From<Rounding> for Method {
    fn from(rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nash => Self::Nash,
            Rounding::Rtn => Self::RoundToNearest,
            Rounding::Gptq => Self::Gptq,
        }
    }
}

/// A share between 0 and 1.
fn share(text: &str) -> Result<f32, String> {
    let share: f32 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(format!("{text} is not between 0 and 1"))
    }
}

impl Compress {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        if self.dry_run {
            return self.plan();
        }
        // Without --dry-run clap requires the option.
        let out = self.output.clone().unwrap_or_default();
        let loaded = model::load(&self.source, ui)?;
        let options = self.options(&loaded, ui)?;
        let report = compress(&loaded, &out, &options, ui)?;
        let row = row(&out, &report)?;
        self.json.write(&Report { rows: vec![row] })?;
        if !self.json.replaces_table() {
            summary::print(&out, &report);
        }
        Ok(())
    }

    /// Shows what would come out.
    fn plan(&self) -> anyhow::Result<()> {
        let (_, file) = model::open(&self.source)?;
        let config = model::config(&file)?;
        let (effort, options) = self.effort(&config)?;
        let plan = nash_quant::plan(&config, &options)?;
        self.json.write(&plan)?;
        if !self.json.replaces_table() {
            say!("{}", plan_table(std::slice::from_ref(&plan)));
            say!("effort: {effort:?}; nothing was written");
        }
        Ok(())
    }

    fn options(&self, loaded: &Loaded, ui: &Ui) -> anyhow::Result<CompressOptions> {
        let (effort, options) = self.effort(loaded.model.config())?;
        let tokens = self.calibration_tokens.unwrap_or(effort.calibration_tokens());
        if self.time_budget.is_some() {
            ui.note(&format!("effort within the time: {effort:?}"));
        } else if self.effort.is_none() && effort != Effort::default() {
            ui.note(&format!(
                "effort for a model of this size: {effort:?}; --effort normal does more and takes longer"
            ));
        }
        Ok(CompressOptions {
            seed: self.seed,
            calibration: calibration(&self.calibration, loaded, tokens, self.seed, ui)?,
            resume: self.resume,
            force: self.force,
            work_dir: self.work_dir.clone(),
            ..options
        })
    }

    /// The effort, and the options that come of it and of what was asked for; without text.
    fn effort(&self, config: &ModelConfig) -> anyhow::Result<(Effort, CompressOptions)> {
        let asked = CompressOptions {
            budget: self.budget(config)?,
            method: self.method.into(),
            sensitivity: self.losses.into(),
            tensor_types: self.tensor_type.clone(),
            ..CompressOptions::default()
        };
        let effort = match (self.time_budget, self.effort) {
            (Some(time), _) => nash_quant::effort_within(config, &asked, time.as_secs_f64())?,
            (None, Some(effort)) => effort.into(),
            (None, None) => nash_quant::usual_effort(config),
        };
        let mut options = effort.apply(asked);
        // What was asked for by name counts more than the effort.
        if let Some(lookup) = self.codebook {
            options.codebook = lookup.into();
        }
        if let Some(division) = self.allocation {
            options.allocation = division.into();
        }
        if let Some(share) = self.propagate {
            options.propagation = share;
        }
        if let Some(epochs) = self.tune {
            options.tune_epochs = epochs;
        }
        Ok((effort, options))
    }

    fn budget(&self, config: &ModelConfig) -> anyhow::Result<Budget> {
        if let Some(bytes) = self.size {
            return Ok(Budget::Bytes(bytes));
        }
        if self.fit_ram {
            return fit_memory(config);
        }
        Ok(self
            .bpw
            .map_or(CompressOptions::default().budget, Budget::BitsPerWeight))
    }
}

/// Three quarters of the free memory, less a cache of 4096 tokens; 8 bits per weight at the most.
fn fit_memory(config: &ModelConfig) -> anyhow::Result<Budget> {
    let free = memory::available_bytes().context("this system does not tell how much memory is free")?;
    let cache = config.kv_bytes_per_token() as u64 * config.context_length.min(4096) as u64;
    let room = (free / 4 * 3).saturating_sub(cache);
    let widest = Budget::BitsPerWeight(8.25).bytes(Inventory::of(config).weights());
    Ok(Budget::Bytes(room.min(widest)))
}

/// Compresses a loaded model.
pub(crate) fn compress(
    loaded: &Loaded,
    out: &Path,
    options: &CompressOptions,
    ui: &Ui,
) -> anyhow::Result<nash_quant::Report> {
    let tokenizer = loaded.tokenizer()?;
    let save = |dir: &Path| Ok(tokenizer.save(dir)?);
    nash_kernels::heap::return_freed_blocks();
    let report = nash_quant::compress(&loaded.file, &save, out, options, ui)
        .with_context(|| format!("cannot compress {}", loaded.path.display()))?;
    ui.finish();
    Ok(report)
}

/// The figures of a finished folder.
pub(crate) fn row(out: &Path, report: &nash_quant::Report) -> anyhow::Result<Row> {
    let (_, file) = model::open(out)?;
    Ok(Row {
        name: model::name(out),
        size: Some(size_report(&file)?),
        compress_seconds: report.compress_seconds,
        max_regret: Some(report.max_regret),
        peak_memory_bytes: memory::peak_bytes(),
        ..Row::default()
    })
}

pub(crate) fn bits(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(bits) if (2.0..=16.0).contains(&bits) => Ok(bits),
        _ => Err("give a number between 2 and 16".into()),
    }
}

fn tensor_type(text: &str) -> Result<(String, Width), String> {
    let (pattern, width) = text.rsplit_once('=').ok_or("write it as PATTERN=WIDTH")?;
    let bits: u8 = width.parse().map_err(|_| format!("`{width}` is not a width"))?;
    let width = Width::new(bits).ok_or(format!("{bits} bits is not a width; use 2, 3, 4, 5, 6 or 8"))?;
    if pattern.is_empty() {
        return Err("the pattern is empty".into());
    }
    Ok((pattern.to_owned(), width))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_types() {
        assert_eq!(
            tensor_type("*.q_proj=3").unwrap(),
            ("*.q_proj".to_owned(), Width::new(3).unwrap())
        );
        for bad in ["x", "x=", "x=7", "=3", "x=three"] {
            assert!(tensor_type(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bits_of_a_budget() {
        assert_eq!(bits("4.25"), Ok(4.25));
        for bad in ["1.9", "17", "NaN", "four", "-3"] {
            assert!(bits(bad).is_err(), "{bad}");
        }
    }
}
