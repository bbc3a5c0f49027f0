//! `bench routing`: what choosing experts costs, and how well it balances.

use clap::{Args, ValueEnum, value_parser};
use nash_eval::routing::{RoutingOptions, RoutingReport, RoutingRow, RoutingShape, routing_rows};

use crate::args::{Json, Threads};
use crate::interrupt;
use crate::out::say;
use crate::table::table;
use crate::ui::{Ui, Unit};

/// Measure the routing of tokens to experts: time, iterations, regret, balance
///
/// Needs no model: the scores are random, from a seed, and skewed as those of a router that nobody balanced. `plan` is 256 tokens and 8
/// experts, 2 per token, with a whole layer of experts and a dense one beside it; the others are 2048 tokens and 64, 128 or
/// 256 experts, 8 per token. Measure on a quiet machine.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm bench routing
  nashswarm bench routing --shape e64 -t 1 -r 20 --json routing.json")]
pub(crate) struct Routing {
    /// Shapes to measure [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    shape: Vec<Shape>,
    /// Batches of each shape
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u16).range(1..))]
    batches: u16,
    /// Repeats of each batch
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Seed of the scores
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    json: Json,
}

/// Names of [`RoutingShape::ALL`], in its order.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    Plan,
    E64,
    E128,
    E256,
}

/// Rows of a shape, one per method, at most: the plan's two layers are measured together.
const STEPS: u64 = 7;

impl Routing {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        let options = RoutingOptions {
            batches: self.batches.into(),
            repeats: self.repetitions.into(),
            seed: self.seed,
            ..RoutingOptions::default()
        };
        let shapes: &[Shape] = if self.shape.is_empty() {
            Shape::value_variants()
        } else {
            &self.shape
        };
        let mut report = RoutingReport::default();
        for &shape in shapes {
            let shape = RoutingShape::ALL[shape as usize];
            ui.begin(&format!("routing, {}", shape.name), STEPS, Unit::Steps);
            let mut tick = || {
                ui.step(1);
                interrupt::check_measurement()
            };
            report.rows.extend(routing_rows(shape, options, &mut tick)?);
            ui.finish();
        }
        self.json.write(&report)?;
        if !self.json.replaces_table() {
            print(&report.rows);
        }
        Ok(())
    }
}

fn print(rows: &[RoutingRow]) {
    let mut table = table(&[
        "shape, method",
        "ns/token",
        "ms/batch",
        "iterations",
        "max regret",
        "MaxVio",
        "load CV",
        "mean score",
        "shared",
        "cache hits",
        "unconverged",
    ]);
    for row in rows {
        let number =
            |value: Option<f64>, digits: usize| value.map(|v| format!("{v:.digits$}")).unwrap_or_default();
        let count = |value: Option<u64>| value.map(|v| v.to_string()).unwrap_or_default();
        table.add_row([
            format!("{}, {}", row.shape, row.method),
            format!("{:.0}", row.nanoseconds_per_token),
            format!("{:.3}", row.milliseconds),
            number(row.iterations, 1),
            row.max_regret.map(|r| format!("{r:.1e}")).unwrap_or_default(),
            number(row.max_violation, 3),
            number(row.load_cv, 3),
            number(row.mean_score, 3),
            number(row.shared_with_neighbours, 3),
            count(row.cache_hits),
            count(row.unconverged),
        ]);
    }
    say!("{table}");
    for row in rows {
        if let Some(share) = row.routing_share {
            say!(
                "{}: routing is {:.2} % of the mixture layer's time",
                row.shape,
                100.0 * share
            );
        }
        if let Some(searched) = row.neighbour_nanoseconds_per_token {
            say!(
                "{}: finding neighbours took {searched:.0} ns per token more",
                row.shape
            );
        }
    }
}
