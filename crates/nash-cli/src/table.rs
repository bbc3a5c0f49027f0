//! Tables on stdout.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use nash_eval::report::Row;

use crate::format;

/// A table with these headers; the first column is text, the others are numbers and stand to the right.
pub(crate) fn table(headers: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(headers.iter().copied());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Sizes, perplexity and divergence of models.
pub(crate) fn eval_table(rows: &[Row]) -> Table {
    let compared = rows.iter().any(|row| row.comparison.is_some());
    let mut headers = vec!["model", "file", "bits/weight", "linears", "perplexity"];
    if compared {
        headers.extend(["KL mean", "KL median", "KL 99 %", "top-1"]);
    }
    let mut table = table(&headers);
    for row in rows {
        let mut cells = identity_cells(row).to_vec();
        if let Some(c) = &row.comparison {
            cells.push(format::plus_minus(c.kl_mean, c.kl_mean_stderr, 4));
            cells.push(format!("{:.4}", c.kl_median));
            cells.push(format!("{:.3}", c.kl_p99));
            cells.push(format!("{:.1} %", 100.0 * c.top1_agreement));
        }
        table.add_row(cells);
    }
    table
}

/// What every table of models starts with: name, file size, bits per weight of file and linears, perplexity; empty where not measured.
fn identity_cells(row: &Row) -> [String; 5] {
    let size = row.size.as_ref();
    let perplexity = row
        .comparison
        .as_ref()
        .map(|c| &c.perplexity)
        .or(row.perplexity.as_ref());
    [
        row.name.clone(),
        size.map(|size| format::bytes(size.file_bytes))
            .unwrap_or_default(),
        size.map(|size| format!("{:.3}", size.file_bits_per_weight))
            .unwrap_or_default(),
        size.map(|size| format!("{:.3}", size.linear_bits_per_weight))
            .unwrap_or_default(),
        perplexity
            .map(|p| format::plus_minus(p.perplexity, p.perplexity_stderr, 2))
            .unwrap_or_default(),
    ]
}

/// Sizes, quality, speed and cost of the models of the demonstration.
pub(crate) fn demo_table<'a>(rows: impl Iterator<Item = &'a Row>) -> Table {
    let mut table = table(&[
        "model",
        "file",
        "bits/weight",
        "linears",
        "perplexity",
        "KL mean",
        "KL 99 %",
        "top-1",
        "decode tok/s",
        "made in",
    ]);
    for row in rows {
        let kl = row.comparison.as_ref();
        let rate = row
            .speed
            .as_ref()
            .and_then(|speed| speed.decode_tokens_per_second);
        table.add_row(
            identity_cells(row).into_iter().chain([
                kl.map(|c| format::plus_minus(c.kl_mean, c.kl_mean_stderr, 4))
                    .unwrap_or_default(),
                kl.map(|c| format!("{:.3}", c.kl_p99)).unwrap_or_default(),
                kl.map(|c| format!("{:.1} %", 100.0 * c.top1_agreement))
                    .unwrap_or_default(),
                rate.map(|rate| format!("{rate:.1}")).unwrap_or_default(),
                row.compress_seconds
                    .map(|seconds| format::duration(std::time::Duration::from_secs_f64(seconds)))
                    .unwrap_or_default(),
            ]),
        );
    }
    table
}
