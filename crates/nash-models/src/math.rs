//! Scalar functions of the forward pass, written so that the compiler turns their loops into SIMD.
//!
//! `exp` is the usual range reduction with a polynomial (Cephes `expf`), 2 ulp; the library's would cost more than
//! the matrix products of a short attention.

use nash_kernels::vectorize;

use crate::config::Activation;

/// `e^x` to 2 ulp for |x| ≤ 87, 0 below −87.3, capped at `e^88` above.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Above: 1.5·2²³ rounds to the nearest integer by absorption.
    const ROUND: f32 = 12_582_912.0;
    let x = x.min(88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, the first exact in few bits.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_2e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // n ≥ −126 wherever the result is kept, so the exponent stays in range.
    let scale = f32::from_bits((((n.max(-126.0) as i32) + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { y * scale }
}

#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    // 1 − 2/(e^{2x} + 1) loses relative precision near 0, where a Taylor polynomial takes over.
    let square = x * x;
    let small = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))));
    let large = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if square < 0.01 { small } else { large }
}

/// `cap·tanh(x/cap)`.
#[inline(always)]
pub(crate) fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    // 0.5·(1 + tanh u) = σ(2u)
    x * sigmoid(2.0 * SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x))
}

/// `x·Φ(x)`; the error function by Abramowitz & Stegun 7.1.26, absolute error 1.5e-7.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly =
        t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let erf = 1.0 - poly * exp(-z * z);
    0.5 * x * (1.0 + erf.copysign(x))
}

/// Applies the nonlinearity in place.
pub(crate) fn activate(kind: Activation, x: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || match kind {
            Activation::Silu => x.iter_mut().for_each(|v| *v *= sigmoid(*v)),
            Activation::GeluTanh => x.iter_mut().for_each(|v| *v = gelu_tanh(*v)),
            Activation::Gelu => x.iter_mut().for_each(|v| *v = gelu(*v)),
            Activation::Relu => x.iter_mut().for_each(|v| *v = v.max(0.0)),
            Activation::ClampedSwiglu => x.iter_mut().for_each(|v| {
                let low = v.min(SWIGLU_LIMIT);
                *v = low * sigmoid(SWIGLU_RATE * low);
            }),
        },
    );
}

/// `e^(x − max)` in place; their sum.
pub(crate) fn exp_below(max: f32, x: &mut [f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            x.iter_mut().for_each(|v| *v = exp(*v - max));
            sum(x)
        },
    )
}

/// Limit of the clamped SwiGLU and the rate of its sigmoid (gpt-oss).
pub(crate) const SWIGLU_LIMIT: f32 = 7.0;
const SWIGLU_RATE: f32 = 1.702;

/// `gate ← act(gate) ∘ up`, where the clamped SwiGLU also clamps `up` and adds one.
pub(crate) fn activate_gated(kind: Activation, gate: &mut [f32], up: &[f32]) {
    activate(kind, gate);
    let pairs = gate.iter_mut().zip(up);
    match kind {
        Activation::ClampedSwiglu => {
            pairs.for_each(|(gate, up)| *gate *= up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0);
        }
        _ => pairs.for_each(|(gate, up)| *gate *= up),
    }
}

