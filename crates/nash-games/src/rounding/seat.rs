//! One row's turn at one group: every weight or chain of weights answers, then the scale.

use nash_kernels::{CHAIN, CHAINS, GROUP, chain_column};

use super::MIN_GAIN;
use crate::grid::{Book, Levels, MAX_LEVEL, inverse_or_zero};
use crate::trellis::{self, Abreast, Lanes, Trellis, WIDE, WithLanes};

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

/// The turn of the rows of a chunk at one block.
pub(super) struct Turn<'t, 'a> {
    /// One per row that plays.
    pub(super) seats: &'t mut [Seat<'a>],
    pub(super) block: &'t Block,
    pub(super) book: &'t Book,
    /// Whether chains search for paths.
    pub(super) searches: bool,
    /// Whether scales are players.
    pub(super) move_scales: bool,
}

impl WithLanes for Turn<'_, '_> {
    type Output = ();

    /// Every player of the block answers once, in order; then the scale.
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.book {
            Book::Scalar(levels) => {
                for seat in &mut *self.seats {
                    seat.respond_alone(self.block, levels);
                }
            }
            Book::Trellis(trellis) => {
                for seat in &mut *self.seats {
                    seat.values = trellis.values(seat.codes);
                }
                let mut abreast = Abreast::new();
                for seats in self.seats.chunks_mut(Abreast::chains(trellis.bits())) {
                    for index in 0..CHAINS {
                        if self.searches {
                            let paths = search(lanes, &mut abreast, seats, (self.block, index), trellis);
                            for (seat, path) in seats.iter_mut().zip(&paths) {
                                seat.respond_in_chain(self.block, index, trellis, Some(path));
                            }
                        } else {
                            for seat in &mut *seats {
                                seat.respond_in_chain(self.block, index, trellis, None);
                            }
                        }
                    }
                }
            }
        }
        if self.move_scales {
            for seat in self.seats {
                seat.move_scale(self.block, self.book);
            }
        }
    }
}

/// The best paths of chain `index` of as many seats as are searched together.
#[inline(always)]
fn search<L: Lanes>(
    lanes: L,
    abreast: &mut Abreast,
    seats: &[Seat<'_>],
    (block, index): (&Block, usize),
    trellis: &Trellis,
) -> [[u8; CHAIN]; WIDE] {
    for (place, seat) in seats.iter().enumerate() {
        let lane = trellis::Lane {
            residual: &trellis::gather(&seat.local, index),
            values: &trellis::gather(&seat.values, index).map(|v| seat.step * v),
            diagonal: &block.diagonals[index],
            step: seat.step,
        };
        abreast.set(trellis.bits(), place, lane);
    }
    let mut paths = [[0; CHAIN]; WIDE];
    let coupling = block.chains.as_deref().map(|c| &c[index]);
    let exists = trellis::exists(block.len, index);
    abreast.search(lanes, trellis, coupling, &exists, &mut paths[..seats.len()]);
    paths
}

/// The players of one row and one block.
pub(super) struct Seat<'a> {
    pub(super) weights: &'a [f32],
    pub(super) codes: &'a mut [u8],
    pub(super) scale_code: &'a mut i8,
    pub(super) row_step: f32,
    pub(super) delta: &'a mut [f32],
    pub(super) change: &'a mut [f32],
    /// The residual of the block, kept up to date during the turn.
    pub(super) local: [f32; GROUP],
    /// Values of the codes on a trellis, in units of the codebook, kept up to date likewise.
    pub(super) values: [f32; GROUP],
    /// Value of one unit of the codebook.
    pub(super) step: f32,
    /// Players who moved.
    pub(super) moves: u64,
}

impl Seat<'_> {
    /// Each weight takes the level nearest to the vertex of its parabola.
    #[inline(always)]
    fn respond_alone(&mut self, block: &Block, levels: &Levels) {
        let (step, inverse) = (self.step, inverse_or_zero(self.step));
        for j in 0..self.weights.len() {
            let hjj = block.h[j * GROUP + j];
            let value = self.weights[j] + self.delta[j];
            let code = levels.nearest((value - self.local[j] / hjj) * inverse);
            if code == self.codes[j] {
                continue;
            }
            let new_delta = step * levels.value(code) - self.weights[j];
            let d = new_delta - self.delta[j];
            let change_of_potential = d * (2.0 * self.local[j] + d * hjj);
            if change_of_potential < -MIN_GAIN * hjj * d * d {
                self.codes[j] = code;
                self.delta[j] = new_delta;
                self.change[j] += d;
                add_scaled(&mut self.local, block.row(j), d);
                self.moves += 1;
            }
        }
    }

    /// A chain takes the path found for it, if that gains; without one, its codes are asked one by one.
    #[inline(always)]
    fn respond_in_chain(
        &mut self,
        block: &Block,
        index: usize,
        trellis: &Trellis,
        path: Option<&[u8; CHAIN]>,
    ) {
        let mut codes = trellis::gather(&trellis::padded(self.codes), index);
        let chain = trellis::Chain {
            coupling: block.chains.as_deref().map(|c| &c[index]),
            diagonal: &block.diagonals[index],
            residual: trellis::gather(&self.local, index),
            values: trellis::gather(&self.values, index).map(|v| self.step * v),
            step: self.step,
            exists: trellis::exists(self.weights.len(), index),
        };
        let moved = match path {
            Some(path) => chain.take(trellis, path, &mut codes, MIN_GAIN),
            None => chain.respond_alone(trellis, &mut codes, MIN_GAIN),
        };
        if moved == 0 {
            return;
        }
        self.moves += moved;
        let values = trellis.chain_values(&codes);
        trellis::scatter(&values, &mut self.values, index);
        for (s, (code, value)) in codes.into_iter().zip(values).enumerate() {
            let j = chain_column(index, s);
            if j < self.weights.len() {
                self.codes[j] = code;
                let new_delta = self.step * value - self.weights[j];
                let d = new_delta - self.delta[j];
                if d != 0.0 {
                    self.delta[j] = new_delta;
                    self.change[j] += d;
                    add_scaled(&mut self.local, block.row(j), d);
                }
            }
        }
    }

    /// Best response of the scale: the code nearest to the vertex of its parabola.
    #[inline(always)]
    fn move_scale(&mut self, block: &Block, book: &Book) {
        let values = match book {
            Book::Scalar(_) => book.values(self.codes),
            Book::Trellis(_) => self.values,
        };
        let v = values.map(|v| self.row_step * v);
        let mut hv = [0.0f32; GROUP];
        for (j, &v) in v.iter().enumerate().take(block.len) {
            add_scaled(&mut hv, block.row(j), v);
        }
        let slope = 2.0 * sum_of_products(&v, &self.local);
        let curvature = sum_of_products(&v, &hv);
        if curvature <= 0.0 {
            return;
        }
        let old = f32::from(*self.scale_code);
        let new = (old - 0.5 * slope / curvature).round().clamp(1.0, MAX_LEVEL);
        let d = new - old;
        if d == 0.0 || d * (slope + d * curvature) >= -MIN_GAIN * curvature * d * d {
            return;
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
        self.moves += 1;
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
