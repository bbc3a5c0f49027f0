//! One model under compression: calibration and solved tensors, each computed once and kept in the scratch folder.

use std::sync::Arc;

use nash_core::ModelFile;
use nash_games::RoundingCertificate;
use nash_games::rounding::Problem;
use nash_kernels::{PackedMatrix, PackedRef, Width};
use nash_models::{KvCache, LinearInfo, Model, Site, VocabParts, decode_rows};

use crate::QuantError;
use crate::allocate::outliers;
use crate::hessian::{HessianTap, regularise, triangle};
use crate::options::{CompressOptions, Method, Sensitivity};
use crate::packed::load_in_parts;
use crate::progress::Progress;
use crate::scratch::Scratch;
use crate::sensitivity::hessian_key;
use crate::stored;
use crate::tensor::{DRAFT_SWEEPS, Rounded, Rounding, certify, draft};

/// Rows per tensor whose equilibrium is certified when compressing; `verify` can check all.
const CERTIFIED_ROWS: usize = 64;

/// A model, its options and what is known about it so far.
pub(crate) struct Session<'a> {
    pub(crate) model: Model,
    pub(crate) linears: Vec<LinearInfo>,
    pub(crate) options: &'a CompressOptions,
    pub(crate) scratch: Scratch,
    pub(crate) progress: &'a dyn Progress,
}

/// A solved tensor with its record.
#[derive(Debug, Clone)]
pub(crate) struct Solved {
    /// Shared with the model that runs it.
    pub(crate) matrix: Arc<PackedMatrix>,
    pub(crate) record: SolvedRecord,
}

impl Solved {
    pub(crate) fn new(matrix: PackedMatrix, record: SolvedRecord) -> Self {
        Self {
            matrix: Arc::new(matrix),
            record,
        }
    }

    /// The tensor's bytes.
    pub(crate) fn packed(&self) -> PackedRef<'_> {
        PackedMatrix::as_ref(&self.matrix)
    }
}

/// What is known about a solved tensor beside its bytes.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct SolvedRecord {
    pub(crate) sweeps: usize,
    pub(crate) certificate: RoundingCertificate,
}

/// The linears that are packed: routers are small and steer everything after them, they stay in half precision.
pub(crate) fn packable(model: &Model) -> Vec<LinearInfo> {
    let linears = model.linears().into_iter();
    linears.filter(|l| l.site != Site::Router).collect()
}

