//! Ctrl-C: the first press asks for an orderly stop, the second one ends the process; while the program waits for input, so
//! does the first.
//!
//! Files are written under temporary names and renamed when complete, so even the second leaves nothing half-written
//! that looks finished.

use nash_eval::EvalError;
use std::sync::atomic::{AtomicBool, Ordering};

static STOP: AtomicBool = AtomicBool::new(false);
/// Nothing is being worked on: the program waits for the user.
static IDLE: AtomicBool = AtomicBool::new(false);

/// Exit status after an interrupt, 128 + SIGINT as shells have it.
pub(crate) const EXIT_STATUS: u8 = 130;

/// The error of a job that was asked to stop.
#[derive(Debug)]
pub(crate) struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// Installs the handler.
pub(crate) fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::SeqCst) || IDLE.load(Ordering::SeqCst) {
            std::process::exit(i32::from(EXIT_STATUS));
        }
    })?;
    Ok(())
}

/// Waits for the user: reads input, during which a request to stop ends the process at once.
pub(crate) fn wait<T>(read: impl FnOnce() -> T) -> T {
    IDLE.store(true, Ordering::SeqCst);
    let result = read();
    IDLE.store(false, Ordering::SeqCst);
    result
}

/// Whether a stop was asked for.
pub(crate) fn stopped() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// Forgets a request: the thing it was meant for (an answer in a chat) has stopped. True if there was one.
pub(crate) fn clear() -> bool {
    STOP.swap(false, Ordering::SeqCst)
}

/// The same for measurements: [`EvalError::Cancelled`] if a stop was asked for.
pub(crate) fn check_measurement() -> Result<(), EvalError> {
    if stopped() {
        Err(EvalError::Cancelled)
    } else {
        Ok(())
    }
}

/// [`Stopped`] if a stop was asked for.
pub(crate) fn check() -> Result<(), Stopped> {
    if stopped() { Err(Stopped) } else { Ok(()) }
}
