//! Layer by layer through the model.

use std::path::Path;
use std::time::Instant;

use nash_games::market::{Player, clear_market};
use nash_models::{
    KvCache, Model, ModelConfig, MoeConfig, Scoring, SharedExpert, Site, Tap, kl_divergence, log_softmax,
};
use rayon::prelude::*;

use crate::CarveError;
use crate::layer::{Block, Carved};
use crate::options::{CarveOptions, Division};
use crate::report::CarveReport;
use crate::write;

/// Tokens below which a carving would follow the noise.
const LEAST_TOKENS: usize = 1024;

/// Called after each layer with (layers done, layers in all); `false` stops.
pub type Progress<'a> = dyn FnMut(usize, usize) -> bool + 'a;

/// Carves a dense model into experts and writes it as a folder without a tokenizer, which `save_tokenizer` adds.
///
/// # Errors
/// The model is no gated dense one, the experts do not divide its blocks, the text is too short, `progress` stops, or the system refuses.
pub fn carve(
    model: &Model,
    options: &CarveOptions,
    out: &Path,
    save_tokenizer: &write::SaveTokenizer<'_>,
    progress: &mut Progress<'_>,
) -> Result<CarveReport, CarveError> {
    let start = Instant::now();
    let config = model.config();
    let f = config.mlp.intermediate;
    check(config)?;
    let division = options.division(f)?;
    let tokens: usize = options.windows.iter().map(Vec::len).sum();
    if tokens < LEAST_TOKENS {
        return Err(CarveError::TooShort {
            tokens,
            least: LEAST_TOKENS,
        });
    }
    let windows = &options.windows;
    // Where all experts are active there is nothing to divide, and nothing to measure.
    let (top_k, losses) = if options.market && division.top_k < division.experts {
        profile(model, division, options, progress)?
    } else {
        (vec![division.top_k; config.num_layers()], Vec::new())
    };
    let mut walk = Walk::new(model, windows)?;
    let mut layers = Vec::with_capacity(config.num_layers());
    for (layer, &top_k) in top_k.iter().enumerate() {
        let mut carved = walk.carve(Division { top_k, ..division }, options)?;
        carved.lost = Vec::new();
        carved.report.kl = losses.get(layer).copied();
        layers.push(carved);
        if !progress(layer + 1, config.num_layers()) {
            return Err(CarveError::Cancelled);
        }
    }
    let mut carved = config.clone();
    carved.moe = Some(MoeConfig {
        experts: division.experts,
        top_k: division.top_k,
        intermediate: division.width,
        scoring: Scoring::Unit,
        normalize: false,
        scale: 1.0,
        correction_bias: true,
        groups: None,
        shared: (division.shared > 0).then_some(SharedExpert {
            intermediate: division.shared,
            gated: false,
        }),
        bias: false,
    });
    for (layer, &k) in carved.layers.iter_mut().zip(&top_k) {
        // A layer that the market gave all experts stays the dense block that it was: the same answer without a router.
        layer.experts = !(options.market && division.top_k < division.experts && k == division.experts);
        layer.top_k = (layer.experts && k != division.top_k).then_some(k);
    }
    let report = CarveReport {
        experts: division.experts,
        width: division.width,
        shared: division.shared,
        active: (division.shared as f64
            + top_k.iter().sum::<usize>() as f64 / top_k.len() as f64 * division.width as f64)
            / f as f64,
        layers: layers.iter().map(|layer: &Carved| layer.report.clone()).collect(),
        max_regret: layers
            .iter()
            .map(|layer| layer.report.max_regret)
            .fold(0.0, f64::max),
        tokens,
        seconds: start.elapsed().as_secs_f64(),
    };
    write::write(model, &carved, &layers, &report, (out, save_tokenizer))?;
    Ok(report)
}

pub(crate) fn check(config: &ModelConfig) -> Result<(), CarveError> {
    let problem = if config.moe.is_some() {
        "it has experts already"
    } else if !config.mlp.gated {
        "its blocks have no gate"
    } else if config.mlp.bias {
        "its blocks have biases"
    } else {
        return Ok(());
    };
    Err(CarveError::NotDense {
        architecture: config.architecture.clone(),
        problem: problem.into(),
    })
}

/// Tokens on which the market measures.
const MARKET_WINDOWS: usize = 2;

