//! The rounding game: every weight is a player who picks a code, every scale group a player who picks a scale code.
//!
//! All players share one payoff, minus the potential `Φ = Σᵢ Δᵢ H Δᵢᵀ` with `Δ = Ŵ − W`: an identical-interest game
//! (Monderer and Shapley 1996), so every improving move lowers Φ, and because the strategies are finite, play one at a time ends in
//! a pure Nash equilibrium. With the residual `R = Δ H` the best response of weight `(i, j)` is the level nearest to
//! `ŵᵢⱼ − Rᵢⱼ / Hⱼⱼ`; a scale's payoff is a parabola in its code and its best response the code nearest to the vertex.
//!
//! Rows are independent sub-games and run in parallel. Within a row, players move one after the other: inside a
//! block of 64 columns the block's part of `R` is updated after every move, the rest of `R` once per block with one matrix product. Moving
//! players simultaneously could cycle and is never done. Row chunks have a fixed size: results do not depend on the number of threads.

mod seat;

use half::f16;
use nash_kernels::dense::{MatMut, MatRef, gemm};
use nash_kernels::{GROUP, SCALE_UNIT, pool};

use crate::error::{GameError, check_len};
use crate::grid::{Book, Grid};
use seat::{Block, Seat, Turn};

/// Rows of a chunk: its residual (`32 · n` floats) stays in the second-level cache.
const ROWS_PER_CHUNK: usize = 32;
/// A move by `d` must gain more than this share of `H·d²`: smaller gains are within the rounding noise of `f32`.
pub(crate) const MIN_GAIN: f32 = 1e-3;
/// The residual is recomputed from scratch after this many sweeps, so that rounding errors do not add up.
const SWEEPS_PER_REFRESH: usize = 8;

/// Chains search for paths until a sweep lowers the potential by less than this share. Searching to the end lowers it by another 1 % and takes a
/// third more time.
const SEARCH_PAYS: f64 = 5e-3;

/// The fixed part of a rounding game.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// `W [m, n]`, row-major.
    pub weights: &'a [f32],
    /// Number of inputs n.
    pub cols: usize,
    /// `H [n, n]`, symmetric, damped so that the diagonal is positive.
    pub hessian: &'a [f32],
}

impl Problem<'_> {
    /// Number of outputs m.
    pub fn rows(&self) -> usize {
        self.weights.len().checked_div(self.cols).unwrap_or(0)
    }

    /// Checks lengths.
    ///
    /// # Errors
    /// If a buffer does not have the length its shape asks for.
    pub fn check(&self, grid: &Grid, codes: &[u8]) -> Result<(), GameError> {
        let (m, n) = (self.rows(), self.cols);
        check_len("the weights", m * n, self.weights.len())?;
        check_len("the Hessian", n * n, self.hessian.len())?;
        check_len("the codes", m * n, codes.len())?;
        check_len("the row scales", m, grid.row_scales.len())?;
        check_len("the scale codes", m * Grid::groups(n), grid.scale_codes.len())
    }

    /// The reference energy `Σᵢ wᵢ H wᵢᵀ`, by which potentials are divided to give relative layer errors.
    pub fn energy(&self) -> f64 {
        self.quadratic(|_, w, out| out.copy_from_slice(w))
    }

    /// The potential `Φ = Σᵢ Δᵢ H Δᵢᵀ` of given codes.
    pub fn potential(&self, grid: &Grid, codes: &[u8]) -> f64 {
        let book = grid.book();
        self.quadratic(|r, w, out| {
            grid.dequantize_row(&book, r, &codes[r * self.cols..][..self.cols], out);
            out.iter_mut().zip(w).for_each(|(o, w)| *o -= w);
        })
    }

    /// `Σᵢ vᵢ H vᵢᵀ` over rows written by `fill(row, weights of the row, v)`.
    fn quadratic(&self, fill: impl Fn(usize, &[f32], &mut [f32]) + Sync) -> f64 {
        let n = self.cols;
        let mut chunks: Vec<(&[f32], f64)> = self
            .weights
            .chunks((n * ROWS_PER_CHUNK).max(1))
            .map(|w| (w, 0.0))
            .collect();
        pool::for_each_chunk(&mut chunks, 1, |index, chunk| {
            let (w, sum) = &mut chunk[0];
            let rows = w.len() / n;
            let (mut v, mut hv) = (vec![0.0; w.len()], vec![0.0; w.len()]);
            for (r, (w, v)) in w.chunks(n).zip(v.chunks_mut(n)).enumerate() {
                fill(index * ROWS_PER_CHUNK + r, w, v);
            }
            let (a, h) = (
                MatRef::row_major(&v, rows, n),
                MatRef::row_major(self.hessian, n, n),
            );
            gemm(1.0, a, h, 0.0, MatMut::row_major(&mut hv, rows, n));
            *sum = inner_product(&v, &hv);
        });
        chunks.iter().map(|c| c.1).sum()
    }
}

