//! One row's turn at one group: every weight or chain of weights answers, then the scale.

use nash_kernels::{CHAIN, CHAINS, GROUP, chain_column};

use super::MIN_GAIN;
use crate::grid::{Book, Levels, MAX_LEVEL, inverse_or_zero};
use crate::trellis::{self, Trellis};

/// The 64 × 64 block of H on the diagonal, contiguous, zero-padded.
pub(super) struct Block {
    h: [f32; GROUP * GROUP],
    pub(super) len: usize,
    /// The diagonal of H, by chain.
    diagonals: [[f32; CHAIN]; CHAINS],
    /// H among the weights of each chain; `None` if nothing couples them.
    chains: Option<Box<[trellis::Matrix; CHAINS]>>,
}

impl Block {
    /// To be loaded.
    pub(super) fn new() -> Self {
        Self {
            h: [0.0; GROUP * GROUP],
            len: 0,
            diagonals: [[0.0; CHAIN]; CHAINS],
            chains: None,
        }
    }

    pub(super) fn load(&mut self, hessian: &[f32], n: usize, start: usize) {
        self.len = GROUP.min(n - start);
        self.h.fill(0.0);
        for j in 0..self.len {
            self.h[j * GROUP..][..self.len].copy_from_slice(&hessian[(start + j) * n + start..][..self.len]);
        }
    }

    /// Gathers what couples the weights of each chain.
    pub(super) fn load_chains(&mut self, diagonal: bool) {
        let own: [f32; GROUP] = std::array::from_fn(|j| self.h[j * GROUP + j]);
        self.diagonals = std::array::from_fn(|chain| trellis::gather(&own, chain));
        self.chains = (!diagonal).then(|| {
            Box::new(std::array::from_fn(|chain| {
                std::array::from_fn(|i| trellis::gather(self.row(chain_column(chain, i)), chain))
            }))
        });
    }

    #[inline(always)]
    fn row(&self, j: usize) -> &[f32; GROUP] {
        // Always 64 long: constant lengths let the compiler unroll.
        (&self.h[j * GROUP..(j + 1) * GROUP])
            .try_into()
            .unwrap_or(&[0.0; GROUP])
    }
}

/// A seat's turn: what a closure would hold, but inlined into the code for this CPU's instruction set for certain.
pub(super) struct Turn<'s, 'a> {
    pub(super) seat: Seat<'a>,
    pub(super) block: &'s Block,
    pub(super) residual: &'s [f32],
    pub(super) book: &'s Book,
    pub(super) move_scale: bool,
}

impl pulp::NullaryFnOnce for Turn<'_, '_> {
    type Output = u64;

    #[inline(always)]
    fn call(mut self) -> u64 {
        self.seat
            .respond(self.block, self.residual, self.book, self.move_scale)
    }
}

/// The players of one row and one block.
pub(super) struct Seat<'a> {
    pub(super) weights: &'a [f32],
    pub(super) codes: &'a mut [u8],
    pub(super) scale_code: &'a mut i8,
    pub(super) row_step: f32,
    /// Whether chains search for paths.
    pub(super) searches: bool,
    pub(super) delta: &'a mut [f32],
    pub(super) change: &'a mut [f32],
}

