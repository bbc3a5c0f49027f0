//! What a user can ask of a compression.

use nash_kernels::Width;

/// How large the result may be. Every byte of the model files counts; tokenizer text files are listed apart.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Bits per stored weight, over the whole file.
    BitsPerWeight(f64),
    /// Bytes of the whole file.
    Bytes(u64),
}

impl Budget {
    /// The budget in bytes for a model of `weights` parameters.
    pub fn bytes(&self, weights: u64) -> u64 {
        match *self {
            Self::BitsPerWeight(bits) => (bits * weights as f64 / 8.0).floor() as u64,
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The games: codebooks, best response to equilibrium, widths from the market.
    #[default]
    Nash,
    /// Baseline: uniform levels, scale from the largest magnitude, nearest level; the same width everywhere.
    RoundToNearest,
    /// Baseline: uniform levels, searched scales, sequential rounding with error feedback (GPTQ with act-order); the same width everywhere.
    Gptq,
}

/// The start of the rounding game.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Every weight at its nearest level. Reaches equilibria closer to the source.
    #[default]
    Nearest,
    /// The leader–follower solution. Reaches lower layer errors.
    LeaderFollower,
}

/// What the codes of the games are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codebook {
    /// Six bits of a chain of codes choose a value: trellis-coded quantization. Errs least.
    #[default]
    Trellis,
    /// Every code has its value. Decodes faster on CPUs without AVX-512.
    Scalar,
}

/// How the bytes are divided among the tensors (for [`Method::Nash`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Allocation {
    /// The market at its clearing price, or uniform widths where held-back text likes those better.
    #[default]
    Market,
    /// The market with price multipliers refined by a particle swarm on the true loss; falls back on the market and on uniform widths.
    Swarm,
    /// Baseline: the same width everywhere.
    Uniform,
    /// Baseline: the largest fall of the measured loss per byte, again and again.
    Greedy,
    /// Baseline: the exact optimum of the measured losses.
    Knapsack,
    /// Baseline: the market with measured pairwise effects.
    Pairwise,
    /// Baseline: evolutionary search on the true loss (EvoPress), without measured losses.
    Evolution,
}

/// How the loss of a tensor at a width is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sensitivity {
    /// Measured as the KL divergence of the model with this one tensor rounded; in deep models in some layers and interpolated.
    #[default]
    Measured,
    /// Measured likewise; tokens of the rounding game are weighted by gradients of the whole model's loss, from one reverse pass over the calibration
    /// text. Models without a reverse pass (mixtures of experts) are not weighted.
    Weighted,
    /// Predicted from gradients of the whole model's loss, which also weight the tokens of the rounding game. Faster; better where the
    /// divergence is small. Models without a reverse pass (mixtures of experts) are measured instead.
    Gradient,
}

/// How much work a compression may be. Everything else about it is as asked for.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Effort {
    /// Scalar codebooks, uniform widths, few sweeps.
    Least,
    /// Scalar codebooks, a market with few measurements, few sweeps.
    Quick,
    /// Trellis codebooks, a market with few measurements, layers that make up for the errors before them.
    Short,
    /// Everything that pays.
    #[default]
    Normal,
    /// Also what pays little for its time: the market refined by a particle swarm, norms and biases tuned.
    Thorough,
}

/// The best share of the drift to make up for (ADR 0015).
const PROPAGATION: f32 = 0.3;

impl Effort {
    /// All, least first.
    pub const ALL: [Self; 5] = [
        Self::Least,
        Self::Quick,
        Self::Short,
        Self::Normal,
        Self::Thorough,
    ];

    /// Tokens to calibrate on.
    pub fn calibration_tokens(self) -> usize {
        match self {
            Self::Least => 2048,
            Self::Quick => 3072,
            Self::Short => 4096,
            Self::Normal => 8192,
            Self::Thorough => 16384,
        }
    }

