//! Fitting a tensor's grid: group scales by search, a codebook of `2^b` levels by weighted Lloyd iterations.
//!
//! The weight of a squared error is the diagonal of the Hessian, `h[c] = E[x_c²]`, times the square of the step, so
//! that the fit minimises `Σ h[c] (w − ŵ)²`. Lloyd (1982) runs on a histogram of the weights divided by their
//! group's scale, which makes it independent of the size of the tensor. Row chunks have a fixed size and are summed in order: the
//! result does not depend on the number of threads.

use half::f16;
use nash_kernels::{GROUP, SCALE_UNIT, WINDOW_BITS, Width};
use rayon::prelude::*;

use crate::error::{GameError, check_len};
use crate::grid::{Grid, MAX_LEVEL, inverse_or_zero};
use crate::trellis::{self, TABLE};

/// Bins of the histogram over `w / scale` in [−1, 1].
const BINS: usize = 2048;
const ROWS_PER_CHUNK: usize = 64;
const LLOYD_ITERATIONS: usize = 60;

/// Which levels a grid has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LevelKind {
    /// Equally spaced, symmetric about zero: the grid of round-to-nearest and GPTQ baselines.
    Uniform,
    /// A level for every code, fitted to the tensor by weighted Lloyd.
    Codebook,
    /// A value for every window of six bits, fitted likewise: trellis-coded quantization. At 6 and 8 bits the same as [`Codebook`](Self::Codebook),
    /// because there are no bits left to share.
    Trellis,
}

/// How to fit a grid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitOptions {
    /// Bits per code.
    pub width: Width,
    /// Uniform or fitted levels.
    pub levels: LevelKind,
    /// Rounds of codebook fit and scale search; 0 leaves every scale at the group's largest magnitude.
    pub rounds: usize,
}

/// Fits scales and codebook of `weights [m, n]` for column importances `h [n]` (the Hessian's diagonal).
///
/// # Errors
/// If the lengths do not agree.
pub fn fit_grid(weights: &[f32], cols: usize, h: &[f32], options: FitOptions) -> Result<Grid, GameError> {
    check_len("the column importance", cols, h.len())?;
    check_len("the weights", weights.len() / cols.max(1) * cols, weights.len())?;
    let bits = options.width.bits();
    if options.levels == LevelKind::Trellis && bits < WINDOW_BITS {
        let (trellis, scales) = trellis::fit(weights, cols, h, bits, options.rounds);
        let (codebook, unit) = integers(trellis.table());
        return Ok(encode_scales(
            options.width,
            codebook,
            unit,
            &scales,
            Grid::groups(cols),
        ));
    }
    let mut scales = largest_magnitudes(weights, cols);
    let mut levels = uniform_levels(options.width);
    let identity = options.width.bits() == 8;
    for round in 0..options.rounds {
        if options.levels != LevelKind::Uniform && !identity {
            levels = lloyd(&histogram(weights, cols, h, &scales), levels);
        }
        let factors = factors(&levels, round);
        for_each_scale(weights, cols, h, &mut scales, |w, h, s| {
            pulp::Arch::new().dispatch(|| best_scale(w, h, &levels, s, factors))
        });
    }
    let (codebook, unit) = integer_codebook(&levels, identity);
    Ok(encode_scales(
        options.width,
        codebook,
        unit,
        &scales,
        Grid::groups(cols),
    ))
}

/// `max |w|` per row and group, `[m, G]`.
fn largest_magnitudes(weights: &[f32], cols: usize) -> Vec<f32> {
    weights
        .par_chunks(cols)
        .flat_map_iter(|row| {
            row.chunks(GROUP)
                .map(|g| g.iter().fold(0.0f32, |a, w| a.max(w.abs())))
        })
        .collect()
}

/// `2^b` equally spaced levels, symmetric, with the outermost at ±1 (255 levels for 8 bits).
fn uniform_levels(width: Width) -> Vec<f32> {
    let count = if width.bits() == 8 { 255 } else { width.levels() };
    let half = (count - 1) as f32 * 0.5;
    (0..count).map(|i| (i as f32 - half) / half).collect()
}

