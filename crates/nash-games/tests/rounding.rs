//! Properties of the rounding game: the potential never rises, play ends, nobody regrets, threads do not matter.

use nash_games::codebook::{FitOptions, LevelKind, fit_grid};
use nash_games::leader::Leadership;
use nash_games::rounding::{BestResponse, Problem, play};
use nash_games::{GameError, Grid, certify_rounding};
use nash_kernels::Width;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};

const TO_THE_END: BestResponse = BestResponse {
    max_sweeps: 200,
    move_scales: true,
    joint_moves: true,
};

/// Weights `[rows, cols]` and a Hessian of correlated inputs (a random walk over columns), damped by 5 %.
fn instance(rows: usize, cols: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
    let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    let weights = (0..rows * cols).map(|_| normal() * 0.05).collect();
    let mut hessian = vec![0.0f32; cols * cols];
    for _ in 0..2 * cols {
        let mut x = vec![0.0f32; cols];
        let mut state = 0.0;
        for v in &mut x {
            state = 0.8 * state + normal();
            *v = state;
        }
        for i in 0..cols {
            for j in 0..cols {
                hessian[i * cols + j] += x[i] * x[j] / (2 * cols) as f32;
            }
        }
    }
    let mean = (0..cols).map(|i| hessian[i * cols + i]).sum::<f32>() / cols as f32;
    (0..cols).for_each(|i| hessian[i * cols + i] += 0.05 * mean);
    (weights, hessian)
}

fn diagonal_of(hessian: &[f32], n: usize) -> Vec<f32> {
    (0..n).map(|i| hessian[i * n + i]).collect()
}

fn fitted(problem: Problem<'_>, bits: u8) -> Grid {
    fitted_as(problem, bits, LevelKind::Codebook)
}

fn fitted_as(problem: Problem<'_>, bits: u8, levels: LevelKind) -> Grid {
    let options = FitOptions {
        width: Width::new(bits).expect("a width"),
        levels,
        rounds: 2,
    };
    let h = diagonal_of(problem.hessian, problem.cols);
    fit_grid(problem.weights, problem.cols, &h, options).expect("matching lengths")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn play_lowers_the_potential_and_ends_in_equilibrium(
        rows in 1usize..40, cols in 1usize..150, bits in prop::sample::select(vec![2u8, 3, 4, 5, 6, 8]), seed in any::<u64>(),
        levels in prop::sample::select(vec![LevelKind::Codebook, LevelKind::Trellis])
    ) {
        let (weights, hessian) = instance(rows, cols, seed);
        let problem = Problem { weights: &weights, cols, hessian: &hessian };
        let mut grid = fitted_as(problem, bits, levels);
        let mut codes = grid.nearest_codes(&weights, &diagonal_of(&hessian, cols));
        let before = problem.potential(&grid, &codes);
        let trace = play(problem, &mut grid, &mut codes, TO_THE_END).unwrap();
        prop_assert!(trace.settled(), "{trace:?}");
        // f32 residuals of up to 150 terms: relative rounding below 150 · 2⁻²³ per term, taken of the first potential.
        let rounding = before * 150.0 * f64::from(f32::EPSILON);
        for pair in trace.potential.windows(2) {
            prop_assert!(pair[1] <= pair[0] + rounding, "{trace:?}");
        }
        let after = problem.potential(&grid, &codes);
        prop_assert!((after - trace.potential.last().unwrap()).abs() <= rounding + 1e-4 * after);
        let certificate = certify_rounding(problem, &grid, &codes, 1).unwrap();
        prop_assert_eq!(certificate.unsettled, 0, "{:?}", certificate);
        prop_assert!((certificate.potential - after).abs() <= 1e-3 * after + 1e-12);
    }

    #[test]
    fn the_certificate_notices_a_player_that_could_gain(
        seed in any::<u64>(), victim in 0usize..20 * 96, levels in prop::sample::select(vec![LevelKind::Codebook, LevelKind::Trellis])
    ) {
        let (weights, hessian) = instance(20, 96, seed);
        let problem = Problem { weights: &weights, cols: 96, hessian: &hessian };
        let mut grid = fitted_as(problem, 3, levels);
        let mut codes = grid.nearest_codes(&weights, &diagonal_of(&hessian, 96));
        play(problem, &mut grid, &mut codes, TO_THE_END).unwrap();
        // Another code for the victim, far from its own on a scalar grid.
        codes[victim] = if codes[victim] < 4 { 7 } else { 0 };
        let certificate = certify_rounding(problem, &grid, &codes, 1).unwrap();
        prop_assert!(certificate.unsettled > 0);
        prop_assert!(certificate.max_regret > 0.0);
    }
}

#[test]
fn every_stage_beats_the_one_before() {
    let (weights, hessian) = instance(64, 192, 5);
    let problem = Problem {
        weights: &weights,
        cols: 192,
        hessian: &hessian,
    };
    let mut grid = fitted(problem, 3);
    let nearest = grid.nearest_codes(&weights, &diagonal_of(&hessian, 192));
    let error = |grid: &Grid, codes: &[u8]| problem.potential(grid, codes) / problem.energy();
    let e_nearest = error(&grid, &nearest);
    let leadership = Leadership::new(&hessian, 192).unwrap();
    let mut led = leadership.round(problem, &grid).unwrap();
    let e_led = error(&grid, &led);
    let mut grid_led = grid.clone();
    play(problem, &mut grid_led, &mut led, TO_THE_END).unwrap();
    let e_led_played = error(&grid_led, &led);
    let mut played = nearest;
    play(problem, &mut grid, &mut played, TO_THE_END).unwrap();
    let e_played = error(&grid, &played);
    assert!(
        e_played < e_nearest && e_led < e_nearest && e_led_played < e_led,
        "{e_nearest} {e_led} {e_led_played} {e_played}"
    );
}

