//! `bench`: tokens per second; `bench routing`: the cost of choosing experts.

mod routing;

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand, ValueEnum as _, value_parser};
use nash_eval::report::{Report, Row};
use nash_eval::stats::median;
use nash_eval::{ModelScorer, ReadBandwidth, SpeedOptions, SpeedReport, memory, speed};

use crate::args::{Json, KvArg, KvName, ModelArg};
use crate::experts::{self, Experts};
use crate::out::say;
use crate::sizes::size_report;
use crate::table::table;
use crate::ui::{Ui, Unit};
use crate::{format, interrupt, model};

/// Measure prefill and decode speed, as llama-bench does
///
/// Medians over the repeats; `load` is until the weights are mapped, `first token` one pass of one token after that, `from start` the whole
/// way from the start of the program to the logits of a first token, the tokenizer included; a warm-up comes first and is not counted. The share of bandwidth is the bytes of
/// weights, keys and values read per second of decode over what plain reads between the repeats reach. Measure on a quiet machine.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    after_help = "Examples:
  nashswarm bench small
  nashswarm bench small -p 512 -n 128 -t 1,2,4 -r 5 --json speed.json
  nashswarm bench routing"
)]
pub(crate) struct Bench {
    #[command(subcommand)]
    other: Option<Other>,
    #[command(flatten)]
    model: ModelArg,
    /// Prompt tokens; 0 leaves prefill out
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    n_prompt: usize,
    /// Generated tokens; 0 leaves decode out
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    n_gen: usize,
    /// Tokens of context before both, not timed
    #[arg(short = 'd', long, value_name = "N", default_value_t = 0)]
    n_depth: usize,
    #[command(flatten)]
    kv: KvArg,
    /// Numbers of threads [default: all cores]
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', value_parser = value_parser!(u16).range(1..))]
    threads: Vec<u16>,
    /// Repeats
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    #[command(flatten)]
    experts: Experts,
    #[command(flatten)]
    json: Json,
}

/// What else than a model can be measured.
#[derive(Debug, Subcommand)]
enum Other {
    Routing(routing::Routing),
}

impl Bench {
    pub(crate) fn run(mut self, ui: &Ui) -> anyhow::Result<()> {
        if let Some(Other::Routing(routing)) = self.other.take() {
            return routing.run(ui);
        }
        let threads = if self.threads.is_empty() {
            vec![0]
        } else {
            self.threads.clone()
        };
        let rows = match threads[..] {
            [threads] => vec![self.measure(threads, ui)?],
            _ => self.measure_apart(&threads, ui)?,
        };
        let report = Report { rows };
        self.json.write(&report)?;
        if !self.json.replaces_table() {
            print(&report);
        }
        Ok(())
    }

    /// Measures with this many threads; 0 for all cores.
    fn measure(&self, threads: u16, ui: &Ui) -> anyhow::Result<Row> {
        nash_kernels::pool::set_threads(threads.into())?;
        let mut loaded = model::load(self.model.path(), ui)?;
        loaded.tokenizer()?;
        // From here on a prompt could be read.
        let ready = crate::START.elapsed().as_secs_f64();
        let handle = self.experts.apply(&mut loaded, ui)?;
        let options = SpeedOptions {
            prompt_tokens: self.n_prompt,
            generate_tokens: self.n_gen,
            depth: self.n_depth,
            repeats: self.repetitions,
        };
        let title = format!("{}, threads: {}", loaded.name(), nash_kernels::pool::threads());
        ui.begin(&title, passes(options), Unit::Steps);
        let mut bandwidth = Bandwidth::default();
        let mut tick = || {
            ui.step(1);
            bandwidth.pass(options.generate_tokens > 0);
            interrupt::check_measurement()
        };
        let mut scorer = ModelScorer::with_cache(&loaded.model, self.kv.kv_type.into());
        let mut report = speed(&mut scorer, options, &mut tick)?;
        if let Some(rate) = report.decode_tokens_per_second {
            let cache = scorer.cache_bytes_per_token(self.n_depth, self.n_gen);
            let bytes = scorer.bytes_per_token() + cache;
            report.bytes_per_token = Some(bytes);
            report.bandwidth = bandwidth.median();
            report.bandwidth_share = report.bandwidth.map(|reads| rate * bytes as f64 / reads);
        }
        let (peak, resident) = bandwidth.memory;
        ui.finish();
        Ok(Row {
            name: loaded.name(),
            size: Some(size_report(&loaded.file)?),
            load_seconds: Some(loaded.load_seconds),
            first_answer_seconds: report.first_token_seconds.map(|first| ready + first),
            peak_memory_bytes: peak,
            resident_memory_bytes: resident,
            speed: Some(report),
            expert_use: handle.map(|handle| handle.read()),
            ..Row::default()
        })
    }