/// How long to play.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BestResponse {
    /// Sweeps over all players at most. Play ends earlier when a whole sweep brings no move.
    pub max_sweeps: usize,
    /// Whether scale groups are players too.
    pub move_scales: bool,
    /// Whether whole chains of a trellis deviate together, before single codes answer.
    pub joint_moves: bool,
}

/// What happened in a play.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Trace {
    /// Φ before play and after every sweep. Never rises.
    pub potential: Vec<f64>,
    /// Moves of every sweep; 0 at the end says that play has settled.
    pub moves: Vec<u64>,
}

impl Trace {
    /// Whether the last sweep had no move.
    pub fn settled(&self) -> bool {
        self.moves.last() == Some(&0)
    }

    /// Adds the sweeps of a chunk; chunks that settled earlier keep their last potential.
    fn merge(&mut self, other: &Trace) {
        let sweeps = self.moves.len().max(other.moves.len());
        let last = |t: &Trace| t.potential.last().copied().unwrap_or(0.0);
        let (mine, theirs) = (last(self), last(other));
        self.moves.resize(sweeps, 0);
        self.potential.resize(sweeps + 1, mine);
        for (i, p) in self.potential.iter_mut().enumerate() {
            *p += other.potential.get(i).copied().unwrap_or(theirs);
        }
        for (m, o) in self.moves.iter_mut().zip(&other.moves) {
            *m += o;
        }
    }
}

/// Plays best responses from `codes` and the scales of `grid` until no player moves or the sweeps are used up.
///
/// # Errors
/// If the lengths do not agree.
pub fn play(
    problem: Problem<'_>,
    grid: &mut Grid,
    codes: &mut [u8],
    rule: BestResponse,
) -> Result<Trace, GameError> {
    problem.check(grid, codes)?;
    let (n, groups) = (problem.cols, Grid::groups(problem.cols));
    let book = grid.book();
    let diagonal = is_diagonal(problem.hessian, n);
    // The kernels' own pool: products inside of a task then run on the task's thread.
    let mut jobs: Vec<Job<'_>> = codes
        .chunks_mut((n * ROWS_PER_CHUNK).max(1))
        .zip(grid.scale_codes.chunks_mut((groups * ROWS_PER_CHUNK).max(1)))
        .zip(grid.row_scales.chunks(ROWS_PER_CHUNK))
        .zip(problem.weights.chunks((n * ROWS_PER_CHUNK).max(1)))
        .map(|(((codes, scale_codes), row_scales), weights)| Job {
            codes,
            scale_codes,
            row_scales,
            weights,
            trace: Trace::default(),
        })
        .collect();
    pool::for_each_chunk(&mut jobs, 1, |_, job| {
        let job = &mut job[0];
        let row_steps: Vec<f32> = job.row_scales.iter().map(|s| s.to_f32() * SCALE_UNIT).collect();
        let mut chunk = Chunk::new(job.weights, problem.hessian, n, &book, row_steps);
        chunk.diagonal = diagonal;
        job.trace = chunk.play(job.codes, job.scale_codes, rule);
    });
    let mut trace = Trace::default();
    for job in &jobs {
        trace.merge(&job.trace);
    }
    Ok(trace)
}

