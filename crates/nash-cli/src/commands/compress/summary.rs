//! What a user is told of a finished compression.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use nash_eval::memory;
use nash_quant::{Method, Report};

use crate::format;
use crate::out::say;
use crate::table::table;

/// Sizes, cost, equilibrium and widths.
pub(super) fn print(out: &Path, report: &Report) {
    let texts = tokenizer_bytes(out);
    say!(
        "{}: {} ({:.3} bits per weight over the whole file, {:.3} over the weight matrices); tokenizer texts apart: {}",
        out.display(),
        format::bytes(report.file_bytes),
        report.file_bits_per_weight,
        report.linear_bits_per_weight,
        format::bytes(texts)
    );
    let seconds = Duration::from_secs_f64(report.compress_seconds.unwrap_or_default());
    say!(
        "took {}, {} of memory at most; {} bytes of the budget unspent",
        format::duration(seconds),
        memory::peak_bytes().map_or("an unknown amount".into(), format::bytes),
        format::count(report.unspent_bytes)
    );
    if report.method == Method::Nash {
        say!(
            "equilibrium: {} of the certified players could still gain, at most {:.1e} of their row's energy",
            format::count(report.unsettled),
            report.max_regret
        );
    }
    if let Some(tuning) = &report.tuning {
        say!(
            "tuned {} norms and biases: KL divergence {:.4} before, {:.4} after, on text held back",
            tuning.tensors,
            tuning.kl_before,
            tuning.kl_after
        );
    }
    let mut widths = BTreeMap::<usize, u64>::new();
    report
        .rows
        .iter()
        .for_each(|row| *widths.entry(row.bits).or_default() += 1);
    let mut table = table(&["width", "tensors", "mean layer error"]);
    for (bits, count) in widths {
        let errors = report
            .rows
            .iter()
            .filter(|row| row.bits == bits)
            .map(|row| row.error);
        let mean = errors.sum::<f64>() / count as f64;
        table.add_row([format!("{bits}-bit"), count.to_string(), format!("{mean:.5}")]);
    }
    say!("{table}");
}

/// Bytes of the tokenizer's files in a folder.
fn tokenizer_bytes(dir: &Path) -> u64 {
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]
    .iter()
    .filter_map(|name| std::fs::metadata(dir.join(name)).ok())
    .map(|data| data.len())
    .sum()
}
