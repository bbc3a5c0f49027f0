//! The compressions of the demonstration: two budgets, each with the games and with plain rounding to the same bytes.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nash_eval::SpeedOptions;
use nash_quant::{Budget, Calibration, CompressOptions, Effort, Method};

use crate::commands::compress;
use crate::model::Loaded;
use crate::ui::Ui;

/// Budgets in bits per weight of the whole file.
pub(super) const BUDGETS: [f64; 2] = [4.25, 3.0];

/// How much of everything.
pub(super) struct Extent {
    pub(super) effort: Effort,
    pub(super) chunks: usize,
    pub(super) answer_tokens: usize,
    pub(super) speed: SpeedOptions,
}

impl Extent {
    /// The usual extent, or one for people in a hurry.
    pub(super) fn new(quick: bool) -> Self {
        let (effort, chunks, answer_tokens, repeats) = if quick {
            (Effort::Quick, 3, 40, 1)
        } else {
            (Effort::Normal, 16, 80, 3)
        };
        Self {
            effort,
            chunks,
            answer_tokens,
            speed: SpeedOptions {
                depth: 0,
                prompt_tokens: 128,
                generate_tokens: 32,
                repeats,
            },
        }
    }
}

/// A packed model on disk.
pub(super) struct Packed {
    pub(super) title: String,
    pub(super) dir: PathBuf,
    pub(super) report: nash_quant::Report,
}

/// Compresses at every budget with the games, and to the same bytes by uniform rounding to nearest.
pub(super) fn compress_all(
    source: &Loaded,
    dir: &Path,
    calibration: &Calibration,
    effort: Effort,
    ui: &Ui,
) -> anyhow::Result<Vec<Packed>> {
    let mut packed = Vec::new();
    for bits in BUDGETS {
        let mut budget = Budget::BitsPerWeight(bits);
        for (method, name) in [
            (Method::Nash, "Nash-Swarm"),
            (Method::RoundToNearest, "round to nearest"),
        ] {
            let options = effort.apply(CompressOptions {
                budget,
                method,
                calibration: calibration.clone(),
                // The folders of the demo are its own, and what one budget measured serves the next.
                force: true,
                work_dir: Some(dir.join(format!("work-{}", label(method)))),
                ..CompressOptions::default()
            });
            let out = dir.join(folder(method, bits));
            ui.note(&format!("{name}, {bits:.2} bits per weight"));
            let report = compress::compress(source, &out, &options, ui)?;
            budget = Budget::Bytes(report.file_bytes);
            packed.push(Packed {
                title: format!("{name} {bits:.2}"),
                dir: out,
                report,
            });
        }
    }
    for method in [Method::Nash, Method::RoundToNearest] {
        let work = dir.join(format!("work-{}", label(method)));
        std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    Ok(packed)
}

fn label(method: Method) -> &'static str {
    match method {
        Method::Nash => "nash",
        Method::RoundToNearest => "rtn",
        Method::Gptq => "gptq",
    }
}

/// Name of the folder of a model.
pub(super) fn folder(method: Method, bits: f64) -> String {
    format!("{}-{bits:.2}", label(method))
}
