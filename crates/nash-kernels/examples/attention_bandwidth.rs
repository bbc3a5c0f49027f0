//! One token's attention against the memory: bytes of keys and values per second, in half precision and as bytes, beside plain reads in
//! the same run. Softmax apart: scores become weights as they are.
//!
//! `cargo run --release -p nash-kernels --example attention_bandwidth -- [positions] [runs] [heads] [dim] [threads]`

mod memory;

use std::hint::black_box;
use std::time::Instant;

use half::f16;
use nash_kernels::{ByteQuery, ByteRun, ByteShape, add_rows, dot_rows, pool};

/// Positions of a task.
const PART: usize = 512;
/// Rounds, in which all kinds take turns.
const ROUNDS: usize = 20;

/// The shortest time of each kind, in seconds.
fn best<const N: usize>(mut kinds: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut best = [f64::INFINITY; N];
    for _ in 0..ROUNDS {
        for (kind, best) in kinds.iter_mut().zip(&mut best) {
            let begin = Instant::now();
            kind();
            *best = begin.elapsed().as_secs_f64().min(*best);
        }
    }
    best
}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let argument = |i: usize, default| arguments.get(i).copied().unwrap_or(default);
    let (positions, runs) = (argument(0, 4096).next_multiple_of(PART), argument(1, 90));
    let (heads, dim) = (argument(2, 3), argument(3, 64));
    pool::set_threads(argument(4, 0)).expect("the first use of the pool");
    let parts = positions / PART;
    let q: Vec<f32> = (0..heads * dim).map(|i| (i as f32).sin()).collect();

    let halves: Vec<f16> = (0..2 * runs * positions * dim)
        .map(|i| f16::from_f32((i % 251) as f32 / 251.0))
        .collect();
    let (keys, values) = halves.split_at(halves.len() / 2);
    let mut in_halves = || {
        pool::run(runs * parts, |unit| {
            let rows = unit * PART * dim..(unit + 1) * PART * dim;
            let (mut scores, mut out) = (vec![0.0; heads * PART], vec![0.0; heads * dim]);
            dot_rows(&q, &keys[rows.clone()], dim, 0.01, &mut scores);
            scores.iter_mut().for_each(|score| *score = score.abs());
            add_rows(&scores, &values[rows], dim, &mut out);
            black_box(out);
        });
    };

    let shape = ByteShape::new(dim);
    let per_run = (
        shape.code_bytes(positions),
        shape.key_scales(positions),
        shape.value_scales(positions),
    );
    let bytes = |count: usize| (0..count).map(|i| (i % 251) as u8).collect::<Vec<u8>>();
    let (key_codes, value_codes) = (bytes(runs * per_run.0), bytes(runs * per_run.0));
    let (key_scales, value_scales) = (vec![0.01f32; runs * per_run.1], vec![0.01f32; runs * per_run.2]);
    let mut in_bytes = || {
        pool::run(runs * parts, |unit| {
            let (run, first) = (unit / parts, unit % parts * PART);
            let keys = ByteRun {
                codes: &key_codes[run * per_run.0..][..per_run.0],
                scales: &key_scales[run * per_run.1..][..per_run.1],
            };
            let values = ByteRun {
                codes: &value_codes[run * per_run.0..][..per_run.0],
                scales: &value_scales[run * per_run.2..][..per_run.2],
            };
            let (mut scores, mut out) = (vec![0.0; heads * PART], vec![0.0; heads * dim]);
            let mut query = ByteQuery::default();
            query.quantize(shape, &q, 0.01);
            query.scores(shape, keys, first / 16..(first + PART) / 16, &mut scores);
            scores.iter_mut().for_each(|score| *score = score.abs());
            query.add_values(shape, (values, first..first + PART), &scores, &mut out);
            black_box(out);
        });
    };
    let data: Vec<u64> = (0..32 << 20).collect();
    let mut reads = || _ = black_box(memory::read(&data));
    let [halves_time, bytes_time, reads_time] = best([&mut in_halves, &mut in_bytes, &mut reads]);
    let plain = size_of_val(data.as_slice()) as f64 / reads_time;
    println!(
        "{} threads, {runs} runs of {positions} positions of {dim} columns, {heads} query heads; plain reads {:.1} GB/s",
        pool::threads(),
        plain * 1e-9
    );
    let half_bytes = size_of_val(halves.as_slice());
    let byte_bytes = runs * (2 * per_run.0 + 4 * (per_run.1 + per_run.2));
    for (name, size, time) in [
        ("half precision", half_bytes, halves_time),
        ("bytes", byte_bytes, bytes_time),
    ] {
        let rate = size as f64 / time;
        println!(
            "{name:14} {:6.2} MB, {:7.3} ms, {:5.1} GB/s = {:3.0} % of reads",
            size as f64 * 1e-6,
            time * 1e3,
            rate * 1e-9,
            100.0 * rate / plain
        );
    }
}
