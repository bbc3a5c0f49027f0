//! RMSNorm and LayerNorm over rows.

use std::sync::Arc;

use nash_kernels::{dense, pool};

use crate::config::NormKind;

/// A norm with its weights, `[n]` each.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub(crate) kind: NormKind,
    pub(crate) eps: f32,
    pub(crate) weight: Arc<[f32]>,
    pub(crate) bias: Option<Arc<[f32]>>,
}

/// Elements of a task, in whole rows.
const CHUNK: usize = 1 << 14;

impl Norm {
    /// Norms every row of `x [.., n]` in place.
    pub(crate) fn apply(&self, x: &mut [f32]) {
        let n = self.weight.len();
        pool::for_each_chunk(x, (CHUNK / n).max(1) * n, |_, rows| {
            rows.chunks_exact_mut(n).for_each(|row| self.row(row));
        });
    }

    fn row(&self, x: &mut [f32]) {
        let n = x.len() as f32;
        if self.kind == NormKind::Layer {
            let mean = x.iter().sum::<f32>() / n;
            x.iter_mut().for_each(|v| *v -= mean);
        }
        let scale = 1.0 / (dense::dot(x, x) / n + self.eps).sqrt();
        x.iter_mut()
            .zip(self.weight.iter())
            .for_each(|(v, w)| *v *= scale * w);
        if let Some(bias) = &self.bias {
            x.iter_mut().zip(bias.iter()).for_each(|(v, b)| *v += b);
        }
    }
}
