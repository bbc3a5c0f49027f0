//! Fitting the table and the scales of a tensor, and the tables from which fitting starts.
//!
//! The generalised Lloyd algorithm (Linde, Buzo and Gray 1980): encode with the Viterbi algorithm, move every entry to the weighted mean of what
//! fell on it, and search the scale of every group in between.

use nash_kernels::{CHAIN, CHAINS, GROUP, chain_column};
use rayon::prelude::*;

use super::{
    Abreast, Lane, Lanes, TABLE, Trellis, WIDE, WithLanes, dispatch, exists, gather, padded, scatter, tables,
};
use crate::codebook::for_each_scale;
use crate::grid::Grid;

/// Weights that shape the table, in whole rows: a thousand per entry.
const SAMPLE: usize = 1 << 16;
/// Multiples of the current scale to try: at first, later, and for rows that are not in the sample.
const COARSE: &[f32] = &[1.0, 0.87, 1.15];
const NARROW: &[f32] = &[1.0, 0.95, 1.05];
const REST: &[f32] = &[1.0, 0.89, 1.12, 0.94, 1.06];
/// Most multiples tried at a time.
const MOST_FACTORS: usize = 5;
const ROWS_PER_CHUNK: usize = 16;

/// Table (for a unit scale) and scales `[m, G]` of `weights [m, n]` for column importances `h [n]`.
pub(crate) fn fit(
    weights: &[f32],
    cols: usize,
    h: &[f32],
    bits: usize,
    rounds: usize,
) -> (Trellis, Vec<f32>) {
    let stride = (weights.len() / SAMPLE).max(1);
    let sample: Vec<f32> = weights.chunks(cols).step_by(stride).flatten().copied().collect();
    let mut trellis = Trellis::new(bits, tables::gaussian(bits));
    let spread = root_mean_squares(&sample, cols);
    let mut scales = spread.clone();
    for round in 0..rounds {
        let factors = if round == 0 { COARSE } else { NARROW };
        for_each_scale(&sample, cols, h, &mut scales, |w, h, s| {
            best_scale(w, h, &trellis, s, factors)
        });
        if round + 1 < rounds {
            trellis = refit(&sample, cols, h, &scales, trellis);
        }
    }
    if stride == 1 {
        return (trellis, scales);
    }
    // What the sample's scales are in units of the spread is where those of the other rows start.
    let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
    let ratio = (sum(&scales) / sum(&spread).max(f64::MIN_POSITIVE)) as f32;
    let mut scales = root_mean_squares(weights, cols);
    scales.iter_mut().for_each(|s| *s *= ratio);
    for_each_scale(weights, cols, h, &mut scales, |w, h, s| {
        best_scale(w, h, &trellis, s, REST)
    });
    (trellis, scales)
}

/// Root mean square per row and group, `[m, G]`.
fn root_mean_squares(weights: &[f32], cols: usize) -> Vec<f32> {
    let root = |g: &[f32]| (g.iter().map(|w| w * w).sum::<f32>() / g.len() as f32).sqrt();
    weights
        .par_chunks(cols)
        .flat_map_iter(|row| row.chunks(GROUP).map(root))
        .collect()
}

/// The scale that minimises `Σ h (w − ŵ)²` among multiples of the current one, each refined by least squares.
fn best_scale(w: &[f32], h: &[f32], trellis: &Trellis, start: f32, factors: &[f32]) -> f32 {
    if start <= 0.0 {
        return 0.0;
    }
    // For given codes the least-squares scale is s = Σ h w v / Σ h v², and it leaves an error of Σ h w² − s Σ h w v: the candidate that
    // explains most wins.
    let mut steps = [start; MOST_FACTORS];
    steps
        .iter_mut()
        .zip(factors)
        .for_each(|(step, factor)| *step *= factor);
    let (steps, mut codes) = (&steps[..factors.len()], [[0; GROUP]; MOST_FACTORS]);
    dispatch(Nearest {
        w,
        h,
        trellis,
        steps,
        codes: &mut codes,
    });
    let mut best = (0.0, start);
    for codes in &codes[..factors.len()] {
        let values = trellis.values(codes);
        let (mut wv, mut vv) = (0.0f32, 0.0f32);
        for ((&w, &h), v) in w.iter().zip(h).zip(values) {
            wv += h * w * v;
            vv += h * v * v;
        }
        if wv > 0.0 && wv * wv > best.0 * vv {
            best = (wv * wv / vv, wv / vv);
        }
    }
    best.1
}

/// The codes of a group of up to 64 weights that minimise `Σ h (w − ŵ)²`, if a table entry of 1 is worth `step`.
pub(crate) fn nearest(w: &[f32], h: &[f32], trellis: &Trellis, step: f32) -> [u8; GROUP] {
    let mut codes = [[0; GROUP]];
    dispatch(Nearest {
        w,
        h,
        trellis,
        steps: &[step],
        codes: &mut codes,
    });
    codes[0]
}

/// The nearest codes of one group for each of several steps.
struct Nearest<'a> {
    w: &'a [f32],
    h: &'a [f32],
    trellis: &'a Trellis,
    steps: &'a [f32],
    codes: &'a mut [[u8; GROUP]],
}