/// Experts per token of each layer: layers buy neurons at one price, given what leaving them out costs the whole model. That is measured for one
/// number of experts and taken to grow with the energy that the router leaves out.
fn profile(
    model: &Model,
    division: Division,
    options: &CarveOptions,
    progress: &mut Progress<'_>,
) -> Result<(Vec<usize>, Vec<f64>), CarveError> {
    let quick = CarveOptions {
        router_rounds: 1,
        ..options.clone()
    };
    let step = options.windows.len().div_ceil(8).max(1);
    let windows: Vec<Vec<u32>> = options.windows.iter().step_by(step).cloned().collect();
    let mut walk = Walk::new(model, &windows)?;
    let vocab = model.config().vocab_size;
    let mut reference = walk.logits(0, &walk.states)?;
    reference.par_chunks_mut(vocab).for_each(log_softmax);
    let (mut players, mut losses) = (Vec::new(), Vec::new());
    for layer in 0..model.config().num_layers() {
        let carved = walk.carve(division, &quick)?;
        let mut states = walk.states[..MARKET_WINDOWS.min(walk.states.len())].to_vec();
        let mut lost = &carved.lost[..];
        for x in &mut states {
            let (own, rest) = lost.split_at(x.len());
            x.iter_mut().zip(own).for_each(|(x, l)| *x -= l);
            lost = rest;
        }
        let mut logits = walk.logits(layer + 1, &states)?;
        let kl = divergence(&reference, &mut logits, vocab);
        losses.push(kl);
        // Rounding errors must not make an expert worthless.
        let kl = kl.max(1e-9);
        let left = |k: usize| 1.0 - carved.kept[k];
        let choices = (1..=division.experts)
            .map(|k| {
                (
                    (k * division.width) as u64,
                    kl * left(k) / left(division.top_k).max(1e-9),
                )
            })
            .collect();
        players.push(Player { choices });
        if !progress(layer + 1, model.config().num_layers()) {
            return Err(CarveError::Cancelled);
        }
    }
    let budget = (players.len() * division.top_k * division.width) as u64;
    let outcome = clear_market(&players, budget)?;
    Ok((
        outcome.chosen.into_iter().map(|choice| choice + 1).collect(),
        losses,
    ))
}

/// Mean divergence of logits `q [T, V]` from log-probabilities `ln_p`, which may be of more tokens.
fn divergence(ln_p: &[f32], q: &mut [f32], vocab: usize) -> f64 {
    let rows = ln_p.par_chunks(vocab).zip(q.par_chunks_mut(vocab));
    let each: Vec<f64> = rows
        .map(|(ln_p, q)| {
            log_softmax(q);
            kl_divergence(ln_p, q)
        })
        .collect();
    each.iter().sum::<f64>() / each.len().max(1) as f64
}

/// The dense model, layer by layer.
struct Walk<'a> {
    model: &'a Model,
    layer: usize,
    cache: KvCache,
    /// Hidden states per window, `[T, d]`.
    states: Vec<Vec<f32>>,
}

impl<'a> Walk<'a> {
    fn new(model: &'a Model, windows: &[Vec<u32>]) -> Result<Self, CarveError> {
        let mut states = Vec::with_capacity(windows.len());
        for window in windows {
            let mut x = Vec::new();
            model.embed(window, 0, &mut x)?;
            states.push(x);
        }
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        Ok(Self {
            model,
            layer: 0,
            cache: KvCache::new(model.config(), longest),
            states,
        })
    }

    /// Carves the present layer and goes on to the next.
    fn carve(&mut self, division: Division, options: &CarveOptions) -> Result<Carved, CarveError> {
        let config = self.model.config();
        let mut keep = Keep::default();
        for x in &mut self.states {
            self.cache.reset();
            self.model
                .layer_forward(self.layer, x, &mut self.cache, 0, &mut keep)?;
        }
        let down = write::matrix(self.model, &format!("model.layers.{}.mlp.down_proj", self.layer))?;
        let block = Block {
            x: &keep.read,
            h: &keep.computed,
            down: &down,
            d: config.hidden_size,
            f: config.mlp.intermediate,
        };
        self.layer += 1;
        block.carve(division, options)
    }

    /// Logits of the first windows, `[T, V]`, from their states before `layer` on.
    fn logits(&self, layer: usize, states: &[Vec<f32>]) -> Result<Vec<f32>, CarveError> {
        let config = self.model.config();
        let mut cache = KvCache::new(
            config,
            states.iter().map(Vec::len).max().unwrap_or(0) / config.hidden_size,
        );
        let mut all = Vec::new();
        for x in states.iter().take(MARKET_WINDOWS) {
            let mut x = x.clone();
            cache.reset();
            for layer in layer..config.num_layers() {
                self.model.layer_forward(layer, &mut x, &mut cache, 0, &mut ())?;
            }
            self.model.final_norm(&mut x);
            let mut logits = vec![0.0; x.len() / config.hidden_size * config.vocab_size];
            self.model.logits(&x, &mut logits, &mut ());
            all.extend(logits);
        }
        Ok(all)
    }
}

/// What the blocks of a layer read and compute.
#[derive(Default)]
struct Keep {
    read: Vec<f32>,
    computed: Vec<f32>,
}

impl Tap for Keep {
    fn input(&mut self, _: usize, site: Site, x: &[f32], _: usize, _: usize) {
        match site {
            Site::MlpIn => self.read.extend_from_slice(x),
            Site::MlpDown => self.computed.extend_from_slice(x),
            _ => {}
        }
    }
}
