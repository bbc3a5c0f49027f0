//! `compare`: the games beside other methods, at the same bytes.

use clap::{Args, ValueEnum};
use nash_eval::report::Row;
use nash_quant::{Allocation, CompressOptions, Method};
use serde::Serialize;

use crate::contest::{Contest, Entry, Outcome};
use crate::format;
use crate::out::say;
use crate::table::table;
use crate::ui::Ui;

/// Compare the games with other methods at the same bytes, in the same format, on the same text
///
/// `rtn` and `gptq` round by other rules, at one width. The others all round by the game and differ in how they divide the bytes:
/// equally (`uniform`), by the measured loss of single tensors (`greedy`, `knapsack`, `market`), with pairwise effects
/// (`pairwise`), or by searching with the loss of the whole model (`evolution`; `swarm` starts from the market). They share
/// calibration, measured losses and drafts, so the times are those of what was not there yet.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm compare model.gguf --bpw 3 --text wiki.test.raw
  nashswarm compare model.gguf --methods gptq,uniform,market --json compare.json
  nashswarm compare model.gguf -o work --evaluations 128          keep what was computed")]
pub(crate) struct Compare {
    #[command(flatten)]
    contest: Contest,
    /// Methods to compare
    #[arg(long, value_enum, value_name = "NAME,…", value_delimiter = ',', default_values_t = Contender::value_variants())]
    methods: Vec<Contender>,
    /// Whole allocations that `evolution` and `swarm` may try on the model
    #[arg(long, value_name = "N", default_value_t = CompressOptions::default().evaluations)]
    evaluations: usize,
    /// Seed of every random choice
    #[arg(short, long, value_name = "N", default_value_t = 0, env = "NASHSWARM_SEED")]
    seed: u64,
}

/// Names of the methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Contender {
    /// Round to nearest on a uniform grid, one width
    Rtn,
    /// GPTQ with act-order on a uniform grid, one width
    Gptq,
    /// The rounding game, one width
    Uniform,
    /// The rounding game; the largest fall of the measured loss per byte first
    Greedy,
    /// The rounding game; the exact optimum of the measured losses
    Knapsack,
    /// The rounding game; the market with measured pairwise effects
    Pairwise,
    /// The rounding game; evolutionary search (EvoPress)
    Evolution,
    /// The rounding game; the market
    Market,
    /// The rounding game; the market refined by a particle swarm
    Swarm,
}

impl Contender {
    fn allocation(self) -> Option<Allocation> {
        Some(match self {
            Self::Rtn | Self::Gptq => return None,
            Self::Uniform => Allocation::Uniform,
            Self::Greedy => Allocation::Greedy,
            Self::Knapsack => Allocation::Knapsack,
            Self::Pairwise => Allocation::Pairwise,
            Self::Evolution => Allocation::Evolution,
            Self::Market => Allocation::Market,
            Self::Swarm => Allocation::Swarm,
        })
    }

    fn entry(self, common: &CompressOptions) -> Entry {
        let name = self
            .to_possible_value()
            .map_or_else(String::new, |v| v.get_name().into());
        let method = match self {
            Self::Rtn => Method::RoundToNearest,
            Self::Gptq => Method::Gptq,
            _ => Method::Nash,
        };
        let work = match method {
            Method::Nash => "work".into(),
            _ => format!("work-{name}"),
        };
        Entry {
            name,
            work,
            options: CompressOptions {
                method,
                allocation: self.allocation().unwrap_or_default(),
                ..common.clone()
            },
        }
    }
}

/// The results.
#[derive(Serialize)]
struct Comparison {
    source: Row,
    rows: Vec<MethodRow>,
}

#[derive(Serialize)]
struct MethodRow {
    #[serde(flatten)]
    row: Row,
    /// The allocation that the method ended with: its own, or one that it fell back on.
    allocation: String,
    /// Loss that the method's model of losses predicted, in nats.
    predicted_kl: Option<f64>,
}

impl Compare {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        let arena = self.contest.open(ui)?;
        let common = CompressOptions {
            evaluations: self.evaluations,
            ..arena.options(self.seed, ui)?
        };
        let entries = self.methods.iter().map(|method| method.entry(&common)).collect();
        let (source, outcomes) = arena.hold(entries, ui)?;
        let rows = outcomes.into_iter().map(|Outcome { row, report }| MethodRow {
            row,
            allocation: report.profile,
            predicted_kl: report.predicted_kl,
        });
        let comparison = Comparison {
            source,
            rows: rows.collect(),
        };
        self.contest.json.write(&comparison)?;
        if !self.contest.json.replaces_table() {
            print(&comparison);
            say!("{}", arena.protocol());
        }
        Ok(())
    }
}

fn print(comparison: &Comparison) {
    let mut table = table(&[
        "method",
        "file",
        "bits/weight",
        "perplexity",
        "KL mean",
        "KL 99 %",
        "top-1",
        "allocation",
        "predicted KL",
        "made in",
    ]);
    let best = comparison.rows.iter().map(kl).fold(f64::INFINITY, f64::min);
    for method in &comparison.rows {
        let row = &method.row;
        let size = row.size.as_ref();
        let c = row.comparison.as_ref();
        let mark = if kl(method) == best { " *" } else { "" };
        table.add_row([
            format!("{}{mark}", row.name),
            size.map(|s| format::bytes(s.file_bytes)).unwrap_or_default(),
            size.map(|s| format!("{:.3}", s.file_bits_per_weight))
                .unwrap_or_default(),
            c.map(|c| format::plus_minus(c.perplexity.perplexity, c.perplexity.perplexity_stderr, 2))
                .unwrap_or_default(),
            c.map(|c| format::plus_minus(c.kl_mean, c.kl_mean_stderr, 4))
                .unwrap_or_default(),
            c.map(|c| format!("{:.3}", c.kl_p99)).unwrap_or_default(),
            c.map(|c| format!("{:.1} %", 100.0 * c.top1_agreement))
                .unwrap_or_default(),
            method.allocation.clone(),
            method
                .predicted_kl
                .map(|kl| format!("{kl:.3}"))
                .unwrap_or_default(),
            row.compress_seconds
                .map(|s| format::duration(std::time::Duration::from_secs_f64(s)))
                .unwrap_or_default(),
        ]);
    }
    say!("{table}");
    if let Some(source) = &comparison.source.perplexity {
        say!(
            "* least divergence. The source's perplexity is {:.2}.",
            source.perplexity
        );
    }
}

fn kl(method: &MethodRow) -> f64 {
    method
        .row
        .comparison
        .as_ref()
        .map_or(f64::INFINITY, |c| c.kl_mean)
}
