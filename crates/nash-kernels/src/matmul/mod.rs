//! `y [T, m] = x [T, n] · Wᵀ` for packed `W [m, n]` and quantized `x`.
//!
//! # What is computed, to the bit
//!
//! For row `r`, token `t` and group `g`, lane `l` of four takes the columns `16q + 4l + i` of the group
//! (`q`, `i` in 0..4) and adds up `S[g][l] = Σ value · a` exactly in 32 bits
//! (`|S| ≤ 16·128·127 < 2²⁴`, so the conversion to f32 is exact too). Then, in f32 and in this order,
//!
//! ```text
//! lane[l] = 0;  for g ascending:  lane[l] += f32(S[g][l]) · (f32(scale_code[r, g]) · scale[t, g])
//! y[t, r] = row_scale[r] · ((lane[0] + lane[1]) + (lane[2] + lane[3]))
//! ```
//!
//! with every operation rounded (no fused multiply-add). All kernels do exactly this, so results are the
//! same for every instruction set, thread count and number of tokens at a time. Only *which* NaN comes out
//! of NaN inputs is left open.
//!
//! Against real arithmetic on the same quantized inputs the error is at most `(groups + 5) · 2⁻²⁴` times
//! the sum of the magnitudes of all terms, to first order: each term is rounded twice before and at most
//! `groups` times in its lane's sum, then twice over lanes and once by the row scale.
//!
//! # How
//!
//! One token ([`Kernel::one`]): weights are read once, straight into registers, the rows of a tile side by
//! side. More tokens ([`Kernel::many`]): a panel of groups is decoded into a buffer in the first-level
//! cache and used for up to [`TOKEN_CHUNK`] tokens, [`TOKEN_BLOCK`] at a time in registers. Threads share
//! the work by tiles; every output is computed by one thread.
#![expect(
    unsafe_code,
    reason = "kernels of instruction sets, and outputs shared out to threads by tiles"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod common;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::marker::PhantomData;
use std::ops::Range;

use crate::Isa;
use crate::activations::{ActivationGroup, Activations, TOKEN_BLOCK};
use crate::layout::{PackedRef, PackedShape, TILE_ROWS, TILE_WEIGHTS, WINDOW_BITS};
use crate::pool::{self, Pool};

/// Tokens that one decoded panel is used for. 64 tokens of 8192 columns are 768 KiB: second-level cache.
const TOKEN_CHUNK: usize = 64;
/// Groups decoded at a time; the panels of two tiles are 8 KiB of the first-level cache.
const PANEL: usize = 16;
/// Tiles whose panels are used together, at most.
const TILES: usize = 2;
/// Bytes of stream that one task works on for one token: enough to make the start of a task cheap,
/// little enough to share out a small matrix.
const TASK_BYTES: usize = 24 << 10;

/// `y [T, m] = x [T, n] · Wᵀ`, with the kernels of [`Isa::active`]. The [crate] tells what is exact about it;
/// no memory is allocated.
///
/// # Panics
/// If `x` has another number of columns than `w`, or `y` has not `T · m` elements.
pub fn matmul(w: PackedRef<'_>, x: &Activations, y: &mut [f32]) {
    matmul_each([Product { w, x, y }]);
}

/// One of the products of [`matmul_each`]: `y [T, m] = x [T, n] · Wᵀ`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `W [m, n]`.
    pub w: PackedRef<'a>,
    /// `x [T, n]`.
    pub x: &'a Activations,
    /// `y [T, m]`, replaced.
    pub y: &'a mut [f32],
}

/// Several products as one piece of work: threads meet once for all of them, not once for each. The results are those of
/// [`matmul`].
///
/// # Panics
/// As [`matmul`].
pub fn matmul_each<'a>(products: impl IntoIterator<Item = Product<'a>>) {
    multiply_on(pool::global(), Isa::active(), products);
}

/// As [`matmul`] with a given instruction set; for tests and measurements.
///
/// # Panics
/// As [`matmul`], and if this CPU lacks the instruction set.
pub fn matmul_with(isa: Isa, w: PackedRef<'_>, x: &Activations, y: &mut [f32]) {
    multiply_on(pool::global(), isa, [Product { w, x, y }]);
}

/// Products that are shared out together, at most: gate and up of some 30 small experts.
const TOGETHER: usize = 64;

