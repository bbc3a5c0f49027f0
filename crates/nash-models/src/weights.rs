//! The weights of a model: linears by number, for the blocks, and by name, for whoever replaces them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nash_kernels::{Product, pool};

use crate::error::{ModelError, Result};
use crate::linear::{Input, Linear};
use crate::manifest::LinearInfo;
use crate::scratch::sized;

/// A float tensor: canonical name, shape, values.
pub(crate) type FloatTensor = (String, Vec<usize>, Arc<[f32]>);

struct Slot {
    info: LinearInfo,
    linear: Arc<dyn Linear>,
    /// Whether it is packed; asked once, since every answer checks the matrix again.
    packed: bool,
}

/// All weights.
#[derive(Default)]
pub(crate) struct Weights {
    slots: Vec<Slot>,
    index: HashMap<String, usize>,
    pub(crate) floats: Vec<FloatTensor>,
}

/// A linear in a block, with its bias.
#[derive(Debug, Clone)]
pub(crate) struct Projection {
    pub(crate) slot: usize,
    pub(crate) bias: Option<Arc<[f32]>>,
}

/// One output of [`Weights::project_all`].
pub(crate) struct Projected<'a> {
    pub(crate) projection: &'a Projection,
    pub(crate) input: &'a Input<'a>,
    /// `[T, m]`, replaced.
    pub(crate) y: &'a mut [f32],
}

/// Outputs of a task that adds biases, in whole rows.
const CHUNK: usize = 1 << 14;
/// Rows of a task that looks for NaN.
const CHECK_ROWS: usize = 64;

impl Weights {
    pub(crate) fn push(&mut self, info: LinearInfo, linear: Arc<dyn Linear>) -> usize {
        self.index.insert(info.name.clone(), self.slots.len());
        let packed = linear.packed().is_some();
        self.slots.push(Slot { info, linear, packed });
        self.slots.len() - 1
    }

    pub(crate) fn infos(&self) -> impl ExactSizeIterator<Item = &LinearInfo> {
        self.slots.iter().map(|slot| &slot.info)
    }

    pub(crate) fn linears(&self) -> impl ExactSizeIterator<Item = (&LinearInfo, &Arc<dyn Linear>)> {
        self.slots.iter().map(|slot| (&slot.info, &slot.linear))
    }

    pub(crate) fn slot(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    pub(crate) fn info(&self, slot: usize) -> &LinearInfo {
        &self.slots[slot].info
    }

    pub(crate) fn linear(&self, slot: usize) -> &Arc<dyn Linear> {
        &self.slots[slot].linear
    }

    pub(crate) fn set(&mut self, name: &str, linear: Arc<dyn Linear>) -> Result<()> {
        let slot = self.slot(name).ok_or_else(|| ModelError::NoSuchLinear {
            name: name.to_owned(),
        })?;
        let info = &self.slots[slot].info;
        if (linear.rows(), linear.cols()) != (info.rows, info.cols) {
            return Err(ModelError::WrongShape {
                file: "replacement".into(),
                tensor: name.to_owned(),
                expected: vec![info.rows, info.cols],
                found: vec![linear.rows(), linear.cols()],
            });
        }
        self.slots[slot].packed = linear.packed().is_some();
        self.slots[slot].linear = linear;
        Ok(())
    }

    /// `y = x·Wᵀ + b`, `[T, m]`.
    pub(crate) fn project(&self, projection: &Projection, input: &Input<'_>, y: &mut Vec<f32>) {
        self.project_each([(projection, y)], input);
    }

    /// [`Self::project`] for several projections of one input; packed ones as one piece of work.
    pub(crate) fn project_each<const N: usize>(
        &self,
        outputs: [(&Projection, &mut Vec<f32>); N],
        input: &Input<'_>,
    ) {
        self.project_all(&mut outputs.map(|(projection, y)| {
            let len = input.tokens() * self.slots[projection.slot].linear.rows();
            let y = sized(y, len);
            Projected { projection, input, y }
        }));
    }

    /// [`Self::project`] for several projections, each of its own input; packed ones as one piece of work.
    pub(crate) fn project_all(&self, outputs: &mut [Projected<'_>]) {
        let linear = |projection: &Projection| &self.slots[projection.slot].linear;
        if outputs.iter().all(|out| self.is_packed(out.projection)) {
            nash_kernels::matmul_each(outputs.iter_mut().filter_map(|out| {
                let (w, x) = (linear(out.projection).packed()?, out.input.activations());
                Some(Product { w, x, y: out.y })
            }));
        } else {
            for out in outputs.iter_mut() {
                linear(out.projection).forward(out.input, out.y);
            }
        }
        for Projected { projection, y, .. } in outputs {
            if let Some(bias) = &projection.bias {
                let m = bias.len();
                pool::for_each_chunk(y, (CHUNK / m).max(1) * m, |_, rows| {
                    for row in rows.chunks_exact_mut(m) {
                        row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
                    }
                });
            }
        }
    }

    /// Whether the projection reads its input as int8.
    pub(crate) fn is_packed(&self, projection: &Projection) -> bool {
        self.slots[projection.slot].packed
    }

    /// Looks for the first weight that is not a finite number.
    pub(crate) fn check_finite(&self) -> Result<()> {
        let not_finite = |tensor: &str, row, values: &[f32]| {
            let col = values.iter().position(|v| !v.is_finite())?;
            Some(ModelError::NotFinite {
                tensor: tensor.to_owned(),
                row,
                col,
                value: values[col],
            })
        };
        for (name, _, values) in &self.floats {
            not_finite(name, 0, values).map_or(Ok(()), Err)?;
        }
        for (info, linear) in self.linears() {
            // The lowest row wins, whichever thread comes first.
            let first: Mutex<Option<(usize, ModelError)>> = Mutex::new(None);
            pool::run(info.rows.div_ceil(CHECK_ROWS), |task| {
                let mut values = vec![0.0; info.cols];
                for row in task * CHECK_ROWS..((task + 1) * CHECK_ROWS).min(info.rows) {
                    linear.row(row, &mut values);
                    if let Some(error) = not_finite(&info.name, row, &values) {
                        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                        if first.as_ref().is_none_or(|(earlier, _)| row < *earlier) {
                            *first = Some((row, error));
                        }
                        return;
                    }
                }
            });
            let first = first.into_inner().unwrap_or_else(PoisonError::into_inner);
            first.map_or(Ok(()), |(_, error)| Err(error))?;
            linear.release();
        }
        Ok(())
    }
}
