//! Errors of carving.

use std::path::PathBuf;

/// Why a model could not be carved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CarveError {
    /// A model file is wrong.
    #[error(transparent)]
    Core(#[from] nash_core::CoreError),
    /// The model cannot be loaded or run.
    #[error(transparent)]
    Model(#[from] nash_models::ModelError),
    /// A game was given wrong inputs.
    #[error(transparent)]
    Game(#[from] nash_games::GameError),
    /// The model has no dense block that can be carved.
    #[error("{architecture}: {problem}; only gated blocks without biases can be carved into experts")]
    NotDense {
        /// Its family.
        architecture: String,
        /// What is in the way.
        problem: String,
    },
    /// The experts do not divide the block.
    #[error(
        "{experts} experts and a shared one of {shared} neurons cannot be made of a block of {width} neurons"
    )]
    Division {
        /// Routed experts.
        experts: usize,
        /// Neurons of the shared expert.
        shared: usize,
        /// Neurons of the block.
        width: usize,
    },
    /// The share of active neurons leaves no expert or more than there are.
    #[error(
        "{active:.3} of the neurons cannot be active: the shared expert and one of {experts} routed ones are {least:.3}"
    )]
    Active {
        /// Share asked for.
        active: f64,
        /// Routed experts.
        experts: usize,
        /// Smallest share.
        least: f64,
    },
    /// There are not enough tokens to see which neurons fire together.
    #[error("the calibration text has {tokens} tokens, carving needs {least} at least")]
    TooShort {
        /// Tokens found.
        tokens: usize,
        /// Tokens needed.
        least: usize,
    },
    /// The inputs of a router are linearly dependent.
    #[error("the inputs of a router are not finite or linearly dependent")]
    Singular,
    /// The caller stopped.
    #[error("cancelled")]
    Cancelled,
    /// A file could not be written.
    #[error("`{}`: {source}", path.display())]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}
