//! Compression of a language model by games.
//!
//! ```text
//! source ─► calibrate ─► measure ─► allocate ─► draft ─► select ─► solve ─► tune ─► write
//!           Hessians     loss       market for  two      true KL   rounding norms   packed folder
//!           per site     curves     bits        sweeps   decides   game     and     with certificates
//!                                                                           biases
//! ```
//!
//! Every stage stores what it computed in a scratch folder ([`scratch`]), which makes a killed run resumable and lets several
//! budgets share their calibration. The same input gives the same bytes for any number of threads.
#![forbid(unsafe_code)]

mod allocate;
mod compress;
mod couplings;
mod curves;
mod error;
mod hessian;
mod judge;
mod options;
mod packed;
mod plan;
mod prefix;
mod probe;
mod progress;
mod propagate;
mod propose;
mod report;
pub mod scratch;
mod sensitivity;
mod session;
mod stored;
mod tensor;
mod tune;
mod verify;
mod write;

pub use allocate::{Curve, Inventory, LinearShape, Profile};
pub use compress::compress;
pub use error::QuantError;
pub use options::{
    Allocation, Budget, Calibration, Codebook, CompressOptions, Effort, Method, Sensitivity, Start,
};
pub use plan::{Plan, effort_within, plan, usual_effort};
pub use progress::Progress;
pub use report::{Report, TensorRow, Tuning};
pub use verify::{Verification, VerifyOptions, verify};
pub use write::SaveTokenizer;
