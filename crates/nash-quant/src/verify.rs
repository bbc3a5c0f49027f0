//! Checking a packed folder: checksums, and the equilibrium again from the source model.

use std::sync::Arc;

use nash_core::{ModelFile, PackedFolder};
use nash_games::RoundingCertificate;
use nash_games::rounding::Problem;
use nash_models::{LinearInfo, ModelConfig, PackedLinear};

use crate::QuantError;
use crate::compress::source_hash;
use crate::options::{Calibration, CompressOptions, Method};
use crate::packed::{load, load_in_parts};
use crate::progress::Progress;
use crate::report::{Report, TensorRow};
use crate::scratch::Scratch;
use crate::session::{Session, packable};
use crate::tensor::certify;
use crate::write::CALIBRATION_FILE;

/// How thoroughly to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Rows per tensor whose players are checked; `usize::MAX` checks every player.
    pub rows_per_tensor: usize,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { rows_per_tensor: 64 }
    }
}

/// What the check found.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Verification {
    /// Tensors whose checksum was compared; all agree, or there is an error.
    pub checksums: usize,
    /// The equilibrium, if a source model was given and the folder was made by the games.
    pub equilibrium: Option<Equilibrium>,
}

/// The equilibrium as recomputed from the source.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Equilibrium {
    /// Largest regret found, as a share of the energy of the player's row.
    pub max_regret: f64,
    /// Players checked.
    pub players: u64,
    /// Players who could still gain more than the solver's threshold.
    pub unsettled: u64,
    /// One row per tensor.
    pub rows: Vec<TensorRow>,
}

/// Verifies `packed`; with `source` also that it is an equilibrium of the games on that model and the recorded calibration tokens.
///
/// # Errors
/// If a checksum differs, the source is another model, or the calibration tokens are gone.
pub fn verify(
    packed: &PackedFolder,
    source: Option<&ModelFile>,
    options: VerifyOptions,
    progress: &dyn Progress,
) -> Result<Verification, QuantError> {
    let report = Report::read(packed)?;
    progress.stage("checksums", packed.file_bytes());
    let mut before = 0;
    packed.verify(|done| progress.advance(done - std::mem::replace(&mut before, done)))?;
    let checksums = packed.packed_tensors().len();
    let equilibrium = match source {
        Some(source) if report.method == Method::Nash => {
            Some(equilibrium(packed, &report, source, options, progress)?)
        }
        _ => None,
    };
    Ok(Verification {
        checksums,
        equilibrium,
    })
}

fn equilibrium(
    packed: &PackedFolder,
    report: &Report,
    source: &ModelFile,
    verify: VerifyOptions,
    progress: &dyn Progress,
) -> Result<Equilibrium, QuantError> {
    let parts = ModelConfig::from_packed(packed.config())?.vocab_parts;
    let model = load_in_parts(source, |_| parts)?;
    let found = source_hash(source, progress)?;
    if found != report.source_sha256 {
        return Err(QuantError::Mismatch(format!(
            "the source is not the model that was compressed: its weights have SHA-256 {found}, the folder was made from {} ({})",
            report.source_sha256, report.source
        )));
    }
    let dir = packed
        .dir()
        .ok_or_else(|| QuantError::Mismatch("the packed model is not in a folder".into()))?;
    let path = dir.join(CALIBRATION_FILE);
    let bytes = std::fs::read(&path).map_err(|e| QuantError::io(&path, e))?;
    let windows = serde_json::from_slice(&bytes).map_err(|source| QuantError::Json {
        what: path.display().to_string(),
        source,
    })?;
    let options = CompressOptions {
        calibration: Calibration {
            windows,
            description: report.calibration.clone(),
        },
        damping: report.damping,
        propagation: report.propagation,
        start: report.start,
        codebook: report.codebook,
        sensitivity: report.sensitivity,
        seed: report.seed,
        ..CompressOptions::default()
    };
    let work = tempfile::tempdir().map_err(|e| QuantError::io(&std::env::temp_dir(), e))?;
    let scratch = Scratch::open(&work.path().join("hessians"), "verify")?;
    let session = Session {
        linears: packable(&model),
        model,
        options: &options,
        scratch,
        progress,
    };
    session.calibrate()?;
    let certificates = certificates(&session, packed, source, verify)?;
    let mut result = Equilibrium {
        max_regret: 0.0,
        players: 0,
        unsettled: 0,
        rows: Vec::new(),
    };
    for (info, certificate) in session.linears.iter().zip(certificates) {
        result.max_regret = result.max_regret.max(certificate.max_regret);
        result.players += certificate.players;
        result.unsettled += certificate.unsettled;
        let bits = packed.packed(&info.name)?.shape().width.bits();
        let recorded = report.rows.iter().find(|r| r.name == info.name);
        let sweeps = recorded.map_or(0, |r| r.sweeps);
        result
            .rows
            .push(TensorRow::new(&info.name, bits, sweeps, &certificate));
    }
    Ok(result)
}

/// The certificate of every linear, each against the inputs and the target that it was solved for.
fn certificates(
    session: &Session<'_>,
    packed: &PackedFolder,
    source: &ModelFile,
    verify: VerifyOptions,
) -> Result<Vec<RoundingCertificate>, QuantError> {
    session.progress.stage("certify", session.linears.len() as u64);
    let certificate = |info: &LinearInfo, weights: &[f32], hessian: &[f32]| {
        let problem = Problem {
            weights,
            cols: info.cols,
            hessian,
        };
        let stride = info.rows.div_ceil(verify.rows_per_tensor.max(1));
        certify(&info.name, problem, packed.packed(&info.name)?.as_ref(), stride)
    };
    let mut certificates = vec![RoundingCertificate::default(); session.linears.len()];
    for (slot, info) in certificates.iter_mut().zip(&session.linears) {
        if !session.in_order(info) {
            *slot = certificate(info, &session.weights(info)?, &session.hessian(info)?)?;
            session.progress.advance(1);
        }
    }
    if session.propagation() > 0.0 {
        // The source with packed linears, as it was when they were solved: norms may have been tuned since.
        let mut model = load(session, source)?;
        for info in &session.linears {
            let linear = PackedLinear::new(packed.packed(&info.name)?);
            model.set_linear(&info.name, Arc::new(linear))?;
        }
        session.each_in_order(&mut model, &|_| true, &mut |index, moments, _| {
            let info = &session.linears[index];
            certificates[index] = certificate(info, &session.target(info, moments)?, &moments.hessian)?;
            Ok(())
        })?;
    }
    Ok(certificates)
}