fn multiply_on<'a>(pool: &Pool, isa: Isa, products: impl IntoIterator<Item = Product<'a>>) {
    let kernel = Kernel::of(isa);
    let mut products = products.into_iter();
    loop {
        let mut jobs = [const { None }; TOGETHER];
        let mut tasks = 0;
        for (slot, product) in jobs.iter_mut().zip(products.by_ref()) {
            let job = Job::new(product, tasks, pool.threads());
            tasks = job.tasks.end;
            *slot = Some(job);
        }
        if jobs[0].is_none() {
            return;
        }
        pool.run(tasks, &|task| {
            if let Some(job) = jobs.iter().flatten().find(|job| job.tasks.contains(&task)) {
                // SAFETY: `Kernel::of` found the instruction set on this CPU. Each task runs once.
                unsafe { job.run(&kernel, task) }
            }
        });
    }
}

/// Tiles that one task works on; has no influence on results.
fn tiles_per_task(shape: PackedShape, tokens: usize, threads: usize) -> usize {
    let tile_bytes = shape.groups() * shape.record_bytes();
    let cheap = TASK_BYTES.div_ceil(tokens * tile_bytes.max(1));
    let balanced = shape.tiles() / (threads * 16);
    cheap.max(balanced).next_multiple_of(TILES)
}

/// One matrix product.
struct Job<'a> {
    w: PackedRef<'a>,
    x: &'a Activations,
    /// Value of each window.
    table: [i8; 1 << WINDOW_BITS],
    /// Outputs `[tokens, rows]`.
    y: *mut f32,
    _y: PhantomData<&'a mut [f32]>,
    /// Which tasks of the work are its own.
    tasks: Range<usize>,
    tiles_per_task: usize,
}

// SAFETY: `w` and `x` are shared references to plain data; `y` is written only by `store`, whose contract
// makes the writes of different threads disjoint.
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    /// A product whose tasks begin at number `first`.
    fn new(product: Product<'a>, first: usize, threads: usize) -> Self {
        let Product { w, x, y } = product;
        let shape = w.shape();
        assert_eq!(x.cols(), shape.cols, "columns of the activations");
        assert_eq!(
            Some(y.len()),
            x.tokens().checked_mul(shape.rows),
            "outputs [tokens, rows]"
        );
        let tiles_per_task = tiles_per_task(shape, x.tokens().max(1), threads);
        let tasks = if y.is_empty() {
            0
        } else {
            shape.tiles().div_ceil(tiles_per_task)
        };
        Job {
            w,
            x,
            table: w.table(),
            y: y.as_mut_ptr(),
            _y: PhantomData,
            tasks: first..first + tasks,
            tiles_per_task,
        }
    }

    /// # Safety
    /// The CPU has the instruction set of the kernel; `task` is one of the job's and runs once.
    unsafe fn run(&self, kernel: &Kernel, task: usize) {
        let first = (task - self.tasks.start) * self.tiles_per_task;
        let tiles = first..self.w.shape().tiles().min(first + self.tiles_per_task);
        // SAFETY: passed on; the tiles of different tasks are disjoint.
        unsafe {
            if self.x.tokens() == 1 {
                (kernel.one)(self, tiles)
            } else {
                many(kernel, self, tiles)
            }
        }
    }

    /// The records of a tile: those of its groups, in order.
    fn records(&self, tile: usize) -> &[u8] {
        let shape = self.w.shape();
        let bytes = shape.groups() * shape.record_bytes();
        &self.w.stream()[tile * bytes..][..bytes]
    }

    /// Finishes the rows of a tile for one token: adds up the lanes (`[row][lane]`), applies the row scales
    /// and writes the rows that exist.
    ///
    /// # Safety
    /// `tile` and `token` are in range, and no other thread stores the same tile.
    unsafe fn store(&self, tile: usize, token: usize, row_scales: [f32; TILE_ROWS], lanes: &[f32; 16]) {
        let rows = self.w.shape().rows;
        debug_assert!(tile < self.w.shape().tiles() && token < self.x.tokens());
        let first = tile * TILE_ROWS;
        for (r, (row_scale, lane)) in row_scales.iter().zip(lanes.as_chunks::<4>().0).enumerate() {
            if first + r < rows {
                let sum = (lane[0] + lane[1]) + (lane[2] + lane[3]);
                // SAFETY: `token < tokens` and `first + r < rows`, so this is inside the `tokens · rows`
                // outputs, which `_y` borrows exclusively; tiles of other threads have other rows.
                unsafe { self.y.add(token * rows + first + r).write(row_scale * sum) }
            }
        }
    }
}

