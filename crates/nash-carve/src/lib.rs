//! Dense models as mixtures of experts.
//!
//! ```text
//! source ─► what each block reads and computes ─► carving game ─► router ─► folder
//!           on calibration text, layer by layer    neurons choose   ridge     as any model
//! ```
//!
//! Nothing is trained and no weight changes: the rows of gate and up, and the columns of down, of a block are sorted into experts. With all of them
//! active the model computes what it did before.
#![forbid(unsafe_code)]

mod carve;
mod channels;
mod error;
mod layer;
mod options;
mod report;
mod router;
mod write;

pub use carve::{Progress, carve};
pub use channels::{ChannelKind, channel_sparsity};
pub use error::CarveError;
pub use options::{CarveOptions, Start};
pub use report::{CarveReport, LayerReport};
pub use write::SaveTokenizer;
