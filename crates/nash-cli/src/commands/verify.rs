//! `verify`: checks a packed model, and with the source also its equilibrium certificate.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use nash_core::ModelFile;
use nash_quant::{Verification, VerifyOptions};

use crate::args::{Json, Threads};
use crate::failure::Hint as _;
use crate::out::say;
use crate::ui::Ui;
use crate::{format, model};

/// Check a compressed model: checksums, and with the source the equilibrium
///
/// With --source the certificate is computed again, from the packed file and the source alone: for every weight the gain it
/// could make by moving to another level, given all others.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm verify small
  nashswarm verify small --source model.gguf")]
pub(crate) struct Verify {
    /// Folder that `compress` wrote
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Model it was made from
    #[arg(long, value_name = "SOURCE")]
    source: Option<PathBuf>,
    /// Check every player of every tensor, not a sample of rows
    #[arg(long, requires = "source")]
    all: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    json: Json,
}

#[derive(serde::Serialize)]
struct Outcome {
    #[serde(flatten)]
    verification: Verification,
    max_regret: Option<f64>,
}

impl Verify {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        let (path, file) = model::open(&self.dir)?;
        let ModelFile::Packed(packed) = file else {
            return Err(anyhow::anyhow!(
                "{} is not a folder that `compress` wrote",
                path.display()
            ))
            .hint("a source model has no certificate to check; `inspect` shows what is in it");
        };
        let source = self
            .source
            .as_deref()
            .map(model::open)
            .transpose()?
            .map(|(_, file)| file);
        let options = if self.all {
            VerifyOptions {
                rows_per_tensor: usize::MAX,
            }
        } else {
            VerifyOptions::default()
        };
        let verification = nash_quant::verify(&packed, source.as_ref(), options, ui)?;
        ui.finish();
        let max_regret = verification
            .equilibrium
            .as_ref()
            .map(|equilibrium| equilibrium.max_regret);
        let outcome = Outcome {
            verification,
            max_regret,
        };
        self.json.write(&outcome)?;
        if !self.json.replaces_table() {
            outcome.print(source.is_some());
        }
        let unsettled = outcome
            .verification
            .equilibrium
            .map_or(0, |equilibrium| equilibrium.unsettled);
        ensure!(
            unsettled == 0,
            "{unsettled} players could still gain: this is not an equilibrium"
        );
        Ok(())
    }
}

impl Outcome {
    fn print(&self, with_source: bool) {
        say!(
            "checksums: {} tensors, all as recorded",
            self.verification.checksums
        );
        match &self.verification.equilibrium {
            Some(equilibrium) => say!(
                "equilibrium: {} players checked against the source, {} could still gain; largest regret {:.2e} of the row's energy",
                format::count(equilibrium.players),
                equilibrium.unsettled,
                equilibrium.max_regret
            ),
            None if with_source => {
                say!("equilibrium: none claimed, the model was rounded by a baseline method")
            }
            None => say!("equilibrium: not checked, give the source with --source"),
        }
    }
}
