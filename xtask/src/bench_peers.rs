//! `bench-peers`: our engine and llama.cpp's, in turns on one machine, as ratios with their spread.
//!
//! A machine's speed drifts, and neighbours come and go: what is measured minutes apart cannot be compared. So every
//! round measures each model once, one after the other, and a ratio is taken within its round. Builds nothing: binaries and files are given.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

/// What to measure.
#[derive(Args)]
pub(crate) struct BenchPeers {
    /// Our binary
    #[arg(long, value_name = "FILE", default_value = "target/release/nashswarm")]
    nashswarm: PathBuf,
    /// Models for our engine
    #[arg(long, value_name = "MODEL", required = true)]
    ours: Vec<PathBuf>,
    /// `llama-bench` of llama.cpp, ik_llama.cpp or another fork
    #[arg(long, value_name = "FILE")]
    llama_bench: PathBuf,
    /// GGUF files for it; ratios are taken to the first one
    #[arg(long, value_name = "GGUF", required = true)]
    theirs: Vec<PathBuf>,
    /// Further arguments for `llama-bench`, such as `--peer-arg=-rtr --peer-arg=1`
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    peer_arg: Vec<String>,
    /// Threads
    #[arg(short, long, default_value_t = 2)]
    threads: usize,
    /// Prompt tokens
    #[arg(short = 'p', long, default_value_t = 512)]
    prompt: usize,
    /// Generated tokens
    #[arg(short = 'n', long, default_value_t = 128)]
    generate: usize,
    /// Rounds; each measures every model once
    #[arg(short, long, default_value_t = 5)]
    rounds: usize,
    /// Write the results here as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A model's rates, tokens per second, one per round.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Rates {
    engine: &'static str,
    model: String,
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    rates: Rates,
    /// Median of the ratios to the first peer, each within its round, with the least and the largest.
    prefill_ratio: [f64; 3],
    decode_ratio: [f64; 3],
}

/// Measures and prints.
pub(crate) fn run(args: &BenchPeers) -> anyhow::Result<()> {
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned()
    };
    let rates = |engine, path: &PathBuf| Rates {
        engine,
        model: name(path),
        ..Rates::default()
    };
    let mut ours: Vec<Rates> = args.ours.iter().map(|path| rates("nashswarm", path)).collect();
    let mut theirs: Vec<Rates> = args
        .theirs
        .iter()
        .map(|path| rates("llama-bench", path))
        .collect();
    for round in 0..args.rounds.max(1) {
        eprintln!("round {} of {}", round + 1, args.rounds.max(1));
        // In turns from one end and from the other, so that what slows down over a round slows everyone.
        let mut turns: Vec<usize> = (0..ours.len() + theirs.len()).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for turn in turns {
            if let Some(rates) = ours.get_mut(turn) {
                measure_ours(args, &args.ours[turn], rates)?;
            } else {
                let peer = turn - ours.len();
                measure_theirs(args, &args.theirs[peer], &mut theirs[peer])?;
            }
        }
    }
    let base = theirs[0].clone();
    let rows: Vec<Row> = ours
        .into_iter()
        .chain(theirs)
        .map(|rates| Row {
            prefill_ratio: ratios(&rates.prefill, &base.prefill),
            decode_ratio: ratios(&rates.decode, &base.decode),
            rates,
        })
        .collect();
    print!("{}", table(&rows, args));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn output(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command
        .stderr(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed; run it by itself to see why"
    );
    Ok(output.stdout)
}

fn measure_ours(args: &BenchPeers, model: &Path, rates: &mut Rates) -> anyhow::Result<()> {
    let mut command = Command::new(&args.nashswarm);
    command.args(["bench", "--quiet", "--json", "-", "-r", "1", "-m"]);
    command.arg(model).args(sizes(args));
    add_ours(&serde_json::from_slice(&output(&mut command)?)?, rates)
}

fn measure_theirs(args: &BenchPeers, model: &Path, rates: &mut Rates) -> anyhow::Result<()> {
    let mut command = Command::new(&args.llama_bench);
    command.args(["-o", "json", "-r", "1", "-m"]);
    command.arg(model).args(sizes(args)).args(&args.peer_arg);
    add_theirs(&serde_json::from_slice(&output(&mut command)?)?, rates)
}

