//! RMSNorm and LayerNorm over rows.

use std::sync::Arc;

use nash_kernels::{dense, pool};

use crate::backward::GradientTap;
use crate::config::NormKind;
use crate::math;

/// A norm with its weights, `[n]` each.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    /// Canonical, without `.weight`.
    pub(crate) name: String,
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

    /// Visits weight and bias.
    pub(crate) fn for_each_float(&mut self, visit: &mut dyn FnMut(&mut Arc<[f32]>)) {
        visit(&mut self.weight);
        self.bias.iter_mut().for_each(visit);
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

    /// `g`, the gradient with respect to the norm of `x [.., n]`, becomes that with respect to `x`; the tap sees those of weight and bias.
    ///
    /// With the centred input c (RMS: x itself), r = 1/√(mean c² + ε) and a = g∘w: `r·(a − mean a) − c·r³·mean(a∘c)`, the mean of a only for
    /// LayerNorm.
    pub(crate) fn backward(&self, x: &[f32], g: &mut [f32], tap: &mut dyn GradientTap) {
        let n = self.weight.len();
        self.show(x, g, tap);
        let rows = (CHUNK / n).max(1);
        pool::for_each_chunk(g, rows * n, |chunk, g| {
            let mut c = vec![0.0; n];
            for (x, g) in x[chunk * rows * n..].chunks_exact(n).zip(g.chunks_exact_mut(n)) {
                let r = self.centre(x, &mut c);
                g.iter_mut().zip(self.weight.iter()).for_each(|(g, w)| *g *= w);
                if self.kind == NormKind::Layer {
                    let mean = math::sum(g) / n as f32;
                    g.iter_mut().for_each(|g| *g -= mean);
                }
                let pull = r * r * r * dense::dot(g, &c) / n as f32;
                g.iter_mut().zip(&c).for_each(|(g, c)| *g = r * *g - pull * c);
            }
        });
    }

    /// Gradients `Σ_t g∘c·r` of the weight and `Σ_t g` of the bias.
    fn show(&self, x: &[f32], g: &[f32], tap: &mut dyn GradientTap) {
        let n = self.weight.len();
        let (mut c, mut weight) = (vec![0.0; n], vec![0.0; n]);
        for (x, g) in x.chunks_exact(n).zip(g.chunks_exact(n)) {
            let r = self.centre(x, &mut c);
            for ((sum, g), c) in weight.iter_mut().zip(g).zip(&c) {
                *sum += g * c * r;
            }
        }
        tap.float(&format!("{}.weight", self.name), &weight);
        if self.bias.is_some() {
            tap.float(&format!("{}.bias", self.name), &math::column_sums(g, n));
        }
    }

    /// One row: `c`, and r as the result.
    fn centre(&self, x: &[f32], c: &mut [f32]) -> f32 {
        let n = x.len() as f32;
        c.copy_from_slice(x);
        if self.kind == NormKind::Layer {
            let mean = math::sum(c) / n;
            c.iter_mut().for_each(|v| *v -= mean);
        }
        1.0 / (dense::dot(c, c) / n + self.eps).sqrt()
    }
}
