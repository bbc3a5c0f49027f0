//! `carve`: makes a mixture of experts of a dense model.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum, value_parser};
use nash_carve::{CarveOptions, CarveReport, Start};

use crate::args::{Json, Threads};
use crate::calibration::{Source, calibration};
use crate::failure::Hint as _;
use crate::out::say;
use crate::table::table;
use crate::ui::{Ui, Unit};
use crate::{interrupt, model};

/// Carve a dense model into a mixture of experts, without training
///
/// The neurons of each feed-forward block are sorted into a shared expert, which every token uses, and routed ones, of which a router chooses some. Which neurons stand together is a
/// game on calibration text: neurons and tokens choose so that least of the block's output is lost, until nobody gains. A market gives the layers that need them more
/// experts. No weight changes: with --active 1 the mixture computes what the dense model did. It reads fewer weights per token and answers worse: measure both with `bench` and `eval`, and
/// compare with what single neurons could do (`eval --channels`).
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm carve model.gguf -o mixture --active 0.75
  nashswarm eval mixture --reference model.gguf          what was lost
  nashswarm compress mixture -o small --bpw 4.25         as any model
  nashswarm carve model.gguf -o mixture --experts 8 --shared 0 --active 0.5")]
pub(crate) struct Carve {
    /// Dense model: GGUF file, model folder, or name of a fetched model
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Share of a block's neurons that a token uses, shared ones included; the mean over the layers
    #[arg(long, value_name = "SHARE", default_value_t = 0.75)]
    active: f64,
    /// Routed experts of a layer [default: of a multiple of 64 neurons each, about a 24th of the block]
    #[arg(long, value_name = "E")]
    experts: Option<usize>,
    /// Neurons of the shared expert; those that the experts leave over join them [default: half of the active ones]
    #[arg(long, value_name = "N")]
    shared: Option<usize>,
    /// Every layer uses the same number of experts per token
    #[arg(long)]
    no_market: bool,
    /// Where the game starts
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Begin::Flocks)]
    start: Begin,
    /// Times at most that the router is fitted again to the experts, and the experts to it
    #[arg(long, value_name = "N", default_value_t = 4)]
    router_rounds: usize,
    /// Text to calibrate on: a file, `book` (comes with the program) or `self` (the model writes it)
    #[arg(long, value_name = "FILE|book|self", default_value = "book", value_parser = value_parser!(Source))]
    calibration: Source,
    /// Tokens to calibrate on
    #[arg(long, value_name = "N", default_value_t = 8192)]
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

/// Names of the starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Begin {
    /// Neurons that fire together stand together, the strongest are shared
    Flocks,
    /// At random
    Random,
    /// As the neurons lie in the matrix
    InOrder,
}

impl From<Begin> for Start {
    fn from(begin: Begin) -> Self {
        match begin {
            Begin::Flocks => Self::Flocks,
            Begin::Random => Self::Random,
            Begin::InOrder => Self::InOrder,
        }
    }
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
            start: self.start.into(),
            market: !self.no_market,
            router_rounds: self.router_rounds,
            windows: text.windows,
            seed: self.seed,
        };
        let passes = if options.market { 2 } else { 1 };
        let layers = loaded.model.config().num_layers() as u64;
        ui.begin("carving", passes * layers, Unit::Steps);
        let tokenizer = loaded.tokenizer()?;
        let save = |dir: &Path| tokenizer.save(dir).map_err(std::io::Error::other);
        let report = nash_carve::carve(&loaded.model, &options, &self.output, &save, &mut |_, _| {
            ui.step(1);
            !interrupt::stopped()
        });
        interrupt::check()?;
        let report = report.with_context(|| format!("cannot carve {}", loaded.path.display()))?;
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
        "layer",
        "experts per token",
        "kept at start",
        "by choice",
        "by router",
        "at random",
        "error",
        "rounds",
        "max regret",
    ]);
    for (layer, row) in report.layers.iter().enumerate() {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        table.add_row([
            layer.to_string(),
            row.top_k.to_string(),
            percent(row.kept_at_start),
            percent(row.kept_by_choice),
            percent(row.kept_by_router),
            percent(row.kept_at_random),
            format!("{:.4}", row.error),
            format!("{} + {}", row.rounds, row.router_rounds),
            format!("{:.0e}", row.max_regret),
        ]);
    }
    say!("{table}");
    say!(
        "{} routed experts of {} neurons and a shared one of {}; a token uses {:.1} % of the neurons, the mean over the layers",
        report.experts,
        report.width,
        report.shared,
        100.0 * report.active
    );
}