/// Replaces every value by the derivative of the nonlinearity there.
pub(crate) fn slope(kind: Activation, x: &mut [f32]) {
    /// 1/√2π
    const DENSITY: f32 = 0.398_942_3;
    /// √(2/π)
    const RATE: f32 = 0.797_884_6;
    match kind {
        Activation::Silu => x.iter_mut().for_each(|v| {
            let s = sigmoid(*v);
            *v = s * (1.0 + *v * (1.0 - s));
        }),
        Activation::GeluTanh => x.iter_mut().for_each(|v| {
            // x·σ(2u): σ + x·σ(1 − σ)·2u′
            let square = *v * *v;
            let s = sigmoid(2.0 * RATE * *v * (1.0 + 0.044_715 * square));
            *v = s + *v * s * (1.0 - s) * 2.0 * RATE * (1.0 + 3.0 * 0.044_715 * square);
        }),
        Activation::Gelu => x.iter_mut().for_each(|v| {
            // Φ(x) + x·φ(x); Φ from x·Φ(x), and its Taylor polynomial where that would divide by nearly nothing.
            let density = DENSITY * exp(-0.5 * *v * *v);
            let area = if v.abs() < 1e-2 {
                0.5 + DENSITY * *v
            } else {
                gelu(*v) / *v
            };
            *v = area + *v * density;
        }),
        Activation::Relu => x.iter_mut().for_each(|v| *v = f32::from(u8::from(*v > 0.0))),
        Activation::ClampedSwiglu => x.iter_mut().for_each(|v| {
            let s = sigmoid(SWIGLU_RATE * *v);
            let slope = s * (1.0 + SWIGLU_RATE * *v * (1.0 - s));
            *v = if *v < SWIGLU_LIMIT { slope } else { 0.0 };
        }),
    }
}

/// Lanes of a reduction; the order of summation is part of the result, so it is fixed here and not by the compiler.
const LANES: usize = 16;

/// Sum in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for block in blocks {
        sums.iter_mut().zip(block).for_each(|(sum, v)| *sum += v);
    }
    sums.iter_mut().zip(rest).for_each(|(sum, v)| *sum += v);
    sums.iter().sum()
}

/// Sum of the rows of `x [.., n]`.
pub(crate) fn column_sums(x: &[f32], n: usize) -> Vec<f32> {
    let mut sums = vec![0.0; n];
    for row in x.chunks_exact(n) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    sums
}

/// Maximum of the values and `start`.
pub(crate) fn max(start: f32, x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut best = [start; LANES];
    for block in blocks {
        best.iter_mut()
            .zip(block)
            .for_each(|(best, v)| *best = larger(*best, *v));
    }
    best.iter().chain(rest).copied().fold(start, larger)
}

/// Softmax in place. An all-−∞ row is a caller's error.
pub(crate) fn softmax(x: &mut [f32]) {
    let sum = exp_below(max(f32::NEG_INFINITY, x), x);
    x.iter_mut().for_each(|v| *v /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(low: f32, high: f32) -> impl Iterator<Item = f32> {
        (0..=200_000).map(move |i| low + (high - low) * (i as f32 / 200_000.0))
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for x in sweep(-87.0, 87.0) {
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(
                error <= 2.0 * f64::from(f32::EPSILON),
                "exp({x}): relative error {error:e}"
            );
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(1000.0).is_finite());
        assert!(
            exp(f32::NAN).is_nan() || exp(f32::NAN) > 1e38,
            "a NaN must not turn into a plausible value"
        );
    }

    #[test]
    fn activations_match_f64() {
        for x in sweep(-20.0, 20.0) {
            let d = f64::from(x);
            let check = |name: &str, got: f32, exact: f64, tolerance: f64| {
                let error = (f64::from(got) - exact).abs();
                assert!(
                    error <= tolerance * exact.abs().max(1.0),
                    "{name}({x}) = {got}, exact {exact}"
                );
            };
            check("tanh", tanh(x), d.tanh(), 3e-7);
            check("sigmoid", sigmoid(x), 1.0 / (1.0 + (-d).exp()), 3e-7);
            let u = (2.0 / std::f64::consts::PI).sqrt() * (d + 0.044715 * d * d * d);
            check("gelu_tanh", gelu_tanh(x), 0.5 * d * (1.0 + u.tanh()), 1e-6);
        }
    }

    #[test]
    fn gelu_at_known_points() {
        // x·Φ(x) from a table of the normal distribution.
        for (x, y) in [
            (1.0_f32, 0.841_344_8_f32),
            (-1.0, -0.158_655_25),
            (2.5, 2.484_475_9),
            (0.0, 0.0),
        ] {
            assert!((gelu(x) - y).abs() < 1e-6, "gelu({x}) = {}", gelu(x));
        }
    }
}
