//! The rounding game: every weight is a player who picks a code, every scale group a player who picks a scale code.
//!
//! All players share one payoff, minus the potential `Φ = Σᵢ Δᵢ H Δᵢᵀ` with `Δ = Ŵ − W`: an identical-interest game
//! (Monderer and Shapley 1996), so every improving move lowers Φ, and because the strategies are finite, play one at a time ends in
//! a pure Nash equilibrium. With the residual `R = Δ H` the best response of weight `(i, j)` is the level nearest to
//! `ŵᵢⱼ − Rᵢⱼ / Hⱼⱼ`; a scale's payoff is a parabola in its code and its best response the code nearest to the vertex.
//!
//! Rows are independent sub-games and run in parallel. Within a row, players move one after the other: inside a
//! block of 64 columns the block's part of `R` is updated after every move, the rest of a stretch of blocks once per block, and all of `R` once per stretch, with
//! matrix products. Moving
//! players simultaneously could cycle and is never done. Row chunks have a fixed size: results do not depend on the number of threads.

mod residual;
mod seat;

use half::f16;
use nash_kernels::dense::{MatMut, MatRef, gemm};
use nash_kernels::{GROUP, SCALE_UNIT, pool};

use crate::error::{GameError, check_len};
use crate::grid::{Book, Grid};
use crate::trellis::dispatch;
use residual::Product;
use seat::{Block, Seat, Turn};

/// Rows of a chunk: a multiple of the six rows that a product keeps in registers and of the sixteen that are searched side by side; few, so that their residual
/// (`48 · n` floats) stays in a cache.
const ROWS_PER_CHUNK: usize = 48;
/// Blocks of a stretch, at most: columns whose changes meet the rest of the row in one product.
const STRETCH: usize = 8;
/// A move by `d` must gain more than this share of `H·d²`: smaller gains are within the rounding noise of `f32`.
pub(crate) const MIN_GAIN: f32 = 1e-3;
/// The residual is recomputed from scratch after this many sweeps, so that rounding errors do not add up.
const SWEEPS_PER_REFRESH: usize = 8;

/// Chains search for paths, and single codes are not asked, until a sweep lowers the potential by less than this share. Searching to the end lowers it by another 1 % and takes a
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
    /// Columns of a stretch.
    width: usize,
    /// Change of Δ in the current stretch, `[rows, width]`.
    change: Vec<f32>,
    /// R in the current stretch, `[rows, width]`.
    front: Vec<f32>,
    /// Whether chains search for paths; afterwards only single codes answer.
    searches: bool,
    /// Room for products of some of the rows.
    buffer: Vec<f32>,
}

/// The codes of a chunk.
struct Codes<'a> {
    /// `[rows, n]`.
    codes: &'a mut [u8],
    /// `[rows, G]`.
    scale_codes: &'a mut [i8],
}

impl Codes<'_> {
    fn reborrow(&mut self) -> Codes<'_> {
        Codes {
            codes: self.codes,
            scale_codes: self.scale_codes,
        }
    }
}

/// Who plays in a sweep, and what came of it.
struct Players<'a> {
    /// Per row.
    active: &'a mut [bool],
    /// Whether scales are players.
    move_scales: bool,
    /// Moves per row.
    moves: Vec<u64>,
}

impl<'a> Chunk<'a> {
    fn new(weights: &'a [f32], hessian: &'a [f32], n: usize, book: &'a Book, row_steps: Vec<f32>) -> Self {
        let rows = row_steps.len();
        let zeros = || vec![0.0; weights.len()];
        // Stretches of like length.
        let groups = Grid::groups(n).max(1);
        let width = groups.div_ceil(groups.div_ceil(STRETCH)) * GROUP;
        Self {
            weights,
            hessian,
            n,
            diagonal: false,
            book,
            row_steps,
            delta: zeros(),
            residual: zeros(),
            width,
            change: vec![0.0; rows * width],
            front: vec![0.0; rows * width],
            searches: true,
            buffer: Vec::new(),
        }
    }

    fn play(&mut self, codes: &mut [u8], scale_codes: &mut [i8], rule: BestResponse) -> Trace {
        // Rows that did not move in the last sweep are in equilibrium: rows do not influence each other.
        let mut active: Vec<bool> = vec![true; self.row_steps.len()];
        self.refresh(codes, scale_codes, &active);
        self.searches = rule.joint_moves && matches!(self.book, Book::Trellis(_));
        let mut trace = Trace {
            potential: vec![inner_product(&self.delta, &self.residual)],
            moves: Vec::new(),
        };
        for sweep in 0..rule.max_sweeps {
            if sweep > 0 && sweep % SWEEPS_PER_REFRESH == 0 {
                self.refresh(codes, scale_codes, &active);
            }
            let state = Codes {
                codes: &mut *codes,
                scale_codes: &mut *scale_codes,
            };
            let moves = self.sweep(state, &mut active, rule.move_scales);
            trace.moves.push(moves);
            let (before, now) = (trace.potential[sweep], inner_product(&self.delta, &self.residual));
            trace.potential.push(now);
            if self.searches && now >= before * (1.0 - SEARCH_PAYS) {
                // From here on single codes answer, which nobody was asked for before.
                self.searches = false;
                active.fill(true);
            } else if moves == 0 {
                break;
            }
        }
        trace
    }