    /// The same options with this much work.
    #[must_use]
    pub fn apply(self, options: CompressOptions) -> CompressOptions {
        let few = |options| CompressOptions {
            probe_tokens: 48,
            probe_layer_stride: 8,
            ..options
        };
        match self {
            Self::Least => CompressOptions {
                codebook: Codebook::Scalar,
                allocation: Allocation::Uniform,
                max_sweeps: 2,
                ..few(options)
            },
            Self::Quick => CompressOptions {
                codebook: Codebook::Scalar,
                max_sweeps: 3,
                ..few(options)
            },
            Self::Short => CompressOptions {
                max_sweeps: 6,
                propagation: PROPAGATION,
                ..few(options)
            },
            Self::Normal => CompressOptions {
                propagation: PROPAGATION,
                ..options
            },
            Self::Thorough => CompressOptions {
                allocation: Allocation::Swarm,
                propagation: PROPAGATION,
                tune_epochs: 2,
                ..options
            },
        }
    }
}

/// Text to calibrate on, as windows of tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Calibration {
    /// Token windows, each an independent sequence.
    pub windows: Vec<Vec<u32>>,
    /// Where the text came from, for the report.
    pub description: String,
}

/// Options of [`crate::compress`].
#[derive(Debug, Clone, PartialEq)]
pub struct CompressOptions {
    /// Size of the result.
    pub budget: Budget,
    /// Rounding method and with it the allocation.
    pub method: Method,
    /// Start of the rounding game.
    pub start: Start,
    /// What codes are worth (for [`Method::Nash`]). The leader–follower start needs [`Codebook::Scalar`].
    pub codebook: Codebook,
    /// How the bytes are divided (for [`Method::Nash`]).
    pub allocation: Allocation,
    /// Whole profiles whose true loss a search may measure ([`Allocation::Swarm`], [`Allocation::Evolution`]).
    pub evaluations: usize,
    /// How losses are known (for [`Method::Nash`]).
    pub sensitivity: Sensitivity,
    /// Fixed widths: (glob over canonical tensor names, width); the first match counts.
    pub tensor_types: Vec<(String, Width)>,
    /// Seed of every random choice; recorded in the report.
    pub seed: u64,
    /// Text to calibrate on.
    pub calibration: Calibration,
    /// Share of the mean of `diag H` added to the diagonal.
    pub damping: f64,
    /// Sweeps of the rounding game at most.
    pub max_sweeps: usize,
    /// Whether whole chains of a trellis deviate together before single codes answer.
    pub joint_moves: bool,
    /// Share of the drift of their inputs that linears make up for, 0 to 1: above 0 they are solved in the order of the forward pass, each against what it
    /// reads from the compressed prefix. At 0 each is solved against what the source reads. Where the rounding game weights tokens by gradients, it
    /// counts as 0.
    pub propagation: f32,
    /// Whether what was found before is used again: solutions start from drafts, candidates share them. Changes the time, not the result.
    pub reuse: bool,
    /// Tokens on which the KL divergence of single-tensor changes is measured.
    pub probe_tokens: usize,
    /// In models of more than twelve layers it is measured in the first and last few and in every n-th layer between them.
    pub probe_layer_stride: usize,
    /// Times that norms and biases see the calibration text to make up for the rounding of the rest; 0 leaves them as they are. Models without
    /// a reverse pass (mixtures of experts) and methods that do not look at text are not tuned.
    pub tune_epochs: usize,
    /// Continue an interrupted compression in the same place.
    pub resume: bool,
    /// Replace an existing output folder.
    pub force: bool,
    /// Folder for intermediate results, kept and shared between budgets; default: `OUT.work`, removed at the end.
    pub work_dir: Option<std::path::PathBuf>,
}

impl Sensitivity {
    /// Whether the rounding game weights tokens by gradients.
    pub(crate) fn weights_tokens(self) -> bool {
        self != Self::Measured
    }

    /// Whether losses are measured.
    pub(crate) fn measures(self) -> bool {
        self != Self::Gradient
    }
}

impl Default for CompressOptions {
    fn default() -> Self {
        Self {
            budget: Budget::BitsPerWeight(4.25),
            method: Method::Nash,
            start: Start::Nearest,
            codebook: Codebook::Trellis,
            allocation: Allocation::Market,
            evaluations: 64,
            sensitivity: Sensitivity::Measured,
            tensor_types: Vec::new(),
            seed: 0,
            calibration: Calibration::default(),
            damping: 0.1,
            max_sweeps: 64,
            joint_moves: true,
            propagation: 0.0,
            reuse: true,
            probe_tokens: 128,
            probe_layer_stride: 3,
            tune_epochs: 0,
            resume: false,
            force: false,
            work_dir: None,
        }
    }
}