impl Session<'_> {
    /// Cuts the columns that carry most energy off the vocabulary's matrices, once there is a Hessian to know them by. Hessians by gradient are those of
    /// whole matrices: then columns stay together.
    pub(crate) fn part_outliers(&mut self, source: &ModelFile) -> Result<(), QuantError> {
        let weighted = self.sensitivity_kind().weights_tokens();
        if !self.needs_hessians() || weighted || self.options.method != Method::Nash {
            return Ok(());
        }
        let config = self.model.config();
        let (d, vocab) = (config.hidden_size, config.vocab_size);
        let Some(h) = self.site_hessian(config.num_layers(), Site::Head, d)? else {
            return Ok(());
        };
        let diagonal: Vec<f32> = (0..d).map(|i| h[i * d + i]).collect();
        let parts = VocabParts {
            outliers: outliers(&diagonal, vocab),
            ..config.vocab_parts.clone()
        };
        self.model = load_in_parts(source, |_| parts)?;
        self.linears = packable(&self.model);
        Ok(())
    }

    fn site_hessian(&self, layer: usize, site: Site, n: usize) -> Result<Option<Vec<f32>>, QuantError> {
        let stored = self.scratch.get_bytes(&site_key(layer, site))?;
        Ok(stored.and_then(|b| triangle::from_bytes(&b, n)))
    }

    pub(crate) fn check_cancelled(&self) -> Result<(), QuantError> {
        if self.progress.cancelled() {
            Err(QuantError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Whether rounding looks at the inputs.
    pub(crate) fn needs_hessians(&self) -> bool {
        self.options.method != Method::RoundToNearest
    }

    /// How losses are known: what was asked for, where the model and the method allow it.
    pub(crate) fn sensitivity_kind(&self) -> Sensitivity {
        if self.options.method == Method::Nash && self.model.has_backward() {
            self.options.sensitivity
        } else {
            Sensitivity::Measured
        }
    }

    /// Collects the damped Hessians of all linears from the calibration windows.
    pub(crate) fn calibrate(&self) -> Result<(), QuantError> {
        if !self.needs_hessians() || self.scratch.has("calibrated") {
            return Ok(());
        }
        if self.sensitivity_kind().weights_tokens() {
            self.calibrate_with_gradients()
        } else {
            self.calibrate_forward()
        }
    }

    /// Runs the source model over the calibration windows, layer by layer, and stores every site's Hessian.
    fn calibrate_forward(&self) -> Result<(), QuantError> {
        let windows = &self.options.calibration.windows;
        let layers = self.model.config().num_layers();
        self.progress.stage("calibrate", layers as u64 + 1);
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let mut cache = KvCache::new(self.model.config(), longest);
        let mut states = Vec::with_capacity(windows.len());
        for tokens in windows {
            let mut x = Vec::new();
            self.model.embed(tokens, 0, &mut x)?;
            states.push(x);
        }
        for layer in 0..layers {
            self.check_cancelled()?;
            let mut tap = HessianTap::default();
            for x in &mut states {
                cache.reset();
                self.model.layer_forward(layer, x, &mut cache, 0, &mut tap)?;
            }
            self.store_hessians(tap)?;
            self.progress.advance(1);
        }
        let mut tap = HessianTap::default();
        for x in &mut states {
            self.model.final_norm(x);
            let d = self.model.config().hidden_size;
            nash_models::Tap::input(&mut tap, layers, Site::Head, x, x.len() / d, d);
        }
        self.store_hessians(tap)?;
        self.progress.advance(1);
        self.scratch
            .put("calibrated", &windows.iter().map(Vec::len).sum::<usize>())
    }

    fn store_hessians(&self, tap: HessianTap) -> Result<(), QuantError> {
        for ((layer, site), (mut sum, tokens)) in tap.sums {
            let n = sum.len().isqrt();
            regularise(&mut sum, n, tokens, self.options.damping);
            self.scratch
                .put_bytes(&site_key(layer, site), &triangle::to_bytes(&sum, n))?;
        }
        Ok(())
    }

    /// The damped Hessian of a linear's input, `[n, n]`; the identity for tables that are only looked up, experts no token chose, and
    /// methods that do not look.
    pub(crate) fn hessian(&self, info: &LinearInfo) -> Result<Vec<f32>, QuantError> {
        let n = info.cols;
        let config = self.model.config();
        let layer = info.layer.unwrap_or(config.num_layers());
        if self.needs_hessians() && info.site != Site::Embedding {
            let found = if self.sensitivity_kind().weights_tokens() {
                let stored = self.scratch.get_bytes(&hessian_key(&info.name))?;
                stored.and_then(|b| triangle::from_bytes(&b, n))
            } else if let Some(columns) = config.columns(info) {
                let whole = self.site_hessian(layer, info.site, config.hidden_size)?;
                whole.map(|h| part(&h, config.hidden_size, &columns))
            } else {
                self.site_hessian(layer, info.site, n)?
            };
            if let Some(h) = found {
                return Ok(h);
            }
        }
        let mut h = vec![0.0; n * n];
        (0..n).for_each(|i| h[i * n + i] = 1.0);
        Ok(h)
    }

    /// Source weights `[m, n]` of a linear.
    pub(crate) fn weights(&self, info: &LinearInfo) -> Result<Vec<f32>, QuantError> {
        let linear = self.model.linear(&info.name).ok_or_else(|| {
            QuantError::Mismatch(format!(
                "the model lists the tensor `{}` but has none of that name",
                info.name
            ))
        })?;
        let weights = decode_rows(linear.as_ref(), 0..info.rows);
        linear.release();
        Ok(weights)
    }

    pub(crate) fn rounding(&self, width: Width) -> Rounding {
        Rounding {
            width,
            method: self.options.method,
            start: self.options.start,
            codebook: self.options.codebook,
            sweeps: self.options.max_sweeps.min(DRAFT_SWEEPS),
            joint_moves: self.options.joint_moves,
        }
    }

    /// Solves a tensor at a width, or takes it from the scratch folder. Starts from its draft if there is one.
    pub(crate) fn solve(&self, info: &LinearInfo, width: Width) -> Result<Solved, QuantError> {
        self.stored(info, width, Effort::Full, |problem| {
            let rounded = match self.known(info, width, Effort::Draft)? {
                Some(bytes) if let Some(draft) = stored::decode(&bytes, info, width) => {
                    Rounded::of(draft.packed(), draft.record.sweeps)
                }
                _ => draft(&info.name, problem, self.rounding(width))?,
            };
            self.settle(info, problem, rounded)
        })
    }

    /// Plays on from a draft to the end, packs and certifies.
    pub(crate) fn settle(
        &self,
        info: &LinearInfo,
        problem: Problem<'_>,
        mut rounded: Rounded,
    ) -> Result<Solved, QuantError> {
        if self.options.method == Method::Nash {
            let sweeps = self.options.max_sweeps.saturating_sub(DRAFT_SWEEPS);
            rounded.play(&info.name, problem, sweeps, self.options.joint_moves)?;
        }
        let sweeps = rounded.sweeps;
        let matrix = rounded.pack(&info.name, info.cols)?;
        let stride = info.rows.div_ceil(CERTIFIED_ROWS);
        let certificate = certify(&info.name, problem, matrix.as_ref(), stride)?;
        Ok(Solved::new(matrix, SolvedRecord { sweeps, certificate }))
    }

    /// Solves every tensor against what the source reads.
    pub(crate) fn solve_apart(&self, widths: &[Width]) -> Result<Vec<Solved>, QuantError> {
        let mut solved = Vec::with_capacity(self.linears.len());
        for (info, &width) in self.linears.iter().zip(widths) {
            solved.push(self.solve(info, width)?);
            self.progress.advance(1);
        }
        Ok(solved)
    }

    /// Rounds a tensor as far as candidates need it, or takes it from the scratch folder.
    pub(crate) fn draft(&self, info: &LinearInfo, width: Width) -> Result<Solved, QuantError> {
        self.stored(info, width, Effort::Draft, |problem| {
            let rounded = draft(&info.name, problem, self.rounding(width))?;
            let record = SolvedRecord {
                sweeps: rounded.sweeps,
                certificate: RoundingCertificate::default(),
            };
            Ok(Solved::new(rounded.pack(&info.name, info.cols)?, record))
        })
    }

    /// What was found for a tensor before, if it may be used again.
    fn known(&self, info: &LinearInfo, width: Width, effort: Effort) -> Result<Option<Vec<u8>>, QuantError> {
        if !self.options.reuse {
            return Ok(None);
        }
        self.scratch.get_bytes(&solved_key(info, width, effort))
    }

    /// What the scratch folder holds for a tensor; computed first if it does not.
    fn stored(
        &self,
        info: &LinearInfo,
        width: Width,
        effort: Effort,
        compute: impl FnOnce(Problem<'_>) -> Result<Solved, QuantError>,
    ) -> Result<Solved, QuantError> {
        self.check_cancelled()?;
        let known = self.known(info, width, effort)?;
        if let Some(solved) = known.and_then(|b| stored::decode(&b, info, width)) {
            return Ok(solved);
        }
        let (weights, hessian) = (self.weights(info)?, self.hessian(info)?);
        let solved = compute(Problem {
            weights: &weights,
            cols: info.cols,
            hessian: &hessian,
        })?;
        self.scratch
            .put_bytes(&solved_key(info, width, effort), &stored::encode(&solved)?)?;
        Ok(solved)
    }
}

/// Rows and columns `columns` of `h [n, n]`.
fn part(h: &[f32], n: usize, columns: &[u32]) -> Vec<f32> {
    let row = |&r: &u32| {
        let row = &h[r as usize * n..][..n];
        columns.iter().map(|&c| row[c as usize])
    };
    columns.iter().flat_map(row).collect()
}

/// How far a tensor is solved.
#[derive(Clone, Copy, Debug)]
enum Effort {
    Draft,
    Full,
}

fn solved_key(info: &LinearInfo, width: Width, effort: Effort) -> String {
    let kind = match effort {
        Effort::Draft => "draft",
        Effort::Full => "solved",
    };
    format!("{kind}-{}-{}", info.name, width.bits())
}

fn site_key(layer: usize, site: Site) -> String {
    format!("hessian-{layer}-{site:?}")
}