    /// Recomputes Δ and R of the active rows from the codes.
    fn refresh(&mut self, codes: &[u8], scale_codes: &[i8], active: &[bool]) {
        let (n, groups) = (self.n, Grid::groups(self.n));
        for (r, &row_step) in self.row_steps.iter().enumerate().filter(|(r, _)| active[*r]) {
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
        let h = MatRef::row_major(self.hessian, n, n);
        let multiply = |delta: &[f32], residual: &mut [f32]| {
            let rows = delta.len() / n;
            let residual = MatMut::row_major(residual, rows, n);
            gemm(1.0, MatRef::row_major(delta, rows, n), h, 0.0, residual);
        };
        let rows: Vec<usize> = (0..active.len()).filter(|&r| active[r]).collect();
        if rows.len() == active.len() {
            return multiply(&self.delta, &mut self.residual);
        }
        self.buffer.clear();
        for r in &rows {
            self.buffer.extend_from_slice(&self.delta[r * n..][..n]);
        }
        self.buffer.resize(2 * rows.len() * n, 0.0);
        let (delta, residual) = self.buffer.split_at_mut(rows.len() * n);
        multiply(delta, residual);
        for (r, residual) in rows.iter().zip(residual.chunks(n)) {
            self.residual[r * n..][..n].copy_from_slice(residual);
        }
    }

    /// One sweep over all players of the active rows, block of columns by block. Returns the number of moves.
    ///
    /// Within a stretch of blocks only a copy of its own part of `R` is kept up to date; all of `R` follows once, by one large product.
    fn sweep(&mut self, mut state: Codes<'_>, active: &mut [bool], move_scales: bool) -> u64 {
        let (n, width) = (self.n, self.width);
        let mut players = Players {
            active,
            move_scales,
            moves: vec![0; self.row_steps.len()],
        };
        let mut block = Block::new();
        for from in (0..n).step_by(width) {
            let end = n.min(from + width);
            self.change.fill(0.0);
            for (front, residual) in self.front.chunks_mut(width).zip(self.residual.chunks(n)) {
                front[..end - from].copy_from_slice(&residual[from..end]);
            }
            for g in from / GROUP..end.div_ceil(GROUP) {
                block.load(self.hessian, n, g * GROUP);
                if matches!(self.book, Book::Trellis(_)) {
                    block.load_chains(self.diagonal);
                }
                self.turn(state.reborrow(), (&block, g), from, &mut players);
                let next = (g + 1) * GROUP;
                if next < end && !self.diagonal {
                    let product = Product {
                        change: &self.change,
                        stride: width,
                        used: g * GROUP - from..next - from,
                        first: from,
                        hessian: self.hessian,
                        n,
                        columns: next..end,
                    };
                    product.add_to(&mut self.front, width, next - from, &mut self.buffer);
                }
            }
            self.propagate(from, end - from);
        }
        for (a, &m) in players.active.iter_mut().zip(&players.moves) {
            *a = m > 0;
        }
        players.moves.iter().sum()
    }

    /// The turn of group `g`: the active rows, each at its residual `front`.
    fn turn(
        &mut self,
        state: Codes<'_>,
        (block, g): (&Block, usize),
        from: usize,
        players: &mut Players<'_>,
    ) {
        let (n, groups, len) = (self.n, Grid::groups(self.n), block.len);
        let (start, width) = (g * GROUP, self.width);
        let change = self.change.chunks_mut(width);
        let rows = state
            .codes
            .chunks_mut(n)
            .zip(state.scale_codes.chunks_mut(groups));
        let rows = rows.zip(self.delta.chunks_mut(n)).zip(change).enumerate();
        let (mut seats, mut seated) = (Vec::with_capacity(self.row_steps.len()), Vec::new());
        for (r, (((codes, scale_codes), delta), change)) in rows {
            let step = self.row_steps[r] * f32::from(scale_codes[g]);
            if !players.active[r] || step <= 0.0 {
                continue;
            }
            let mut local = [0.0; GROUP];
            local[..len].copy_from_slice(&self.front[r * width + start - from..][..len]);
            seated.push(r);
            seats.push(Seat {
                weights: &self.weights[r * n + start..][..len],
                codes: &mut codes[start..start + len],
                scale_code: &mut scale_codes[g],
                row_step: self.row_steps[r],
                delta: &mut delta[start..start + len],
                change: &mut change[start - from..][..len],
                local,
                values: [0.0; GROUP],
                step,
                moves: 0,
            });
        }
        dispatch(Turn {
            seats: &mut seats,
            block,
            book: self.book,
            searches: self.searches,
            move_scales: players.move_scales,
        });
        for (r, seat) in seated.into_iter().zip(seats) {
            players.moves[r] += seat.moves;
        }
    }

    /// `R += change · H` after a stretch of columns from `from` on.
    fn propagate(&mut self, from: usize, len: usize) {
        let (n, width) = (self.n, self.width);
        if self.diagonal {
            let changes = self.change.chunks(width);
            for (residual, change) in self.residual.chunks_mut(n).zip(changes) {
                for (c, (r, d)) in residual[from..from + len].iter_mut().zip(change).enumerate() {
                    *r += d * self.hessian[(from + c) * n + from + c];
                }
            }
            return;
        }
        let product = Product {
            change: &self.change,
            stride: width,
            used: 0..len,
            first: from,
            hessian: self.hessian,
            n,
            columns: 0..n,
        };
        product.add_to(&mut self.residual, n, 0, &mut self.buffer);
    }
}

/// `Σ a·b` with sums of `f32` products in `f64`.
fn inner_product(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
