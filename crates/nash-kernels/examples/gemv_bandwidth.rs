//! Packed matrix products against the memory: for every width the bytes of weights per second for one token, as a
//! share of plain reads in the same run, and the products per second for more tokens, beside what the multipliers can do.
//!
//! `cargo run --release -p nash-kernels --example gemv_bandwidth -- [rows] [cols] [threads]`

mod memory;
mod multipliers;

use std::hint::black_box;
use std::time::Instant;

use nash_kernels::{Activations, Isa, PackedMatrix, PackedShape, Width, dense, matmul_with, pool};

/// The shortest of the runs of half a second (five at least), in seconds: others on the machine only slow runs down.
fn best(mut run: impl FnMut()) -> f64 {
    let (begin, mut runs, mut best) = (Instant::now(), 0, f64::INFINITY);
    while runs < 5 || begin.elapsed().as_secs_f64() < 0.5 {
        let begin = Instant::now();
        run();
        best = begin.elapsed().as_secs_f64().min(best);
        runs += 1;
    }
    best
}

fn packed(shape: PackedShape) -> PackedMatrix {
    let mut state = 1u64;
    let random = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let stream = (0..shape.stream_bytes().expect("a shape that fits"))
        .map(random)
        .collect();
    let row_scales = vec![half::f16::ONE; shape.rows];
    let codebook = (0..shape.width.codebook_len()).map(|i| i as i8).collect();
    PackedMatrix::new(shape, stream, row_scales, codebook).expect("lengths from the shape")
}

fn seconds(isa: Isa, w: &PackedMatrix, tokens: usize) -> f64 {
    let shape = w.as_ref().shape();
    let inputs: Vec<f32> = (0..tokens * shape.cols).map(|i| (i as f32).sin()).collect();
    let mut x = Activations::new();
    x.quantize(&inputs, tokens, shape.cols);
    let mut y = vec![0.0; tokens * shape.rows];
    best(|| {
        matmul_with(isa, w.as_ref(), &x, &mut y);
        black_box(&y);
    })
}

fn dense_products() {
    for (tokens, n) in [(512, 1024), (512, 576), (64, 1536), (1, 2048)] {
        let (x, mut h) = (vec![0.5f32; tokens * n], vec![0.0f32; n * n]);
        let operations = 2e-9 * (tokens * n * n) as f64;
        let gram = best(|| dense::gram_accumulate(&x, tokens, n, &mut h));
        let (w, mut y) = (vec![0.5f32; n * n], vec![0.0f32; tokens * n]);
        let product = best(|| dense::matmul_nt(&x, &w, &mut y, tokens, n, n));
        println!(
            "dense, x [{tokens}, {n}]: gram_accumulate {:.0}, matmul_nt {:.0} GFLOP/s",
            operations / gram,
            operations / product
        );
    }
}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let argument = |i: usize, default| arguments.get(i).copied().unwrap_or(default);
    let (rows, cols) = (argument(0, 32768), argument(1, 8192));
    pool::set_threads(argument(2, 0)).expect("the first use of the pool");
    let data: Vec<u64> = (0..32 << 20).collect();
    println!("{} threads, W [{rows}, {cols}]", pool::threads());
    if let Some(peak) = multipliers::products_per_second() {
        println!(
            "multipliers: {:.0} G products/s (vpdpbusd on registers)",
            peak * 1e-9
        );
    }
    for isa in Isa::available() {
        for width in Width::ALL {
            let w = packed(PackedShape { rows, cols, width });
            let plain = size_of_val(data.as_slice()) as f64 / best(|| _ = black_box(memory::read(&data)));
            let one = w.as_ref().bytes() as f64 / seconds(isa, &w, 1);
            let macs = |tokens| (tokens * rows * cols) as f64 * 1e-9 / seconds(isa, &w, tokens);
            let slow = isa == Isa::Portable;
            println!(
                "{:8} {} bits: {:5.1} GB/s = {:3.0} % of reads ({:.1}); G products/s: T=1 {:5.1}, T=4 {:5.1}, T=64 {:6.1}, T=512 {:6.1}",
                isa.name(),
                width.bits(),
                one * 1e-9,
                100.0 * one / plain,
                plain * 1e-9,
                macs(1),
                macs(4),
                if slow { f64::NAN } else { macs(64) },
                if slow { f64::NAN } else { macs(512) },
            );
        }
    }
    dense_products();
}
