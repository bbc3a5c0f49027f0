//! Solving in the order of the forward pass: every linear of a layer against what it will read from the compressed prefix, towards what it
//! gave in the source ([`nash_games::propagation`]).

use nash_core::ModelFile;
use nash_core::hash::Hasher;
use nash_games::rounding::Problem;
use nash_kernels::Width;
use nash_models::{LinearInfo, Model};

use crate::QuantError;
use crate::options::Method;
use crate::packed::load;
use crate::prefix::{Moments, Prefix, SITES};
use crate::session::{Session, Solved};
use crate::stored;
use crate::tensor::Rounded;

/// Called with the number of a linear and the moments of its inputs; may put the linear into the compressed model.
pub(crate) type Visit<'v> = dyn FnMut(usize, &Moments, &mut Model) -> Result<(), QuantError> + 'v;

impl Session<'_> {
    /// The share of the drift that linears make up for; 0 if they are solved apart.
    pub(crate) fn propagation(&self) -> f32 {
        if self.options.method == Method::Nash && !self.sensitivity_kind().weights_tokens() {
            self.options.propagation
        } else {
            0.0
        }
    }

    /// Whether a linear waits for those before it.
    pub(crate) fn in_order(&self, info: &LinearInfo) -> bool {
        self.propagation() > 0.0 && info.layer.is_some() && SITES.contains(&info.site)
    }

    /// Goes through those of the linears that wait for others which are `wanted` by number, in the order of the forward pass; `packed` has all others.
    pub(crate) fn each_in_order(
        &self,
        packed: &mut Model,
        wanted: &dyn Fn(usize) -> bool,
        visit: &mut Visit<'_>,
    ) -> Result<(), QuantError> {
        // What comes after the last of them need not be run; nor anything, where all are known.
        let waiting = self
            .linears
            .iter()
            .enumerate()
            .filter(|(index, info)| self.in_order(info) && wanted(*index));
        let Some(last) = waiting.filter_map(|(_, info)| info.layer).max() else {
            return Ok(());
        };
        let windows = &self.options.calibration.windows;
        let mut prefix = Prefix::new(&self.model, packed, windows, self.options.damping)?;
        for layer in 0..=last {
            for site in SITES {
                self.check_cancelled()?;
                let here = |(_, info): &(usize, &LinearInfo)| (info.layer, info.site) == (Some(layer), site);
                let linears = self
                    .linears
                    .iter()
                    .enumerate()
                    .filter(here)
                    .map(|(index, _)| index);
                let linears: Vec<usize> = linears.filter(|&index| wanted(index)).collect();
                if linears.is_empty() {
                    continue;
                }
                let Some(moments) = prefix.moments(packed, site)? else {
                    continue;
                };
                for index in linears {
                    visit(index, &moments, packed)?;
                    self.progress.advance(1);
                }
            }
            if layer < last {
                prefix.advance(packed)?;
            }
        }
        Ok(())
    }

    /// What a linear is to be rounded to.
    pub(crate) fn target(&self, info: &LinearInfo, moments: &Moments) -> Result<Vec<f32>, QuantError> {
        let weights = self.weights(info)?;
        let target = moments.correction.target(&weights, self.propagation());
        target.map_err(QuantError::game(&info.name))
    }

    /// Solves all linears, those of the layers in order.
    pub(crate) fn solve_in_order(
        &self,
        source: &ModelFile,
        widths: &[Width],
    ) -> Result<Vec<Solved>, QuantError> {
        let mut solved: Vec<Option<Solved>> = vec![None; self.linears.len()];
        let mut packed = load(self, source)?;
        let key = |info: &LinearInfo| self.ordered_key(info, widths);
        for (index, info) in self.linears.iter().enumerate() {
            let found = if self.in_order(info) {
                // What an interrupted run has found already.
                let known = self.scratch.get_bytes(&key(info))?.filter(|_| self.options.reuse);
                known.and_then(|bytes| stored::decode(&bytes, info, widths[index]))
            } else {
                Some(self.solve(info, widths[index])?)
            };
            if let Some(found) = &found {
                packed.set_linear(&info.name, found.linear())?;
                self.progress.advance(1);
            }
            solved[index] = found;
        }
        let unknown: Vec<bool> = solved.iter().map(Option::is_none).collect();
        self.each_in_order(
            &mut packed,
            &|index| unknown[index],
            &mut |index, moments, packed| {
                let info = &self.linears[index];
                let found = self.solve_towards(info, widths[index], &self.target(info, moments)?, moments)?;
                self.scratch.put_bytes(&key(info), &stored::encode(&found)?)?;
                packed.set_linear(&info.name, found.linear())?;
                solved[index] = Some(found);
                Ok(())
            },
        )?;
        let listed = self.linears.iter().zip(solved);
        let all = listed.map(|(info, found)| {
            found.ok_or_else(|| {
                QuantError::Mismatch(format!(
                    "the forward pass never came to the tensor `{}`",
                    info.name
                ))
            })
        });
        all.collect()
    }

    /// Solutions in order depend on the widths of all tensors before them.
    fn ordered_key(&self, info: &LinearInfo, widths: &[Width]) -> String {
        let mut hasher = Hasher::new();
        widths
            .iter()
            .for_each(|width| hasher.update(&[width.bits() as u8]));
        hasher.update(&self.propagation().to_le_bytes());
        format!("ordered-{}-{}", info.name, hasher.finish())
    }

    fn solve_towards(
        &self,
        info: &LinearInfo,
        width: Width,
        target: &[f32],
        moments: &Moments,
    ) -> Result<Solved, QuantError> {
        let problem = Problem {
            weights: target,
            cols: info.cols,
            hessian: &moments.hessian,
        };
        // Targets are near the source's weights, so play goes on from the draft that was judged.
        let draft = self.draft(info, width)?;
        let rounded = Rounded::of(draft.packed(), draft.record.sweeps);
        self.settle(info, problem, rounded)
    }
}
