//! Decoder language models as data over shared blocks: configuration, forward pass, KV cache, sampling, generation.
//!
//! An architecture is a row of a table ([`ModelConfig`] says what a model is; the names of its tensors come from
//! another table), not a file of code. The forward pass knows weights only through [`Linear`], so that a float
//! weight in a mapped file, a dense one and a packed one are interchangeable ([`Model::set_linear`]).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use nash_models::{GenerateOptions, Generator, KvCache, Model, Sampler, SamplingParams};
//!
//! let model = Model::load(&nash_core::ModelFile::open("model.gguf")?)?;
//! let mut cache = KvCache::new(model.config(), 2048);
//! let sampler = Sampler::new(SamplingParams::default())?;
//! let options = GenerateOptions { max_new_tokens: Some(32), ..Default::default() };
//! for token in Generator::new(&model, &mut cache, sampler, &[1, 42, 7], options)? {
//!     println!("{}", token?);
//! }
//! # Ok(()) }
//! ```
//!
//! Shapes: T tokens, d hidden size, V vocabulary; weights `[m, n]` = `[outputs, inputs]`; all matrices row-major.

mod attention;
mod backward;
mod cache;
mod channels;
mod config;
mod error;
mod feed;
mod generate;
mod layer;
mod linear;
mod loader;
mod log_probs;
mod manifest;
mod math;
mod model;
mod names;
mod norm;
mod rope;
mod routing;
mod sampler;
mod scratch;
mod stacked;
mod stop;
mod tap;
mod vocabulary;
mod weights;

pub use backward::GradientTap;
pub use cache::{KvCache, KvType};
pub use channels::{ChannelRule, ChannelSparsity};
pub use config::{
    Activation, AttentionConfig, ExpertGroups, LayerConfig, MlpConfig, ModelConfig, MoeConfig, NormConfig,
    NormKind, NormPlacement, Positions, QkNorm, RopeConfig, RopeFrequencies, RopeScaling, RopeStyle,
    STORED_KEY, Scoring, SharedExpert, VocabParts,
};
pub use error::{ModelError, Result};
pub use generate::{FinishReason, GenerateOptions, Generator, PREFILL_CHUNK, Progress};
pub use linear::{DenseLinear, FloatLinear, Input, Linear, PackedLinear, decode_rows};
pub use log_probs::{kl_divergence, log_softmax};
pub use manifest::{LinearInfo, Site, matrix_name};
pub use model::Model;
pub use routing::{RoutingCall, RoutingPolicy};
pub use sampler::{Sampler, SamplingParams, argmax};
pub use stop::{StopMatch, StopMatcher};
pub use tap::Tap;
