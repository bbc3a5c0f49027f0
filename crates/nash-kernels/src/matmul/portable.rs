//! Kernels in plain Rust: for every machine, and what the others are compared with. Written so that a
//! compiler finds the vector instructions of its target.

use std::ops::Range;

use super::{Decoded, Job, Kernel, ROWS, Step, many};
use crate::activations::TokenBlock;
use crate::codec;
use crate::layout::{BLOCK, GROUP, TILE_ROWS, TILE_WEIGHTS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
};

/// # Safety
/// `tiles` are in range, and no other thread stores them.
unsafe fn one(job: &Job<'_>, tiles: Range<usize>) {
    // SAFETY: every CPU can do it; the rest is passed on.
    unsafe { many(&KERNEL, job, tiles) }
}

/// Decodes to `i8` values, `[tile][block][row][16]`. Safe, but of the type of its peers.
fn decode(job: &Job<'_>, strip: Range<usize>, groups: Range<usize>, panel: &mut [Decoded]) {
    let (width, bytes) = (job.w.shape().width, job.w.shape().record_bytes());
    for (i, tile) in strip.enumerate() {
        let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
        for (record, decoded) in records.chunks_exact(bytes).zip(panel.iter_mut()) {
            let (codes, scale_codes) = record.split_at(codec::record_code_bytes(width));
            decoded.weights[i] = codec::values(codes, width, &job.table).map(i8::cast_unsigned);
            decoded.scales[i] = std::array::from_fn(|r| f32::from(scale_codes[r].cast_signed()));
        }
    }
}

/// # Safety
/// Strip and token of the step are in range, and no other thread stores these rows.
unsafe fn multiply(panel: &[Decoded], x: &TokenBlock<'_>, totals: &mut [[f32; ROWS]], step: &Step<'_>) {
    if step.begin {
        totals.fill([0.0; ROWS]);
    }
    for ((codes, token_scales), Decoded { weights, scales }) in x.groups().zip(panel) {
        for ((codes, token_scale), totals) in codes.iter().zip(token_scales).zip(totals.iter_mut()) {
            let tiles = weights[..step.strip.len()].iter().zip(scales);
            for ((weights, scales), totals) in tiles.zip(totals.as_chunks_mut::<TILE_ROWS>().0) {
                let rows = totals.iter_mut().zip(scales).zip(sums(weights, &codes.0));
                for ((total, scale), sum) in rows {
                    *total += sum as f32 * (scale * token_scale);
                }
            }
        }
    }
    // SAFETY: passed on.
    unsafe { step.finish(totals) }
}

/// The exact sums of four rows and one group.
fn sums(weights: &[u8; TILE_WEIGHTS], codes: &[i8; GROUP]) -> [i32; TILE_ROWS] {
    let mut sums = [0; TILE_ROWS];
    for (weights, codes) in weights
        .as_chunks::<{ TILE_ROWS * BLOCK }>()
        .0
        .iter()
        .zip(codes.as_chunks::<BLOCK>().0)
    {
        for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<BLOCK>().0) {
            // At most 128 · 127: fits 16 bits.
            let products: [i16; BLOCK] =
                std::array::from_fn(|j| i16::from(weights[j] as i8) * i16::from(codes[j]));
            *sum += products.iter().map(|&product| i32::from(product)).sum::<i32>();
        }
    }
    sums
}