/// Whether nothing couples the players of a row: a table that is only looked up has the identity for its Hessian.
fn is_diagonal(hessian: &[f32], n: usize) -> bool {
    hessian
        .chunks(n)
        .enumerate()
        .all(|(i, row)| row.iter().enumerate().all(|(j, &h)| i == j || h == 0.0))
}

/// A few rows to be played, and what happened.
struct Job<'a> {
    codes: &'a mut [u8],
    scale_codes: &'a mut [i8],
    row_scales: &'a [f16],
    weights: &'a [f32],
    trace: Trace,
}

/// The state of play of a few rows.
struct Chunk<'a> {
    weights: &'a [f32],
    hessian: &'a [f32],
    n: usize,
    /// H is diagonal: `R = Δ∘diag H`, without a product.
    diagonal: bool,
    book: &'a Book,
    /// Value of one (scale code × codebook unit) per row.
    row_steps: Vec<f32>,
    /// Δ = Ŵ − W, `[rows, n]`.
    delta: Vec<f32>,
    /// R = Δ H, `[rows, n]`.
    residual: Vec<f32>,
    /// Change of Δ in the current block, `[rows, 64]`.
    change: Vec<f32>,
    /// Whether chains search for paths; afterwards only single codes answer.
    searches: bool,
    /// Room for products of some of the rows, `[rows, n]`.
    product: Vec<f32>,
}

impl<'a> Chunk<'a> {
    fn new(weights: &'a [f32], hessian: &'a [f32], n: usize, book: &'a Book, row_steps: Vec<f32>) -> Self {
        let rows = row_steps.len();
        let zeros = || vec![0.0; weights.len()];
        Self {
            weights,
            hessian,
            n,
            diagonal: false,
            book,
            row_steps,
            delta: zeros(),
            residual: zeros(),
            change: vec![0.0; rows * GROUP],
            product: zeros(),
            searches: true,
        }
    }

    fn play(&mut self, codes: &mut [u8], scale_codes: &mut [i8], rule: BestResponse) -> Trace {
        self.refresh(codes, scale_codes);
        self.searches = rule.joint_moves;
        let mut trace = Trace {
            potential: vec![inner_product(&self.delta, &self.residual)],
            moves: Vec::new(),
        };
        // Rows that did not move in the last sweep are in equilibrium: rows do not influence each other.
        let mut active: Vec<bool> = vec![true; self.row_steps.len()];
        for sweep in 0..rule.max_sweeps {
            if sweep > 0 && sweep % SWEEPS_PER_REFRESH == 0 {
                self.refresh(codes, scale_codes);
            }
            let moves = self.sweep(codes, scale_codes, &mut active, rule.move_scales);
            trace.moves.push(moves);
            let (before, now) = (trace.potential[sweep], inner_product(&self.delta, &self.residual));
            trace.potential.push(now);
            self.searches &= now < before * (1.0 - SEARCH_PAYS);
            if moves == 0 {
                break;
            }
        }
        trace
    }

    /// Recomputes Δ and R from the codes.
    fn refresh(&mut self, codes: &[u8], scale_codes: &[i8]) {
        let (n, groups) = (self.n, Grid::groups(self.n));
        for (r, &row_step) in self.row_steps.iter().enumerate() {
            let row = self.delta[r * n..][..n].chunks_mut(GROUP);
            let row = row.zip(self.weights[r * n..][..n].chunks(GROUP));
            for (g, ((delta, weights), codes)) in row.zip(codes[r * n..][..n].chunks(GROUP)).enumerate() {
                let step = row_step * f32::from(scale_codes[r * groups + g]);
                for ((delta, w), value) in delta.iter_mut().zip(weights).zip(self.book.values(codes)) {
                    *delta = step * value - w;
                }
            }
        }
        if self.diagonal {
            for (r, d) in self.residual.chunks_mut(n).zip(self.delta.chunks(n)) {
                for (c, (r, d)) in r.iter_mut().zip(d).enumerate() {
                    *r = d * self.hessian[c * n + c];
                }
            }
            return;
        }
        let rows = self.row_steps.len();
        let h = MatRef::row_major(self.hessian, n, n);
        gemm(
            1.0,
            MatRef::row_major(&self.delta, rows, n),
            h,
            0.0,
            MatMut::row_major(&mut self.residual, rows, n),
        );
    }

