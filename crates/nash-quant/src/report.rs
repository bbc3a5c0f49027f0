//! What a compression did: written to `nashswarm.json` and returned to the caller.

use std::path::Path;

use nash_core::PackedFolder;
use nash_games::RoundingCertificate;

use crate::QuantError;
use crate::options::{Allocation, Budget, Codebook, Method, Sensitivity, Start};

/// The report of a compression.
///
/// What is written to `nashswarm.json` is a function of the input, so that equal input gives equal bytes: times are not, and neither are
/// the sizes that the report itself would change. Both are filled in when the report is returned or read back with [`Report::read`].
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// Version of the program that wrote it.
    pub created_by: String,
    /// File name of the source model.
    pub source: String,
    /// SHA-256 over the source's weights and settings.
    pub source_sha256: String,
    /// What was asked for.
    pub budget: Budget,
    /// The budget in bytes.
    pub budget_bytes: u64,
    /// Method.
    pub method: Method,
    /// Start of the game.
    pub start: Start,
    /// What codes are worth.
    pub codebook: Codebook,
    /// How the bytes were to be divided; [`Self::profile`] says what won.
    #[serde(default)]
    pub allocation: Allocation,
    /// How losses were known, and with it the Hessians.
    #[serde(default = "measured")]
    pub sensitivity: Sensitivity,
    /// Seed.
    pub seed: u64,
    /// Damping of the Hessians.
    pub damping: f64,
    /// Share of the drift of their inputs that linears made up for; 0 if each was solved against the source's inputs.
    #[serde(default)]
    pub propagation: f32,
    /// Calibration text.
    pub calibration: String,
    /// Tokens of the calibration windows that the Hessians saw.
    pub calibration_tokens: u64,
    /// Parameters, packed or not.
    pub weights: u64,
    /// Bytes of the model files (`model.safetensors`, `config.json`, `nashswarm.json`).
    #[serde(default)]
    pub file_bytes: u64,
    /// `8 · file_bytes / weights`.
    #[serde(default)]
    pub file_bits_per_weight: f64,
    /// Bits per weight of the packed tensors with their scales and codebooks.
    pub linear_bits_per_weight: f64,
    /// Which allocation won: `market` or `uniform`.
    pub profile: String,
    /// Measured KL divergence (nats per token) of each candidate allocation on held-back calibration text, with the layers drafted in which effects
    /// are measured.
    pub candidates: Vec<(String, f64)>,
    /// KL divergence the market's additive model predicted for its allocation.
    pub predicted_kl: Option<f64>,
    /// Clearing price in nats per byte.
    pub price: Option<f64>,
    /// Budget minus file bytes.
    #[serde(default)]
    pub unspent_bytes: u64,
    /// What tuning of norms and biases did, if it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuning>,
    /// Largest regret of any certified weight or scale, as a share of its row's energy.
    pub max_regret: f64,
    /// Certified players who could still gain.
    pub unsettled: u64,
    /// One row per packed tensor.
    pub rows: Vec<TensorRow>,
    /// Wall-clock seconds; absent from the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress_seconds: Option<f64>,
}

/// What reports said by not mentioning it.
fn measured() -> Sensitivity {
    Sensitivity::Measured
}

/// Fields that depend on the clock or on the size of the report itself.
const NOT_WRITTEN: [&str; 4] = [
    "file_bytes",
    "file_bits_per_weight",
    "unspent_bytes",
    "compress_seconds",
];

impl Report {
    /// The object that goes into the folder.
    pub(crate) fn to_map(&self) -> Result<serde_json::Map<String, serde_json::Value>, QuantError> {
        let value = serde_json::to_value(self).map_err(|source| QuantError::Json {
            what: "the report".into(),
            source,
        })?;
        let mut map = value.as_object().cloned().unwrap_or_default();
        NOT_WRITTEN.iter().for_each(|key| drop(map.remove(*key)));
        Ok(map)
    }

    /// Reads the report of a packed folder and fills in the sizes of its files.
    ///
    /// # Errors
    /// If the report is of another program or a file is gone.
    pub fn read(folder: &PackedFolder) -> Result<Self, QuantError> {
        let what = || "nashswarm.json".to_string();
        let mut report: Self = serde_json::from_value(folder.report().clone())
            .map_err(|source| QuantError::Json { what: what(), source })?;
        report.file_bytes = folder.dir().map_or(Ok(folder.file_bytes()), file_bytes)?;
        report.file_bits_per_weight = report.file_bytes as f64 * 8.0 / report.weights.max(1) as f64;
        report.unspent_bytes = report.budget_bytes.saturating_sub(report.file_bytes);
        Ok(report)
    }
}

/// Bytes of the model files of a folder: weights, configuration and report. Text files of the tokenizer and the calibration tokens, which
/// only `verify` reads, are listed apart.
fn file_bytes(dir: &Path) -> Result<u64, QuantError> {
    ["model.safetensors", "config.json", "nashswarm.json"]
        .iter()
        .try_fold(0, |sum, name| {
            let path = dir.join(name);
            Ok(sum
                + std::fs::metadata(&path)
                    .map_err(|e| QuantError::io(&path, e))?
                    .len())
        })
}

/// Tuning of the float tensors after rounding.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Tuning {
    /// Float tensors that were tuned: norms and biases.
    pub tensors: usize,
    /// Values in them.
    pub values: usize,
    /// Calibration tokens seen in an epoch.
    pub tokens: usize,
    /// Epochs run.
    pub epochs: usize,
    /// The epoch whose values were kept; 0 for the source's.
    pub best_epoch: usize,
    /// KL divergence (nats per token) on held-back calibration text before.
    pub kl_before: f64,
    /// The same with the values that were kept.
    pub kl_after: f64,
}

/// One packed tensor.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TensorRow {
    /// Canonical name.
    pub name: String,
    /// Bits per code.
    pub bits: usize,
    /// Sweeps played.
    pub sweeps: usize,
    /// Relative layer error `Φ / Σ w H wᵀ` on the certified rows.
    pub error: f64,
    /// Largest regret on the certified rows.
    pub regret: f64,
    /// Players on the certified rows who could still gain.
    pub unsettled: u64,
}

impl TensorRow {
    /// A row from a certificate; floats keep four digits, which keeps the file small.
    pub fn new(name: &str, bits: usize, sweeps: usize, certificate: &RoundingCertificate) -> Self {
        Self {
            name: name.into(),
            bits,
            sweeps,
            error: four_digits(certificate.relative_error),
            regret: four_digits(certificate.max_regret),
            unsettled: certificate.unsettled,
        }
    }
}

/// `x` rounded to four significant digits.
pub(crate) fn four_digits(x: f64) -> f64 {
    format!("{x:.3e}").parse().unwrap_or(x)
}
