//! Packed and dense CPU kernels: one layout, every width, run-time CPU detection.
//!
//! A weight matrix `W [m, n]` is stored in 2, 3, 4, 5, 6 or 8 bits per weight plus one 8-bit scale per
//! row and [`GROUP`] columns (see [`PackedRef`] for the layout) and is multiplied straight from that
//! form: no float copy of it ever exists.
//!
//! * [`pack`], [`unpack`], [`dequantize_row`]: between codes and the packed stream;
//! * [`Activations`]: inputs `x [T, n]` as int8 with a scale per token and group;
//! * [`matmul`]: `y [T, m] = x Wᵀ`, **bit-identical for every thread count and every [`Isa`]** (AVX-512, AVX2 without and with VNNI, NEON, plain Rust);
//! * [`matmul_each`]: several of them as one piece of work;
//! * [`dot_rows`], [`add_rows`]: one token's attention over keys and values in half precision;
//! * [`ByteShape`], [`ByteQuery`]: the same over keys and values in bytes;
//! * [`dense`]: float matrix products with results independent of the thread count;
//! * [`pool`]: the threads behind both;
//! * [`vectorize`]: plain loops with the registers of the CPU;
//! * [`heap`]: memory back to the system.
//!
//! Shapes: `T` tokens, `m` rows (outputs), `n` columns (inputs); all matrices row-major.
//!
//! This is the only crate of the workspace that contains `unsafe` arithmetic code. It knows nothing of
//! models or files.

mod activations;
mod byte_rows;
mod codec;
pub mod dense;
mod half_rows;
pub mod heap;
mod isa;
mod layout;
mod matmul;
pub mod pool;
mod vectorize;

pub use activations::Activations;
pub use byte_rows::{ByteQuery, ByteRun, ByteShape, KEY_GROUP, POSITIONS};
pub use codec::{Unpacked, dequantize_row, pack, unpack};
pub use half_rows::{add_rows, dot_rows};
pub use isa::{Isa, IsaError};
pub use layout::{
    CHAIN, CHAINS, GROUP, LayoutError, PackedMatrix, PackedRef, PackedShape, SCALE_UNIT, TILE_ROWS,
    WINDOW_BITS, Width, chain_column,
};
pub use matmul::{Product, matmul, matmul_each, matmul_with};
pub use vectorize::vectorize;
