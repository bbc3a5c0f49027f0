//! How a failure is told: what happened, what caused it, what to do.
//!
//! ```text
//! error: cannot open model.gguf
//!   caused by: No such file or directory (os error 2)
//!   hint: check the path, or fetch the model with `nashswarm pull`
//! ```

use std::process::ExitCode;

use anyhow::Error;

use crate::interrupt::{EXIT_STATUS, Stopped};

/// An error with advice; made by [`Hint::hint`].
#[derive(Debug)]
struct Advised {
    advice: String,
    error: Error,
}

impl std::fmt::Display for Advised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Advised {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Attaches advice to an error.
pub(crate) trait Hint<T> {
    /// Says what to do if this is an error.
    fn hint(self, advice: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<Error>> Hint<T> for Result<T, E> {
    fn hint(self, advice: impl Into<String>) -> Result<T, Error> {
        self.map_err(|error| {
            Error::new(Advised {
                advice: advice.into(),
                error: error.into(),
            })
        })
    }
}

/// Prints an error to stderr; the exit status that goes with it: 130 for a stop by Ctrl-C, else 1.
pub(crate) fn report(error: &Error) -> ExitCode {
    if error.chain().any(|cause| cause.is::<Stopped>()) || crate::interrupt::stopped() {
        eprintln!("stopped; nothing unfinished was left under a final name");
        return ExitCode::from(EXIT_STATUS);
    }
    eprint!("{}", describe(error));
    ExitCode::FAILURE
}

/// The text of a failure, ending in a newline.
fn describe(error: &Error) -> String {
    let (mut causes, mut hints) = (Vec::<String>::new(), Vec::<String>::new());
    for cause in error.chain() {
        if let Some(advised) = cause.downcast_ref::<Advised>() {
            hints.push(advised.advice.clone());
        }
        // Errors of the libraries may carry advice of their own as further lines.
        let text = cause.to_string();
        let (text, advice) = text.split_once("\nhint: ").unwrap_or((&text, ""));
        if !advice.is_empty() {
            hints.push(advice.to_owned());
        }
        // An error that already quotes its cause is not followed by the same words again.
        if !causes.last().is_some_and(|before| before.contains(text)) {
            causes.push(text.to_owned());
        }
    }
    hints.dedup();
    let mut out = String::new();
    for (index, cause) in causes.iter().enumerate() {
        let label = if index == 0 { "error" } else { "  caused by" };
        out += &format!("{label}: {}\n", cause.replace('\n', "\n    "));
    }
    for hint in hints {
        out += &format!("  hint: {}\n", hint.replace('\n', "\n    "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn tells_causes_and_advice_once() {
        let cause = std::io::Error::other("disk on fire");
        let error = Err::<(), _>(cause)
            .hint("use water")
            .context("cannot write out/model")
            .unwrap_err();
        assert_eq!(
            describe(&error),
            "error: cannot write out/model\n  caused by: disk on fire\n  hint: use water\n"
        );
    }

    #[test]
    fn splits_advice_that_a_library_put_into_its_message() {
        let error = anyhow::anyhow!("a.gguf: not a model\nhint: give a GGUF file");
        assert_eq!(
            describe(&error),
            "error: a.gguf: not a model\n  hint: give a GGUF file\n"
        );
    }

    #[test]
    fn does_not_repeat_a_quoted_cause() {
        let error = anyhow::anyhow!("no such file").context("cannot open x: no such file");
        assert_eq!(describe(&error), "error: cannot open x: no such file\n");
    }
}
