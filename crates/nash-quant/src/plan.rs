//! What a compression would give and cost, from shapes alone: no weights are read.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nash_games::propagation::through_tokens;
use nash_kernels::Width;
use nash_kernels::dense::{MatMut, MatRef, gemm};
use nash_models::{ModelConfig, Site, VocabParts};

use crate::QuantError;
use crate::allocate::{Inventory, fixed_widths, outliers, uniform, vocab_ranges};
use crate::curves::is_measured;
use crate::options::{Allocation, Codebook, CompressOptions, Effort, Method};

/// Sizes, memory and time for a model and a budget.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Plan {
    /// Parameters, packed or not.
    pub weights: u64,
    /// Budget in bytes.
    pub budget_bytes: u64,
    /// Bytes of the file with the widths below; what the market chooses differs per tensor, not in total.
    pub file_bytes: u64,
    /// The same in bits per weight.
    pub file_bits_per_weight: f64,
    /// Bits per weight of the linears.
    pub linear_bits_per_weight: f64,
    /// Bytes of the same model in 16-bit floats.
    pub half_precision_bytes: u64,
    /// Smallest file possible, bytes.
    pub smallest_bytes: u64,
    /// Number of linears at each width.
    pub widths: Vec<(usize, usize)>,
    /// Estimated peak memory of the compression in bytes; the source streams and is no part of it.
    pub compress_memory_bytes: u64,
    /// Estimated scratch space on disk in bytes.
    pub scratch_bytes: u64,
    /// Estimated seconds on this machine, from operation counts and a short measurement of its speed.
    pub compress_seconds: f64,
    /// Memory to run the model: packed weights and a KV cache of `context` tokens in `f16`, bytes.
    pub run_memory_bytes: u64,
    /// Context length assumed for the KV cache.
    pub context: usize,
    /// One line per linear: name, rows, cols, bits, bytes.
    pub rows: Vec<PlanRow>,
}

/// One linear of a plan.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct PlanRow {
    /// Canonical name.
    pub name: String,
    /// Outputs, inputs.
    pub shape: [usize; 2],
    /// Bits per code.
    pub bits: usize,
    /// Bytes with scales and codebook.
    pub bytes: u64,
}

/// Plans the compression of a model of this configuration.
///
/// # Errors
/// If the budget is too small or a `--tensor-type` pattern matches nothing.
pub fn plan(config: &ModelConfig, options: &CompressOptions) -> Result<Plan, QuantError> {
    let config = &in_parts(config);
    let inventory = Inventory::of(config);
    let fixed = fixed_widths(&inventory.linears, &options.tensor_types)?;
    let weights = inventory.weights();
    let budget = options.budget.bytes(weights);
    let profile = uniform(&inventory, &fixed, budget)?;
    let file_bytes = inventory.file_bytes(&profile.widths).unwrap_or(u64::MAX);
    let smallest: Vec<Width> = fixed.iter().map(|f| f.unwrap_or(Width::ALL[0])).collect();
    let context = config.context_length.min(4096);
    let kv = config.layers.len() * config.attention.kv_heads * config.attention.head_dim * 2 * 2 * context;
    let count = |w: Width| profile.widths.iter().filter(|&&p| p == w).count();
    let given: usize = options.calibration.windows.iter().map(Vec::len).sum();
    let tokens = if given == 0 {
        Effort::default().calibration_tokens()
    } else {
        given
    };
    let cost = Cost::of(config, &inventory, options, tokens);
    Ok(Plan {
        weights,
        budget_bytes: budget,
        file_bytes,
        file_bits_per_weight: file_bytes as f64 * 8.0 / weights.max(1) as f64,
        linear_bits_per_weight: inventory.linear_bits_per_weight(&profile.widths),
        half_precision_bytes: 2 * weights,
        smallest_bytes: inventory.file_bytes(&smallest).unwrap_or(u64::MAX),
        widths: Width::ALL
            .into_iter()
            .map(|w| (w.bits(), count(w)))
            .filter(|c| c.1 > 0)
            .collect(),
        // The packed model grows while it is solved.
        compress_memory_bytes: cost.memory + file_bytes,
        scratch_bytes: cost.scratch,
        compress_seconds: cost.operations / operations_per_second(),
        run_memory_bytes: file_bytes + kv as u64,
        context,
        rows: inventory
            .linears
            .iter()
            .zip(&profile.widths)
            .map(|(l, &w)| PlanRow {
                name: l.name.clone(),
                shape: [l.rows, l.cols],
                bits: w.bits(),
                bytes: l.packed_bytes(w).unwrap_or(u64::MAX),
            })
            .collect(),
    })
}

