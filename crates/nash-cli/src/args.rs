//! What a user can type. Arguments of one command stand in that command's file; those that several share stand here.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use nash_models::{KvType, SamplingParams};
use nash_quant::Effort;

use crate::commands;

/// Make a language model small, prove it, measure it and run it, on a CPU.
///
/// A MODEL is a GGUF file, a Hugging Face folder (config.json, *.safetensors, tokenizer.json), a folder that `compress`
/// wrote, or the name of a model that `pull` has fetched.
#[derive(Debug, Parser)]
#[command(
    name = "nashswarm",
    version,
    about,
    long_about,
    max_term_width = 100,
    propagate_version = true
)]
#[command(after_help = "Examples:
  nashswarm demo                                   see it all on a small real model
  nashswarm compress model.gguf -o small           compress to 4.25 bits per weight
  nashswarm eval small --reference model.gguf      how much was lost
  nashswarm chat small                             talk to it

`nashswarm help COMMAND` has examples for each command.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print results and errors only
    #[arg(short, long, global = true, env = "NASHSWARM_QUIET", display_order = 1000)]
    pub(crate) quiet: bool,
    /// Say more; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 1000)]
    pub(crate) verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(commands::demo::Demo),
    Compress(commands::compress::Compress),
    Carve(commands::carve::Carve),
    Eval(commands::eval::Eval),
    Compare(commands::compare::Compare),
    Ablate(commands::ablate::Ablate),
    Glue(commands::glue::Glue),
    Run(commands::run::Run),
    Chat(commands::chat::Chat),
    Inspect(commands::inspect::Inspect),
    Verify(commands::verify::Verify),
    Plan(commands::plan::Plan),
    Bench(commands::bench::Bench),
    Pull(commands::pull::Pull),
    List(commands::list::List),
    Completions(commands::completions::Completions),
    Man(commands::man::Man),
}

/// The model of a command, as a position or as `-m`.
#[derive(Debug, Args)]
pub(crate) struct ModelArg {
    /// GGUF file, model folder, or name of a fetched model
    #[arg(value_name = "MODEL", required_unless_present = "model_option")]
    model: Option<PathBuf>,
    /// The same as MODEL, for fingers used to llama.cpp
    #[arg(
        short = 'm',
        long = "model",
        value_name = "MODEL",
        conflicts_with = "model",
        hide_short_help = true
    )]
    model_option: Option<PathBuf>,
}

impl ModelArg {
    /// What was given.
    pub(crate) fn path(&self) -> &Path {
        // clap requires one of the two.
        self.model
            .as_deref()
            .or(self.model_option.as_deref())
            .unwrap_or(Path::new(""))
    }
}

/// The models of a command, as positions or as `-m`.
#[derive(Debug, Args)]
pub(crate) struct ModelsArg {
    /// Models to measure
    #[arg(value_name = "MODEL", required_unless_present = "model_option")]
    models: Vec<PathBuf>,
    /// The same as MODEL
    #[arg(short = 'm', long = "model", value_name = "MODEL", hide_short_help = true)]
    model_option: Vec<PathBuf>,
}

impl ModelsArg {
    /// What was given, at least one.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.models.iter().chain(&self.model_option).map(PathBuf::as_path)
    }
}

/// Number of threads of a command.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Threads {
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", env = "NASHSWARM_THREADS", value_parser = value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Threads {
    /// Gives this many threads to all further work; to be called once, before it.
    pub(crate) fn apply(self) -> anyhow::Result<()> {
        Ok(nash_kernels::pool::set_threads(self.threads.unwrap_or(0).into())?)
    }
}

/// Names of the types of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvName {
    /// In half precision
    F16,
    /// 8 bits: half the memory, faster in long contexts
    Q8,
}

impl From<KvName> for KvType {
    fn from(name: KvName) -> Self {
        match name {
            KvName::F16 => Self::F16,
            KvName::Q8 => Self::Q8,
        }
    }
}

/// The KV cache of a command that generates.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct KvArg {
    /// How keys and values are stored
    #[arg(
        long,
        visible_alias = "ctk",
        value_name = "TYPE",
        default_value = "q8",
        env = "NASHSWARM_KV_TYPE"
    )]
    pub(crate) kv_type: KvName,
}

/// Names of the efforts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// Scalar codebooks, one width everywhere, few sweeps
    Least,
    /// Scalar codebooks, a market with few measurements, few sweeps
    Quick,
    /// Trellis codebooks, a market with few measurements, layers that make up for errors before them
    Short,
    /// Everything that pays
    Normal,
    /// Also what takes long: a swarm refines the market, norms and biases are tuned
    Thorough,
}

impl From<Work> for Effort {
    fn from(work: Work) -> Self {
        match work {
            Work::Least => Self::Least,
            Work::Quick => Self::Quick,
            Work::Short => Self::Short,
            Work::Normal => Self::Normal,
            Work::Thorough => Self::Thorough,
        }
    }
}

/// A file for the results as JSON.
#[derive(Debug, Args)]
pub(crate) struct Json {
    /// Also write the results as JSON to FILE; `-` prints them instead of the table
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

impl Json {
    /// Whether the JSON takes the place of the table.
    pub(crate) fn replaces_table(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }

    /// Writes the results where the user wants them, if anywhere.
    pub(crate) fn write(&self, results: &impl serde::Serialize) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let Some(path) = &self.json else { return Ok(()) };
        let mut text = serde_json::to_string_pretty(results)?;
        text.push('\n');
        if self.replaces_table() {
            crate::out::write(format_args!("{text}"));
            return Ok(());
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// How tokens are chosen. The defaults are llama.cpp's.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct Sampling {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.8, env = "NASHSWARM_TEMP")]
    temp: f32,
    /// Choose among the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Choose among the most likely tokens that have this share together; 1 for all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one; 0 for none
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Divide the logits of recent tokens by this; 1 for no penalty
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// How many tokens are recent
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_last_n: usize,
    /// Seed of the choices; the same seed gives the same answer [default: another one each time]
    #[arg(short, long, value_name = "N", env = "NASHSWARM_SEED")]
    seed: Option<u64>,
    /// Stop before this text appears; can be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

impl Sampling {
    /// The parameters of the sampler.
    pub(crate) fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            seed: self.seed.unwrap_or_else(seed_from_clock),
        }
    }
}

fn seed_from_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |elapsed| elapsed.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_model_can_be_a_position_or_an_option() {
        for line in [
            ["nashswarm", "inspect", "m.gguf"].as_slice(),
            &["nashswarm", "inspect", "-m", "m.gguf"],
        ] {
            let Command::Inspect(inspect) = Cli::try_parse_from(line).unwrap().command else {
                panic!()
            };
            assert_eq!(inspect.model.path(), Path::new("m.gguf"));
        }
        assert!(Cli::try_parse_from(["nashswarm", "inspect"]).is_err());
    }
}
