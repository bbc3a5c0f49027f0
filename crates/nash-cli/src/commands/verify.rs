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
    /// Largest regret found.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_regret: Option<f64>,
    /// Largest regret that the model's own report claims.
    claimed_max_regret: f64,
    /// Players that the model's own report says could still gain.
    claimed_unsettled: u64,
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
        let report = nash_quant::Report::read(&packed)?;
        let source = self
            .source
            .as_deref()
            .map(model::open)
            .transpose()?
            .map(|(_, file)| file);
        let rows_per_tensor = if self.all {
            usize::MAX
        } else {
            VerifyOptions::default().rows_per_tensor
        };
        let options = VerifyOptions { rows_per_tensor };
        let verification = nash_quant::verify(&packed, source.as_ref(), options, ui)?;
        ui.finish();
        let outcome = Outcome {
            max_regret: verification
                .equilibrium
                .as_ref()
                .map(|equilibrium| equilibrium.max_regret),
            verification,
            claimed_max_regret: report.max_regret,
            claimed_unsettled: report.unsettled,
        };
        self.json.write(&outcome)?;
        if !self.json.replaces_table() {
            outcome.print(source.is_some());
        }
        outcome.judge(self.all)
    }
}

impl Outcome {
    fn print(&self, with_source: bool) {
        say!(
            "checksums: {} tensors, all as recorded",
            self.verification.checksums
        );
        let Some(equilibrium) = &self.verification.equilibrium else {
            return if with_source {
                say!("equilibrium: none claimed, the model was rounded by a baseline method");
            } else {
                say!("equilibrium: not checked, give the source with --source");
            };
        };
        say!(
            "equilibrium: of {} players checked against the source {} could still gain, at most {:.1e} of their row's energy",
            format::count(equilibrium.players),
            format::count(equilibrium.unsettled),
            equilibrium.max_regret
        );
        say!(
            "the report claims: {} could still gain, at most {:.1e}",
            format::count(self.claimed_unsettled),
            self.claimed_max_regret
        );
    }

    /// An error if the equilibrium is worse than claimed. More rows than the claim was made on may hold more players.
    fn judge(&self, all: bool) -> anyhow::Result<()> {
        let Some(equilibrium) = &self.verification.equilibrium else {
            return Ok(());
        };
        // The claim is written with four digits.
        let allowed = self.claimed_max_regret * (1.0 + 1e-3);
        ensure!(
            all || (equilibrium.max_regret <= allowed && equilibrium.unsettled <= self.claimed_unsettled),
            "the equilibrium is worse than the report claims"
        );
        Ok(())
    }
}
