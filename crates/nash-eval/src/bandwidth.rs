//! Read bandwidth of the memory, the ceiling of decode speed: every generated token reads every weight once.

use std::time::Instant;

use rayon::prelude::*;

/// Bytes read; far beyond any last-level cache.
const BYTES: usize = 512 << 20;

/// Memory to be read, 512 MB of it. The bandwidth of a shared machine changes from second to second, so passes belong between the
/// measurements they are compared with.
pub struct ReadBandwidth {
    words: Vec<u64>,
}

impl ReadBandwidth {
    /// Fills the memory.
    #[expect(clippy::new_without_default, reason = "a costly thing is not made by default")]
    pub fn new() -> Self {
        let words = (0..BYTES / 8).into_par_iter().map(|i| i as u64).collect();
        Self { words }
    }

    /// Bytes per second of one pass of plain reads with the threads of [`nash_kernels::pool`] (rayon's are as many).
    pub fn pass(&self) -> f64 {
        let part = self.words.len().div_ceil(rayon::current_num_threads() * 4);
        let start = Instant::now();
        let parts = self.words.par_chunks(part).map(sum);
        std::hint::black_box(parts.reduce(|| 0, u64::wrapping_add));
        BYTES as f64 / start.elapsed().as_secs_f64()
    }
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
        let rate = ReadBandwidth::new().pass();
        // Slower than a disk or faster than on-package memory would mean that something else was measured.
        assert!((0.2e9..5e12).contains(&rate), "{rate}");
    }
}