    /// One sweep over all players of the active rows, block of columns by block. Returns the number of moves.
    fn sweep(
        &mut self,
        codes: &mut [u8],
        scale_codes: &mut [i8],
        active: &mut [bool],
        move_scales: bool,
    ) -> u64 {
        let (n, groups, rows) = (self.n, Grid::groups(self.n), self.row_steps.len());
        let mut moves = vec![0u64; rows];
        let mut block = Block::new();
        for g in 0..groups {
            let start = g * GROUP;
            block.load(self.hessian, n, start);
            if matches!(self.book, Book::Trellis(_)) {
                block.load_chains(self.diagonal);
            }
            let len = block.len;
            self.change.fill(0.0);
            let mut moved = vec![false; rows];
            for r in 0..rows {
                if !active[r] {
                    continue;
                }
                let at = r * n + start;
                let seat = Seat {
                    weights: &self.weights[at..at + len],
                    codes: &mut codes[at..at + len],
                    scale_code: &mut scale_codes[r * groups + g],
                    row_step: self.row_steps[r],
                    searches: self.searches,
                    delta: &mut self.delta[at..at + len],
                    change: &mut self.change[r * GROUP..][..len],
                };
                let count = pulp::Arch::new().dispatch(Turn {
                    seat,
                    block: &block,
                    residual: &self.residual[at..at + len],
                    book: self.book,
                    move_scale: move_scales,
                });
                moves[r] += count;
                moved[r] = count > 0;
            }
            if moved.contains(&true) {
                self.propagate(start, len, &moved);
            }
        }
        for (a, &m) in active.iter_mut().zip(&moves) {
            *a = m > 0;
        }
        moves.iter().sum()
    }

    /// `R += change · H[block, :]` for the rows that moved in this block.
    fn propagate(&mut self, start: usize, len: usize, moved: &[bool]) {
        let n = self.n;
        if self.diagonal {
            let changes = self.change.chunks(GROUP);
            for (residual, change) in self.residual.chunks_mut(n).zip(changes) {
                for (c, (r, d)) in residual[start..start + len].iter_mut().zip(change).enumerate() {
                    *r += d * self.hessian[(start + c) * n + start + c];
                }
            }
            return;
        }
        let h = MatRef::row_major(&self.hessian[start * n..(start + len) * n], len, n);
        let rows: Vec<usize> = (0..moved.len()).filter(|&r| moved[r]).collect();
        if rows.len() == moved.len() {
            let change = MatRef::row_major(&self.change, rows.len(), GROUP).cols_range(0..len);
            return gemm(
                1.0,
                change,
                h,
                1.0,
                MatMut::row_major(&mut self.residual, rows.len(), n),
            );
        }
        // Late sweeps move few rows: only those are multiplied.
        for (to, &from) in rows.iter().enumerate() {
            self.change
                .copy_within(from * GROUP..(from + 1) * GROUP, to * GROUP);
        }
        let change =
            MatRef::row_major(&self.change[..rows.len() * GROUP], rows.len(), GROUP).cols_range(0..len);
        let product = &mut self.product[..rows.len() * n];
        gemm(1.0, change, h, 0.0, MatMut::row_major(product, rows.len(), n));
        for (&r, product) in rows.iter().zip(product.chunks(n)) {
            self.residual[r * n..][..n]
                .iter_mut()
                .zip(product)
                .for_each(|(r, p)| *r += p);
        }
    }
}

/// `Σ a·b` with sums of `f32` products in `f64`.
fn inner_product(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
