//! Errors of compression.

use std::path::{Path, PathBuf};

/// Why a compression or a check of one failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A model file is wrong.
    #[error(transparent)]
    Core(#[from] nash_core::CoreError),
    /// The model cannot be loaded or run.
    #[error(transparent)]
    Model(#[from] nash_models::ModelError),
    /// A game was given wrong inputs or has no solution.
    #[error("tensor `{tensor}`: {source}")]
    Game {
        /// Which tensor (or `market`).
        tensor: String,
        /// What is wrong.
        source: nash_games::GameError,
    },
    /// The packed layout refused a tensor.
    #[error("tensor `{tensor}` cannot be packed: {source}")]
    Layout {
        /// Which tensor.
        tensor: String,
        /// What is wrong.
        source: nash_kernels::LayoutError,
    },
    /// Reading or writing failed.
    #[error("`{}`: {source}", path.display())]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// JSON could not be written or read.
    #[error("{what}: {source}")]
    Json {
        /// Which file or entry.
        what: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The calibration text is too short or empty.
    #[error(
        "the calibration text has {tokens} tokens; at least {least} are needed (give a longer --calibration FILE, or `self`)"
    )]
    CalibrationTooShort {
        /// Tokens found.
        tokens: usize,
        /// Tokens needed.
        least: usize,
    },
    /// The output exists.
    #[error("`{}` exists already (use --force to replace it)", path.display())]
    OutputExists {
        /// The output folder.
        path: PathBuf,
    },
    /// A folder that holds something else than intermediate results.
    #[error("`{}` is not a folder of intermediate results; choose another --work-dir", path.display())]
    NotAScratchFolder {
        /// The folder.
        path: PathBuf,
    },
    /// A width was asked for that does not exist or a pattern matches nothing.
    #[error("--tensor-type {pattern}: {problem}")]
    TensorType {
        /// The pattern.
        pattern: String,
        /// What is wrong.
        problem: String,
    },
    /// The budget cannot be met.
    #[error(
        "the budget of {budget} bytes is too small: the smallest file of this model has {smallest} bytes ({bits:.3} bits per weight)"
    )]
    BudgetTooSmall {
        /// Bytes asked for.
        budget: u64,
        /// Bytes of the smallest file.
        smallest: u64,
        /// The same in bits per weight.
        bits: f64,
    },
    /// The source of a check is not the model that was compressed.
    #[error("{0}")]
    Mismatch(String),
    /// The user asked to stop.
    #[error("stopped; the same command with --resume continues")]
    Cancelled,
}

impl From<nash_games::GameError> for QuantError {
    /// An error of a game over the whole model, which no tensor is to blame for.
    fn from(source: nash_games::GameError) -> Self {
        Self::game("allocation")(source)
    }
}

impl QuantError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    pub(crate) fn game(tensor: &str) -> impl FnOnce(nash_games::GameError) -> Self {
        move |source| Self::Game {
            tensor: tensor.into(),
            source,
        }
    }
}
