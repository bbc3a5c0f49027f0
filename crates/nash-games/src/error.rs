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
    /// Tokens cannot choose that many experts.
    #[error("tokens cannot choose {top_k} of {experts} experts; 1 to 8 of at most 65535 are possible")]
    TopK {
        /// Experts a token chooses.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// The experts together have less room than the tokens need.
    #[error(
        "{experts} experts with room for {capacity} of {tokens} tokens each cannot give every token {top_k}"
    )]
    Capacity {
        /// Tokens of the batch.
        tokens: usize,
        /// Experts a token chooses.
        top_k: usize,
        /// Experts there are.
        experts: usize,
        /// Tokens one expert takes.
        capacity: usize,
    },
    /// A neuron sits in an expert that does not exist.
    #[error("a neuron has a seat in expert {seat}, there are {experts} experts")]
    Seat {
        /// The expert.
        seat: usize,
        /// Experts there are.
        experts: usize,
    },
    /// A token sees a neighbour that does not see it: such a game has no potential, and play may never end.
    #[error("token {from} has token {to} as a neighbour but not the other way round")]
    Directed {
        /// The token that sees.
        from: usize,
        /// The token that is seen.
        to: usize,
    },
    /// Neighbours that are not a graph over the tokens.
    #[error("token {token} has neighbour {neighbour}: itself, twice, or beyond the {tokens} tokens")]
    Neighbour {
        /// Whose list.
        token: usize,
        /// The entry.
        neighbour: usize,
        /// Tokens there are.
        tokens: usize,
    },
    /// Choices that are no strategy: an expert that does not exist, is chosen twice by a token, or has no room.
    #[error("the choices of token {token} are not allowed: expert {expert} is unknown, repeated or full")]
    Choice {
        /// The token.
        token: usize,
        /// The expert.
        expert: usize,
    },
}

/// `Err` if a value is NaN or infinite.
pub(crate) fn check_finite(what: &'static str, values: &[f32]) -> Result<(), GameError> {
    // The exponent of a value that is not finite is all ones; a count vectorises, a search does not.
    let strange = |v: &f32| v.to_bits() & 0x7f80_0000 == 0x7f80_0000;
    if values.iter().map(|v| u32::from(strange(v))).fold(0, |a, b| a | b) == 0 {
        return Ok(());
    }
    let index = values.iter().position(strange).unwrap_or_default();
    Err(GameError::NotFinite { what, index })
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
