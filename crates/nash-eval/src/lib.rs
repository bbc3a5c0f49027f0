//! Measurements of a language model: perplexity, KL divergence to a reference, answers to questions, speed and
//! memory.
//!
//! Everything here sees a model through [`Scorer`], so that a measurement never knows how a weight was
//! compressed and tests can use a table of logits in place of a model.
//!
//! - [`Windows`]: the text windows and positions that `llama-perplexity` scores.
//! - [`perplexity`], [`compare()`]: one pass over the windows, logits in row blocks, sums in `f64`.
//! - [`glue`]: sentence tasks by log-likelihood; accuracy, F1, Matthews correlation, agreement.
//! - [`speed()`], [`ReadBandwidth`], [`memory`]: tokens per second, bytes per second, resident bytes.
//! - [`routing`]: cost, balance and regret of routing tokens to experts, on synthetic scores.
//! - [`report`]: the serialisable results; their field names are stable, scripts rely on them.
//!
//! Shapes: T tokens of a window, d hidden width, V vocabulary; hidden states `[T, d]`, logits `[T, V]`, row-major.

mod bandwidth;
mod compare;
mod error;
pub mod glue;
pub mod memory;
mod model;
pub mod report;
pub mod routing;
mod scorer;
mod softmax;
mod speed;
pub mod stats;
mod windows;

pub use bandwidth::ReadBandwidth;
pub use compare::{Progress, compare, perplexity};
pub use error::EvalError;
pub use model::ModelScorer;
pub use report::{ComparisonReport, PerplexityReport, SpeedReport, TaskReport};
pub use scorer::{Decoder, PrefixScorer, Scorer};
pub use softmax::{KlRow, kl_row, log_sum_exp};
pub use speed::{SpeedOptions, speed};
pub use windows::{Window, Windows};
