//! The whole way on a tiny random model: budgets, resume, verification, bad input.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nash_core::{ModelFile, PackedFolder};
use nash_models::{KvCache, Model};
use nash_quant::{
    Budget, Calibration, CompressOptions, Method, Progress, QuantError, Report, Sensitivity, VerifyOptions,
    compress, verify,
};
use rand::{RngExt, SeedableRng};

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// A tiny random model of another crate's golden tests.
fn golden(name: &str) -> Result<ModelFile, nash_core::CoreError> {
    ModelFile::open(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../nash-models/tests/golden")
            .join(name),
    )
}

fn windows(count: usize) -> Vec<Vec<u32>> {
    let mut rng = rand_pcg::Pcg64Mcg::seed_from_u64(7);
    (0..count)
        .map(|_| (0..32).map(|_| rng.random_range(0..64)).collect())
        .collect()
}

fn options(bits: f64) -> CompressOptions {
    let calibration = Calibration {
        windows: windows(6),
        description: "random tokens".into(),
    };
    CompressOptions {
        budget: Budget::BitsPerWeight(bits),
        calibration,
        ..CompressOptions::default()
    }
}

fn run(out: &Path, options: &CompressOptions, progress: &dyn Progress) -> Result<Report, QuantError> {
    compress(&golden("llama")?, &|_| Ok(()), out, options, progress)
}

fn files_of(dir: &Path) -> std::io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        files.push((path.file_name().unwrap_or_default().into(), std::fs::read(&path)?));
    }
    files.sort();
    Ok(files)
}

/// Asks to stop after a number of steps.
struct StopAfter(AtomicU64);

impl Progress for StopAfter {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, n: u64) {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.saturating_sub(n), Ordering::Relaxed);
    }
    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// Bits per weight that leave room for `share` of the way from the smallest file to 8 bits.
fn feasible(share: f64) -> Result<f64, QuantError> {
    let config = Model::load(&golden("llama")?)?.config().clone();
    let generous = nash_quant::plan(&config, &options(64.0))?;
    let smallest = generous.smallest_bytes as f64;
    Ok((smallest + share * (generous.file_bytes as f64 - smallest)) * 8.0 / generous.weights as f64)
}

/// Solved in order, the layers are an equilibrium of what they read in the compressed model, which `verify` finds again; the bytes are others than
/// those of layers solved apart, and the same every time.
#[test]
fn layers_solved_in_order_are_an_equilibrium_of_what_they_read() -> TestResult {
    let dir = tempfile::tempdir()?;
    let all = VerifyOptions {
        rows_per_tensor: usize::MAX,
    };
    let mut files = Vec::new();
    for (name, propagation) in [("apart", 0.0), ("ordered", 0.5), ("again", 0.5)] {
        let out = dir.path().join(name);
        let options = CompressOptions {
            propagation,
            ..options(feasible(0.2)?)
        };
        let report = run(&out, &options, &())?;
        assert_eq!((report.propagation, report.unsettled), (propagation, 0), "{name}");
        let found = verify(&PackedFolder::open(&out)?, Some(&golden("llama")?), all, &())?;
        let found = found.equilibrium.ok_or("no equilibrium")?;
        assert_eq!(
            (found.unsettled, found.rows.len()),
            (0, report.rows.len()),
            "{name}"
        );
        assert!(found.players > 1000 && found.max_regret < 1e-5, "{name}");
        files.push(std::fs::read(out.join("model.safetensors"))?);
    }
    assert_ne!(files[0], files[1]);
    assert_eq!(files[1], files[2]);
    Ok(())
}

#[test]
fn the_file_keeps_to_its_budget_and_loads_and_is_an_equilibrium() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("packed");
    let report = run(&out, &options(feasible(0.4)?), &())?;
    assert!(
        report.file_bytes <= report.budget_bytes,
        "{} of {}",
        report.file_bytes,
        report.budget_bytes
    );
    assert_eq!(report.unsettled, 0);
    assert!(!dir.path().join("packed.work").exists(), "scratch is removed");
    let folder = PackedFolder::open(&out)?;
    assert_eq!(Report::read(&folder)?.rows, report.rows);
    let model = Model::load(&ModelFile::open(&out)?)?;
    let hidden = model.forward(&windows(1)[0], &mut KvCache::new(model.config(), 64), &mut ())?;
    assert!(hidden.iter().all(|v| v.is_finite()));
    let all = VerifyOptions {
        rows_per_tensor: usize::MAX,
    };
    let found = verify(&folder, Some(&golden("llama")?), all, &())?
        .equilibrium
        .ok_or("no equilibrium was checked")?;
    assert_eq!(found.unsettled, 0);
    assert!(found.players > report.weights / 2, "{found:?}");
    Ok(())
}

#[test]
fn a_stopped_run_resumes_to_the_same_bytes() -> TestResult {
    resumes_to_the_same_bytes(Sensitivity::Measured, 0.0)
}

#[test]
fn a_stopped_run_in_order_resumes_to_the_same_bytes() -> TestResult {
    resumes_to_the_same_bytes(Sensitivity::Measured, 0.5)
}

#[test]
fn a_stopped_run_with_gradients_resumes_to_the_same_bytes() -> TestResult {
    resumes_to_the_same_bytes(Sensitivity::Gradient, 0.0)
}