impl Seat<'_> {
    /// Every player of the block answers once, in order; then the scale. Returns the number of moves.
    #[inline(always)]
    fn respond(&mut self, block: &Block, residual: &[f32], book: &Book, move_scale: bool) -> u64 {
        let step = self.row_step * f32::from(*self.scale_code);
        if step <= 0.0 {
            return 0;
        }
        let mut local = [0.0f32; GROUP];
        local[..residual.len()].copy_from_slice(residual);
        let mut moves = match book {
            Book::Scalar(levels) => self.respond_alone(block, &mut local, levels, step),
            Book::Trellis(trellis) => self.respond_in_chains(block, &mut local, trellis, step),
        };
        if move_scale {
            moves += self.move_scale(block, &local, book);
        }
        moves
    }

    /// Each weight takes the level nearest to the vertex of its parabola.
    #[inline(always)]
    fn respond_alone(&mut self, block: &Block, local: &mut [f32; GROUP], levels: &Levels, step: f32) -> u64 {
        let inverse = inverse_or_zero(step);
        let mut moves = 0;
        for j in 0..self.weights.len() {
            let hjj = block.h[j * GROUP + j];
            let value = self.weights[j] + self.delta[j];
            let code = levels.nearest((value - local[j] / hjj) * inverse);
            if code == self.codes[j] {
                continue;
            }
            let new_delta = step * levels.value(code) - self.weights[j];
            let d = new_delta - self.delta[j];
            let change_of_potential = d * (2.0 * local[j] + d * hjj);
            if change_of_potential < -MIN_GAIN * hjj * d * d {
                self.codes[j] = code;
                self.delta[j] = new_delta;
                self.change[j] += d;
                add_scaled(local, block.row(j), d);
                moves += 1;
            }
        }
        moves
    }

    /// Each chain takes the best path found; where that is the present one, single codes are asked.
    #[inline(always)]
    fn respond_in_chains(
        &mut self,
        block: &Block,
        local: &mut [f32; GROUP],
        trellis: &Trellis,
        step: f32,
    ) -> u64 {
        let mut moves = 0;
        for index in 0..CHAINS {
            let mut codes = trellis::gather(&trellis::padded(self.codes), index);
            let chain = trellis::Chain {
                coupling: block.chains.as_deref().map(|c| &c[index]),
                diagonal: block.diagonals[index],
                residual: trellis::gather(local, index),
                values: trellis.chain_values(&codes).map(|v| step * v),
                step,
                exists: trellis::exists(self.weights.len(), index),
            };
            let moved = trellis::respond(trellis, chain, &mut codes, self.searches, MIN_GAIN);
            if moved == 0 {
                continue;
            }
            moves += moved;
            let values = trellis.chain_values(&codes);
            for (s, (code, value)) in codes.into_iter().zip(values).enumerate() {
                let j = chain_column(index, s);
                if j < self.weights.len() {
                    self.codes[j] = code;
                    let new_delta = step * value - self.weights[j];
                    let d = new_delta - self.delta[j];
                    if d != 0.0 {
                        self.delta[j] = new_delta;
                        self.change[j] += d;
                        add_scaled(local, block.row(j), d);
                    }
                }
            }
        }
        moves
    }

    /// Best response of the scale: the code nearest to the vertex of its parabola.
    #[inline(always)]
    fn move_scale(&mut self, block: &Block, local: &[f32; GROUP], book: &Book) -> u64 {
        let v = book.values(self.codes).map(|v| self.row_step * v);
        let mut hv = [0.0f32; GROUP];
        for (j, &v) in v.iter().enumerate().take(block.len) {
            add_scaled(&mut hv, block.row(j), v);
        }
        let slope = 2.0 * sum_of_products(&v, local);
        let curvature = sum_of_products(&v, &hv);
        if curvature <= 0.0 {
            return 0;
        }
        let old = f32::from(*self.scale_code);
        let new = (old - 0.5 * slope / curvature).round().clamp(1.0, MAX_LEVEL);
        let d = new - old;
        if d == 0.0 || d * (slope + d * curvature) >= -MIN_GAIN * curvature * d * d {
            return 0;
        }
        *self.scale_code = new as i8;
        for (((w, v), delta), change) in self
            .weights
            .iter()
            .zip(v)
            .zip(&mut *self.delta)
            .zip(&mut *self.change)
        {
            let new_delta = new * v - w;
            *change += new_delta - *delta;
            *delta = new_delta;
        }
        1
    }
}

#[inline(always)]
fn add_scaled(y: &mut [f32; GROUP], x: &[f32; GROUP], a: f32) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

#[inline(always)]
fn sum_of_products(a: &[f32; GROUP], b: &[f32; GROUP]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % 16] += a * b;
    }
    lanes.iter().sum()
}
