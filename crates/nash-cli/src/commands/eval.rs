//! `eval`: perplexity, and divergence from a reference, over a text.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, value_parser};
use nash_carve::ChannelKind;
use nash_eval::report::{Report, Row};
use nash_eval::routing::{ExpertRules, UseHandle};
use nash_eval::{ModelScorer, Scorer, Windows, memory};
use nash_text::Tokenizer;

use crate::args::{Json, KvName, ModelsArg, Threads};
use crate::calibration::{Source, calibration};
use crate::experts::{self, Experts};
use crate::model::{self, Loaded};
use crate::out::say;
use crate::sizes::size_report;
use crate::table::eval_table;
use crate::ui::{Ui, Unit};
use crate::{interrupt, texts};

/// Measure perplexity, and what was lost against a reference
///
/// Windows, scored positions and errors are those of llama-perplexity, so the figures can be compared with its figures on the
/// same text. KL is the divergence of the model's predictions from the reference's, in nats; top-1 is how often both
/// prefer the same token.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm eval small --reference model.gguf --text wiki.test.raw
  nashswarm eval small medium --reference model.gguf --chunks 20 --json report.json
  nashswarm eval model.gguf --text book.txt --ctx 2048        perplexity alone")]
pub(crate) struct Eval {
    #[command(flatten)]
    models: ModelsArg,
    /// Model that the others are compared with, usually the source they were made from
    #[arg(short, long, value_name = "SOURCE")]
    reference: Option<PathBuf>,
    /// Text to measure on [default: a book that comes with the program]
    #[arg(short = 'f', long, visible_alias = "file", value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens in a window
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        value_name = "N",
        default_value_t = 512
    )]
    ctx: usize,
    /// Windows to measure [default: all of the text]
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Read the scored half of a window token by token, as generation does, from a KV cache of this type [default: whole windows at
    /// once, which no cache is read for]
    #[arg(long, visible_alias = "ctk", value_name = "TYPE")]
    kv_type: Option<KvName>,
    /// Let dense models keep only this share of the neurons of their feed-forward blocks, token by token: the yardstick of `carve`. Thresholds are found on
    /// other text (`--calibration`)
    #[arg(long, value_name = "largest|above|gate=SHARE", value_parser = channels)]
    channels: Vec<(ChannelKind, f64)>,
    /// Text to find thresholds on: a file, `book` (comes with the program) or `self` (the model writes it)
    #[arg(long, value_name = "FILE|book|self", default_value = "book", value_parser = value_parser!(Source))]
    calibration: Source,
    #[command(flatten)]
    experts: Experts,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    json: Json,
}

/// Tokens that thresholds are found on.
const THRESHOLD_TOKENS: usize = 4096;

impl Eval {
    /// Adds a copy of each model for every rule of `--channels`.
    fn thin(&self, models: &mut Vec<Loaded>, ui: &Ui) -> anyhow::Result<()> {
        if self.channels.is_empty() {
            return Ok(());
        }
        let paths: Vec<_> = self.models.paths().map(Path::to_owned).collect();
        for path in &paths {
            for &(kind, share) in &self.channels {
                let mut loaded = model::load(path, ui)?;
                let text = calibration(&self.calibration, &loaded, THRESHOLD_TOKENS, 0, ui)?;
                let rule = nash_carve::channel_sparsity(&loaded.model, kind, share, &text.windows)?;
                loaded.model.set_channels(Some(rule))?;
                loaded.label = Some(format!("{}, {kind:?} {share}", loaded.name()));
                models.push(loaded);
            }
        }
        Ok(())
    }

    /// Gives each model the rule of `--routing`, and for several rewards a copy each.
    fn route(&self, models: &mut Vec<Loaded>, ui: &Ui) -> anyhow::Result<Vec<Option<UseHandle>>> {
        let mut handles = Vec::new();
        for mut loaded in std::mem::take(models) {
            let rules = self.experts.rules(&loaded)?;
            let Some((&first, others)) = rules.split_first() else {
                models.push(loaded);
                handles.push(None);
                continue;
            };
            let name = loaded.name();
            let label = |rules: ExpertRules| Some(format!("{name}, reward {}", rules.reward));
            let places = self.experts.places(&mut loaded, first, ui)?;
            for &rules in others {
                let mut copy = model::load(&loaded.path, ui)?;
                handles.push(Some(experts::install(&mut copy, rules, Arc::clone(&places))));
                copy.label = label(rules);
                models.push(copy);
            }
            handles.push(Some(experts::install(&mut loaded, first, places)));
            loaded.label = label(first);
            models.push(loaded);
        }
        Ok(handles)
    }

    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        let text = self.text.as_deref().map(model::read_text).transpose()?;
        let text = text.as_deref().unwrap_or(texts::EVALUATION);
        let mut models = self
            .models
            .paths()
            .map(|path| model::load(path, ui))
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.thin(&mut models, ui)?;
        let handles = self.route(&mut models, ui)?;
        let reference = self
            .reference
            .as_deref()
            .map(|path| model::load(path, ui))
            .transpose()?;
        let Some(first) = reference.as_ref().or(models.first()) else {
            return Ok(());
        };
        let windows = windows(first.tokenizer()?, text, self.ctx, self.chunks)?;
        let mut rows = match &reference {
            Some(reference) => compare(reference, &models, (&windows, self.kv_type), ui)?,
            None => measure(&models, (&windows, self.kv_type), ui)?,
        };
        let first = rows.len() - handles.len().min(rows.len());
        for (row, handle) in rows[first..].iter_mut().zip(&handles) {
            row.expert_use = handle.as_ref().map(UseHandle::read);
        }
        let report = Report { rows };
        self.json.write(&report)?;
        if !self.json.replaces_table() {
            say!("{}", eval_table(&report.rows));
            say!("{}", protocol(&windows, self.text.as_deref()));
            for row in &report.rows {
                row.expert_use
                    .iter()
                    .for_each(|used| experts::print(&row.name, used));
            }
        }
        Ok(())
    }
}