/// Mass of the weights over `w / scale`, each counted `h · scale²`, with the mass-weighted mean of every bin.
fn histogram(weights: &[f32], cols: usize, h: &[f32], scales: &[f32]) -> Vec<(f64, f64)> {
    let groups = Grid::groups(cols);
    let chunks: Vec<Vec<(f64, f64)>> = weights
        .par_chunks(cols * ROWS_PER_CHUNK)
        .zip(scales.par_chunks(groups * ROWS_PER_CHUNK))
        .map(|(w, s)| {
            let mut bins = vec![(0.0, 0.0); BINS];
            for (row, s) in w.chunks(cols).zip(s.chunks(groups)) {
                for ((row, h), &s) in row.chunks(GROUP).zip(h.chunks(GROUP)).zip(s) {
                    let inverse = inverse_or_zero(s);
                    for (&w, &h) in row.iter().zip(h) {
                        let x = (w * inverse).clamp(-1.0, 1.0);
                        let mass = f64::from(h * s * s);
                        let bin = &mut bins[((x + 1.0) * 0.5 * (BINS - 1) as f32 + 0.5) as usize];
                        bin.0 += mass;
                        bin.1 += mass * f64::from(x);
                    }
                }
            }
            bins
        })
        .collect();
    let mut total = vec![(0.0, 0.0); BINS];
    for chunk in chunks {
        for (t, c) in total.iter_mut().zip(chunk) {
            t.0 += c.0;
            t.1 += c.1;
        }
    }
    total
}

/// Weighted Lloyd iterations on a histogram of (mass, mass × position), from `levels`, ascending.
fn lloyd(bins: &[(f64, f64)], mut levels: Vec<f32>) -> Vec<f32> {
    let position = |i: usize| i as f32 / (BINS - 1) as f32 * 2.0 - 1.0;
    for _ in 0..LLOYD_ITERATIONS {
        let mut sums = vec![(0.0f64, 0.0f64); levels.len()];
        let mut k = 0;
        for (i, bin) in bins.iter().enumerate() {
            while k + 1 < levels.len() && position(i) > 0.5 * (levels[k] + levels[k + 1]) {
                k += 1;
            }
            sums[k].0 += bin.0;
            sums[k].1 += bin.1;
        }
        let mut moved = 0.0f32;
        for (level, (mass, moment)) in levels.iter_mut().zip(sums) {
            if mass > 0.0 {
                let mean = (moment / mass) as f32;
                moved = moved.max((mean - *level).abs());
                *level = mean;
            }
        }
        if moved < 1e-5 {
            break;
        }
    }
    levels.sort_by(f32::total_cmp);
    levels
}

/// Multiples of the current scale to try: a wide search first, then around what was found. Many levels need little clipping.
fn factors(levels: &[f32], round: usize) -> &'static [f32] {
    const WIDE: [f32; 8] = [1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 1.08];
    match (levels.len() > 16, round) {
        (true, 0) => &WIDE[..3],
        (false, 0) => &WIDE,
        _ => &[1.0, 0.97, 1.03],
    }
}

/// Replaces the scale of every group by `best(weights, importances, scale)`.
pub(crate) fn for_each_scale(
    weights: &[f32],
    cols: usize,
    h: &[f32],
    scales: &mut [f32],
    best: impl Fn(&[f32], &[f32], f32) -> f32 + Sync,
) {
    let groups = Grid::groups(cols);
    weights
        .par_chunks(cols * ROWS_PER_CHUNK)
        .zip(scales.par_chunks_mut(groups * ROWS_PER_CHUNK))
        .for_each(|(w, s)| {
            for (row, s) in w.chunks(cols).zip(s.chunks_mut(groups)) {
                for ((w, h), s) in row.chunks(GROUP).zip(h.chunks(GROUP)).zip(s) {
                    *s = best(w, h, *s);
                }
            }
        });
}

