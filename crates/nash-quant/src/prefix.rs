//! The source and the compressed model side by side over the calibration text, layer by layer: what a linear of the compressed model reads,
//! and how far that has drifted from what the source reads.

use std::collections::BTreeMap;

use nash_games::propagation::{Correction, Inputs};
use nash_kernels::dense;
use nash_kernels::heap::zeros;
use nash_models::{KvCache, Model, Site, Tap};

use crate::QuantError;
use crate::hessian::regularise;

/// Sites whose inputs correspond token by token in both models, in the order of the forward pass. The inputs of experts do not: routers may choose
/// others.
pub(crate) const SITES: [Site; 4] = [Site::AttnIn, Site::AttnOut, Site::MlpIn, Site::MlpDown];

/// What is known about a site's inputs: `x` of the source, `x̂` of the compressed prefix.
pub(crate) struct Moments {
    /// Damped `E[x̂ x̂ᵀ]`, `[n, n]`.
    pub(crate) hessian: Vec<f32>,
    /// What makes up for the drift from `x` to `x̂`.
    pub(crate) correction: Correction,
}

/// Hidden states of both models before some layer.
pub(crate) struct Prefix<'a> {
    source: &'a Model,
    damping: f64,
    layer: usize,
    /// Per window `[T, d]`.
    of_source: Vec<Vec<f32>>,
    of_packed: Vec<Vec<f32>>,
    cache: KvCache,
    /// Inputs of the sites of the present layer in the source, all windows one after the other.
    inputs: BTreeMap<Site, Vec<f32>>,
}

/// Keeps the inputs of some sites.
struct Keep<'a> {
    sites: &'a [Site],
    inputs: BTreeMap<Site, Vec<f32>>,
    /// The last of them has been seen.
    seen: bool,
    /// Whether the layer is of no use after that.
    ends: bool,
}

impl Tap for Keep<'_> {
    fn input(&mut self, _: usize, site: Site, x: &[f32], _: usize, _: usize) {
        if self.sites.contains(&site) {
            self.inputs.entry(site).or_default().extend_from_slice(x);
            self.seen = self.sites.last() == Some(&site);
        }
    }

    fn wants_more(&self) -> bool {
        !(self.ends && self.seen)
    }
}

impl<'a> Prefix<'a> {
    /// Before the first layer; `packed` has its embedding already.
    ///
    /// # Errors
    /// If a token is outside the vocabulary.
    pub(crate) fn new(
        source: &'a Model,
        packed: &Model,
        windows: &[Vec<u32>],
        damping: f64,
    ) -> Result<Self, QuantError> {
        let embed = |model: &Model| -> Result<Vec<Vec<f32>>, QuantError> {
            let mut states = Vec::with_capacity(windows.len());
            for tokens in windows {
                let mut x = Vec::new();
                model.embed(tokens, 0, &mut x)?;
                states.push(x);
            }
            Ok(states)
        };
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let mut prefix = Self {
            of_source: embed(source)?,
            of_packed: embed(packed)?,
            source,
            damping,
            layer: 0,
            cache: KvCache::new(source.config(), longest),
            inputs: BTreeMap::new(),
        };
        prefix.read_source()?;
        Ok(prefix)
    }

    /// Runs the source through the present layer and keeps what its sites read.
    fn read_source(&mut self) -> Result<(), QuantError> {
        let mut keep = Keep {
            sites: &SITES,
            inputs: BTreeMap::new(),
            seen: false,
            ends: false,
        };
        if self.layer < self.source.config().num_layers() {
            for x in &mut self.of_source {
                self.cache.reset();
                self.source
                    .layer_forward(self.layer, x, &mut self.cache, 0, &mut keep)?;
            }
        }
        self.inputs = keep.inputs;
        Ok(())
    }

    /// Moments of a site of the present layer, as `packed` is now; `None` if the layer has no such site.
    ///
    /// # Errors
    /// If the layer cannot be run.
    pub(crate) fn moments(&mut self, packed: &Model, site: Site) -> Result<Option<Moments>, QuantError> {
        let Some(x) = self.inputs.remove(&site) else {
            return Ok(None);
        };
        let mut keep = Keep {
            sites: &[site],
            inputs: BTreeMap::new(),
            seen: false,
            ends: true,
        };
        for x in &self.of_packed {
            self.cache.reset();
            keep.seen = false;
            let mut x = x.clone();
            packed.layer_forward(self.layer, &mut x, &mut self.cache, 0, &mut keep)?;
        }
        let Some(drifted) = keep.inputs.remove(&site).filter(|other| other.len() == x.len()) else {
            return Ok(None);
        };
        let tokens: usize = self.of_packed.iter().map(Vec::len).sum::<usize>() / packed.config().hidden_size;
        let n = x.len() / tokens.max(1);
        let mut hessian = zeros(n * n);
        dense::gram_accumulate(&drifted, tokens, n, &mut hessian);
        let damping = regularise(&mut hessian, n, tokens as u64, self.damping);
        let correction = Correction::new(Inputs {
            compressed: drifted,
            source: x,
            hessian: &hessian,
            damping: &damping,
        })
        .map_err(QuantError::game(&format!("layer {}, {site:?}", self.layer)))?;
        Ok(Some(Moments { hessian, correction }))
    }

    /// On to the next layer, once `packed` has this one.
    ///
    /// # Errors
    /// If a layer cannot be run.
    pub(crate) fn advance(&mut self, packed: &Model) -> Result<(), QuantError> {
        for x in &mut self.of_packed {
            self.cache.reset();
            packed.layer_forward(self.layer, x, &mut self.cache, 0, &mut ())?;
        }
        self.layer += 1;
        self.read_source()
    }
}
