//! The leader–follower start: weights commit one after the other, each answering the errors of those before it.
//!
//! This is the sequential solution of GPTQ (Frantar et al. 2023) in the form of LDLQ (Chee et al. 2023, QuIP, eq. 2): with
//! `H = U D Uᵀ`, U unit upper triangular in the order of play, the follower j is rounded at
//! `w_j + Σ_{k<j} (w_k − ŵ_k) U_kj`. Players lead in descending order of `H_jj` (act-order).

use faer::Side;
use nash_kernels::dense::{MatMut, MatRef, gemm};
use nash_kernels::{GROUP, pool};
use rayon::prelude::*;

use crate::error::GameError;
use crate::grid::{Book, Grid, Levels, inverse_or_zero};
use crate::rounding::Problem;

const ROWS_PER_CHUNK: usize = 32;
const BLOCK: usize = 64;

/// The order of play and the feedback matrix of a Hessian, shared by all tensors that read the same input.
#[derive(Debug, Clone)]
pub struct Leadership {
    /// Column of the player at each place.
    order: Vec<usize>,
    /// U in order of play, `[n, n]`, row k holds the answers to k's error; strictly upper part.
    feedback: Vec<f32>,
}

impl Leadership {
    /// Factors `hessian [n, n]` (damped).
    ///
    /// # Errors
    /// If the Hessian is not positive definite.
    pub fn new(hessian: &[f32], n: usize) -> Result<Self, GameError> {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| hessian[b * n + b].total_cmp(&hessian[a * n + a]).then(a.cmp(&b)));
        // Cholesky of the reversed order gives the upper factor in the order of play.
        let reversed =
            faer::Mat::<f32>::from_fn(n, n, |i, j| hessian[order[n - 1 - i] * n + order[n - 1 - j]]);
        let factor = reversed
            .llt(Side::Lower)
            .map_err(|_| GameError::NotPositiveDefinite { size: n })?;
        let l = factor.L();
        let mut feedback = vec![0.0; n * n];
        feedback.par_chunks_mut(n).enumerate().for_each(|(k, row)| {
            for (j, u) in row.iter_mut().enumerate().skip(k + 1) {
                *u = l[(n - 1 - k, n - 1 - j)] / l[(n - 1 - j, n - 1 - j)];
            }
        });
        Ok(Self { order, feedback })
    }

    /// Codes `[m, n]` of the leader–follower solution on `grid`.
    ///
    /// # Errors
    /// If the lengths do not agree, or the grid is not scalar: a code that shares in its neighbours' values cannot be committed alone.
    pub fn round(&self, problem: Problem<'_>, grid: &Grid) -> Result<Vec<u8>, GameError> {
        let n = problem.cols;
        let mut codes = vec![0u8; problem.weights.len()];
        problem.check(grid, &codes)?;
        let Book::Scalar(levels) = grid.book() else {
            return Err(GameError::NotScalar);
        };
        pool::for_each_chunk(&mut codes, (n * ROWS_PER_CHUNK).max(1), |chunk, codes| {
            let first = chunk * ROWS_PER_CHUNK;
            self.round_rows(
                first,
                &problem.weights[first * n..][..codes.len()],
                grid,
                &levels,
                codes,
            );
        });
        Ok(codes)
    }

    fn round_rows(&self, first: usize, weights: &[f32], grid: &Grid, levels: &Levels, codes: &mut [u8]) {
        let n = self.order.len();
        let (rows, groups) = (weights.len() / n, Grid::groups(n));
        let mut answers = vec![0.0f32; weights.len()];
        let mut errors = vec![0.0f32; rows * BLOCK];
        for start in (0..n).step_by(BLOCK) {
            let end = n.min(start + BLOCK);
            for r in 0..rows {
                let errors = &mut errors[r * BLOCK..][..BLOCK];
                for place in start..end {
                    let column = self.order[place];
                    let w = weights[r * n + column];
                    let mut answer = answers[r * n + place];
                    for (k, e) in errors[..place - start].iter().enumerate() {
                        answer += e * self.feedback[(start + k) * n + place];
                    }
                    let step = grid.step(first + r, column / GROUP, groups);
                    let code = levels.nearest((w + answer) * inverse_or_zero(step));
                    codes[r * n + column] = code;
                    errors[place - start] = w - step * levels.value(code);
                }
            }
            if end < n {
                let errors = MatRef::row_major(&errors, rows, BLOCK);
                let u = MatRef::row_major(&self.feedback, n, n)
                    .rows_range(start..end)
                    .cols_range(end..n);
                gemm(
                    1.0,
                    errors,
                    u,
                    1.0,
                    MatMut::row_major(&mut answers, rows, n).cols_range(end..n),
                );
            }
        }
    }
}