/// The scale that minimises `Σ h (w − s·level)²` among multiples of the current one, each refined by least squares.
#[inline(always)]
fn best_scale(w: &[f32], h: &[f32], levels: &[f32], start: f32, factors: &[f32]) -> f32 {
    if start <= 0.0 {
        return 0.0;
    }
    // For the levels nearest at a candidate, the least-squares scale is s = Σ h w v / Σ h v², and it leaves an error of
    // Σ h w² − s Σ h w v: the candidate that explains most wins.
    let mut best = (0.0, start);
    for &factor in factors {
        let v = nearest_values(w, levels, start * factor);
        let (mut wv, mut vv) = ([0.0f32; 16], [0.0f32; 16]);
        for (i, (&w, &h)) in w.iter().zip(h).enumerate() {
            wv[i % 16] += h * w * v[i];
            vv[i % 16] += h * v[i] * v[i];
        }
        let (wv, vv) = (wv.iter().sum::<f32>(), vv.iter().sum::<f32>());
        if wv > 0.0 && wv * wv > best.0 * vv {
            best = (wv * wv / vv, wv / vv);
        }
    }
    best.1
}

/// Nearest level of `w / s` for up to one group, as a sum of steps: branch-free and vectorised over the group.
#[inline(always)]
fn nearest_values(w: &[f32], levels: &[f32], s: f32) -> [f32; GROUP] {
    let inverse = 1.0 / s;
    let mut x = [0.0; GROUP];
    for (x, &w) in x.iter_mut().zip(w) {
        *x = w * inverse;
    }
    let mut v = [levels[0]; GROUP];
    if levels.len() == 255 {
        for (v, x) in v.iter_mut().zip(x) {
            *v = (x * MAX_LEVEL).round().clamp(-MAX_LEVEL, MAX_LEVEL) / MAX_LEVEL;
        }
        return v;
    }
    for pair in levels.windows(2) {
        let midpoint = 0.5 * (pair[0] + pair[1]);
        let rise = pair[1] - pair[0];
        for (v, &x) in v.iter_mut().zip(&x) {
            *v += if x > midpoint { rise } else { 0.0 };
        }
    }
    v
}

/// Levels or table entries as integers, and the value of one unit.
fn integers(values: &[f32]) -> (Vec<i8>, f32) {
    let largest = values
        .iter()
        .fold(0.0f32, |a, l| a.max(l.abs()))
        .max(f32::MIN_POSITIVE);
    let unit = largest / MAX_LEVEL;
    (values.iter().map(|v| (v / unit).round() as i8).collect(), unit)
}

/// Integer codebook whose own levels are in strictly ascending order, and the value of one of its units relative to the group scale.
fn integer_codebook(levels: &[f32], identity: bool) -> (Vec<i8>, f32) {
    let (book, unit) = integers(levels);
    if identity {
        return (Vec::new(), unit);
    }
    let mut book: Vec<i32> = book.into_iter().map(i32::from).collect();
    // Levels that fall together after rounding are pushed apart, first upwards and then down from the top.
    for i in 1..book.len() {
        book[i] = book[i].max(book[i - 1] + 1);
    }
    let last = book.len() - 1;
    book[last] = book[last].min(127);
    for i in (0..last).rev() {
        book[i] = book[i].min(book[i + 1] - 1);
    }
    (book.iter().cycle().take(TABLE).map(|&v| v as i8).collect(), unit)
}

