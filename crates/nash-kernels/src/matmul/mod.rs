//! `y [T, m] = x [T, n] · Wᵀ` for packed `W [m, n]` and quantized `x`.
//!
//! # What is computed, to the bit
//!
//! For row `r`, token `t` and group `g`, `S[g] = Σ value · a` over the columns of the group is exact in 32 bits
//! (`|S| ≤ 64·128·127 < 2²⁴`, so the conversion to f32 is exact too). Then, in f32 and in this order,
//!
//! ```text
//! total = 0;  for g ascending:  total += f32(S[g]) · (f32(scale_code[r, g]) · scale[t, g])
//! y[t, r] = row_scale[r] · total
//! ```
//!
//! with every operation rounded (no fused multiply-add). All kernels do exactly this, so results are the
//! same for every instruction set, thread count and number of tokens at a time. Only *which* NaN comes out
//! of NaN inputs is left open.
//!
//! Against real arithmetic on the same quantized inputs the error is at most `(groups + 3) · 2⁻²⁴` times
//! the sum of the magnitudes of all terms, to first order: each term is rounded twice before and at most
//! `groups` times in the sum, then once by the row scale.
//!
//! # How
//!
//! One token ([`Kernel::one`]): weights are read once, straight into registers, the rows of a tile side by
//! side. More tokens ([`many`]): some groups of a strip of four tiles are decoded into a panel in the first-level
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

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::Isa;
use crate::activations::{Activations, TOKEN_BLOCK, TokenBlock};
use crate::layout::{PackedRef, PackedShape, TILE_ROWS, TILE_WEIGHTS, WINDOW_BITS};
use crate::pool::{self, Pool};

/// Tokens that one decoded panel is used for: their totals are 16 KiB, and to decode costs a fiftieth of their products.
const TOKEN_CHUNK: usize = 256;
/// Groups decoded at a time: 17 KiB with their scales, half of a first-level cache.
const PANEL: usize = 16;
/// Tokens from which on the products with a panel leave time to ask for the next one: with fewer the requests only wait for each other.
const AHEAD_TOKENS: usize = 32;
/// Bytes of a line of the cache.
const LINE: usize = 64;
/// Tiles of a strip: rows that are decoded together.
const TILES: usize = 4;
/// Rows of a strip.
const ROWS: usize = TILES * TILE_ROWS;
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
        let (mut tasks, threads) = (0, pool.helping_threads());
        for (slot, product) in jobs.iter_mut().zip(products.by_ref()) {
            let job = Job::new(product, tasks, threads);
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
    if threads == 1 {
        return shape.tiles().max(1);
    }
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

// SAFETY: `w` and `x` are shared references to plain data; `y` is written only by `store`, and by kernels under
// its contract, which makes the writes of different threads disjoint.
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

    /// Multiplies the totals of rows `first ..` for one token by the row scales and writes those that exist.
    ///
    /// # Safety
    /// `first` and `token` are in range, and no other thread stores the same rows.
    #[inline(always)]
    unsafe fn store<const N: usize>(
        &self,
        first: usize,
        token: usize,
        row_scales: &[f32; N],
        totals: &[f32; N],
    ) {
        let rows = self.w.shape().rows;
        debug_assert!(first < rows && token < self.x.tokens());
        let products: [f32; N] = std::array::from_fn(|r| row_scales[r] * totals[r]);
        // SAFETY: `token < tokens` and `first + r < rows` for every row `r` that is written, so this is inside the `tokens · rows`
        // outputs, which `_y` borrows exclusively; other threads have other rows.
        unsafe {
            let y = self.y.add(token * rows + first);
            if first + N <= rows {
                y.cast::<[f32; N]>().write(products);
            } else {
                write_some(y, &products[..rows - first]);
            }
        }
    }
}

/// Out of line: merged with the copy of all rows it would turn that into a call, too, a tenth of the time of a small matrix.
///
/// # Safety
/// The values fit at `y`, which nobody else uses.
#[cold]
#[inline(never)]
unsafe fn write_some(y: *mut f32, values: &[f32]) {
    // SAFETY: the caller vouches for it.
    unsafe { y.copy_from_nonoverlapping(values.as_ptr(), values.len()) }
}