/// Some groups of one tile, decoded.
#[repr(C, align(64))]
struct Panel {
    /// Values, `[block][row][16]`, as `i8` or as `value + 128`: the kernel's choice.
    weights: [[u8; TILE_WEIGHTS]; PANEL],
    /// Scale code of each row.
    scales: [[f32; TILE_ROWS]; PANEL],
}

impl Panel {
    const ZERO: Panel = Panel {
        weights: [[0; TILE_WEIGHTS]; PANEL],
        scales: [[0.0; TILE_ROWS]; PANEL],
    };
}

/// Sums of one tile for the tokens of a chunk: `[row][lane]` for each token.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Lanes([[f32; 16]; TOKEN_CHUNK]);

/// Some groups of a block of up to eight tokens.
struct TokenBlock<'a> {
    /// `[groups][tokens]`.
    groups: &'a [ActivationGroup],
    tokens: usize,
    /// Where in the chunk the block begins: token `t` of the block adds to `lanes[tile].0[first + t]`.
    first: usize,
}

/// The kernels of one instruction set.
///
/// # Safety
/// Each function is `unsafe` because it needs the instruction set; nothing else is asked for but what is said
/// here.
struct Kernel {
    /// Computes and stores the rows of some tiles for the only token. No other thread stores these tiles.
    one: unsafe fn(&Job<'_>, Range<usize>),
    /// Decodes the given groups (at most [`PANEL`]) of a tile.
    decode: unsafe fn(&Job<'_>, usize, Range<usize>, &mut Panel),
    /// Adds the products of each panel (1 to `tiles`) with a block of tokens to the tile's lanes.
    multiply: unsafe fn(&[Panel], &TokenBlock<'_>, &mut [Lanes]),
    /// Panels that `multiply` takes at most.
    tiles: usize,
}

impl Kernel {
    fn of(isa: Isa) -> Kernel {
        assert!(isa.is_available(), "this CPU lacks {}", isa.name());
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::KERNEL,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::KERNEL,
            _ => portable::KERNEL,
        }
    }
}

/// Computes and stores the rows of some tiles for all tokens.
///
/// # Safety
/// The CPU has the kernel's instruction set, `tiles` are in range, and no other thread stores them.
unsafe fn many(kernel: &Kernel, job: &Job<'_>, tiles: Range<usize>) {
    let mut panels = [const { Panel::ZERO }; TILES];
    let mut lanes = [Lanes([[0.0; 16]; TOKEN_CHUNK]); TILES];
    for first_token in (0..job.x.tokens()).step_by(TOKEN_CHUNK) {
        let tokens = first_token..job.x.tokens().min(first_token + TOKEN_CHUNK);
        for first in tiles.clone().step_by(kernel.tiles) {
            let tiles = first..tiles.end.min(first + kernel.tiles);
            // SAFETY: passed on.
            unsafe { many_of(kernel, job, (tiles, tokens.clone()), (&mut panels, &mut lanes)) }
        }
    }
}

/// [`many`] for at most `kernel.tiles` tiles and [`TOKEN_CHUNK`] tokens.
///
/// # Safety
/// As [`many`].
unsafe fn many_of(
    kernel: &Kernel,
    job: &Job<'_>,
    (tiles, tokens): (Range<usize>, Range<usize>),
    (panels, lanes): (&mut [Panel; TILES], &mut [Lanes; TILES]),
) {
    let groups = job.w.shape().groups();
    let panels = &mut panels[..tiles.len()];
    for lanes in lanes.iter_mut() {
        lanes.0[..tokens.len()].fill([0.0; 16]);
    }
    for first in (0..groups).step_by(PANEL) {
        let range = first..groups.min(first + PANEL);
        for (panel, tile) in panels.iter_mut().zip(tiles.clone()) {
            // SAFETY: the caller vouches for the instruction set.
            unsafe { (kernel.decode)(job, tile, range.clone(), panel) }
        }
        for token in tokens.clone().step_by(TOKEN_BLOCK) {
            let (all, in_block) = job.x.block(token);
            let block = TokenBlock {
                groups: &all[range.start * in_block..range.end * in_block],
                tokens: in_block,
                first: token - tokens.start,
            };
            // SAFETY: the caller vouches for the instruction set.
            unsafe { (kernel.multiply)(panels, &block, lanes) }
        }
    }
    for (tile, lanes) in tiles.zip(lanes) {
        let row_scales = job.w.tile_row_scales(tile);
        for (token, lanes) in tokens.clone().zip(&lanes.0) {
            // SAFETY: both are in range, and the caller vouches that the tile is this thread's.
            unsafe { job.store(tile, token, row_scales, lanes) }
        }
    }
}