/// Splits group scales into a row scale and codes 1..=127 (0 for a group of zeros).
fn encode_scales(width: Width, codebook: Vec<i8>, unit: f32, scales: &[f32], groups: usize) -> Grid {
    let rows = scales.len() / groups.max(1);
    let mut grid = Grid {
        width,
        codebook,
        row_scales: Vec::with_capacity(rows),
        scale_codes: Vec::with_capacity(scales.len()),
    };
    for row in scales.chunks(groups) {
        let largest = row.iter().fold(0.0f32, |a, s| a.max(*s)) * unit;
        let scale = f16::from_f32((largest / MAX_LEVEL / SCALE_UNIT).min(f16::MAX.to_f32()));
        let inverse = inverse_or_zero(scale.to_f32() * SCALE_UNIT);
        grid.row_scales.push(scale);
        grid.scale_codes.extend(row.iter().map(|&s| {
            if s > 0.0 {
                (s * unit * inverse).round().clamp(1.0, MAX_LEVEL) as i8
            } else {
                0
            }
        }));
    }
    grid
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn gaussian(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
        (0..n)
            .map(|_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)
            .collect()
    }

    fn error(w: &[f32], cols: usize, options: FitOptions) -> f64 {
        let grid = fit_grid(w, cols, &vec![1.0; cols], options).unwrap();
        let v = grid.dequantize(cols, &grid.nearest_codes(w, &vec![1.0; cols]));
        let energy: f64 = w.iter().map(|w| f64::from(w * w)).sum();
        w.iter()
            .zip(v)
            .map(|(a, b)| f64::from((a - b) * (a - b)))
            .sum::<f64>()
            / energy
    }

    #[test]
    fn every_refinement_lowers_the_error() {
        let w = gaussian(64 * 200, 1);
        for bits in [2, 3, 4] {
            let width = Width::new(bits).unwrap();
            let raw = error(
                &w,
                200,
                FitOptions {
                    width,
                    levels: LevelKind::Uniform,
                    rounds: 0,
                },
            );
            let scaled = error(
                &w,
                200,
                FitOptions {
                    width,
                    levels: LevelKind::Uniform,
                    rounds: 1,
                },
            );
            let fitted = error(
                &w,
                200,
                FitOptions {
                    width,
                    levels: LevelKind::Codebook,
                    rounds: 3,
                },
            );
            assert!(
                scaled < raw && fitted < scaled,
                "{bits} bits: {raw} {scaled} {fitted}"
            );
        }
    }

    #[test]
    fn lloyd_reaches_the_known_optimum_of_a_gaussian() {
        // Max (1960), table I: distortion of the optimal 8-level quantizer of a unit Gaussian is 0.03454. One scale per
        // row of 64 adapts to each row's sample, so the fitted grid must do at least as well.
        let w = gaussian(64 * 4000, 2);
        let e = error(
            &w,
            64,
            FitOptions {
                width: Width::new(3).unwrap(),
                levels: LevelKind::Codebook,
                rounds: 4,
            },
        );
        assert!(e < 0.0346, "{e}");
    }

    #[test]
    fn eight_bits_err_by_at_most_half_a_step() {
        let w = gaussian(64 * 10, 3);
        let grid = fit_grid(
            &w,
            64,
            &[1.0; 64],
            FitOptions {
                width: Width::new(8).unwrap(),
                levels: LevelKind::Codebook,
                rounds: 0,
            },
        )
        .unwrap();
        let v = grid.dequantize(64, &grid.nearest_codes(&w, &[1.0; 64]));
        for (r, (w, v)) in w.chunks(64).zip(v.chunks(64)).enumerate() {
            let step = grid.step(r, 0, 1);
            for (a, b) in w.iter().zip(v) {
                // The scale is an f16: the largest weight may be clipped by 2⁻¹¹ of itself.
                assert!((a - b).abs() <= 0.5 * step + a.abs() / 2048.0, "{a} {b} {step}");
            }
        }
    }

    #[test]
    fn zero_groups_and_zero_rows_stay_zero() {
        let mut w = gaussian(3 * 128, 4);
        w[..64].fill(0.0);
        w[256..].fill(0.0);
        let grid = fit_grid(
            &w,
            128,
            &[1.0; 128],
            FitOptions {
                width: Width::new(3).unwrap(),
                levels: LevelKind::Codebook,
                rounds: 2,
            },
        )
        .unwrap();
        let v = grid.dequantize(128, &grid.nearest_codes(&w, &[1.0; 128]));
        assert!(v[..64].iter().chain(&v[256..]).all(|&v| v == 0.0));
    }

    #[test]
    fn codebooks_are_strictly_ascending_even_for_degenerate_weights() {
        let w = vec![0.5f32; 4 * 64];
        let grid = fit_grid(
            &w,
            64,
            &[1.0; 64],
            FitOptions {
                width: Width::new(6).unwrap(),
                levels: LevelKind::Codebook,
                rounds: 3,
            },
        )
        .unwrap();
        assert_eq!(grid.codebook.len(), 64);
        assert!(
            grid.codebook.windows(2).all(|p| p[0] < p[1]),
            "{:?}",
            grid.codebook
        );
        assert!(grid.codebook.iter().all(|&v| v >= -127));
    }
}