/// Both programs spell these alike.
fn sizes(args: &BenchPeers) -> [String; 6] {
    let [p, n, t] = [args.prompt, args.generate, args.threads].map(|v| v.to_string());
    ["-p".into(), p, "-n".into(), n, "-t".into(), t]
}

fn add_ours(report: &Value, rates: &mut Rates) -> anyhow::Result<()> {
    let row = &report["rows"][0];
    let rate = |key: &str| {
        row[key]
            .as_f64()
            .with_context(|| format!("the report has no `{key}`"))
    };
    rates.prefill.push(rate("prefill_tokens_per_second")?);
    rates.decode.push(rate("decode_tokens_per_second")?);
    Ok(())
}

/// `llama-bench` reports the prompt and the generation as two entries.
fn add_theirs(report: &Value, rates: &mut Rates) -> anyhow::Result<()> {
    let entries = report.as_array().context("llama-bench wrote no list")?;
    let rate = |key: &str| {
        let entry = entries.iter().find(|e| e[key].as_u64().is_some_and(|n| n > 0));
        entry
            .and_then(|e| e["avg_ts"].as_f64())
            .with_context(|| format!("llama-bench reported nothing for `{key}`"))
    };
    rates.prefill.push(rate("n_prompt")?);
    rates.decode.push(rate("n_gen")?);
    Ok(())
}

/// Median, least and largest ratio of two series, round by round.
fn ratios(a: &[f64], b: &[f64]) -> [f64; 3] {
    let mut ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
    ratios.sort_by(f64::total_cmp);
    let at = |i: usize| ratios.get(i).copied().unwrap_or(f64::NAN);
    let middle = ratios.len() / 2;
    let median = if ratios.len().is_multiple_of(2) {
        0.5 * (at(middle.wrapping_sub(1)) + at(middle))
    } else {
        at(middle)
    };
    [median, at(0), at(ratios.len().wrapping_sub(1))]
}

fn table(rows: &[Row], args: &BenchPeers) -> String {
    let mut text = format!(
        "{} rounds, {} threads, prompt {}, generation {}; ratios to {}\n\n",
        args.rounds,
        args.threads,
        args.prompt,
        args.generate,
        rows[args.ours.len()].rates.model
    );
    text += "| engine | model | prefill tok/s | ratio | decode tok/s | ratio |\n| --- | --- | --- | --- | --- | --- |\n";
    for Row {
        rates,
        prefill_ratio,
        decode_ratio,
    } in rows
    {
        let one = [1.0];
        let rate = |values: &[f64]| {
            let ones = one.repeat(values.len());
            format!("{:.0}", ratios(values, &ones)[0])
        };
        let ratio = |[median, low, high]: &[f64; 3]| format!("{median:.2} ({low:.2}–{high:.2})");
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            rates.engine,
            rates.model,
            rate(&rates.prefill),
            ratio(prefill_ratio),
            rate(&rates.decode),
            ratio(decode_ratio)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_both_reports() {
        let mut rates = Rates::default();
        let ours = json!({"rows": [{"prefill_tokens_per_second": 800.0, "decode_tokens_per_second": 200.0}]});
        add_ours(&ours, &mut rates).unwrap();
        let theirs = json!([{"n_prompt": 512, "n_gen": 0, "avg_ts": 400.0}, {"n_prompt": 0, "n_gen": 128, "avg_ts": 100.0}]);
        add_theirs(&theirs, &mut rates).unwrap();
        assert_eq!(
            (rates.prefill.as_slice(), rates.decode.as_slice()),
            (&[800.0, 400.0][..], &[200.0, 100.0][..])
        );
        assert!(add_ours(&json!({"rows": []}), &mut rates).is_err());
        assert!(add_theirs(&json!([{"n_prompt": 512, "n_gen": 0, "avg_ts": 1.0}]), &mut rates).is_err());
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        assert_eq!(ratios(&[2.0, 9.0, 4.0], &[1.0, 3.0, 4.0]), [2.0, 1.0, 3.0]);
        assert_eq!(ratios(&[2.0, 4.0], &[1.0, 1.0]), [3.0, 2.0, 4.0]);
    }
}
