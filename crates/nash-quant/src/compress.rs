//! The whole way from a source model to a packed folder.

use std::path::{Path, PathBuf};
use std::time::Instant;

use nash_core::ModelFile;
use nash_core::hash::Hasher;
use nash_models::{LinearInfo, Model};

use crate::QuantError;
use crate::allocate::{Inventory, Profile, fixed_widths};
use crate::judge::{Judge, Scope};
use crate::options::{Calibration, CompressOptions, Method};
use crate::packed::load_in_ranges;
use crate::progress::Progress;
use crate::propose::Wishes;
use crate::report::{Report, TensorRow, four_digits};
use crate::scratch::Scratch;
use crate::session::{Session, Solved, packable};
use crate::write::{self, Content, SaveTokenizer};

/// Tokens below which a calibration is refused.
const LEAST_TOKENS: usize = 64;

/// Compresses `source` to the folder `out`.
///
/// `save_tokenizer` writes the tokenizer's text files into a folder; they are not part of the counted size. The folder appears
/// under its name only when it is complete.
///
/// # Errors
/// On wrong input, an impossible budget, or a full disk; nothing is left under `out` then. After [`QuantError::Cancelled`] the same
/// call with [`CompressOptions::resume`] continues.
pub fn compress(
    source: &ModelFile,
    save_tokenizer: &SaveTokenizer<'_>,
    out: &Path,
    options: &CompressOptions,
    progress: &dyn Progress,
) -> Result<Report, QuantError> {
    let start = Instant::now();
    if out.exists() && !options.force {
        return Err(QuantError::OutputExists { path: out.into() });
    }
    let (training, held_back) = split(options)?;
    let options = &CompressOptions {
        calibration: training,
        ..options.clone()
    };
    let model = load_in_ranges(source)?;
    model.check_finite()?;
    // What is impossible is told before any work.
    crate::plan::check(model.config(), options)?;
    let source_sha256 = source_hash(source, progress)?;
    let work_dir = options.work_dir.clone().unwrap_or_else(|| work_dir_of(out));
    let scratch = open_scratch(&work_dir, options, &source_sha256)?;
    let mut session = Session {
        linears: packable(&model),
        model,
        options,
        scratch,
        progress,
    };
    session.calibrate()?;
    session.part_outliers(source)?;
    let inventory = Inventory::of(session.model.config());
    let fixed = fixed_widths(&inventory.linears, &options.tensor_types)?;
    let budget = options.budget.bytes(inventory.weights());
    let wishes = Wishes {
        inventory: &inventory,
        fixed: &fixed,
        budget,
    };
    let profiles = session.propose(source, &wishes)?;
    let Choice {
        profile,
        solved,
        candidates,
    } = select(&session, source, profiles, &held_back)?;
    let mut floats = write::floats(&session)?;
    let tuned = session.tune(source, &solved, &held_back)?;
    if let Some(tuned) = &tuned {
        // A tensor that was not tuned is not listed.
        for (name, _, values) in &mut floats {
            if let Some(tuned) = tuned.floats.get(name) {
                values.clone_from(tuned);
            }
        }
    }
    let rows = rows(&session.linears, &profile, &solved);
    let report = Report {
        created_by: concat!("nashswarm ", env!("CARGO_PKG_VERSION")).into(),
        source: source
            .path()
            .and_then(Path::file_name)
            .map(|n| n.to_string_lossy().into())
            .unwrap_or_default(),
        source_sha256,
        budget: options.budget,
        budget_bytes: budget,
        method: options.method,
        start: options.start,
        codebook: options.codebook,
        allocation: options.allocation,
        sensitivity: session.sensitivity_kind(),
        seed: options.seed,
        damping: options.damping,
        propagation: session.propagation(),
        calibration: options.calibration.description.clone(),
        calibration_tokens: options.calibration.windows.iter().map(|w| w.len() as u64).sum(),
        weights: inventory.weights(),
        file_bytes: 0,
        file_bits_per_weight: 0.0,
        linear_bits_per_weight: inventory.linear_bits_per_weight(&profile.widths),
        profile: profile.name.into(),
        candidates,
        predicted_kl: profile.predicted_kl.map(four_digits),
        price: profile.market.as_ref().map(|m| m.price),
        unspent_bytes: 0,
        tuning: tuned.map(|t| t.record),
        max_regret: rows.iter().map(|r| r.regret).fold(0.0, f64::max),
        unsettled: rows.iter().map(|r| r.unsettled).sum(),
        rows,
        compress_seconds: None,
    };
    let mut report = write::write(&session, &Content { solved, floats }, report, save_tokenizer, out)?;
    if options.work_dir.is_none() {
        session.scratch.remove()?;
    }
    report.compress_seconds = Some(start.elapsed().as_secs_f64());
    Ok(report)
}

