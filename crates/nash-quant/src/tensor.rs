//! Rounding one tensor: fit the grid, start, play, certify, pack.

use nash_games::codebook::{FitOptions, LevelKind, fit_grid};
use nash_games::leader::Leadership;
use nash_games::rounding::{BestResponse, Problem, Trace, play};
use nash_games::{Grid, RoundingCertificate, certify_rounding};
use nash_kernels::{PackedMatrix, PackedRef, PackedShape, Unpacked, Width, pack, unpack};

use crate::QuantError;
use crate::options::{Codebook, Method, Start};

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
    /// Sweeps at most (for [`Method::Nash`]).
    pub(crate) max_sweeps: usize,
}

/// A rounded tensor.
#[derive(Debug, Clone)]
pub(crate) struct Rounded {
    /// Scales and levels.
    pub(crate) grid: Grid,
    /// Codes `[m, n]`.
    pub(crate) codes: Vec<u8>,
    /// The play; empty for the baselines.
    pub(crate) trace: Trace,
}

/// Rounds `problem` (named for errors).
///
/// # Errors
/// If the lengths do not agree or, for sequential rounding, the Hessian cannot be factored.
pub(crate) fn round(name: &str, problem: Problem<'_>, rounding: Rounding) -> Result<Rounded, QuantError> {
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
    let mut grid = fit_grid(problem.weights, n, &importance, fit).map_err(QuantError::game(name))?;
    let leads = match rounding.method {
        Method::Nash => rounding.start == Start::LeaderFollower,
        Method::RoundToNearest => false,
        Method::Gptq => true,
    };
    let mut codes = if leads {
        let leadership = Leadership::new(problem.hessian, n).map_err(QuantError::game(name))?;
        leadership.round(problem, &grid).map_err(QuantError::game(name))?
    } else {
        grid.nearest_codes(problem.weights, &importance)
    };
    let trace = if rounding.method == Method::Nash {
        let rule = BestResponse {
            max_sweeps: rounding.max_sweeps,
            move_scales: true,
        };
        play(problem, &mut grid, &mut codes, rule).map_err(QuantError::game(name))?
    } else {
        Trace::default()
    };
    Ok(Rounded { grid, codes, trace })
}

impl Rounded {
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
    let width = packed.shape().width;
    let parts = unpack(packed);
    let grid = Grid {
        width,
        codebook: parts.codebook,
        row_scales: parts.row_scales,
        scale_codes: parts.scale_codes,
    };
    certify_rounding(problem, &grid, &parts.codes, stride).map_err(QuantError::game(name))
}
