//! `compare` and `ablate` on a tiny random model, and efforts.

use std::path::Path;

use crate::common::{arg, json, stdout, text, tiny_model};

/// What both commands are given.
fn common<'a>(source: &'a Path, text: &'a Path) -> Vec<&'a str> {
    let mut args = vec![arg(source), "--bpw", "6", "--effort", "quick", "--ctx", "128"];
    args.extend([
        "--chunks",
        "4",
        "--calibration-tokens",
        "2048",
        "--text",
        arg(text),
    ]);
    args
}

#[test]
fn every_method_fills_the_same_bytes_and_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let (source, text) = (tiny_model(dir.path(), 21), text(dir.path(), 1000));
    let kept = dir.path().join("kept");
    let mut args = vec!["compare"];
    args.extend(common(&source, &text));
    args.extend(["--evaluations", "6", "-o", arg(&kept)]);
    let found = json(&args);
    let rows = found["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let all = [
        "rtn",
        "gptq",
        "uniform",
        "greedy",
        "knapsack",
        "pairwise",
        "evolution",
        "market",
        "swarm",
    ];
    assert_eq!(names, all);
    for row in rows {
        assert!(row["file_bits_per_weight"].as_f64().unwrap() <= 6.0, "{row}");
        assert!(row["kl_mean"].as_f64().unwrap() > 0.0, "{row}");
        assert!(
            kept.join(row["name"].as_str().unwrap())
                .join("config.json")
                .is_file()
        );
    }
    let kl = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name).unwrap();
        row["kl_mean"].as_f64().unwrap()
    };
    assert!(kl("market") < kl("rtn"), "{found}");
}

#[test]
fn an_ablation_has_every_variant_and_a_figure() {
    let dir = tempfile::tempdir().unwrap();
    let (source, text) = (tiny_model(dir.path(), 22), text(dir.path(), 1000));
    let figure = dir.path().join("figure.svg");
    let mut args = vec!["ablate"];
    args.extend(common(&source, &text));
    args.extend(["--seeds", "2", "--svg", arg(&figure)]);
    let found = json(&args);
    let rows = found["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let all = [
        "full",
        "no-quantization",
        "no-nash",
        "no-swarm",
        "no-cache",
        "baseline",
    ];
    assert_eq!(names, all);
    let kl = |index: usize| &rows[index]["kl_mean"];
    assert_eq!(kl(1)["mean"], 0.0);
    assert_eq!(kl(0)["values"].as_array().unwrap().len(), 2);
    assert_eq!(kl(0), kl(4), "the cache changes the time, not the result");
    let mean = |index: usize| kl(index)["mean"].as_f64().unwrap();
    assert!(mean(0) < mean(5), "{found}");
    assert!(std::fs::read_to_string(&figure).unwrap().contains("no-swarm"));
}

#[test]
fn a_time_budget_picks_an_effort_and_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 23);
    let plan = |more: &[&str]| {
        let fixed = ["compress", arg(&source), "--bpw", "6", "--dry-run"];
        stdout(&fixed.iter().chain(more).copied().collect::<Vec<_>>())
    };
    assert!(plan(&["--effort", "quick"]).contains("effort: Quick"));
    // A model of a hundred thousand weights: an hour is plenty, a nanosecond is not enough for the least.
    assert!(plan(&["--time-budget", "1h"]).contains("effort: Thorough"));
    assert!(plan(&["--time-budget", "0.000000001"]).contains("effort: Least"));
}
