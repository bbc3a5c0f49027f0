//! Plain reads, which the examples compare with.

use std::sync::atomic::{AtomicU64, Ordering};

use nash_kernels::pool;

/// Reads everything once, with all threads.
pub(crate) fn read(data: &[u64]) -> u64 {
    const CHUNK: usize = 1 << 15;
    let sum = AtomicU64::new(0);
    pool::run(data.len().div_ceil(CHUNK), |i| {
        let chunk = &data[i * CHUNK..data.len().min((i + 1) * CHUNK)];
        let mut sums = [0u64; 32];
        for part in chunk.as_chunks::<32>().0 {
            for (sum, value) in sums.iter_mut().zip(part) {
                *sum ^= value;
            }
        }
        sum.fetch_xor(sums.iter().fold(0, |a, b| a ^ b), Ordering::Relaxed);
    });
    sum.into_inner()
}