/// Splits the last sixteenth of the windows off; they choose between candidate allocations and are seen by nothing else.
fn split(options: &CompressOptions) -> Result<(Calibration, Vec<Vec<u32>>), QuantError> {
    let mut training = options.calibration.clone();
    let tokens: usize = training.windows.iter().map(Vec::len).sum();
    if options.method == Method::RoundToNearest {
        return Ok((training, Vec::new()));
    }
    if tokens < LEAST_TOKENS {
        return Err(QuantError::CalibrationTooShort {
            tokens,
            least: LEAST_TOKENS,
        });
    }
    let held = (training.windows.len() / 16)
        .max(1)
        .min(training.windows.len() - 1);
    let held_back = training.windows.split_off(training.windows.len() - held);
    Ok((training, held_back))
}

fn work_dir_of(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".work");
    out.with_file_name(name)
}

/// SHA-256 over the source's weight values, as `f32`, in the order of the forward pass.
pub(crate) fn source_hash(source: &ModelFile, progress: &dyn Progress) -> Result<String, QuantError> {
    let model = Model::load(source)?;
    progress.stage("hash", model.linears().len() as u64);
    let mut hasher = Hasher::new();
    for info in model.linears() {
        hasher.update(info.name.as_bytes());
        if let Some(linear) = model.linear(&info.name) {
            let mut row = vec![0.0f32; info.cols];
            for r in 0..info.rows {
                linear.row(r, &mut row);
                hasher.update(bytemuck::cast_slice(&row));
            }
            linear.release();
        }
        progress.advance(1);
    }
    for (name, _, values) in model.float_tensors() {
        hasher.update(name.as_bytes());
        hasher.update(bytemuck::cast_slice(&values));
    }
    Ok(hasher.finish())
}

/// Opens the scratch folder for what determines its content: source, calibration, and the rounding options. The budget is not among them.
fn open_scratch(dir: &Path, options: &CompressOptions, source: &str) -> Result<Scratch, QuantError> {
    let mut text = Hasher::new();
    for window in &options.calibration.windows {
        text.update(&(window.len() as u64).to_le_bytes());
        text.update(bytemuck::cast_slice(window));
    }
    let fingerprint = format!(
        "{} source {source} calibration {} method {:?} start {:?} codebook {:?} damping {} sensitivity {:?} seed {} joint {} sweeps {} probe {} every {}",
        env!("CARGO_PKG_VERSION"),
        text.finish(),
        options.method,
        options.start,
        options.codebook,
        options.damping,
        options.sensitivity,
        options.seed,
        options.joint_moves,
        options.max_sweeps,
        options.probe_tokens,
        options.probe_layer_stride
    );
    if !options.resume && options.work_dir.is_none() && dir.exists() {
        Scratch::open(dir, &fingerprint)?.remove()?;
    }
    Scratch::open(dir, &fingerprint)
}

/// The allocation that won, and what was measured of each.
struct Choice {
    profile: Profile,
    solved: Vec<Solved>,
    candidates: Vec<(String, f64)>,
}

/// Solves the candidate allocation that has the lowest measured KL divergence on held-back text with the measured layers drafted; ties go to the first.
fn select(
    session: &Session<'_>,
    source: &ModelFile,
    mut profiles: Vec<Profile>,
    held_back: &[Vec<u32>],
) -> Result<Choice, QuantError> {
    let mut candidates = Vec::new();
    let mut best = (f64::INFINITY, 0);
    if profiles.len() > 1 && !held_back.is_empty() {
        let mut judge = Judge::new(session, source, held_back, Scope::Measured)?;
        for (index, profile) in profiles.iter().enumerate() {
            session.progress.stage("draft", session.linears.len() as u64);
            let kl = judge.kl(session, &profile.widths, &|| session.progress.advance(1))?;
            candidates.push((profile.name.to_string(), four_digits(kl)));
            if kl < best.0 {
                best = (kl, index);
            }
        }
    }
    let profile = profiles.swap_remove(best.1);
    session.progress.stage("solve", session.linears.len() as u64);
    let solved = if session.propagation() > 0.0 {
        session.solve_in_order(source, &profile.widths)?
    } else {
        session.solve_apart(&profile.widths)?
    };
    Ok(Choice {
        profile,
        solved,
        candidates,
    })
}

fn rows(linears: &[LinearInfo], profile: &Profile, solved: &[Solved]) -> Vec<TensorRow> {
    let records = solved.iter().map(|s| &s.record);
    let rows = linears.iter().zip(&profile.widths).zip(records);
    rows.map(|((info, width), r)| TensorRow::new(&info.name, width.bits(), r.sweeps, &r.certificate))
        .collect()
}
