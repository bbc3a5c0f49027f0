//! Trains small language models whose blocks are mixtures of experts, with and without the routing game, and saves them for `nashswarm`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};

use balance::Rule;
use model::Shape;
use text::Corpus;
use train::{Outcome, Plan};

mod balance;
mod export;
mod model;
mod text;
mod train;

/// Train small mixtures of experts on a folder of text
#[derive(Debug, Parser)]
#[command(name = "nash-train", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train one model and save it as a Hugging Face folder, which `nashswarm` reads
    One {
        #[command(flatten)]
        setting: Setting,
        /// How experts are kept busy
        #[arg(long, value_enum, default_value = "nash")]
        rule: Rule,
        /// Seed of the weights and of the order of the text
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Folder to write
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Train with every rule and several seeds, and print a table
    Compare {
        #[command(flatten)]
        setting: Setting,
        /// Rules to compare [default: all]
        #[arg(long, value_enum, value_delimiter = ',')]
        rules: Vec<Rule>,
        /// Seeds, from 1 on
        #[arg(long, default_value_t = 3)]
        seeds: u64,
        /// JSON file of all outcomes; those that it holds already are not trained again
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

/// What all runs of a command share.
#[derive(Debug, Args)]
struct Setting {
    /// Folder of .txt files, one document each; every tenth is held back
    #[arg(long)]
    text: PathBuf,
    /// Tokens to train on
    #[arg(long, default_value_t = 1 << 20)]
    tokens: usize,
    /// Tokens of the vocabulary
    #[arg(long, default_value_t = 2048)]
    vocabulary: usize,
    /// Layers
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Experts of a layer
    #[arg(long, default_value_t = 16)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Hidden neurons of an expert
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    /// Tokens of a window
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Windows of a batch
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3)]
    rate: f64,
    /// Weight α of the auxiliary loss, step u of the loss-free bias [default: 0.01, the best tried], or reward of experts in fast memory, in standard
    /// deviations of a token's scores [default: 1]
    #[arg(long)]
    strength: Option<f64>,
}

impl Setting {
    fn shape(&self, rule: Rule, corpus: &Corpus) -> Shape {
        Shape {
            vocabulary: corpus.vocabulary,
            layers: self.layers,
            width: self.width,
            heads: self.heads,
            experts: if rule == Rule::Dense { 0 } else { self.experts },
            top_k: self.top_k,
            hidden: self.hidden,
            context: self.context,
        }
    }

    fn plan(&self, rule: Rule, seed: u64) -> Plan {
        let usual = rule.usual_strength();
        Plan {
            batch: self.batch,
            steps: self.tokens.div_ceil(self.batch * self.context),
            rate: self.rate,
            strength: usual.and(self.strength.or(usual)),
            seed,
        }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::One {
            setting,
            rule,
            seed,
            output,
        } => {
            let corpus = Corpus::read(&setting.text, setting.vocabulary)?;
            let shape = setting.shape(rule, &corpus);
            let (model, router, outcome) =
                train::train(shape, rule, setting.plan(rule, seed), &corpus, &bar(rule, seed))?;
            export::write(&output, &model, &shape, &router, &corpus)?;
            println!("{}", table(&[outcome]));
        }
        Command::Compare {
            setting,
            rules,
            seeds,
            json,
        } => {
            let corpus = Corpus::read(&setting.text, setting.vocabulary)?;
            let rules = if rules.is_empty() {
                <Rule as clap::ValueEnum>::value_variants().to_vec()
            } else {
                rules
            };
            let mut outcomes: Vec<Outcome> = match &json {
                Some(path) if path.exists() => {
                    let text = fs::read_to_string(path)
                        .with_context(|| format!("cannot read {}", path.display()))?;
                    serde_json::from_str(&text)
                        .with_context(|| format!("{} holds no outcomes", path.display()))?
                }
                _ => Vec::new(),
            };
            for seed in 1..=seeds {
                for &rule in &rules {
                    let (shape, plan) = (setting.shape(rule, &corpus), setting.plan(rule, seed));
                    let known = |o: &Outcome| (o.rule, o.shape, o.plan) == (rule, shape, plan);
                    if outcomes.iter().any(known) {
                        continue;
                    }
                    let (_, _, outcome) = train::train(shape, rule, plan, &corpus, &bar(rule, seed))?;
                    outcomes.push(outcome);
                    if let Some(path) = &json {
                        nash_core::atomic::write(path, serde_json::to_string_pretty(&outcomes)?)?;
                    }
                }
            }
            println!("{}", table(&outcomes));
        }
    }
    Ok(())
}

fn name(rule: Rule) -> String {
    clap::ValueEnum::to_possible_value(&rule).map_or_else(String::new, |value| value.get_name().to_owned())
}

fn bar(rule: Rule, seed: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:24} {bar:30} {pos}/{len}  {msg}  {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0)
        .with_style(style)
        .with_prefix(format!("{}, seed {seed}", name(rule)))
}

/// A row per rule and strength: means over the seeds, and their standard deviation.
fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.set_header([
        "rule",
        "strength",
        "seeds",
        "weights",
        "loss, held back",
        "MaxVio of a batch",
        "of all",
        "in training",
        "price steps",
        "choosing, µs",
        "misses",
        "s",
    ]);
    let kind = |o: &Outcome| (o.rule, o.plan.strength);
    let mut kinds = Vec::new();
    for outcome in outcomes {
        if !kinds.contains(&kind(outcome)) {
            kinds.push(kind(outcome));
        }
    }
    for (rule, strength) in kinds {
        let of: Vec<&Outcome> = outcomes.iter().filter(|o| kind(o) == (rule, strength)).collect();
        let value = |digits: usize, get: fn(&Outcome) -> f64| {
            let (mean, deviation) = mean_and_deviation(of.iter().map(|o| get(o)));
            if of.len() > 1 {
                format!("{mean:.digits$} ± {deviation:.digits$}")
            } else {
                format!("{mean:.digits$}")
            }
        };
        table.add_row([
            name(rule),
            strength.map_or_else(String::new, |strength| strength.to_string()),
            of.len().to_string(),
            of[0].shape.parameters().to_string(),
            value(4, |o| o.validation_loss),
            value(2, |o| o.validation.batch_violation),
            value(2, |o| o.validation.global_violation),
            value(2, |o| o.training.batch_violation),
            value(2, |o| o.training.price_steps),
            value(0, |o| o.training.microseconds),
            if of.iter().all(|o| o.validation.miss_rate.is_some()) {
                value(3, |o| o.validation.miss_rate.unwrap_or_default())
            } else {
                String::new()
            },
            value(0, |o| o.seconds),
        ]);
    }
    table
}

fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let squares = values.map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, (squares / (count - 1.0).max(1.0)).sqrt())
}
