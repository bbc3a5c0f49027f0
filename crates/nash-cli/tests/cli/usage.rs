//! What a user sees before any model is there: help, mistakes, completions.

use crate::common::{arg, failure, json, stdout};

#[test]
fn help() {
    insta::assert_snapshot!("help", stdout(&["--help"]));
    for command in [
        "demo",
        "compress",
        "carve",
        "compare",
        "ablate",
        "eval",
        "glue",
        "run",
        "chat",
        "inspect",
        "verify",
        "plan",
        "bench",
        "pull",
        "list",
        "completions",
        "man",
    ] {
        insta::assert_snapshot!(format!("help_{command}"), stdout(&[command, "--help"]));
    }
    insta::assert_snapshot!("help_bench_routing", stdout(&["bench", "routing", "--help"]));
}

#[test]
fn mistakes_in_the_command_line_exit_with_2() {
    for (name, args) in [
        ("no_command", &[][..]),
        ("unknown_option", &["eval", "x", "--chunk", "3"]),
        (
            "two_budgets",
            &["compress", "x", "-o", "y", "--bpw", "3", "--size", "4MB"],
        ),
        (
            "bad_width",
            &["compress", "x", "-o", "y", "--tensor-type", "*.q_proj=7"],
        ),
        ("bad_size", &["compress", "x", "-o", "y", "--size", "4 parsecs"]),
        ("no_output", &["compress", "x"]),
        ("no_shape", &["plan"]),
        ("unknown_task", &["glue", "x", "--data", "y", "--task", "qnli"]),
        ("bench_without_model", &["bench"]),
        ("bad_preset", &["plan", "--preset", "gpt9"]),
    ] {
        let told = failure(args);
        assert!(told.starts_with("status 2\n"), "{told}");
        insta::assert_snapshot!(format!("usage_{name}"), told);
    }
}

#[test]
fn routing_has_its_fields() {
    let report = json(&[
        "bench",
        "routing",
        "--shape",
        "plan",
        "--batches",
        "2",
        "-r",
        "1",
        "-t",
        "1",
    ]);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 12);
    for row in rows {
        assert_eq!(
            (row["experts"].as_u64(), row["top_k"].as_u64()),
            (Some(8), Some(2))
        );
        assert!(row["nanoseconds_per_token"].as_f64().unwrap() > 0.0, "{row}");
    }
    for method in ["prices, cold", "prices, cached", "best response, 7 neighbours"] {
        let row = rows.iter().find(|row| row["method"] == method).unwrap();
        assert_eq!(row["unconverged"].as_u64(), Some(0), "{row}");
        assert!(
            row["max_violation"].is_f64() && row["max_regret"].as_f64().unwrap() < 1e-9,
            "{row}"
        );
    }
}

#[test]
fn completions_and_manual() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(stdout(&["completions", shell]).contains("nashswarm"), "{shell}");
    }
    assert!(stdout(&["man"]).contains(".TH nashswarm 1"));
    let dir = tempfile::tempdir().unwrap();
    stdout(&["man", "-o", arg(dir.path())]);
    assert!(dir.path().join("nashswarm-compress.1").is_file());
}

#[test]
fn every_preset_has_a_plan() {
    for preset in [
        "gpt2",
        "opt-1.3b",
        "llama-7b",
        "mixtral-8x7b",
        "deepseek-67b",
        "gpt3",
    ] {
        let plan = json(&["plan", "--preset", preset, "--bpw", "3"]);
        let row = &plan["rows"][0];
        let bits = row["file_bits_per_weight"].as_f64().unwrap();
        assert!((2.9..=3.0).contains(&bits), "{preset}: {bits}");
        assert!(
            row["file_bytes"].as_u64() <= row["budget_bytes"].as_u64(),
            "{preset}"
        );
    }
}

#[test]
fn the_catalogue_is_listed() {
    let names: Vec<String> = json(&["list"])
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["name"].as_str().unwrap().into())
        .collect();
    assert_eq!(names, ["smollm2", "gemma", "qwen05", "qwen15"]);
    let told = failure(&["pull", "not a name"]);
    assert!(told.contains("nashswarm list"), "{told}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_nashswarm"))
        .args(["man"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
