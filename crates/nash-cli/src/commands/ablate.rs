//! `ablate`: what each part of the method is worth, by leaving it out.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use kuva::backend::svg::SvgBackend;
use kuva::plot::ForestPlot;
use kuva::render::layout::Layout;
use kuva::render::plots::Plot;
use kuva::render::render::render_multiple;
use nash_quant::{CompressOptions, Method};
use serde::Serialize;

use crate::contest::{Contest, Entry, Outcome};
use crate::format;
use crate::out::say;
use crate::table::table;
use crate::ui::Ui;

/// Leave out one part of the method after the other, and measure what it was worth
///
/// Every variant fills the same bytes and is made once per seed; seeds draw the calibration text.
///   full            everything
///   no-nash         no best responses: codes stay at the nearest values of the fitted tables
///   no-swarm        no flock deviations: every weight answers alone, chains never move together
///   no-cache        nothing found before is used again: no warm starts from drafts, no shared drafts (time only)
///   no-quantization the source itself: 16 bits per weight in memory
///   baseline        round to nearest on a uniform grid, one width
///
/// For the routing of experts `nashswarm bench routing` has the same switches as rows: plain top-k (no Nash), the game
/// without and with neighbours (swarm), cold and warm prices (cache).
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
#[command(after_help = "Examples:
  nashswarm ablate model.gguf --bpw 3 --text wiki.test.raw --svg ablation.svg
  nashswarm ablate model.gguf --seeds 5 --json ablation.json")]
pub(crate) struct Ablate {
    #[command(flatten)]
    contest: Contest,
    /// Number of seeds
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Draw the divergences, with their range over the seeds, to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Full,
    NoNash,
    NoSwarm,
    NoCache,
    Baseline,
}

impl Variant {
    const ALL: [Self; 5] = [
        Self::Full,
        Self::NoNash,
        Self::NoSwarm,
        Self::NoCache,
        Self::Baseline,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::NoNash => "no-nash",
            Self::NoSwarm => "no-swarm",
            Self::NoCache => "no-cache",
            Self::Baseline => "baseline",
        }
    }

    fn entry(self, seed: u64, common: &CompressOptions) -> Entry {
        let full = common.clone();
        let options = match self {
            Self::Full => full,
            Self::NoNash => CompressOptions {
                max_sweeps: 0,
                ..full
            },
            Self::NoSwarm => CompressOptions {
                joint_moves: false,
                ..full
            },
            Self::NoCache => CompressOptions { reuse: false, ..full },
            Self::Baseline => CompressOptions {
                method: Method::RoundToNearest,
                ..full
            },
        };
        Entry {
            name: format!("{}-seed{seed}", self.name()),
            work: format!("work-{}-seed{seed}", self.name()),
            options,
        }
    }
}

/// A variant over all seeds.
#[derive(Serialize)]
struct VariantRow {
    name: &'static str,
    file_bytes: u64,
    file_bits_per_weight: f64,
    kl_mean: Spread,
    perplexity: Spread,
    top1_agreement: Spread,
    compress_seconds: Option<Spread>,
}

/// Mean, standard deviation and every value.
#[derive(Clone, Serialize)]
struct Spread {
    mean: f64,
    /// Of the values, with Bessel's correction; 0 for a single one.
    standard_deviation: f64,
    values: Vec<f64>,
}

impl Spread {
    fn of(values: Vec<f64>) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self {
            mean,
            standard_deviation: (squares / (n - 1.0).max(1.0)).sqrt(),
            values,
        }
    }

    fn shown(&self, digits: usize) -> String {
        format::plus_minus(self.mean, self.standard_deviation, digits)
    }
}

#[derive(Serialize)]
struct Ablation {
    rows: Vec<VariantRow>,
}

