//! Results on standard output.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write as _};

/// Prints a line of results; like `println!`, but a reader that has seen enough (`| head`) is no error.
macro_rules! say {
    ($($arg:tt)*) => { $crate::out::write(format_args!("{}\n", format_args!($($arg)*))) };
}
pub(crate) use say;

/// Writes results as they are and hands them on at once. If nobody reads any more, the program ends quietly; if they cannot be
/// written (a full disk), it ends with an error: results are printed last, so no work is lost by it.
pub(crate) fn write(text: Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: cannot write to standard output: {error}");
            std::process::exit(1);
        }
    }
}