/// One group of a strip, decoded.
#[repr(C, align(64))]
struct Decoded {
    /// Values of the tiles, in the order and form of the kernel's choice.
    weights: [[u8; TILE_WEIGHTS]; TILES],
    /// Scale codes of their rows.
    scales: [[f32; TILE_ROWS]; TILES],
}

/// What a thread needs for many tokens.
struct Scratch {
    panel: [Decoded; PANEL],
    /// The sums of a strip so far, for each token of a chunk.
    totals: [[f32; ROWS]; TOKEN_CHUNK],
}

thread_local! {
    /// Kept from task to task: to clear it would take as long as a small task.
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            panel: [const {
                Decoded {
                    weights: [[0; TILE_WEIGHTS]; TILES],
                    scales: [[0.0; TILE_ROWS]; TILES],
                }
            }; PANEL],
            totals: [[0.0; ROWS]; TOKEN_CHUNK],
        })
    };
}

/// Which rows a strip is of, and what stands before and after some of its groups.
struct Step<'a> {
    job: &'a Job<'a>,
    /// The tiles of the strip: one to four.
    strip: Range<usize>,
    /// The first token of the block.
    token: usize,
    /// The totals begin at zero; what they hold is of no meaning.
    begin: bool,
    /// After the last groups: the totals are to be multiplied by these row scales and stored, and need not be kept.
    end: Option<&'a [f32; ROWS]>,
}