#[test]
fn a_trellis_errs_less_than_a_scalar_codebook() {
    let (weights, hessian) = instance(96, 192, 5);
    let problem = Problem {
        weights: &weights,
        cols: 192,
        hessian: &hessian,
    };
    // At least half, in decibels, of what the tables gain on a Gaussian without coupling: 1.27, 1.50, 1.31 and 0.63 dB.
    for (bits, gain) in [(2, 1.27), (3, 1.50), (4, 1.31), (5, 0.63)] {
        let error = |levels| {
            let mut grid = fitted_as(problem, bits, levels);
            let mut codes = grid.nearest_codes(&weights, &diagonal_of(&hessian, 192));
            play(problem, &mut grid, &mut codes, TO_THE_END).unwrap();
            problem.potential(&grid, &codes)
        };
        let ratio = error(LevelKind::Trellis) / error(LevelKind::Codebook);
        assert!(ratio < 10f64.powf(-0.05 * gain), "{bits} bits: {ratio}");
    }
}

#[test]
fn a_grid_on_which_codes_share_values_cannot_be_led() {
    let (weights, hessian) = instance(4, 64, 2);
    let problem = Problem {
        weights: &weights,
        cols: 64,
        hessian: &hessian,
    };
    let grid = fitted_as(problem, 3, LevelKind::Trellis);
    let leadership = Leadership::new(&hessian, 64).unwrap();
    assert_eq!(leadership.round(problem, &grid), Err(GameError::NotScalar));
}

#[test]
fn sequential_rounding_with_a_diagonal_hessian_is_rounding_to_nearest() {
    let (weights, _) = instance(8, 80, 9);
    let mut hessian = vec![0.0; 80 * 80];
    (0..80).for_each(|i| hessian[i * 80 + i] = 1.0 + i as f32);
    let problem = Problem {
        weights: &weights,
        cols: 80,
        hessian: &hessian,
    };
    let grid = fitted(problem, 4);
    let led = Leadership::new(&hessian, 80)
        .unwrap()
        .round(problem, &grid)
        .unwrap();
    assert_eq!(led, grid.nearest_codes(&weights, &diagonal_of(&hessian, 80)));
}

#[test]
fn uncoupled_players_move_as_coupled_ones_would() {
    let (w, h) = instance(40, 100, 11);
    let mut diagonal: Vec<f32> = vec![0.0; h.len()];
    (0..100).for_each(|i| diagonal[i * 101] = h[i * 101]);
    // An entry that is not zero but too small to change anything takes the way of the full products.
    let mut coupled = diagonal.clone();
    coupled[99] = 1e-30;
    coupled[99 * 100] = 1e-30;
    let played = |hessian: &[f32]| {
        let problem = Problem {
            weights: &w,
            cols: 100,
            hessian,
        };
        let mut grid = fitted(problem, 3);
        let mut codes = grid.nearest_codes(&w, &diagonal_of(hessian, 100));
        let trace = play(problem, &mut grid, &mut codes, TO_THE_END).unwrap();
        assert!(trace.settled() && trace.moves[0] > 0, "{trace:?}");
        assert_eq!(certify_rounding(problem, &grid, &codes, 1).unwrap().unsettled, 0);
        (grid, codes)
    };
    assert_eq!(played(&diagonal), played(&coupled));
}

#[test]
fn an_indefinite_hessian_is_an_error() {
    assert_eq!(
        Leadership::new(&[1.0, 2.0, 2.0, 1.0], 2).unwrap_err(),
        GameError::NotPositiveDefinite { size: 2 }
    );
}

#[test]
fn threads_do_not_change_a_bit() {
    let (weights, hessian) = instance(100, 200, 11);
    let problem = Problem {
        weights: &weights,
        cols: 200,
        hessian: &hessian,
    };
    let solve = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut grid = fitted(problem, 3);
            let mut codes = grid.nearest_codes(&weights, &diagonal_of(&hessian, 200));
            let trace = play(
                problem,
                &mut grid,
                &mut codes,
                BestResponse {
                    max_sweeps: 5,
                    move_scales: true,
                    joint_moves: true,
                },
            )
            .unwrap();
            (grid, codes, trace)
        })
    };
    assert_eq!(solve(1), solve(3));
}

#[test]
fn wrong_lengths_are_errors() {
    let (weights, hessian) = instance(4, 64, 1);
    let problem = Problem {
        weights: &weights,
        cols: 64,
        hessian: &hessian,
    };
    let mut grid = fitted(problem, 2);
    let short = Problem {
        hessian: &hessian[..10],
        ..problem
    };
    assert!(matches!(
        play(short, &mut grid, &mut [0; 256], TO_THE_END),
        Err(GameError::Length { .. })
    ));
    assert!(matches!(
        play(problem, &mut grid, &mut [0; 255], TO_THE_END),
        Err(GameError::Length { .. })
    ));
}
