//! Read bandwidth of the memory, the ceiling of decode speed: every generated token reads every weight once.

use std::time::Instant;

use rayon::prelude::*;

/// Bytes read; far beyond any last-level cache.
const BYTES: usize = 512 << 20;

/// Bytes per second of plain reads with the threads of [`nash_kernels::pool`] (rayon's are as many), the best of `repeats` passes over 512 MB.
///
/// The best, not the median: it is used as a ceiling.
pub fn read_bandwidth(repeats: usize) -> f64 {
    let words: Vec<u64> = (0..BYTES / 8).into_par_iter().map(|i| i as u64).collect();
    let part = words.len().div_ceil(rayon::current_num_threads() * 4);
    (0..repeats.max(1))
        .map(|_| {
            let start = Instant::now();
            let sum: u64 = words.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add);
            std::hint::black_box(sum);
            BYTES as f64 / start.elapsed().as_secs_f64()
        })
        .fold(0.0, f64::max)
}

/// Eight sums at a time, so that the adds are not what is measured.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    for chunk in words.chunks_exact(8) {
        for (total, &word) in sums.iter_mut().zip(chunk) {
            *total = total.wrapping_add(word);
        }
    }
    sums.iter().fold(0, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_every_word() {
        let words: Vec<u64> = (0..64).collect();
        assert_eq!(sum(&words), 64 * 63 / 2);
    }

    #[test]
    fn is_a_plausible_rate() {
        let rate = read_bandwidth(1);
        // Slower than a disk or faster than on-package memory would mean that something else was measured.
        assert!((0.2e9..5e12).contains(&rate), "{rate}");
    }
}