fn resumes_to_the_same_bytes(sensitivity: Sensitivity, propagation: f32) -> TestResult {
    let dir = tempfile::tempdir()?;
    let (whole, resumed) = (dir.path().join("whole"), dir.path().join("resumed"));
    let mut options = CompressOptions {
        sensitivity,
        propagation,
        ..options(feasible(0.5)?)
    };
    run(&whole, &options, &())?;
    options.resume = true;
    let mut stops = 0;
    for steps in [2, 5, 9, 14, 20, 24, 28, 30, 45] {
        match run(&resumed, &options, &StopAfter(AtomicU64::new(steps))) {
            Err(QuantError::Cancelled) => stops += 1,
            Ok(_) => break,
            Err(e) => return Err(e.into()),
        }
        assert!(!resumed.join("config.json").exists(), "nothing looks finished");
    }
    assert!(stops >= 2, "{stops}");
    if !resumed.exists() {
        run(&resumed, &options, &())?;
    }
    assert!(
        files_of(&whole)? == files_of(&resumed)?,
        "resumed and whole runs differ"
    );
    Ok(())
}

#[test]
fn gradients_predict_the_divergence_and_leave_an_equilibrium() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("packed");
    let options = CompressOptions {
        sensitivity: Sensitivity::Gradient,
        ..options(feasible(0.6)?)
    };
    let report = run(&out, &options, &())?;
    assert_eq!(report.sensitivity, Sensitivity::Gradient);
    let predicted = report.predicted_kl.ok_or("nothing was predicted")?;
    let measured = report.candidates.first().ok_or("nothing was measured")?.1;
    // Second order, outputs taken as independent, 192 tokens: the order of magnitude must be right.
    assert!(
        predicted < 4.0 * measured && measured < 4.0 * predicted,
        "predicted {predicted}, measured {measured}"
    );
    let all = VerifyOptions {
        rows_per_tensor: usize::MAX,
    };
    let found = verify(&PackedFolder::open(&out)?, Some(&golden("llama")?), all, &())?
        .equilibrium
        .ok_or("no equilibrium was checked")?;
    assert_eq!(found.unsettled, 0, "verify computes the same Hessians again");
    Ok(())
}

#[test]
fn models_without_a_reverse_pass_are_measured() -> TestResult {
    let dir = tempfile::tempdir()?;
    let source = golden("mixtral")?;
    let options = CompressOptions {
        sensitivity: Sensitivity::Gradient,
        ..options(12.0)
    };
    let report = compress(&source, &|_| Ok(()), &dir.path().join("packed"), &options, &())?;
    assert_eq!(report.sensitivity, Sensitivity::Measured);
    Ok(())
}

#[test]
fn experts_stored_in_four_bits_are_packed_and_verified() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("packed");
    let source = golden("gpt_oss_mxfp4")?;
    compress(&source, &|_| Ok(()), &out, &options(12.0), &())?;
    let all = VerifyOptions {
        rows_per_tensor: usize::MAX,
    };
    let found = verify(&PackedFolder::open(&out)?, Some(&source), all, &())?;
    let found = found.equilibrium.ok_or("no equilibrium was checked")?;
    assert_eq!(found.unsettled, 0);
    let (source, packed) = (Model::load(&source)?, Model::load(&ModelFile::open(&out)?)?);
    assert_eq!(packed.linears(), source.linears());
    assert_eq!(packed.float_tensors().len(), source.float_tensors().len());
    Ok(())
}

#[test]
fn every_method_makes_a_model_and_the_games_lose_least() -> TestResult {
    let dir = tempfile::tempdir()?;
    let bits = feasible(0.25)?;
    let tokens = &windows(9)[8];
    let logits = |file: &ModelFile| -> Result<Vec<f32>, nash_models::ModelError> {
        let model = Model::load(file)?;
        let hidden = model.forward(tokens, &mut KvCache::new(model.config(), 64), &mut ())?;
        let mut out = vec![0.0; tokens.len() * model.config().vocab_size];
        model.logits(&hidden, &mut out, &mut ());
        Ok(out)
    };
    let reference = logits(&golden("llama")?)?;
    let mut errors = Vec::new();
    for method in [Method::Nash, Method::Gptq, Method::RoundToNearest] {
        let out = dir.path().join(format!("{method:?}"));
        run(
            &out,
            &CompressOptions {
                method,
                ..options(bits)
            },
            &(),
        )?;
        let found = logits(&ModelFile::open(&out)?)?;
        errors.push(
            reference
                .iter()
                .zip(found)
                .map(|(a, b)| f64::from((a - b) * (a - b)))
                .sum::<f64>(),
        );
    }
    assert!(errors[0] < errors[1] && errors[0] < errors[2], "{errors:?}");
    Ok(())
}

#[test]
fn damage_and_strangers_are_noticed() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("packed");
    let options = options(feasible(0.4)?);
    run(&out, &options, &())?;
    assert!(matches!(
        run(&out, &options, &()),
        Err(QuantError::OutputExists { .. })
    ));
    let stranger = verify(
        &PackedFolder::open(&out)?,
        Some(&golden("qwen2")?),
        VerifyOptions::default(),
        &(),
    );
    assert!(matches!(stranger, Err(QuantError::Mismatch(_))), "{stranger:?}");
    let weights = out.join("model.safetensors");
    let mut bytes = std::fs::read(&weights)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes)?;
    assert!(verify(&PackedFolder::open(&out)?, None, VerifyOptions::default(), &()).is_err());
    Ok(())
}

#[test]
fn impossible_wishes_are_refused_before_anything_is_written() -> TestResult {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("packed");
    let small = run(&out, &options(0.5), &());
    assert!(
        matches!(small, Err(QuantError::BudgetTooSmall { .. })),
        "{small:?}"
    );
    let mut no_text = options(feasible(0.5)?);
    no_text.calibration.windows.clear();
    assert!(matches!(
        run(&out, &no_text, &()),
        Err(QuantError::CalibrationTooShort { tokens: 0, .. })
    ));
    assert!(!out.exists());
    Ok(())
}
