//! What to carve.

use crate::CarveError;

/// Options of [`crate::carve`].
#[derive(Clone, Debug)]
pub struct CarveOptions {
    /// Routed experts of a layer.
    pub experts: usize,
    /// Neurons of the shared expert; 0 for none.
    pub shared: usize,
    /// Share of a block's neurons that a token may use, those of the shared expert included.
    pub active: f64,
    /// Absent experts answer with a constant.
    pub stand_ins: bool,
    /// How the game starts.
    pub start: Start,
    /// What the router estimates.
    pub target: Target,
    /// Fit the down projections to what the router chooses, with this ridge; then all experts together are no longer the dense block.
    pub refit: Option<f64>,
    /// Share of the errors of the layers before that a refitted layer makes up for.
    pub propagate: f32,
    /// Each layer chooses as many experts as pay best at one price, instead of the same number.
    pub market: bool,
    /// Times at most that neurons answer to the router and it to them.
    pub router_rounds: usize,
    /// Tokens of the calibration text, window by window.
    pub windows: Vec<Vec<u32>>,
    /// Seed of the random start.
    pub seed: u64,
}

/// How the carving game starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Neurons that fire together stand together, the strongest are shared.
    #[default]
    Flocks,
    /// At random.
    Random,
    /// As the neurons lie in the matrix.
    InOrder,
}

/// What a router estimates for each expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Target {
    /// Its energy.
    Energy,
    /// Its share of the token's energy.
    Share,
    /// The root of that share.
    #[default]
    Root,
    /// The logarithm of that share.
    Log,
}

impl Target {
    pub(crate) fn apply(self, energy: f32, total: f32) -> f32 {
        let share = energy / total.max(f32::MIN_POSITIVE);
        match self {
            Self::Energy => energy,
            Self::Share => share,
            Self::Root => share.sqrt(),
            Self::Log => (share + 1e-4).ln(),
        }
    }
}

/// A block of f neurons in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Division {
    pub(crate) experts: usize,
    /// Neurons of a routed expert.
    pub(crate) width: usize,
    pub(crate) shared: usize,
    /// Routed experts per token.
    pub(crate) top_k: usize,
}

impl CarveOptions {
    /// How a block of `f` neurons is divided.
    pub(crate) fn division(&self, f: usize) -> Result<Division, CarveError> {
        let (experts, shared) = (self.experts, self.shared);
        if experts == 0 || shared >= f || !(f - shared).is_multiple_of(experts) {
            return Err(CarveError::Division { experts, shared, width: f });
        }
        let width = (f - shared) / experts;
        let top_k = ((self.active * f as f64 - shared as f64) / width as f64 + 1e-9).floor();
        if !(1.0..=experts as f64).contains(&top_k) {
            return Err(CarveError::Active {
                active: self.active,
                experts,
                least: (shared + width) as f64 / f as f64,
            });
        }
        Ok(Division { experts, width, shared, top_k: top_k as usize })
    }
}
