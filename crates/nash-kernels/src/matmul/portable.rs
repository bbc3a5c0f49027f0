//! Kernels in plain Rust: for every machine, and what the others are compared with.

use std::ops::Range;

use super::{Job, Kernel, Lanes, Panel, TILE_WEIGHTS, TokenBlock, many};
use crate::layout::{BLOCK, GROUP, TILE_ROWS};

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
    let (bits, bytes) = (job.w.shape().width.bits(), job.w.shape().record_bytes());
    let records = &job.records(tile)[groups.start * bytes..groups.end * bytes];
    let panel = panel.weights.iter_mut().zip(&mut panel.scales);
    for (record, (weights, scales)) in records.chunks_exact(bytes).zip(panel) {
        let (codes, scale_codes) = record.split_at(TILE_ROWS * GROUP / 8 * bits);
        for (weights, codes) in weights.chunks_exact_mut(8).zip(codes.chunks_exact(bits)) {
            // Eight codes are `bits` whole bytes.
            let mut word = [0; 8];
            word[..bits].copy_from_slice(codes);
            let word = u64::from_le_bytes(word);
            for (j, weight) in weights.iter_mut().enumerate() {
                let code = (word >> (j * bits)) as u8;
                *weight = if bits == 8 {
                    code ^ 0x80
                } else {
                    job.table[usize::from(code % 64)] as u8
                };
            }
        }
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
        for (k, &weight) in weights.iter().enumerate() {
            sums[k / 4] += i32::from(weight as i8) * i32::from(codes[k % BLOCK]);
        }
    }
    sums
}
