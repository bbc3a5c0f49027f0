//! Errors of the games.

/// What can be wrong with the inputs of a game.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum GameError {
    /// A buffer does not have the length its shape asks for.
    #[error("{what} has {found} elements, its shape asks for {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Elements the shape asks for.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// A weight or Hessian entry is NaN or infinite.
    #[error("{what} holds a value that is not finite at index {index}")]
    NotFinite {
        /// Which buffer.
        what: &'static str,
        /// Index of the first such value.
        index: usize,
    },
    /// The Hessian could not be factored, even damped.
    #[error("the Hessian of {size} inputs is not positive definite; use more damping or the nearest start")]
    NotPositiveDefinite {
        /// Rows and columns of the Hessian.
        size: usize,
    },
    /// Sequential rounding on a grid whose values depend on more than one code.
    #[error("leader–follower rounding needs a scalar grid: use scalar codebooks, or the nearest start")]
    NotScalar,
    /// The cheapest profile is larger than the budget.
    #[error("the budget of {budget} bytes is below the smallest possible size, {smallest} bytes")]
    BudgetTooSmall {
        /// The budget in bytes.
        budget: u64,
        /// Bytes of the smallest profile.
        smallest: u64,
    },
    /// A player of the market has no strategy.
    #[error("player {player} of the market has no format to choose from")]
    NoStrategies {
        /// Index of the player.
        player: usize,
    },
}

/// `Err` if `found` is not `expected`.
pub(crate) fn check_len(what: &'static str, expected: usize, found: usize) -> Result<(), GameError> {
    if expected == found {
        Ok(())
    } else {
        Err(GameError::Length {
            what,
            expected,
            found,
        })
    }
}
