//! A loaded model: the whole forward pass, and its layers one by one for calibration.
//!
//! T tokens, d = hidden size, V = vocabulary. Every method takes `&self` and keeps its state in the [`KvCache`], so one
//! model serves many sequences. For one instruction set the results are bit-identical for any number of threads.

use std::sync::{Arc, Mutex};

use nash_core::ModelFile;

use crate::cache::KvCache;
use crate::channels::{ChannelRule, ChannelSparsity};
use crate::config::{ModelConfig, Positions, VocabParts};
use crate::error::{ModelError, Result};
use crate::feed::{Context, Feed, Mlp};
use crate::layer::{Call, Layer, RopeTables};
use crate::linear::{Input, Linear};
use crate::loader;
use crate::manifest::{LinearInfo, Site};
use crate::math;
use crate::norm::Norm;
use crate::rope;
use crate::routing::RoutingPolicy;
use crate::tap::Tap;
use crate::vocabulary::Vocabulary;
use crate::weights::Weights;

/// A decoder language model.
pub struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) weights: Weights,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Option<Norm>,
    /// `[positions, d]`.
    positions: Option<Arc<[f32]>>,
    pub(crate) rope: RopeTables,
    pub(crate) channels: Option<ChannelSparsity>,
    /// Behind a lock, since sequences share it.
    routing: Option<Mutex<Box<dyn RoutingPolicy>>>,
    /// Whether weights are released once they have been read.
    streams: bool,
    embedding: Vocabulary,
    /// `None` if it is the embedding.
    head: Option<Vocabulary>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Reads the configuration of a model file and finds all its tensors. Weight matrices are not copied: they stay
    /// in the mapped file.
    ///
    /// # Errors
    /// Unknown or unsupported architectures, missing tensors, wrong shapes.
    pub fn load(file: &ModelFile) -> Result<Self> {
        loader::load(file, |_| VocabParts::default())
    }

    /// Like [`Self::load`], with embedding and output matrix in parts, each a linear of its own: `cut` tells which. Packed models keep the parts they
    /// have.
    ///
    /// # Errors
    /// As [`Self::load`]; also if the parts do not fit the matrices.
    pub fn load_in_parts(file: &ModelFile, cut: impl FnOnce(&ModelConfig) -> VocabParts) -> Result<Self> {
        loader::load(file, cut)
    }

    pub(crate) fn new(
        config: ModelConfig,
        weights: Weights,
        layers: Vec<Layer>,
        final_norm: Option<Norm>,
        positions: Option<Arc<[f32]>>,
    ) -> Result<Self> {
        let rope = match &config.positions {
            Positions::Rope(settings) => [
                Some(rope::frequencies(&settings.global, settings.dims)),
                settings
                    .local
                    .as_ref()
                    .map(|local| rope::frequencies(local, settings.dims)),
            ],
            Positions::Learned { .. } => [None, None],
        };
        let embedding = Vocabulary::find(&weights, &config, "model.embed_tokens");
        let embedding = embedding.ok_or_else(|| ModelError::NoSuchLinear {
            name: "model.embed_tokens".into(),
        })?;
        let head = Vocabulary::find(&weights, &config, "lm_head");
        Ok(Self {
            config,
            weights,
            layers,
            final_norm,
            positions,
            rope,
            channels: None,
            routing: None,
            streams: false,
            embedding,
            head,
        })
    }

    /// What the model is.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Every weight matrix, in the order of the forward pass.
    #[must_use]
    pub fn linears(&self) -> Vec<LinearInfo> {
        self.weights.infos().cloned().collect()
    }

    /// A weight matrix by its canonical name.
    #[must_use]
    pub fn linear(&self, name: &str) -> Option<&Arc<dyn Linear>> {
        self.weights.slot(name).map(|slot| self.weights.linear(slot))
    }

    /// Replaces a weight matrix.
    ///
    /// # Errors
    /// There is no linear of this name, or the new one has another shape.
    pub fn set_linear(&mut self, name: &str, linear: Arc<dyn Linear>) -> Result<()> {
        self.weights.set(name, linear)
    }

    /// Lets a rule rank experts from now on; `None` for plain top-k. It does nothing in a model without experts.
    pub fn set_routing(&mut self, policy: Option<Box<dyn RoutingPolicy>>) {
        self.routing = policy.map(Mutex::new);
    }

    /// Lets the dense gated blocks keep only some of their neurons per token, from now on; `None` for all.
    ///
    /// # Errors
    /// The norms or thresholds are not one per layer, of the blocks' width.
    pub fn set_channels(&mut self, channels: Option<ChannelSparsity>) -> Result<()> {
        if let Some(channels) = &channels {
            let (layers, f) = (self.config.num_layers(), self.config.mlp.intermediate);
            let thresholds = match &channels.rule {
                ChannelRule::Largest(_) => layers,
                ChannelRule::Above(each) | ChannelRule::GateAbove(each) => each.len(),
            };
            let fits = channels.norms.iter().all(|norms| norms.len() == f);
            if thresholds != layers || channels.norms.len() != layers || !fits {
                return Err(ModelError::Config {
                    key: "channels".into(),
                    problem: format!(
                        "{thresholds} thresholds and {} norms for {layers} layers",
                        channels.norms.len()
                    ),
                });
            }
        }
        self.channels = channels;
        Ok(())
    }

    /// What the gate of a dense block gives after its nonlinearity, `[T, f]`, for inputs `x [T, d]`; empty for other blocks.
    #[must_use]
    pub fn gate(&self, layer: usize, x: &[f32]) -> Vec<f32> {
        let Feed::Dense(Mlp { gate: Some(gate), .. }) = &self.layers[layer].feed else {
            return Vec::new();
        };
        let mut out = Vec::new();
        let input = Input::new(x, self.config.hidden_size);
        self.weights.project(gate, &input, &mut out);
        math::activate(self.config.mlp.activation, &mut out);
        out
    }

    /// Everything that is not a weight matrix (norms, biases, position table): canonical name, shape, values.
    #[must_use]
    pub fn float_tensors(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let floats = self.weights.floats.iter();
        floats
            .map(|(name, shape, values)| (name.clone(), shape.clone(), values.to_vec()))
            .collect()
    }

    /// Replaces the values of one of [`Self::float_tensors`].
    ///
    /// # Errors
    /// There is no float tensor of this name, or it has another number of values.
    pub fn set_float(&mut self, name: &str, values: Vec<f32>) -> Result<()> {
        let floats = &mut self.weights.floats;
        let Some((_, shape, stored)) = floats.iter_mut().find(|float| float.0 == name) else {
            return Err(ModelError::NoSuchFloat {
                name: name.to_owned(),
            });
        };
        if values.len() != stored.len() {
            return Err(ModelError::WrongShape {
                file: "replacement".into(),
                tensor: name.to_owned(),
                expected: shape.clone(),
                found: vec![values.len()],
            });
        }
        let old = std::mem::replace(stored, values.into());
        let new = Arc::clone(stored);
        // The blocks share the tensor with the list.
        let mut replace = |used: &mut Arc<[f32]>| {
            if Arc::ptr_eq(used, &old) {
                *used = Arc::clone(&new);
            }
        };
        self.layers
            .iter_mut()
            .for_each(|layer| layer.for_each_float(&mut replace));
        if let Some(norm) = &mut self.final_norm {
            norm.for_each_float(&mut replace);
        }
        if let Some(positions) = &mut self.positions {
            replace(positions);
        }
        Ok(())
    }

    /// Bytes of all stored weights, as they lie in the file or in memory.
    #[must_use]
    pub fn resident_bytes(&self) -> usize {
        let floats: usize = self
            .weights
            .floats
            .iter()
            .map(|(_, _, values)| 4 * values.len())
            .sum();
        floats
            + self
                .weights
                .linears()
                .map(|(_, linear)| linear.resident_bytes())
                .sum::<usize>()
    }

    /// Reads every weight once and looks for NaN and infinity.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] with the first one found.
    pub fn check_finite(&self) -> Result<()> {
        self.weights.check_finite()
    }

    /// Embeds tokens that stand at positions from `start` on: `x [T, d]`.
    ///
    /// # Errors
    /// A token outside the vocabulary, or a position outside a learned table.
    pub fn embed(&self, tokens: &[u32], start: usize, x: &mut Vec<f32>) -> Result<()> {
        let (d, vocab) = (self.config.hidden_size, self.config.vocab_size);
        if let Some(&id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(ModelError::TokenOutOfRange { id, vocab });
        }
        let end = start + tokens.len();
        if self.positions.is_some() && end > self.config.context_length {
            return Err(ModelError::ContextOverflow {
                needed: end,
                capacity: self.config.context_length,
            });
        }
        x.clear();
        x.resize(tokens.len() * d, 0.0);
        for (row, &token) in x.chunks_exact_mut(d).zip(tokens) {
            self.embedding.row(&self.weights, token as usize, row);
        }
        if self.config.embedding_scale != 1.0 {
            x.iter_mut().for_each(|v| *v *= self.config.embedding_scale);
        }
        if let (Some(table), Positions::Learned { offset }) = (&self.positions, &self.config.positions) {
            let rows = &table[(start + offset) * d..(end + offset) * d];
            x.iter_mut().zip(rows).for_each(|(v, p)| *v += p);
        }
        self.release(None);
        Ok(())
    }

    /// Applies one layer to `x [T, d]` in place, the tokens standing at positions from `start` on. Keys and values
    /// go into the cache, whose earlier positions must have been written; its length is not changed.
    ///
    /// # Errors
    /// The cache is too small or was made for another model.
    ///
    /// # Panics
    /// There is no such layer, or `x` is no whole number of tokens.
    pub fn layer_forward(
        &self,
        layer: usize,
        x: &mut [f32],
        cache: &mut KvCache,
        start: usize,
        tap: &mut dyn Tap,
    ) -> Result<()> {
        assert!(x.len().is_multiple_of(self.config.hidden_size), "whole tokens");
        if x.is_empty() {
            return Ok(());
        }
        let call = Call {
            config: &self.config,
            rope: &self.rope,
            start,
        };
        let mut context = Context {
            weights: &self.weights,
            layer,
            activation: self.config.mlp.activation,
            channels: self.channels.as_ref(),
            routing: self.routing.as_ref(),
            tap,
        };
        self.layers[layer].forward(&call, &mut context, x, cache)?;
        self.release(Some(layer));
        Ok(())
    }

    /// Whether weights give their memory back as soon as a layer has been run, to be read from the file again the next time: for models larger than memory,
    /// or than what they should take of it. Costs little where many tokens run through a layer at a time, and much where one does.
    pub fn set_streaming(&mut self, streams: bool) {
        self.streams = streams;
    }

    /// Gives back the memory of a layer, or of the embedding and the output matrix, if the model streams.
    pub(crate) fn release(&self, layer: Option<usize>) {
        if self.streams {
            let linears = self.weights.linears();
            let here = linears.filter(|(info, _)| info.layer == layer);
            here.for_each(|(_, linear)| linear.release());
        }
    }

    /// The norm before the output matrix, in place on `x [.., d]`.
    pub fn final_norm(&self, x: &mut [f32]) {
        if let Some(norm) = &self.final_norm {
            norm.apply(x);
        }
    }

    /// The output matrix.
    pub(crate) fn head(&self) -> &Vocabulary {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Logits `out [T, V]` of hidden states `[T, d]` after the final norm.
    ///
    /// # Panics
    /// `out` has another length than T·V.
    pub fn logits(&self, hidden: &[f32], out: &mut [f32], tap: &mut dyn Tap) {
        let d = self.config.hidden_size;
        let input = Input::new(hidden, d);
        assert_eq!(
            out.len(),
            input.tokens() * self.config.vocab_size,
            "room for the logits"
        );
        tap.input(self.config.num_layers(), Site::Head, hidden, input.tokens(), d);
        self.head().forward(&self.weights, &input, out);
        if let Some(cap) = self.config.logit_softcap {
            out.iter_mut().for_each(|v| *v = math::softcap(*v, cap));
        }
        self.release(None);
    }

    /// Runs tokens that follow what the cache holds; returns their hidden states after the final norm, `[T, d]`.
    ///
    /// # Errors
    /// The cache has no room (nothing is computed then), or a token is outside the vocabulary.
    pub fn forward(&self, tokens: &[u32], cache: &mut KvCache, tap: &mut dyn Tap) -> Result<Vec<f32>> {
        let start = cache.len();
        cache.check(&self.config, start + tokens.len())?;
        let mut x = Vec::new();
        self.embed(tokens, start, &mut x)?;
        for layer in 0..self.layers.len() {
            self.layer_forward(layer, &mut x, cache, start, tap)?;
        }
        cache.advance(tokens);
        self.final_norm(&mut x);
        Ok(x)
    }
}
