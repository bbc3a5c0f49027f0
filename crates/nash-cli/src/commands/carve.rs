//! `carve`: makes a mixture of experts of a dense model.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum, value_parser};
use nash_carve::{CarveOptions, CarveReport, Start, Target};

use crate::args::{Json, Threads};
use crate::calibration::{Source, calibration};
use crate::out::say;
use crate::table::table;
use crate::ui::{Ui, Unit};
use crate::{failure::Hint as _, interrupt, model};

/// Carve a dense model into a mixture of experts, without training
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm carve model.gguf -o mixture --active 0.75
  nashswarm compress mixture -o small --bpw 4.25")]
pub(crate) struct Carve {
    /// Dense model: GGUF file, model folder, or name of a fetched model
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Routed experts of a layer
    #[arg(long, value_name = "E", default_value_t = 20)]
    experts: usize,
    /// Neurons of the shared expert
    #[arg(long, value_name = "N", default_value_t = 256)]
    shared: usize,
    /// Share of the neurons that a token may use
    #[arg(long, value_name = "SHARE", default_value_t = 0.75)]
    active: f64,
    /// Stand-ins
    #[arg(long)]
    stand_ins: bool,
    #[arg(long, value_enum, default_value_t = Begin::Flocks)]
    start: Begin,
    #[arg(long, value_enum, default_value_t = Aim::Root)]
    target: Aim,
    #[arg(long)]
    refit: Option<f64>,
    #[arg(long, default_value_t = 0.0)]
    propagate: f32,
    #[arg(long)]
    market: bool,
    #[arg(long, default_value_t = 10)]
    router_rounds: usize,
    /// Text to calibrate on: a file, `book` (comes with the program) or `self` (the model writes it)
    #[arg(long, value_name = "FILE|book|self", default_value = "book", value_parser = value_parser!(Source))]
    calibration: Source,
    /// Tokens to calibrate on
    #[arg(long, value_name = "N", default_value_t = 16384)]
    calibration_tokens: usize,
    /// Seed of every random choice
    #[arg(short, long, value_name = "N", default_value_t = 0, env = "NASHSWARM_SEED")]
    seed: u64,
    /// Replace the folder if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    json: Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Begin {
    Flocks,
    Random,
    InOrder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Aim {
    Energy,
    Share,
    Root,
    Log,
}

impl Carve {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        if self.output.exists() && !self.force {
            return Err(anyhow::anyhow!("`{}` exists already", self.output.display()))
                .hint("use --force to replace it");
        }
        let loaded = model::load(&self.source, ui)?;
        let text = calibration(&self.calibration, &loaded, self.calibration_tokens, self.seed, ui)?;
        let options = CarveOptions {
            experts: self.experts,
            shared: self.shared,
            active: self.active,
            stand_ins: self.stand_ins,
            start: match self.start {
                Begin::Flocks => Start::Flocks,
                Begin::Random => Start::Random,
                Begin::InOrder => Start::InOrder,
            },
            target: match self.target {
                Aim::Energy => Target::Energy,
                Aim::Share => Target::Share,
                Aim::Root => Target::Root,
                Aim::Log => Target::Log,
            },
            refit: self.refit,
            propagate: self.propagate,
            market: self.market,
            router_rounds: self.router_rounds,
            windows: text.windows,
            seed: self.seed,
        };
        ui.begin(
            "carving",
            loaded.model.config().num_layers() as u64,
            Unit::Steps,
        );
        let save = |dir: &std::path::Path| loaded.tokenizer.save(dir).map_err(std::io::Error::other);
        let report = nash_carve::carve(&loaded.model, &options, &self.output, &save, &mut |_, _| {
            ui.step(1);
            !interrupt::stopped()
        })
        .with_context(|| format!("cannot carve {}", loaded.path.display()))?;
        ui.finish();
        self.json.write(&report)?;
        if !self.json.replaces_table() {
            print(&report);
        }
        Ok(())
    }
}

fn print(report: &CarveReport) {
    let mut table = table(&[
        "layer", "start", "choice", "router 1", "router", "random", "rounds", "swaps", "r rounds", "error", "refit", "dynamic", "k",
    ]);
    for (layer, row) in report.layers.iter().enumerate() {
        table.add_row([
            layer.to_string(),
            format!("{:.3}", row.kept_at_start),
            format!("{:.3}", row.kept_by_choice),
            format!("{:.3}", row.kept_by_first_router),
            format!("{:.3}", row.kept_by_router),
            format!("{:.3}", row.random),
            row.rounds.to_string(),
            row.swaps.to_string(),
            row.router_rounds.to_string(),
            format!("{:.4}", row.error),
            format!("{:.4}", row.error_refit),
            format!("{:.3}", row.kept_dynamic),
            row.top_k.to_string(),
        ]);
    }
    say!("{table}");
    let mean: f64 = report.layers.iter().map(|l| l.error).sum::<f64>() / report.layers.len() as f64;
    say!("mean error {mean:.4}, {:.1} s", report.seconds);
}
