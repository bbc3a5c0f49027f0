//! What a person sees while work goes on: bars on a terminal, a line now and then in a log, nothing with `--quiet`.
//! All of it on stderr.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{format, interrupt};

/// A log that is not a terminal hears of a stage after this time…
const LOG_FIRST: Duration = Duration::from_secs(2);
/// …and then this often.
const LOG_EVERY: Duration = Duration::from_secs(20);

/// What the steps of a stage are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Things.
    Steps,
    /// Bytes.
    Bytes,
}

/// Shows the stages of a job. Shared between threads.
pub(crate) struct Ui {
    quiet: bool,
    terminal: bool,
    stage: Mutex<Option<Stage>>,
}

struct Stage {
    name: String,
    total: u64,
    done: u64,
    unit: Unit,
    started: Instant,
    next_log: Duration,
    bar: Option<ProgressBar>,
}

impl Ui {
    /// A display; `quiet` shows nothing but notes of importance.
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: std::io::stderr().is_terminal(),
            stage: Mutex::new(None),
        }
    }

    /// Whether nothing but results is wanted.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// A line for the reader.
    pub(crate) fn note(&self, text: &str) {
        if self.quiet {
            return;
        }
        let stage = self.lock();
        match stage.as_ref().and_then(|stage| stage.bar.as_ref()) {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// A stage of `total` units begins; the one before is over. A total of 0 is a stage of unknown length.
    pub(crate) fn begin(&self, name: &str, total: u64, unit: Unit) {
        self.finish();
        if self.quiet {
            return;
        }
        let bar = self.terminal.then(|| bar(name, total, unit));
        let stage = Stage {
            name: name.to_owned(),
            total,
            done: 0,
            unit,
            started: Instant::now(),
            next_log: LOG_FIRST,
            bar,
        };
        *self.lock() = Some(stage);
    }

    /// `steps` more units of the stage are done.
    pub(crate) fn step(&self, steps: u64) {
        let mut guard = self.lock();
        let Some(stage) = guard.as_mut() else { return };
        stage.done += steps;
        if let Some(bar) = &stage.bar {
            bar.inc(steps);
        } else if stage.started.elapsed() >= stage.next_log {
            stage.next_log = stage.started.elapsed() + LOG_EVERY;
            eprintln!("{}", stage.log_line());
        }
    }

    /// A short remark next to the bar.
    pub(crate) fn remark(&self, text: String) {
        if let Some(bar) = self.lock().as_ref().and_then(|stage| stage.bar.as_ref()) {
            bar.set_message(text);
        }
    }

    /// The stage is over; its bar goes away.
    pub(crate) fn finish(&self) {
        let Some(stage) = self.lock().take() else { return };
        match stage.bar {
            Some(bar) => bar.finish_and_clear(),
            None if stage.started.elapsed() >= LOG_FIRST => {
                eprintln!(
                    "{}: done in {}",
                    stage.name,
                    format::duration(stage.started.elapsed())
                );
            }
            None => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Stage>> {
        // A panic elsewhere cannot leave a stage in a state that display code could not show.
        self.stage
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Stage {
    fn log_line(&self) -> String {
        let elapsed = format::duration(self.started.elapsed());
        let done = match self.unit {
            Unit::Steps => format!("{} of {}", self.done, self.total),
            Unit::Bytes => format!("{} of {}", format::bytes(self.done), format::bytes(self.total)),
        };
        format!("{}: {done}, {elapsed}", self.name)
    }
}

impl Drop for Ui {
    fn drop(&mut self) {
        self.finish();
    }
}

impl nash_quant::Progress for Ui {
    fn stage(&self, name: &str, total: u64) {
        // The one stage that counts bytes.
        let unit = if name == "checksums" {
            Unit::Bytes
        } else {
            Unit::Steps
        };
        self.begin(name, total, unit);
    }

    fn advance(&self, n: u64) {
        self.step(n);
    }

    fn cancelled(&self) -> bool {
        interrupt::stopped()
    }
}

fn bar(name: &str, total: u64, unit: Unit) -> ProgressBar {
    let template = match (total, unit) {
        (0, _) => "{prefix} {spinner} {elapsed} {msg}",
        (_, Unit::Steps) => "{prefix} [{bar:32}] {pos}/{len} {elapsed} (left {eta}) {msg}",
        (_, Unit::Bytes) => {
            "{prefix} [{bar:32}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} (left {eta})"
        }
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = if total == 0 {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::new(total)
    };
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
