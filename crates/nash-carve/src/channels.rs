//! Channel-wise sparsity with thresholds found on calibration text.

use std::sync::Arc;

use nash_models::{ChannelRule, ChannelSparsity, KvCache, Model, Site, Tap};

use crate::CarveError;
use crate::carve::check;
use crate::write;

/// How neurons are kept token by token, without experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelKind {
    /// The largest contributions: an oracle.
    Largest,
    /// Contributions above a threshold of the layer (as TEAL).
    Above,
    /// Gates above a threshold of the layer (as CATS).
    Gate,
}

/// The rule that keeps `share` of the neurons, on average over the calibration text.
///
/// # Errors
/// The model is no gated dense one, or cannot be run.
pub fn channel_sparsity(
    model: &Model,
    kind: ChannelKind,
    share: f64,
    windows: &[Vec<u32>],
) -> Result<ChannelSparsity, CarveError> {
    let config = model.config();
    check(config)?;
    let f = config.mlp.intermediate;
    let mut norms: Vec<Arc<[f32]>> = Vec::with_capacity(config.num_layers());
    for layer in 0..config.num_layers() {
        let down = write::matrix(model, &format!("model.layers.{layer}.mlp.down_proj"))?;
        let mut squares = vec![0.0f32; f];
        for row in down.chunks_exact(f) {
            squares.iter_mut().zip(row).for_each(|(n, w)| *n += w * w);
        }
        norms.push(squares.iter().map(|n| n.sqrt()).collect());
    }
    let rule = match kind {
        ChannelKind::Largest => ChannelRule::Largest(share),
        _ => {
            let mut sizes = Sizes {
                model,
                kind,
                norms: &norms,
                of_layers: vec![Vec::new(); config.num_layers()],
            };
            let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
            let mut cache = KvCache::new(config, longest);
            for window in windows {
                cache.reset();
                model.forward(window, &mut cache, &mut sizes)?;
            }
            let thresholds = sizes.of_layers.into_iter().map(|mut sizes| {
                let at = ((1.0 - share) * sizes.len() as f64) as usize;
                if at == 0 || at >= sizes.len() {
                    return if at == 0 { 0.0 } else { f32::INFINITY };
                }
                *sizes.select_nth_unstable_by(at, f32::total_cmp).1
            });
            match kind {
                ChannelKind::Gate => ChannelRule::GateAbove(thresholds.collect()),
                _ => ChannelRule::Above(thresholds.collect()),
            }
        }
    };
    Ok(ChannelSparsity { rule, norms })
}

/// Collects what the thresholds are compared with.
struct Sizes<'a> {
    model: &'a Model,
    kind: ChannelKind,
    norms: &'a [Arc<[f32]>],
    of_layers: Vec<Vec<f32>>,
}

impl Tap for Sizes<'_> {
    fn input(&mut self, layer: usize, site: Site, x: &[f32], _: usize, _: usize) {
        match (self.kind, site) {
            (ChannelKind::Above, Site::MlpDown) => {
                let norms = &self.norms[layer];
                for row in x.chunks_exact(norms.len()) {
                    self.of_layers[layer].extend(row.iter().zip(norms.iter()).map(|(h, n)| h.abs() * n));
                }
            }
            (ChannelKind::Gate, Site::MlpIn) => {
                self.of_layers[layer].extend(self.model.gate(layer, x).into_iter().map(f32::abs));
            }
            _ => {}
        }
    }
}
