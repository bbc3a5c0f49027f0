//! How fast the multipliers of this CPU are: what no matrix product can beat.

/// Products of bytes per second that all threads can do with `vpdpbusd` on registers alone; `None` without AVX-512 VNNI.
pub(crate) fn products_per_second() -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512vnni") {
        use nash_kernels::pool;
        const ROUNDS: usize = 2_000_000;
        let products = (64 * x86::SUMS * ROUNDS * pool::threads()) as f64;
        let run = || {
            let begin = std::time::Instant::now();
            #[expect(unsafe_code, reason = "an instruction of an extension")]
            pool::run(pool::threads(), |_| {
                // SAFETY: the features were found.
                std::hint::black_box(unsafe { x86::multiply(ROUNDS) });
            });
            begin.elapsed().as_secs_f64()
        };
        let best = (0..5).map(|_| run()).fold(f64::INFINITY, f64::min);
        return Some(products / best);
    }
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Sums that grow side by side: more than the latency of a product.
    pub(super) const SUMS: usize = 12;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn multiply(rounds: usize) -> i32 {
        let (a, b) = std::hint::black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.iter().fold(0, |all, sum| {
            all ^ _mm_cvtsi128_si32(_mm512_castsi512_si128(*sum))
        })
    }
}
