//! Kernels in plain Rust: for every machine, and what the others are compared with. Written so that a
//! compiler finds the vector instructions of its target.

use std::ops::Range;

use super::{Job, Kernel, Lanes, Panel, TokenBlock, many};
use crate::codec;
use crate::layout::{BLOCK, GROUP, TILE_ROWS, TILE_WEIGHTS};

pub(super) const KERNEL: Kernel = Kernel {
    one,
    decode,
    multiply,
    tiles: 1,
};

/// # Safety
/// `tiles` are in range, and no other thread stores them.
unsafe fn one(job: &Job<'_>, tiles: Range<usize>) {
    // SAFETY: every CPU can do it; the rest is passed on.
    unsafe { many(&KERNEL, job, tiles) }
}

/// Decodes to `i8` values. Safe, but of the type of its peers.
fn decode(job: &Job<'_>, tile: usize, groups: Range<usize>, panel: &mut Panel) {
    let (width, bytes) = (job.w.shape().width, job.w.shape().record_bytes());
    let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
    let panel = panel.weights.iter_mut().zip(&mut panel.scales);
    for (record, (weights, scales)) in records.chunks_exact(bytes).zip(panel) {
        let (codes, scale_codes) = record.split_at(codec::record_code_bytes(width));
        *weights = codec::values(codes, width, &job.table).map(i8::cast_unsigned);
        *scales = std::array::from_fn(|r| f32::from(scale_codes[r] as i8));
    }
}

/// Safe, but of the type of its peers.
fn multiply(panels: &[Panel], x: &TokenBlock<'_>, lanes: &mut [Lanes]) {
    for (panel, lanes) in panels.iter().zip(lanes) {
        let lanes = &mut lanes.0[x.first..][..x.tokens];
        let weights = panel.weights.iter().zip(&panel.scales);
        for ((weights, scales), x) in weights.zip(x.groups.chunks_exact(x.tokens)) {
            for (x, lanes) in x.iter().zip(lanes.iter_mut()) {
                for (k, (lane, sum)) in lanes.iter_mut().zip(sums(weights, &x.codes)).enumerate() {
                    *lane += sum as f32 * (scales[k / 4] * x.scale);
                }
            }
        }
    }
}

/// The exact sums `S [row][lane]` of one group.
fn sums(weights: &[u8; TILE_WEIGHTS], codes: &[i8; GROUP]) -> [i32; 16] {
    let mut sums = [0; 16];
    for (weights, codes) in weights
        .as_chunks::<{ TILE_ROWS * BLOCK }>()
        .0
        .iter()
        .zip(codes.as_chunks::<BLOCK>().0)
    {
        for (sums, weights) in sums
            .as_chunks_mut::<4>()
            .0
            .iter_mut()
            .zip(weights.as_chunks::<BLOCK>().0)
        {
            // At most 128 · 127: fits 16 bits.
            let products: [i16; BLOCK] =
                std::array::from_fn(|j| i16::from(weights[j] as i8) * i16::from(codes[j]));
            for (sum, products) in sums.iter_mut().zip(products.as_chunks::<4>().0) {
                *sum += products.iter().map(|&product| i32::from(product)).sum::<i32>();
            }
        }
    }
    sums
}
