//! Trains the tables of `src/trellis/tables.rs`: for every width the best of many starts, as Rust source.
//!
//! `cargo run --release -p nash-games --example train_trellis -- [STARTS]`

use nash_games::trellis::train_for_gaussian;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

fn main() {
    let starts: u64 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(48);
    for bits in 2..=5usize {
        let trained: Vec<([f32; 64], f64)> = (0..starts)
            .into_par_iter()
            .map(|seed| {
                let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
                // Box and Muller (1958).
                let mut normal = || {
                    let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
                    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
                };
                train_for_gaussian(bits, 2000, 80, &mut normal)
            })
            .collect();
        let Some((table, error)) = trained.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)) else {
            return;
        };
        println!(
            "// Mean squared error {error:.5}, {:.2} dB.",
            -10.0 * error.log10()
        );
        println!("const BITS_{bits}: [f32; 64] = {table:.4?};\n");
    }
}
