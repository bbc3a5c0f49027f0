//! Every way to divide the bytes, on tiny random models; vocabularies in ranges.

use std::path::{Path, PathBuf};

use nash_core::gguf_write::GgufWriter;
use nash_core::{CoreError, ModelFile, PackedFolder, Tensor};
use nash_models::{Model, ModelConfig};
use nash_quant::{
    Allocation, Budget, Calibration, CompressOptions, QuantError, Report, VerifyOptions, compress, verify,
};
use rand::{RngExt, SeedableRng};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const VOCAB: usize = 4099;
const WIDTH: usize = 64;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-0.2f32..0.2)).collect()
}

/// Writes a Llama of two layers whose vocabulary is large enough to be cut.
fn write_model(path: &Path) -> Result<(), CoreError> {
    let (layers, feed) = (2u32, 2 * WIDTH);
    let mut writer = GgufWriter::new()
        .metadata("general.architecture", "llama")
        .metadata("llama.block_count", layers)
        .metadata("llama.context_length", 64u32)
        .metadata("llama.embedding_length", WIDTH as u32)
        .metadata("llama.feed_forward_length", feed as u32)
        .metadata("llama.attention.head_count", 4u32)
        .metadata("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .metadata("llama.vocab_size", VOCAB as u32);
    let mut tensors = vec![
        ("token_embd".to_owned(), vec![VOCAB, WIDTH]),
        ("output_norm".to_owned(), vec![WIDTH]),
    ];
    for layer in 0..layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        tensors.extend(["attn_norm", "ffn_norm"].map(|part| (name(part), vec![WIDTH])));
        tensors.extend(
            ["attn_q", "attn_k", "attn_v", "attn_output"].map(|part| (name(part), vec![WIDTH, WIDTH])),
        );
        tensors.extend(["ffn_gate", "ffn_up"].map(|part| (name(part), vec![feed, WIDTH])));
        tensors.push((name("ffn_down"), vec![WIDTH, feed]));
    }
    for (seed, (name, shape)) in tensors.into_iter().enumerate() {
        let mut values = random(shape.iter().product(), seed as u64);
        if shape.len() == 1 {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        writer = writer.tensor(Tensor::from_f32(format!("{name}.weight"), shape, &values)?);
    }
    writer.write(path)
}

struct Bench {
    dir: tempfile::TempDir,
    source: ModelFile,
}

impl Bench {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.gguf");
        write_model(&path)?;
        let source = ModelFile::open(&path)?;
        Ok(Self { dir, source })
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Half of the way from the smallest file to one of 8 bits.
    fn options(&self) -> Result<CompressOptions, Box<dyn std::error::Error>> {
        let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(5);
        let window = |_| (0..32).map(|_| rng.random_range(0..VOCAB as u32)).collect();
        let mut options = CompressOptions {
            calibration: Calibration {
                windows: (0..6).map(window).collect(),
                description: "random tokens".into(),
            },
            budget: Budget::BitsPerWeight(64.0),
            evaluations: 12,
            ..CompressOptions::default()
        };
        let config = Model::load(&self.source)?.config().clone();
        let plan = nash_quant::plan(&config, &options)?;
        options.budget = Budget::Bytes((plan.smallest_bytes + plan.file_bytes) / 2);
        Ok(options)
    }

    fn compress(&self, name: &str, options: &CompressOptions) -> Result<Report, QuantError> {
        compress(&self.source, &|_| Ok(()), &self.out(name), options, &())
    }
}

#[test]
fn every_allocation_keeps_to_the_budget_and_is_an_equilibrium() -> TestResult {
    let bench = Bench::new()?;
    let options = CompressOptions {
        work_dir: Some(bench.out("work")),
        ..bench.options()?
    };
    for (allocation, winners) in [
        (Allocation::Market, ["market", "uniform"].as_slice()),
        (Allocation::Swarm, &["swarm", "market", "uniform"]),
        (Allocation::Uniform, &["uniform"]),
        (Allocation::Greedy, &["greedy"]),
        (Allocation::Knapsack, &["knapsack"]),
        (Allocation::Pairwise, &["pairwise"]),
        (Allocation::Evolution, &["evolution"]),
    ] {
        let name = format!("{allocation:?}");
        let options = CompressOptions {
            allocation,
            ..options.clone()
        };
        let report = bench.compress(&name, &options)?;
        assert!(report.file_bytes <= report.budget_bytes, "{name}");
        assert!(
            winners.contains(&report.profile.as_str()),
            "{name}: {}",
            report.profile
        );
        let packed = PackedFolder::open(bench.out(&name))?;
        let all = VerifyOptions {
            rows_per_tensor: usize::MAX,
        };
        let found = verify(&packed, Some(&bench.source), all, &())?.equilibrium;
        assert_eq!(found.map(|e| e.unsettled), Some(0), "{name}");
    }
    Ok(())
}

#[test]
fn ranges_of_the_vocabulary_are_tensors_of_their_own() -> TestResult {
    let bench = Bench::new()?;
    let report = bench.compress("packed", &bench.options()?)?;
    let ranges: Vec<&str> = report
        .rows
        .iter()
        .map(|row| row.name.as_str())
        .filter(|name| name.starts_with("model.embed_tokens."))
        .collect();
    assert_eq!(ranges.len(), 10, "{ranges:?}");
    let file = ModelFile::open(bench.out("packed"))?;
    let (packed, source) = (Model::load(&file)?, Model::load(&bench.source)?);
    let ranges: &ModelConfig = packed.config();
    assert_eq!(ranges.vocab_parts.ranges.iter().sum::<usize>(), VOCAB);
    // The first and last row of every range, against the source.
    let (mut first, mut tokens) = (0, Vec::new());
    for rows in &ranges.vocab_parts.ranges {
        tokens.extend([first as u32, (first + rows - 1) as u32]);
        first += rows;
    }
    let embedded = |model: &Model| {
        let mut x = Vec::new();
        model.embed(&tokens, 0, &mut x).map(|()| x)
    };
    let (a, b) = (embedded(&source)?, embedded(&packed)?);
    for (token, (a, b)) in tokens.iter().zip(a.chunks(WIDTH).zip(b.chunks(WIDTH))) {
        let error: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
        let energy: f32 = a.iter().map(|a| a * a).sum();
        // Two bits leave an error of 7 % of the energy; another row than the right one would leave 200 %.
        assert!(error < 0.3 * energy, "token {token}: {error} of {energy}");
    }
    Ok(())
}

#[test]
fn reuse_changes_no_byte() -> TestResult {
    let bench = Bench::new()?;
    let options = bench.options()?;
    bench.compress("a", &options)?;
    bench.compress(
        "b",
        &CompressOptions {
            reuse: false,
            ..options
        },
    )?;
    let weights = |name: &str| std::fs::read(bench.out(name).join("model.safetensors"));
    assert!(weights("a")? == weights("b")?);
    Ok(())
}

#[test]
fn without_joint_moves_the_rounding_errs_more() -> TestResult {
    let bench = Bench::new()?;
    let errors = |joint_moves: bool| -> Result<f64, Box<dyn std::error::Error>> {
        let options = CompressOptions {
            allocation: Allocation::Uniform,
            joint_moves,
            ..bench.options()?
        };
        let report = bench.compress(if joint_moves { "joint" } else { "single" }, &options)?;
        Ok(report.rows.iter().map(|row| row.error).sum())
    };
    let (joint, single) = (errors(true)?, errors(false)?);
    assert!(joint < single, "{joint} {single}");
    Ok(())
}