impl WithLanes for Nearest<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (weights, importance) = (padded(self.w), padded(self.h));
        let (bits, mut abreast) = (self.trellis.bits(), Abreast::new());
        let together = Abreast::chains(bits);
        for chain in 0..CHAINS {
            let (weights, diagonal) = (gather(&weights, chain), gather(&importance, chain));
            let residual = std::array::from_fn(|s| -diagonal[s] * weights[s]);
            let exists = exists(self.w.len(), chain);
            for (steps, codes) in self.steps.chunks(together).zip(self.codes.chunks_mut(together)) {
                for (index, &step) in steps.iter().enumerate() {
                    let lane = Lane {
                        residual: &residual,
                        values: &[0.0; CHAIN],
                        diagonal: &diagonal,
                        step,
                    };
                    abreast.set(bits, index, lane);
                }
                let mut paths = [[0; CHAIN]; WIDE];
                abreast.search(lanes, self.trellis, None, &exists, &mut paths[..steps.len()]);
                for (path, codes) in paths.iter().zip(codes) {
                    scatter(path, codes, chain);
                }
            }
        }
    }
}

/// Mass and moment of the weights that fell on each window.
type Masses = [(f64, f64); TABLE];

/// The table moved to the means of what fell on its entries, each weight counted `h · scale²`.
fn refit(weights: &[f32], cols: usize, h: &[f32], scales: &[f32], trellis: Trellis) -> Trellis {
    let groups = Grid::groups(cols);
    let rows: Vec<(&[f32], &[f32])> = weights.chunks(cols).zip(scales.chunks(groups)).collect();
    let parts: Vec<Masses> = rows
        .par_chunks(ROWS_PER_CHUNK)
        .map(|rows| {
            let mut masses = [(0.0, 0.0); TABLE];
            for (row, scales) in rows {
                for ((w, h), &s) in row.chunks(GROUP).zip(h.chunks(GROUP)).zip(*scales) {
                    if s > 0.0 {
                        add_masses(w, h, &trellis, s, &mut masses);
                    }
                }
            }
            masses
        })
        .collect();
    let mut masses = [(0.0, 0.0); TABLE];
    for part in parts {
        for (total, part) in masses.iter_mut().zip(part) {
            *total = (total.0 + part.0, total.1 + part.1);
        }
    }
    moved(&trellis, &masses)
}

fn add_masses(w: &[f32], h: &[f32], trellis: &Trellis, scale: f32, masses: &mut Masses) {
    let codes = nearest(w, h, trellis, scale);
    for chain in 0..CHAINS {
        for (s, window) in trellis.windows(&gather(&codes, chain)).into_iter().enumerate() {
            let column = chain_column(chain, s);
            if let (Some(&w), Some(&h)) = (w.get(column), h.get(column)) {
                let mass = f64::from(h) * f64::from(scale) * f64::from(scale);
                let entry = &mut masses[usize::from(window) % TABLE];
                *entry = (entry.0 + mass, entry.1 + mass * f64::from(w / scale));
            }
        }
    }
}

/// Every entry at the mean of what fell on it; entries that nothing fell on stay.
fn moved(trellis: &Trellis, masses: &Masses) -> Trellis {
    let mut table = *trellis.table();
    for (entry, &(mass, moment)) in table.iter_mut().zip(masses) {
        if mass > 0.0 {
            *entry = (moment / mass) as f32;
        }
    }
    Trellis::new(trellis.bits(), table)
}

/// Trains a table for a unit Gaussian: `iterations` of the generalised Lloyd algorithm on `groups` groups of normal variates, started from
/// normal variates and shaken by noise that fades out over the first half. `normal` supplies all of them. Returns the table and its mean squared error on them.
pub fn train_for_gaussian(
    bits: usize,
    groups: usize,
    iterations: usize,
    normal: &mut dyn FnMut() -> f32,
) -> ([f32; TABLE], f64) {
    let mut trellis = Trellis::new(bits, std::array::from_fn(|_| normal()));
    let data: Vec<f32> = (0..groups * GROUP).map(|_| normal()).collect();
    let ones = [1.0; GROUP];
    for iteration in 0..iterations {
        let fading = 1.0 - 2.0 * iteration as f32 / iterations as f32;
        let mut masses = [(0.0, 0.0); TABLE];
        for w in data.chunks(GROUP) {
            add_masses(w, &ones, &trellis, 1.0, &mut masses);
        }
        trellis = moved(&trellis, &masses);
        if fading > 0.0 {
            // About an eighth of the distance between levels.
            let noise = 0.6 * fading / (1 << bits) as f32;
            let table = trellis.table().map(|v| v + noise * normal());
            trellis = Trellis::new(bits, table);
        }
    }
    let error = |w: &[f32]| -> f64 {
        let values = trellis.values(&nearest(w, &ones, &trellis, 1.0));
        w.iter()
            .zip(values)
            .map(|(w, v)| f64::from((w - v) * (w - v)))
            .sum()
    };
    let total: f64 = data.chunks(GROUP).map(error).sum();
    (*trellis.table(), total / data.len() as f64)
}
