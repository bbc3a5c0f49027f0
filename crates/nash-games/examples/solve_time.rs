//! How long a tensor takes: `solve_time [ROWS COLS TOKENS]`. Random weights, a Hessian of correlated inputs; seconds and the layer error after each stage.

use std::time::Instant;

use nash_games::codebook::{FitOptions, LevelKind, fit_grid};
use nash_games::rounding::{BestResponse, Problem, play};
use nash_kernels::{Width, dense};
use rand::{RngExt, SeedableRng};

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let mut next = |default| arguments.next().unwrap_or(default);
    let (rows, cols, tokens) = (next(1536), next(1536), next(4096));
    let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(0);
    let mut normal = |n: usize| -> Vec<f32> {
        (0..n)
            .map(|_| (0..6).map(|_| rng.random::<f32>()).sum::<f32>() - 3.0)
            .collect()
    };
    // Neighbouring inputs share a fading past.
    let mut x = normal(tokens * cols);
    for row in x.chunks_mut(cols) {
        for c in 1..cols {
            row[c] += 0.6 * row[c - 1];
        }
    }
    let weights = normal(rows * cols);
    let mut hessian = vec![0.0; cols * cols];
    dense::gram_accumulate(&x, tokens, cols, &mut hessian);
    hessian.iter_mut().for_each(|h| *h /= tokens as f32);
    (0..cols).for_each(|i| hessian[i * cols + i] *= 1.1 + 0.5 * cols as f32 / tokens as f32);
    let problem = Problem {
        weights: &weights,
        cols,
        hessian: &hessian,
    };
    let importance: Vec<f32> = (0..cols).map(|i| hessian[i * cols + i]).collect();
    let energy = problem.energy();
    for width in Width::ALL.into_iter().take(4) {
        let start = Instant::now();
        let options = FitOptions {
            width,
            levels: LevelKind::Trellis,
            rounds: 3,
        };
        let mut grid = fit_grid(&weights, cols, &importance, options).expect("lengths agree");
        let fit = start.elapsed().as_secs_f64();
        let mut codes = grid.nearest_codes(&weights, &importance);
        let nearest = start.elapsed().as_secs_f64() - fit;
        let first = problem.potential(&grid, &codes) / energy;
        print!(
            "{} bits: fit {fit:.2} s, nearest {nearest:.2} s ({first:.5});",
            width.bits()
        );
        for sweeps in [2, 6, 56] {
            let start = Instant::now();
            let rule = BestResponse {
                max_sweeps: sweeps,
                move_scales: true,
                joint_moves: true,
            };
            let trace = play(problem, &mut grid, &mut codes, rule).expect("lengths agree");
            let (played, phi) = (trace.moves.len(), trace.potential[trace.moves.len()]);
            let moves: Vec<String> = trace
                .moves
                .iter()
                .take(8)
                .map(|m| format!("{:.3}", *m as f64 / weights.len() as f64))
                .collect();
            print!(
                " {played} sweeps {:.2} s ({:.5}; {})",
                start.elapsed().as_secs_f64(),
                phi / energy,
                moves.join(" ")
            );
        }
        println!();
    }
}