/// A rule and a share.
fn channels(text: &str) -> Result<(ChannelKind, f64), String> {
    let (kind, share) = text.split_once('=').ok_or("write it as RULE=SHARE")?;
    let kind = match kind {
        "largest" => ChannelKind::Largest,
        "above" => ChannelKind::Above,
        "gate" => ChannelKind::Gate,
        _ => return Err(format!("`{kind}` is not largest, above or gate")),
    };
    match share.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok((kind, share)),
        _ => Err(format!("{share} is not between 0 and 1")),
    }
}

/// The windows of a text as `llama-perplexity` makes them.
pub(crate) fn windows(
    tokenizer: &Tokenizer,
    text: &str,
    ctx: usize,
    chunks: Option<usize>,
) -> anyhow::Result<Windows> {
    let tokens = tokenizer.encode(text, true)?;
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    Ok(Windows::new(tokens, ctx, chunks, bos)?)
}

fn scorer(loaded: &Loaded, kv_type: Option<KvName>) -> ModelScorer<'_> {
    match kv_type {
        Some(kind) => ModelScorer::stepwise(&loaded.model, kind.into()),
        None => ModelScorer::new(&loaded.model),
    }
}

/// Measures models against a reference, which becomes the first row and is always read window by window.
pub(crate) fn compare(
    reference: &Loaded,
    models: &[Loaded],
    (windows, kv_type): (&Windows, Option<KvName>),
    ui: &Ui,
) -> anyhow::Result<Vec<Row>> {
    let mut source = ModelScorer::new(&reference.model);
    let mut scorers: Vec<ModelScorer<'_>> = models.iter().map(|loaded| scorer(loaded, kv_type)).collect();
    let mut handles: Vec<&mut dyn Scorer> = scorers
        .iter_mut()
        .map(|scorer| scorer as &mut dyn Scorer)
        .collect();
    ui.begin("measuring", windows.count() as u64, Unit::Steps);
    let reports = nash_eval::compare(&mut source, &mut handles, windows, &mut progress(ui))?;
    ui.finish();
    let mut rows = vec![row(reference)?];
    rows[0].perplexity = reports.first().map(|report| report.reference());
    for (loaded, report) in models.iter().zip(reports) {
        rows.push(Row {
            comparison: Some(report),
            ..row(loaded)?
        });
    }
    Ok(rows)
}

/// Perplexity of each model.
fn measure(
    models: &[Loaded],
    (windows, kv_type): (&Windows, Option<KvName>),
    ui: &Ui,
) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for loaded in models {
        ui.begin(
            &format!("measuring {}", loaded.name()),
            windows.count() as u64,
            Unit::Steps,
        );
        let mut scorer = scorer(loaded, kv_type);
        let perplexity = nash_eval::perplexity(&mut scorer, windows, &mut progress(ui))?;
        ui.finish();
        rows.push(Row {
            perplexity: Some(perplexity),
            ..row(loaded)?
        });
    }
    Ok(rows)
}

fn row(loaded: &Loaded) -> anyhow::Result<Row> {
    Ok(Row {
        name: loaded.name(),
        size: Some(size_report(&loaded.file)?),
        load_seconds: Some(loaded.load_seconds),
        peak_memory_bytes: memory::peak_bytes(),
        ..Row::default()
    })
}

fn progress(ui: &Ui) -> impl FnMut(usize, usize, f64) -> ControlFlow<()> {
    |_, _, perplexity| {
        ui.step(1);
        ui.remark(format!("perplexity {perplexity:.2}"));
        if interrupt::stopped() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

fn protocol(windows: &Windows, text: Option<&Path>) -> String {
    let text = text.map_or("the built-in book".into(), |path| path.display().to_string());
    let (count, ctx, scored) = (windows.count(), windows.ctx(), windows.count() * windows.scored());
    format!("{count} windows of {ctx} tokens of {text}, {scored} predictions scored")
}