/// The most work that is estimated to fit in this many seconds on this machine; the least there is if none fits. The tokens to calibrate on are those
/// of the effort.
///
/// # Errors
/// If a `--tensor-type` pattern matches nothing.
pub fn effort_within(
    config: &ModelConfig,
    options: &CompressOptions,
    seconds: f64,
) -> Result<Effort, QuantError> {
    let config = in_parts(config);
    let inventory = Inventory::of(&config);
    let rate = operations_per_second();
    let mut best = Effort::Least;
    for effort in Effort::ALL {
        let options = effort.apply(options.clone());
        let cost = Cost::of(&config, &inventory, &options, effort.calibration_tokens());
        if cost.operations / rate <= seconds {
            best = effort;
        }
    }
    Ok(best)
}

/// Weights from which on everything that pays takes more than the better part of an hour on two cores.
const MANY_WEIGHTS: u64 = 1_000_000_000;

/// How much work a compression does unless told otherwise: that depends on the size of the model alone, never on the machine.
pub fn usual_effort(config: &ModelConfig) -> Effort {
    if Inventory::of(config).weights() > MANY_WEIGHTS {
        Effort::Short
    } else {
        Effort::Normal
    }
}

/// Whether what is asked for can be met at all.
///
/// # Errors
/// If the budget is too small or a `--tensor-type` pattern matches nothing.
pub(crate) fn check(config: &ModelConfig, options: &CompressOptions) -> Result<(), QuantError> {
    let inventory = Inventory::of(&in_parts(config));
    let fixed = fixed_widths(&inventory.linears, &options.tensor_types)?;
    uniform(&inventory, &fixed, options.budget.bytes(inventory.weights())).map(|_| ())
}

/// The configuration with its vocabulary cut as compression cuts it. Which columns are outliers is not known, only how many.
fn in_parts(config: &ModelConfig) -> ModelConfig {
    let vocab_parts = VocabParts {
        ranges: vocab_ranges(config.vocab_size),
        outliers: outliers(&vec![0.0; config.hidden_size], config.vocab_size),
    };
    ModelConfig {
        vocab_parts,
        ..config.clone()
    }
}

/// Operation and byte counts of a compression.
struct Cost {
    /// `f32` operations of matrix products, and what else takes time in units of them.
    operations: f64,
    memory: u64,
    scratch: u64,
}

/// Per weight, in `f32` operations of a matrix product that take as long: fitting table and scales and two sweeps, and the sweeps from there to
/// equilibrium, without the products. Measured on a CPU with AVX-512; with narrower registers both cost more.
const TRELLIS: [f64; 2] = [14e3, 8e3];
/// The same for scalar codebooks, of which every sweep after the draft costs the second number.
const SCALAR: [f64; 2] = [6e3, 1e3];
/// Sweeps from a draft to equilibrium.
const SWEEPS: f64 = 14.0;
/// Products of every weight with its Hessian, as many as the changes of all sweeps come to: up to the draft, and from there on.
const PRODUCTS: [f64; 2] = [3.0, 2.5];
/// Rows on which losses at all widths are computed.
const SAMPLE_ROWS: f64 = 32.0;