/// The kernels of one instruction set.
///
/// # Safety
/// Each function is `unsafe` because it needs the instruction set; nothing else is asked for but what is said
/// here.
struct Kernel {
    /// Computes and stores the rows of some tiles for the only token. No other thread stores these tiles.
    one: unsafe fn(&Job<'_>, Range<usize>),
    /// Decodes the given groups of a strip: one to four tiles.
    decode: unsafe fn(&Job<'_>, Range<usize>, Range<usize>, &mut [Decoded]),
    /// Adds the products of some groups of a strip with a block of tokens to the totals of each token.
    multiply: unsafe fn(&[Decoded], &TokenBlock<'_>, &mut [[f32; ROWS]], &Step<'_>),
}

impl Kernel {
    fn of(isa: Isa) -> Kernel {
        assert!(isa.is_available(), "this CPU lacks {}", isa.name());
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Isa::Vnni if crate::isa::has_avx_vnni() => avx2::avx_vnni::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Isa::Vnni => avx2::avx512_vnni::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::plain::KERNEL,
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
    // Strips that fit the panel side by side: what they store then lies together.
    let strips = (PANEL / job.w.shape().groups().max(1)).max(1);
    let end = tiles.end;
    SCRATCH.with_borrow_mut(|scratch| {
        for first_token in (0..job.x.tokens()).step_by(TOKEN_CHUNK) {
            let tokens = first_token..job.x.tokens().min(first_token + TOKEN_CHUNK);
            for first in tiles.clone().step_by(strips * TILES) {
                let tiles = first..tiles.end.min(first + strips * TILES);
                // SAFETY: passed on.
                unsafe { many_of(kernel, job, (tiles, tokens.clone()), end, scratch) }
            }
        }
    });
}

/// [`many`] for one strip, or as many as fit the panel, and at most [`TOKEN_CHUNK`] tokens. The task goes on to tile `end`.
///
/// # Safety
/// As [`many`].
unsafe fn many_of(
    kernel: &Kernel,
    job: &Job<'_>,
    (tiles, tokens): (Range<usize>, Range<usize>),
    end: usize,
    Scratch { panel, totals }: &mut Scratch,
) {
    let groups = job.w.shape().groups();
    let strips = || {
        tiles
            .clone()
            .step_by(TILES)
            .map(|first| first..tiles.end.min(first + TILES))
    };
    let in_panel = groups.clamp(1, PANEL);
    let mut row_scales = [[0.0; TILE_ROWS]; PANEL * TILES];
    for (scales, tile) in row_scales.iter_mut().zip(tiles.clone()) {
        *scales = job.w.tile_row_scales(tile);
    }
    for first in (0..groups.max(1)).step_by(PANEL) {
        let range = first..groups.min(first + PANEL);
        for (strip, panel) in strips().zip(panel.chunks_mut(in_panel)) {
            // SAFETY: the caller vouches for the instruction set.
            unsafe { (kernel.decode)(job, strip, range.clone(), panel) }
        }
        let blocks = tokens.clone().step_by(TOKEN_BLOCK);
        let steps = blocks.len() * strips().len();
        let ahead = || Ahead::after(job, (&tiles, &range), end, steps);
        let mut ahead = (tokens.len() >= AHEAD_TOKENS).then(ahead);
        for (token, totals) in blocks.zip(totals[..tokens.len()].chunks_mut(TOKEN_BLOCK)) {
            let block = job.x.block(token, range.clone());
            let row_scales = row_scales.as_flattened().as_chunks().0;
            for ((strip, panel), row_scales) in strips().zip(panel.chunks(in_panel)).zip(row_scales) {
                if let Some(ahead) = &mut ahead {
                    ahead.fetch_some();
                }
                let step = Step {
                    job,
                    strip,
                    token,
                    begin: first == 0,
                    end: Some(row_scales).filter(|_| range.end == groups),
                };
                // SAFETY: strip and tokens are in range; the caller vouches for the instruction set, and that the tiles are this
                // thread's.
                unsafe { (kernel.multiply)(panel, &block, totals, &step) }
            }
        }
    }
}

/// Brings the records of the next panel nearer, some with every step of this one: decoding them takes little time, in which memory
/// would have to be waited for.
struct Ahead<'a> {
    job: &'a Job<'a>,
    tiles: Range<usize>,
    /// What of the records of each tile.
    bytes: Range<usize>,
    /// What is left of the records at hand.
    rest: &'a [u8],
    /// Bytes for each step.
    share: usize,
}

impl<'a> Ahead<'a> {
    /// What follows the given groups of the given tiles in a task that goes on to tile `end`, in so many steps.
    fn after(
        job: &'a Job<'a>,
        (tiles, groups): (&Range<usize>, &Range<usize>),
        end: usize,
        steps: usize,
    ) -> Self {
        let all = job.w.shape().groups();
        let (tiles, groups) = if groups.end < all {
            (tiles.clone(), groups.end..all.min(groups.end + PANEL))
        } else {
            (tiles.end..end.min(tiles.end + tiles.len()), 0..all.min(PANEL))
        };
        let record = job.w.shape().record_bytes();
        let bytes = groups.start * record..groups.end * record;
        let lines = tiles.len() * bytes.len().div_ceil(LINE);
        Self {
            job,
            tiles,
            bytes,
            rest: &[],
            share: lines.div_ceil(steps.max(1)) * LINE,
        }
    }

    #[inline]
    fn fetch_some(&mut self) {
        if self.rest.is_empty() {
            let Some(tile) = self.tiles.next() else { return };
            self.rest = &self.job.records(tile)[self.bytes.clone()];
        }
        let (now, rest) = self.rest.split_at(self.share.min(self.rest.len()));
        self.rest = rest;
        for line in now.chunks(LINE) {
            prefetch_soon(line);
        }
    }
}

/// Asks for the line of the second-level cache at the begin of the bytes, to be used after a while. A hint.
#[inline]
fn prefetch_soon(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 CPU has the instruction; it never faults and changes nothing that a program could see.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

impl Step<'_> {
    /// What is to be done after the products, if the kernel has not done it.
    ///
    /// # Safety
    /// Strip and token are in range, and no other thread stores the same rows.
    unsafe fn finish(&self, totals: &[[f32; ROWS]]) {
        let Some(row_scales) = self.end else { return };
        for (token, totals) in (self.token..).zip(totals) {
            // SAFETY: passed on.
            unsafe {
                self.job
                    .store(self.strip.start * TILE_ROWS, token, row_scales, totals)
            }
        }
    }
}
