//! Several ways to compress one model to the same bytes, measured side by side: what `compare` and `ablate` have in common.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, value_parser};
use nash_eval::report::Row;
use nash_quant::{Budget, CompressOptions, Effort, Report};

use crate::args::{Json, Threads, Work};
use crate::calibration::{Source, calibration};
use crate::commands::{compress, eval};
use crate::model::{self, Loaded};
use crate::ui::Ui;
use crate::{format, texts};

/// What is compressed, to which size, and what it is measured on.
#[derive(Debug, Args)]
pub(crate) struct Contest {
    /// Model to compress: GGUF file, model folder, or name of a fetched model
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Bits per weight of the whole file
    #[arg(long, value_name = "BITS", value_parser = compress::bits, default_value_t = 3.0)]
    pub(crate) bpw: f64,
    /// Text to measure on [default: a book that comes with the program]
    #[arg(short = 'f', long, visible_alias = "file", value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens in a window of that text
    #[arg(long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// Windows to measure
    #[arg(long, value_name = "N", default_value_t = 16)]
    chunks: usize,
    /// Text to calibrate on: a file, `book` (comes with the program) or `self` (the model writes it)
    #[arg(long, value_name = "FILE|book|self", default_value = "book", value_parser = value_parser!(Source))]
    calibration: Source,
    /// Tokens to calibrate on [default: those of the effort]
    #[arg(long, value_name = "N")]
    calibration_tokens: Option<usize>,
    /// How much work to do for each
    #[arg(long, value_enum, value_name = "EFFORT", default_value_t = Work::Short)]
    effort: Work,
    /// Keep the packed models and intermediate results in this folder, and use those that are there
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    pub(crate) json: Json,
}

/// One way to compress.
pub(crate) struct Entry {
    /// Name in tables, and of the folder.
    pub(crate) name: String,
    /// What may share intermediate results: the name of their folder.
    pub(crate) work: String,
    pub(crate) options: CompressOptions,
}

/// What came of an entry.
pub(crate) struct Outcome {
    pub(crate) row: Row,
    pub(crate) report: Report,
}

/// A contest that is under way: the source is loaded, a folder is there.
pub(crate) struct Arena<'a> {
    contest: &'a Contest,
    pub(crate) source: Loaded,
    dir: PathBuf,
    /// Removes the folder at the end, if nobody wants it.
    _temporary: Option<tempfile::TempDir>,
}

impl Contest {
    fn calibration_tokens(&self) -> usize {
        let usual = Effort::from(self.effort).calibration_tokens();
        self.calibration_tokens.unwrap_or(usual)
    }

    /// Loads the source and makes the folder.
    pub(crate) fn open(&self, ui: &Ui) -> anyhow::Result<Arena<'_>> {
        self.threads.apply()?;
        let source = model::load(&self.source, ui)?;
        let (dir, temporary) = match &self.output {
            Some(dir) => (dir.clone(), None),
            None => {
                let temporary = tempfile::tempdir().context("cannot create a temporary folder")?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Arena {
            contest: self,
            source,
            dir,
            _temporary: temporary,
        })
    }
}

impl Arena<'_> {
    /// What every entry has in common, with the calibration text of a seed.
    pub(crate) fn options(&self, seed: u64, ui: &Ui) -> anyhow::Result<CompressOptions> {
        let c = self.contest;
        let text = calibration(&c.calibration, &self.source, c.calibration_tokens(), seed, ui)?;
        Ok(Effort::from(c.effort).apply(CompressOptions {
            budget: Budget::BitsPerWeight(c.bpw),
            calibration: text,
            seed,
            force: true,
            ..CompressOptions::default()
        }))
    }

    /// Compresses every entry and measures all of them beside the source, whose row comes first.
    pub(crate) fn hold(&self, entries: Vec<Entry>, ui: &Ui) -> anyhow::Result<(Row, Vec<Outcome>)> {
        let (mut reports, mut loaded) = (Vec::new(), Vec::new());
        for entry in entries {
            let out = self.dir.join(&entry.name);
            let options = CompressOptions {
                work_dir: Some(self.dir.join(&entry.work)),
                ..entry.options
            };
            ui.note(&entry.name);
            reports.push(compress::compress(&self.source, &out, &options, ui)?);
            loaded.push(model::load(&out, ui)?);
        }
        let text = self.contest.text.as_deref().map(model::read_text).transpose()?;
        let text = text.as_deref().unwrap_or(texts::EVALUATION);
        let (ctx, chunks) = (self.contest.ctx, self.contest.chunks);
        let windows = eval::windows(self.source.tokenizer()?, text, ctx, Some(chunks))?;
        let mut rows = eval::compare(&self.source, &loaded, (&windows, None), ui)?;
        let source = rows.remove(0);
        let outcomes = rows.into_iter().zip(reports).map(|(row, report)| Outcome {
            row: Row {
                compress_seconds: report.compress_seconds,
                max_regret: Some(report.max_regret),
                ..row
            },
            report,
        });
        Ok((source, outcomes.collect()))
    }

    /// What was measured on, in a sentence.
    pub(crate) fn protocol(&self) -> String {
        let c = self.contest;
        let text = c.text.as_deref().map_or("the built-in book".into(), shown);
        format!(
            "{} windows of {} tokens of {text}; {:?} effort, calibrated on {} tokens of other text",
            c.chunks,
            c.ctx,
            Effort::from(c.effort),
            format::count(c.calibration_tokens() as u64)
        )
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
