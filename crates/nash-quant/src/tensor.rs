//! Rounding one tensor: fit the grid, start, play, certify, pack.

use nash_games::codebook::{FitOptions, LevelKind, fit_grid};
use nash_games::leader::Leadership;
use nash_games::rounding::{BestResponse, Problem, play};
use nash_games::{Grid, RoundingCertificate, certify_rounding};
use nash_kernels::{PackedMatrix, PackedRef, PackedShape, Unpacked, Width, pack, unpack};

use crate::QuantError;
use crate::options::{Codebook, Method, Start};

/// Sweeps of a draft: the first two make most of the difference.
pub(crate) const DRAFT_SWEEPS: usize = 2;

/// How to round a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rounding {
    /// Bits per weight.
    pub(crate) width: Width,
    /// The method.
    pub(crate) method: Method,
    /// Start of the game (for [`Method::Nash`]).
    pub(crate) start: Start,
    /// What codes are worth (for [`Method::Nash`]).
    pub(crate) codebook: Codebook,
    /// Sweeps of a draft, at most [`DRAFT_SWEEPS`].
    pub(crate) sweeps: usize,
    /// Whether chains deviate together.
    pub(crate) joint_moves: bool,
}

/// A rounded tensor.
#[derive(Debug, Clone)]
pub(crate) struct Rounded {
    /// Scales and levels.
    pub(crate) grid: Grid,
    /// Codes `[m, n]`.
    pub(crate) codes: Vec<u8>,
    /// Sweeps played; 0 for the baselines.
    pub(crate) sweeps: usize,
}

/// Rounds `problem` (named for errors): a fitted grid, a start and, for the games, [`DRAFT_SWEEPS`] sweeps.
///
/// # Errors
/// If the lengths do not agree or, for sequential rounding, the Hessian cannot be factored.
pub(crate) fn draft(name: &str, problem: Problem<'_>, rounding: Rounding) -> Result<Rounded, QuantError> {
    let n = problem.cols;
    let importance: Vec<f32> = (0..n).map(|i| problem.hessian[i * n + i]).collect();
    let (levels, rounds) = match (rounding.method, rounding.codebook) {
        (Method::Nash, Codebook::Trellis) => (LevelKind::Trellis, 3),
        (Method::Nash, Codebook::Scalar) => (LevelKind::Codebook, 3),
        (Method::RoundToNearest, _) => (LevelKind::Uniform, 0),
        (Method::Gptq, _) => (LevelKind::Uniform, 1),
    };
    let fit = FitOptions {
        width: rounding.width,
        levels,
        rounds,
    };
    let grid = fit_grid(problem.weights, n, &importance, fit).map_err(QuantError::game(name))?;
    let leads = match rounding.method {
        Method::Nash => rounding.start == Start::LeaderFollower,
        Method::RoundToNearest => false,
        Method::Gptq => true,
    };
    let codes = if leads {
        let leadership = Leadership::new(problem.hessian, n).map_err(QuantError::game(name))?;
        leadership.round(problem, &grid).map_err(QuantError::game(name))?
    } else {
        grid.nearest_codes(problem.weights, &importance)
    };
    let mut rounded = Rounded {
        grid,
        codes,
        sweeps: 0,
    };
    if rounding.method == Method::Nash {
        rounded.play(name, problem, rounding.sweeps, rounding.joint_moves)?;
    }
    Ok(rounded)
}

impl Rounded {
    /// What a packed tensor holds, after `sweeps` sweeps.
    pub(crate) fn of(packed: PackedRef<'_>, sweeps: usize) -> Self {
        let width = packed.shape().width;
        let parts = unpack(packed);
        Self {
            grid: Grid {
                width,
                codebook: parts.codebook,
                row_scales: parts.row_scales,
                scale_codes: parts.scale_codes,
            },
            codes: parts.codes,
            sweeps,
        }
    }

    /// Plays on, for at most `sweeps` sweeps, chains deviating together or every code alone. Playing on from a packed draft gives what playing on at once gives.
    ///
    /// # Errors
    /// If the lengths do not agree.
    pub(crate) fn play(
        &mut self,
        name: &str,
        problem: Problem<'_>,
        sweeps: usize,
        joint_moves: bool,
    ) -> Result<(), QuantError> {
        let rule = BestResponse {
            max_sweeps: sweeps,
            move_scales: true,
            joint_moves,
        };
        let trace = play(problem, &mut self.grid, &mut self.codes, rule).map_err(QuantError::game(name))?;
        self.sweeps += trace.moves.len();
        Ok(())
    }

    /// Packs the tensor `[rows, cols]`.
    ///
    /// # Errors
    /// If the layout refuses it.
    pub(crate) fn pack(self, name: &str, cols: usize) -> Result<PackedMatrix, QuantError> {
        let shape = PackedShape {
            rows: self.codes.len() / cols.max(1),
            cols,
            width: self.grid.width,
        };
        let unpacked = Unpacked {
            codes: self.codes,
            scale_codes: self.grid.scale_codes,
            row_scales: self.grid.row_scales,
            codebook: self.grid.codebook,
        };
        pack(shape, &unpacked).map_err(|source| QuantError::Layout {
            tensor: name.into(),
            source,
        })
    }
}

/// Certifies a packed tensor against its source weights, every `stride`-th row. Reads nothing but the packed bytes and the problem.
///
/// # Errors
/// If shapes do not agree.
pub(crate) fn certify(
    name: &str,
    problem: Problem<'_>,
    packed: PackedRef<'_>,
    stride: usize,
) -> Result<RoundingCertificate, QuantError> {
    let Rounded { grid, codes, .. } = Rounded::of(packed, 0);
    certify_rounding(problem, &grid, &codes, stride).map_err(QuantError::game(name))
}