impl Ablate {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        let arena = self.contest.open(ui)?;
        let mut entries = Vec::new();
        for seed in 0..self.seeds.max(1) {
            let common = arena.options(seed, ui)?;
            entries.extend(Variant::ALL.map(|variant| variant.entry(seed, &common)));
        }
        let (source, outcomes) = arena.hold(entries, ui)?;
        let mut rows = Vec::new();
        for (i, variant) in Variant::ALL.into_iter().enumerate() {
            let of: Vec<&Outcome> = outcomes.iter().skip(i).step_by(Variant::ALL.len()).collect();
            rows.extend(variant_row(variant.name(), &of));
        }
        // The source, which all are measured against.
        if let (Some(size), Some(perplexity)) = (&source.size, &source.perplexity) {
            rows.insert(
                1,
                VariantRow {
                    name: "no-quantization",
                    file_bytes: size.file_bytes,
                    file_bits_per_weight: size.file_bits_per_weight,
                    kl_mean: Spread::of(vec![0.0]),
                    perplexity: Spread::of(vec![perplexity.perplexity]),
                    top1_agreement: Spread::of(vec![1.0]),
                    compress_seconds: None,
                },
            );
        }
        let ablation = Ablation { rows };
        if let Some(path) = &self.svg {
            std::fs::write(path, figure(&ablation, self.contest.bpw))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.contest.json.write(&ablation)?;
        if !self.contest.json.replaces_table() {
            print(&ablation);
            say!("{}; ± over {} seeds", arena.protocol(), self.seeds.max(1));
        }
        Ok(())
    }
}

/// A variant's figures over the seeds; `None` if something was not measured.
fn variant_row(name: &'static str, outcomes: &[&Outcome]) -> Option<VariantRow> {
    let size = outcomes.first()?.row.size.as_ref()?;
    let compared: Vec<_> = outcomes
        .iter()
        .map(|o| o.row.comparison.as_ref())
        .collect::<Option<_>>()?;
    let seconds: Option<Vec<f64>> = outcomes.iter().map(|o| o.report.compress_seconds).collect();
    Some(VariantRow {
        name,
        file_bytes: size.file_bytes,
        file_bits_per_weight: size.file_bits_per_weight,
        kl_mean: Spread::of(compared.iter().map(|c| c.kl_mean).collect()),
        perplexity: Spread::of(compared.iter().map(|c| c.perplexity.perplexity).collect()),
        top1_agreement: Spread::of(compared.iter().map(|c| c.top1_agreement).collect()),
        compress_seconds: seconds.map(Spread::of),
    })
}

fn print(ablation: &Ablation) {
    let mut table = table(&[
        "variant",
        "file",
        "bits/weight",
        "perplexity",
        "KL mean",
        "top-1",
        "made in",
    ]);
    for row in &ablation.rows {
        let top1 = &row.top1_agreement;
        table.add_row([
            row.name.to_owned(),
            format::bytes(row.file_bytes),
            format!("{:.3}", row.file_bits_per_weight),
            row.perplexity.shown(2),
            row.kl_mean.shown(4),
            format!("{:.1} %", 100.0 * top1.mean),
            row.compress_seconds
                .as_ref()
                .map(|s| format::duration(Duration::from_secs_f64(s.mean)))
                .unwrap_or_default(),
        ]);
    }
    say!("{table}");
}

/// The divergences of all variants but the source, each with its range over the seeds, on a logarithmic axis.
fn figure(ablation: &Ablation, bits: f64) -> String {
    let mut plot = ForestPlot::new().with_show_null_line(false);
    for row in ablation.rows.iter().filter(|row| row.kl_mean.mean > 0.0) {
        let values = &row.kl_mean.values;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        plot = plot.with_row(row.name, row.kl_mean.mean, low, high);
    }
    let plots = vec![Plot::Forest(plot)];
    let layout = Layout::auto_from_plots(&plots)
        .with_title(format!("Ablation at {bits:.2} bits per weight"))
        .with_x_label("mean KL divergence (nats), range over seeds")
        .with_log_x();
    SvgBackend.render_scene(&render_multiple(plots, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let spread = Spread::of(vec![1.0, 2.0, 3.0]);
        assert_eq!((spread.mean, spread.standard_deviation), (2.0, 1.0));
        assert_eq!(Spread::of(vec![4.0]).standard_deviation, 0.0);
    }

    #[test]
    fn the_figure_names_every_variant() {
        let row = |name, kl: f64| VariantRow {
            name,
            file_bytes: 1,
            file_bits_per_weight: 3.0,
            kl_mean: Spread::of(vec![kl, kl * 1.1]),
            perplexity: Spread::of(vec![9.0]),
            top1_agreement: Spread::of(vec![0.5]),
            compress_seconds: None,
        };
        let rows = Variant::ALL.map(|v| row(v.name(), 0.4));
        let svg = figure(&Ablation { rows: rows.into() }, 3.0);
        assert!(
            svg.starts_with("<svg") || svg.starts_with("<?xml"),
            "{}",
            &svg[..40]
        );
        for variant in Variant::ALL {
            assert!(svg.contains(variant.name()), "{}", variant.name());
        }
    }
}
