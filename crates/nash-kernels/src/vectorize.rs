//! Plain loops compiled for what the CPU has.
#![expect(unsafe_code, reason = "calls code compiled for an instruction set")]

use crate::Isa;

/// Runs a loop over floats compiled with the registers of the active instruction set: give it a closure marked `#[inline(always)]` whose
/// loops the compiler can vectorize. Nothing is fused or reordered, so results are the same everywhere.
#[inline]
pub fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    match Isa::active() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the active instruction set is one that this CPU has.
        Isa::Avx512 => unsafe { avx512(body) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 | Isa::Vnni => unsafe { avx2(body) },
        // What an AArch64 or another target always has is in use anyway.
        _ => body(),
    }
}

/// # Safety
/// The CPU has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512<R>(body: impl FnOnce() -> R) -> R {
    body()
}

/// # Safety
/// The CPU has the feature.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2<R>(body: impl FnOnce() -> R) -> R {
    body()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_those_of_the_plain_loop() {
        let values: Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.37).collect();
        let bend = |x: f32| 1.0 / (1.0 + x * x) - x * 0.125;
        let mut vectorized = values.clone();
        vectorize(
            #[inline(always)]
            || vectorized.iter_mut().for_each(|v| *v = bend(*v)),
        );
        for (x, y) in values.into_iter().zip(vectorized) {
            assert_eq!(bend(x).to_bits(), y.to_bits(), "{x}");
        }
    }
}
