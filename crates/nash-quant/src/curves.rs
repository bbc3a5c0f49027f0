//! What the market needs to know: the loss of every linear at every width, computed once and kept in the scratch folder.

use std::sync::Arc;

use nash_games::rounding::Problem;
use nash_kernels::Width;
use nash_models::{DenseLinear, Linear, LinearInfo};
use rayon::prelude::*;

use crate::QuantError;
use crate::allocate::Curve;
use crate::options::Codebook;
use crate::probe::Probe;
use crate::session::Session;
use crate::tensor::{Rounding, draft};

/// Rows per tensor on which layer errors at all widths are computed.
const CURVE_ROWS: usize = 32;
/// Where rows differ in weight, at least one in this many: of a vocabulary, few rows carry most of it.
const WEIGHTED_SHARE: usize = 64;
/// Linears of one layer that are measured together: so many of them exist in float at a time.
const TOGETHER: usize = 8;

impl Session<'_> {
    /// Loss curves of all linears: layer errors at every width, and the KL divergence at the reference width. The latter is predicted from
    /// gradients, or measured: in deep models in some layers only and interpolated between them.
    pub(crate) fn curves(&mut self) -> Result<Vec<Curve>, QuantError> {
        let linears = self.linears.clone();
        self.progress.stage("measure", linears.len() as u64);
        let mut probe = None;
        let mut curves: Vec<Curve> = Vec::with_capacity(linears.len());
        for layer in linears.chunk_by(|a, b| a.layer.is_some() && a.layer == b.layer) {
            for group in layer.chunks(TOGETHER) {
                self.check_cancelled()?;
                let key = format!("curves-{}", group[0].name);
                let known = match self.scratch.get::<Vec<Curve>>(&key)? {
                    Some(known) => known,
                    None => {
                        let measured = self.curves_of(group, &mut probe)?;
                        self.scratch.put(&key, &measured)?;
                        measured
                    }
                };
                curves.extend(known);
                self.progress.advance(group.len() as u64);
            }
        }
        if self.sensitivity_kind().measures() {
            interpolate(&linears, &mut curves);
        }
        Ok(curves)
    }

    /// Curves of a few linears of one layer (or of one outside of the layers).
    fn curves_of(
        &mut self,
        group: &[LinearInfo],
        probe: &mut Option<Probe>,
    ) -> Result<Vec<Curve>, QuantError> {
        let (layer, layers) = (group[0].layer, self.model.config().num_layers());
        let stride = self.options.probe_layer_stride;
        let measures = self.sensitivity_kind().measures()
            && layer.is_none_or(|layer| is_measured(layer, layers, stride));
        let mut curves = Vec::with_capacity(group.len());
        let mut changes: Vec<(&str, Arc<dyn Linear>)> = Vec::new();
        for info in group {
            let (weights, hessian) = (self.weights(info)?, self.hessian(info)?);
            let problem = Problem {
                weights: &weights,
                cols: info.cols,
                hessian: &hessian,
            };
            curves.push(self.curve(info, problem)?);
            if measures {
                changes.push((&info.name, self.rounded_to_reference(info, problem)?));
            }
        }
        if !measures {
            return Ok(curves);
        }
        let probe = match probe {
            Some(probe) => probe,
            None => probe.insert(Probe::new(
                &self.model,
                &self.two_windows(self.options.probe_tokens / 2),
            )?),
        };
        let measured = match layer {
            Some(layer) => probe.kl_of_changes(&mut self.model, layer, changes)?,
            None => changes
                .into_iter()
                .map(|(name, changed)| probe.kl_of_all(&mut self.model, None, vec![(name.into(), changed)]))
                .collect::<Result<_, _>>()?,
        };
        for (curve, kl) in curves.iter_mut().zip(measured) {
            curve.kl_at_reference = Some(kl);
        }
        Ok(curves)
    }

    /// The first `tokens` tokens of two calibration windows.
    pub(crate) fn two_windows(&self, tokens: usize) -> Vec<Vec<u32>> {
        let each = tokens.max(2);
        let windows = &self.options.calibration.windows;
        let step = (windows.len() / 2).max(1);
        windows
            .iter()
            .step_by(step)
            .take(2)
            .map(|w| w[..each.min(w.len())].to_vec())
            .collect()
    }

    /// Layer errors of one linear, and its predicted KL divergence if there are gradients.
    fn curve(&self, info: &LinearInfo, whole: Problem<'_>) -> Result<Curve, QuantError> {
        let n = info.cols;
        let sensitivity = if self.sensitivity_kind().measures() {
            None
        } else {
            self.sensitivity(info)?
        };
        let rows = match sensitivity {
            Some(_) => CURVE_ROWS.max(info.rows / WEIGHTED_SHARE),
            None => CURVE_ROWS,
        };
        let stride = info.rows.div_ceil(rows);
        let mut sample: Vec<f32> = whole
            .weights
            .chunks(n)
            .step_by(stride)
            .flatten()
            .copied()
            .collect();
        if let Some(s) = &sensitivity {
            // Rows scaled by the root of their weight make the layer error a sum weighted by row.
            for (row, weight) in sample.chunks_mut(n).zip(s.rows.iter().step_by(stride)) {
                let root = weight.sqrt();
                row.iter_mut().for_each(|w| *w *= root);
            }
        }
        let problem = Problem {
            weights: &sample,
            ..whole
        };
        // A sample is too small to be shared out; its widths are.
        let potential = Width::ALL
            .into_par_iter()
            .map(|width| {
                let rounded = draft(&info.name, problem, self.rounding(width))?;
                Ok(problem.potential(&rounded.grid, &rounded.codes))
            })
            .collect::<Result<Vec<_>, QuantError>>()?;
        let rounded = draft(&info.name, problem, self.reference())?;
        let reference = problem.potential(&rounded.grid, &rounded.codes);
        let share = whole.weights.len() as f64 / sample.len().max(1) as f64;
        Ok(Curve {
            kl_at_reference: sensitivity.map(|s| s.scale * share * reference),
            energy: problem.energy(),
            potential,
            reference,
        })
    }

    /// How the rounding whose effect on the whole model is measured is made. What is asked for is nats per layer error, which does not
    /// depend on how the error came about: a scalar codebook is several times faster.
    fn reference(&self) -> Rounding {
        Rounding {
            codebook: Codebook::Scalar,
            ..self.rounding(Width::ALL[1])
        }
    }

    /// The linear as it would be at the reference width.
    pub(crate) fn rounded_to_reference(
        &self,
        info: &LinearInfo,
        problem: Problem<'_>,
    ) -> Result<Arc<dyn Linear>, QuantError> {
        let rounded = draft(&info.name, problem, self.reference())?;
        let values = rounded.grid.dequantize(info.cols, &rounded.codes);
        Ok(Arc::new(DenseLinear::new(values, info.rows, info.cols)))
    }
}

/// Whether the effect of tensors in this layer is measured: all layers of shallow models; in deep ones the first three and the last two,
/// which differ most, and every `stride`-th between.
pub(crate) fn is_measured(layer: usize, layers: usize, stride: usize) -> bool {
    layers <= 12 || layer < 3 || layer + 2 >= layers || layer.is_multiple_of(stride.max(1))
}

/// Kind of a linear: its name after the layer's number; outside of the layers the matrix it belongs to.
pub(crate) fn kind(info: &LinearInfo) -> &str {
    match info.layer {
        Some(_) => info.name.splitn(4, '.').nth(3).unwrap_or(&info.name),
        None => info.matrix(),
    }
}

/// Fills in the KL divergences that were not measured: KL per relative layer error, interpolated geometrically between the nearest measured
/// layers of the same kind of tensor, times the tensor's own relative layer error.
fn interpolate(linears: &[LinearInfo], curves: &mut [Curve]) {
    let known: Vec<(&str, usize, f64)> = linears
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