    /// Measures each number of threads in a process of its own: the threads of a process are as many from start to end.
    fn measure_apart(&self, threads: &[u16], ui: &Ui) -> anyhow::Result<Vec<Row>> {
        let program = std::env::current_exe().context("cannot find this program to run it again")?;
        let mut rows = Vec::new();
        for count in threads {
            interrupt::check()?;
            let output = Command::new(&program)
                .arg("bench")
                // As an option: a model may be called `routing`.
                .arg("-m")
                .arg(self.model.path())
                .args(["--json", "-", "-t", &count.to_string()])
                .args(["-p", &self.n_prompt.to_string(), "-n", &self.n_gen.to_string()])
                .args(["-d", &self.n_depth.to_string()])
                .args(["--kv-type", &name(self.kv.kv_type)])
                .args(["-r", &self.repetitions.to_string()])
                .args(self.experts.arguments())
                .args(ui.is_quiet().then_some("--quiet"))
                .stderr(Stdio::inherit())
                .output()?;
            interrupt::check()?;
            ensure!(
                output.status.success(),
                "the measurement with {count} threads failed"
            );
            let report: Report = serde_json::from_slice(&output.stdout)?;
            rows.extend(report.rows);
        }
        Ok(rows)
    }
}

/// How a type is written.
fn name(kind: KvName) -> String {
    kind.to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

/// Passes of plain reads, one after each of the model's.
#[derive(Default)]
struct Bandwidth {
    reads: Option<ReadBandwidth>,
    passes: Vec<f64>,
    ticks: usize,
    /// Peak and resident bytes before the reads took memory of their own.
    memory: (Option<u64>, Option<u64>),
}

impl Bandwidth {
    /// After a pass of the model: reads, if there is a decode to compare them with.
    fn pass(&mut self, reads: bool) {
        self.ticks += 1;
        // A first token and a warm-up come before the memory is as full as it gets.
        if self.ticks <= 2 || !reads {
            self.memory = (memory::peak_bytes(), memory::resident_bytes());
            return;
        }
        self.read();
    }

    fn read(&mut self) {
        let reads = self.reads.get_or_insert_with(ReadBandwidth::new);
        self.passes.push(reads.pass());
    }

    /// Bytes per second.
    fn median(&mut self) -> Option<f64> {
        if self.passes.is_empty() {
            self.read();
        }
        median(&mut self.passes)
    }
}

/// Passes of a measurement, first token and warm-up included.
fn passes(options: SpeedOptions) -> u64 {
    let (prefill, decode) = (options.prompt_tokens > 0, options.generate_tokens > 0);
    let kinds = u64::from(prefill) + u64::from(decode);
    1 + u64::from(prefill) + kinds * options.repeats as u64
}

fn print(report: &Report) {
    let mut table = table(&[
        "model",
        "file",
        "threads",
        "prefill tok/s",
        "decode tok/s",
        "of bandwidth",
        "resident",
        "load",
        "first token",
        "from start",
    ]);
    for row in &report.rows {
        let Some(speed) = &row.speed else { continue };
        table.add_row([
            row.name.clone(),
            row.size
                .as_ref()
                .map(|size| format::bytes(size.file_bytes))
                .unwrap_or_default(),
            speed.threads.to_string(),
            rate(speed.prefill_tokens_per_second, &speed.prefill_samples),
            rate(speed.decode_tokens_per_second, &speed.decode_samples),
            share(speed),
            row.resident_memory_bytes.map(format::bytes).unwrap_or_default(),
            seconds(row.load_seconds),
            seconds(speed.first_token_seconds),
            seconds(row.first_answer_seconds),
        ]);
    }
    say!("{table}");
    for row in &report.rows {
        row.expert_use
            .iter()
            .for_each(|used| experts::print(&row.name, used));
    }
}

/// Median with the range of the repeats.
fn rate(median: Option<f64>, samples: &[f64]) -> String {
    let Some(median) = median else {
        return String::new();
    };
    let low = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let high = samples.iter().copied().fold(0.0, f64::max);
    format!("{median:.1} ({low:.1}–{high:.1})")
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map(|s| format!("{s:.3} s")).unwrap_or_default()
}

fn share(speed: &SpeedReport) -> String {
    match (speed.bandwidth_share, speed.bandwidth) {
        (Some(share), Some(reads)) => format!("{:.0} % of {:.1} GB/s", 100.0 * share, reads / 1e9),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(line: &[&str]) -> Option<Bench> {
        let line = ["nashswarm", "bench"].iter().chain(line);
        match Cli::try_parse_from(line).ok()?.command {
            Command::Bench(bench) => Some(bench),
            _ => None,
        }
    }

    #[test]
    fn a_model_is_measured_unless_routing_is_named() {
        for line in [
            &["m.gguf"][..],
            &["-m", "m.gguf"],
            &["m.gguf", "-p", "16", "-t", "1,2"],
        ] {
            let bench = parse(line).unwrap();
            assert!(
                bench.other.is_none() && bench.model.path() == Path::new("m.gguf"),
                "{line:?}"
            );
        }
        assert_eq!(
            parse(&["./routing"]).unwrap().model.path(),
            Path::new("./routing")
        );
        for line in [
            &["routing"][..],
            &["routing", "--shape", "plan,e64", "-r", "3", "-t", "1"],
        ] {
            assert!(parse(line).unwrap().other.is_some(), "{line:?}");
        }
        for wrong in [
            &[][..],
            &["m.gguf", "routing"],
            &["routing", "m.gguf"],
            &["routing", "-p", "16"],
            &["routing", "-r", "0"],
        ] {
            assert!(parse(wrong).is_none(), "{wrong:?}");
        }
    }
}