impl Cost {
    fn of(config: &ModelConfig, inventory: &Inventory, options: &CompressOptions, tokens: usize) -> Self {
        let linears = &inventory.linears;
        let tokens = tokens as f64;
        let params: f64 = linears.iter().map(|l| l.weights() as f64).sum();
        // Tensors that read the same input share a Hessian; per layer there are about four of them.
        let mut sites: Vec<(Option<usize>, Site, usize)> = config
            .linears()
            .iter()
            .map(|l| (l.layer, l.site, l.cols))
            .collect();
        sites.dedup();
        let gram: f64 = sites.iter().map(|s| (s.2 as f64).powi(2)).sum();
        // With gradients: forward, again and back, and a Hessian per linear instead of one per input.
        let calibrate = if options.sensitivity.weights_tokens() {
            let grams: f64 = linears.iter().map(|l| (l.cols as f64).powi(2)).sum();
            2.0 * tokens * (3.0 * params + grams)
        } else {
            2.0 * tokens * (params + gram)
        };
        // One product of every weight matrix with its Hessian.
        let product: f64 = linears
            .iter()
            .map(|l| 2.0 * l.weights() as f64 * l.cols as f64)
            .sum();
        let trellis = options.codebook == Codebook::Trellis;
        let [draft, rest] = if trellis { TRELLIS } else { SCALAR };
        let sweeps = SWEEPS.min(options.max_sweeps as f64);
        let draft = params * draft + PRODUCTS[0] * product;
        let solve = params * rest * if trellis { sweeps / SWEEPS } else { sweeps } + PRODUCTS[1] * product;
        let evaluation = |tokens: f64| 2.0 * tokens * params;
        let (mut drafts, mut measure) = (1.0, 0.0);
        if options.method == Method::Nash && options.allocation != Allocation::Uniform {
            let layers = config.num_layers();
            let measured = (0..layers).filter(|&l| is_measured(l, layers, options.probe_layer_stride));
            let share = measured.count() as f64 / layers.max(1) as f64;
            // The market's draft, and half of the uniform one in the measured layers; searches draft about one more.
            drafts = 1.0 + 0.5 * share;
            let sampled: f64 = linears.iter().map(|l| SAMPLE_ROWS * l.cols as f64).sum();
            let widths = Width::ALL.len() as f64;
            measure = sampled / params * widths * draft + share * (params * SCALAR[0] + 2.0 * product);
            if options.sensitivity.measures() {
                // On average half of the layers run, and the head.
                let head = (config.vocab_size * config.hidden_size) as f64;
                let probe = 0.5 * evaluation(options.probe_tokens as f64);
                measure += share * linears.len() as f64 * (probe + 2.0 * options.probe_tokens as f64 * head);
            }
            if matches!(options.allocation, Allocation::Swarm | Allocation::Evolution) {
                drafts += 1.0;
                measure += options.evaluations as f64 * evaluation(512.0);
            }
        }
        let tune = options.tune_epochs as f64 * 4.0 * evaluation(tokens);
        // A Hessian and a correction per site, targets, and the layers up to each of their sites.
        // States of a second model, what the sites of a layer read, and what one site reads twice more.
        let (propagate, inputs) = if options.propagation > 0.0 {
            let widest = linears.iter().map(|l| l.cols).max().unwrap_or(0);
            let columns = 4 * config.hidden_size + 3 * widest;
            let corrections: f64 = sites.iter().map(|s| correction(s.2, tokens as usize)).sum();
            let targets = linears.iter().map(|l| target(l.rows, l.cols, tokens as usize));
            let targets: f64 = targets.sum();
            let operations = tokens * gram + corrections + targets + 3.2 * evaluation(tokens);
            (operations, tokens as u64 * 4 * columns as u64)
        } else {
            (0.0, 0)
        };
        let largest = linears.iter().map(|l| l.weights()).max().unwrap_or(0);
        let widest = linears.iter().map(|l| l.cols as u64).max().unwrap_or(0);
        let states = tokens as u64 * config.hidden_size as u64 * 4;
        let probe_bytes = options.probe_tokens as u64
            * 4
            * (config.vocab_size + config.layers.len() * config.hidden_size) as u64;
        Self {
            operations: calibrate + measure + drafts * draft + solve + propagate + tune,
            memory: largest * 14 + 8 * widest * widest + states.max(probe_bytes) + inputs + (64 << 20),
            scratch: (gram * 2.0) as u64 + params as u64,
        }
    }
}

/// Operations of the correction of a site of `n` inputs ([`nash_games::propagation`]).
fn correction(inputs: usize, tokens: usize) -> f64 {
    let (n, t) = (inputs as f64, tokens as f64);
    if through_tokens(inputs, tokens) {
        t * t * n + t.powi(3) / 3.0
    } else {
        2.0 * t * n * n + n.powi(3) / 3.0
    }
}

/// Operations of a target `[m, n]`.
fn target(outputs: usize, inputs: usize, tokens: usize) -> f64 {
    let (m, n, t) = (outputs as f64, inputs as f64, tokens as f64);
    if through_tokens(inputs, tokens) {
        4.0 * m * n * t + 2.0 * m * t * t
    } else {
        4.0 * m * n * n
    }
}

/// `f32` operations per second of this machine's matrix products, measured when it is first asked for.
fn operations_per_second() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(measure_rate)
}

/// The best of the products that fit half a second, so that a moment in which something else ran does not count.
fn measure_rate() -> f64 {
    const N: usize = 1024;
    const MEASURED: Duration = Duration::from_millis(500);
    /// The share of the rate of a square product that those of a compression reach: from whole runs on models of 135M and 1.5B weights.
    const REACHED: f64 = 0.8;
    let (a, mut c) = (vec![1.0f32; N * N], vec![0.0f32; N * N]);
    let begin = Instant::now();
    let mut best = Duration::MAX;
    while begin.elapsed() < MEASURED {
        let start = Instant::now();
        gemm(
            1.0,
            MatRef::row_major(&a, N, N),
            MatRef::row_major(&a, N, N),
            0.0,
            MatMut::row_major(&mut c, N, N),
        );
        best = best.min(start.elapsed());
    }
    REACHED * 2.0 * (N as f64).powi(3) / best.as_secs_f64().max(1e-9)
}
