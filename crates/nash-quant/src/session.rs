//! One model under compression: calibration, curves and solved tensors, each computed once and kept in the scratch folder.

use std::sync::Arc;

use nash_games::RoundingCertificate;
use nash_games::rounding::Problem;
use nash_kernels::{PackedMatrix, Width};
use nash_models::{DenseLinear, KvCache, LinearInfo, Model, Site};

use crate::QuantError;
use crate::allocate::Curve;
use crate::hessian::{HessianTap, regularise, triangle};
use crate::options::{CompressOptions, Method, Sensitivity};
use crate::probe::Probe;
use crate::progress::Progress;
use crate::scratch::Scratch;
use crate::sensitivity::hessian_key;
use crate::stored;
use crate::tensor::{Rounded, Rounding, certify, round};

/// Width at which the effect of a tensor on the whole model is measured.
const REFERENCE_BITS: usize = 3;
/// Rows per tensor on which layer errors at all widths are computed.
const CURVE_ROWS: usize = 48;
/// Where rows differ in weight, at least one in this many: of a vocabulary, few rows carry most of it.
const WEIGHTED_SHARE: usize = 64;
/// Sweeps for curves: the first two make most of the difference.
const CURVE_SWEEPS: usize = 2;
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
    pub(crate) matrix: PackedMatrix,
    pub(crate) record: SolvedRecord,
}

/// What is known about a solved tensor beside its bytes.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct SolvedRecord {
    pub(crate) sweeps: usize,
    pub(crate) certificate: RoundingCertificate,
}

