//! The `nashswarm` command: compress, check, measure and run language models on a CPU.
//!
//! `args` is what a user can type, `commands` has one file per command, `ui` is what a user sees on stderr. Results
//! go to stdout and nothing else does. Every long job polls [`interrupt::stopped`].

mod args;
mod calibration;
mod commands;
mod contest;
mod experts;
mod failure;
mod format;
mod generate;
mod interrupt;
mod model;
mod out;
mod questions;
mod sizes;
mod store;
mod table;
mod texts;
mod ui;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::Instant;

use clap::Parser;

/// When the program began; what the system did before is not in it.
pub(crate) static START: LazyLock<Instant> = LazyLock::new(Instant::now);

fn main() -> ExitCode {
    LazyLock::force(&START);
    let cli = args::Cli::parse();
    match prepare(&cli.global).and_then(|()| commands::run(cli.command, &cli.global)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

/// Logging, the forced instruction set and Ctrl-C, before any work.
fn prepare(global: &args::Global) -> anyhow::Result<()> {
    let level = match global.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("NASHSWARM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    // A misspelt name would otherwise fall back silently to the best kernel.
    nash_kernels::Isa::from_env()?;
    interrupt::install()?;
    Ok(())
}