impl Session<'_> {
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
        match self.sensitivity_kind() {
            Sensitivity::Gradient => self.calibrate_with_gradients(),
            Sensitivity::Measured => self.calibrate_forward(),
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
        let layer = info.layer.unwrap_or(self.model.config().num_layers());
        if self.needs_hessians() && info.site != Site::Embedding {
            let key = match self.sensitivity_kind() {
                Sensitivity::Gradient => hessian_key(&info.name),
                Sensitivity::Measured => site_key(layer, info.site),
            };
            let stored = self.scratch.get_bytes(&key)?;
            if let Some(h) = stored.and_then(|b| triangle::from_bytes(&b, n)) {
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
        let mut w = vec![0.0; info.rows * info.cols];
        for (r, row) in w.chunks_mut(info.cols).enumerate() {
            linear.row(r, row);
        }
        Ok(w)
    }

    fn rounding(&self, width: Width, max_sweeps: usize) -> Rounding {
        Rounding {
            width,
            method: self.options.method,
            start: self.options.start,
            max_sweeps,
        }
    }

    /// Loss curves of all linears: layer errors at every width, and the KL divergence at the reference width. The latter is predicted from
    /// gradients, or measured: in deep models in some layers only and interpolated between them.
    pub(crate) fn curves(&mut self) -> Result<Vec<Curve>, QuantError> {
        let linears = self.linears.clone();
        let layers = self.model.config().num_layers();
        let stride = self.options.probe_layer_stride.max(1);
        let measures = self.sensitivity_kind() == Sensitivity::Measured;
        let measured =
            |l: &LinearInfo| measures && l.layer.is_none_or(|layer| is_measured(layer, layers, stride));
        self.progress.stage("measure", linears.len() as u64);
        let mut probe = None;
        let mut curves = Vec::with_capacity(linears.len());
        for info in &linears {
            self.check_cancelled()?;
            let key = format!("curve-{}", info.name);
            let curve = match self.scratch.get::<Curve>(&key)? {
                Some(curve) => curve,
                None => {
                    if measures && probe.is_none() {
                        probe = Some(Probe::new(&self.model, &self.probe_windows())?);
                    }
                    let curve = self.curve(info, probe.as_ref().filter(|_| measured(info)))?;
                    self.scratch.put(&key, &curve)?;
                    curve
                }
            };
            curves.push(curve);
            self.progress.advance(1);
        }
        if measures {
            interpolate(&linears, &mut curves);
        }
        Ok(curves)
    }

    /// The first tokens of the first calibration windows, `probe_tokens` in all.
    fn probe_windows(&self) -> Vec<Vec<u32>> {
        let each = (self.options.probe_tokens / 2).max(2);
        let windows = &self.options.calibration.windows;
        let step = (windows.len() / 2).max(1);
        windows
            .iter()
            .step_by(step)
            .take(2)
            .map(|w| w[..each.min(w.len())].to_vec())
            .collect()
    }

    /// One curve. Without gradients and without a probe the KL divergence is left out.
    fn curve(&mut self, info: &LinearInfo, probe: Option<&Probe>) -> Result<Curve, QuantError> {
        let n = info.cols;
        let weights = self.weights(info)?;
        let hessian = self.hessian(info)?;
        let sensitivity = self.sensitivity(info)?;
        let rows = match sensitivity {
            Some(_) => CURVE_ROWS.max(info.rows / WEIGHTED_SHARE),
            None => CURVE_ROWS,
        };
        let stride = info.rows.div_ceil(rows);
        let mut sample: Vec<f32> = weights.chunks(n).step_by(stride).flatten().copied().collect();
        if let Some(s) = &sensitivity {
            // Rows scaled by the root of their weight make the layer error a sum weighted by row.
            for (row, weight) in sample.chunks_mut(n).zip(s.rows.iter().step_by(stride)) {
                let root = weight.sqrt();
                row.iter_mut().for_each(|w| *w *= root);
            }
        }
        let problem = Problem {
            weights: &sample,
            cols: n,
            hessian: &hessian,
        };
        let mut potential = Vec::new();
        for width in Width::ALL {
            let rounded = round(&info.name, problem, self.rounding(width, CURVE_SWEEPS))?;
            potential.push(problem.potential(&rounded.grid, &rounded.codes));
        }
        let energy = problem.energy();
        let reference = Width::ALL
            .iter()
            .position(|w| w.bits() == REFERENCE_BITS)
            .unwrap_or(0);
        let kl_at_reference = match (sensitivity, probe) {
            (Some(s), _) => {
                let share = info.rows as f64 * n as f64 / sample.len().max(1) as f64;
                Some(s.scale * share * potential[reference])
            }
            (None, None) => None,
            (None, Some(probe)) => {
                let problem = Problem {
                    weights: &weights,
                    cols: n,
                    hessian: &hessian,
                };
                let rounded = round(
                    &info.name,
                    problem,
                    self.rounding(Width::ALL[reference], CURVE_SWEEPS),
                )?;
                let values = rounded.grid.dequantize(n, &rounded.codes);
                let changed = Arc::new(DenseLinear::new(values, info.rows, n));
                Some(probe.kl_of_change(&mut self.model, &info.name, info.layer, changed)?)
            }
        };
        Ok(Curve {
            kl_at_reference,
            potential,
            energy,
            reference,
        })
    }

    /// Solves a tensor at a width, or takes it from the scratch folder.
    pub(crate) fn solve(&self, info: &LinearInfo, width: Width) -> Result<Solved, QuantError> {
        self.check_cancelled()?;
        let key = format!("solved-{}-{}", info.name, width.bits());
        if let Some(solved) = self
            .scratch
            .get_bytes(&key)?
            .and_then(|b| stored::decode(&b, info, width))
        {
            return Ok(solved);
        }
        let weights = self.weights(info)?;
        let hessian = self.hessian(info)?;
        let problem = Problem {
            weights: &weights,
            cols: info.cols,
            hessian: &hessian,
        };
        let rounded: Rounded = round(&info.name, problem, self.rounding(width, self.options.max_sweeps))?;
        let sweeps = rounded.trace.moves.len();
        let matrix = rounded.pack(&info.name, info.cols)?;
        let stride = info.rows.div_ceil(CERTIFIED_ROWS);
        let certificate = certify(&info.name, problem, matrix.as_ref(), stride)?;
        let solved = Solved {
            matrix,
            record: SolvedRecord { sweeps, certificate },
        };
        self.scratch.put_bytes(&key, &stored::encode(&solved)?)?;
        Ok(solved)
    }
}

/// Whether the effect of tensors in this layer is measured: all layers of shallow models; in deep ones the first three and the last two,
/// which differ most, and every `stride`-th between.
fn is_measured(layer: usize, layers: usize, stride: usize) -> bool {
    layers <= 12 || layer < 3 || layer + 2 >= layers || layer.is_multiple_of(stride)
}

/// Fills in the KL divergences that were not measured: KL per relative layer error, interpolated geometrically between the nearest measured
/// layers of the same kind of tensor, times the tensor's own relative layer error.
fn interpolate(linears: &[LinearInfo], curves: &mut [Curve]) {
    let kind = |l: &LinearInfo| {
        let after_layers = l.name.splitn(4, '.').nth(3).unwrap_or(&l.name);
        after_layers.to_string()
    };
    let known: Vec<(String, usize, f64)> = linears
        .iter()
        .zip(&*curves)
        .filter_map(|(l, c)| {
            Some((
                kind(l),
                l.layer?,
                (c.kl_at_reference?.max(1e-9) / c.relative_error()).ln(),
            ))
        })
        .collect();
    for (l, curve) in linears.iter().zip(curves) {
        let (None, Some(layer)) = (curve.kl_at_reference, l.layer) else {
            continue;
        };
        let same = || known.iter().filter(|k| k.0 == kind(l));
        let below = same().filter(|k| k.1 < layer).max_by_key(|k| k.1);
        let above = same().filter(|k| k.1 > layer).min_by_key(|k| k.1);
        let log_rate = match (below, above) {
            (Some(b), Some(a)) => b.2 + (a.2 - b.2) * (layer - b.1) as f64 / (a.1 - b.1) as f64,
            (Some(k), None) | (None, Some(k)) => k.2,
            (None, None) => continue,
        };
        curve.kl_at_reference = Some(log_rate.exp() * curve.relative_error());
    }
}

fn site_key(layer: usize, site: Site) -> String {
    format!("hessian-{layer}-{site:?}")
}
