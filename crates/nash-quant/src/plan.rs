//! What a compression would give and cost, from shapes alone: no weights are read.

use std::time::Instant;

use nash_kernels::Width;
use nash_kernels::dense::{MatMut, MatRef, gemm};
use nash_models::ModelConfig;

use crate::QuantError;
use crate::allocate::{Inventory, fixed_widths, uniform, vocab_ranges};
use crate::options::CompressOptions;

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
    /// Estimated peak memory of the compression in bytes, without the mapped source.
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
    let config = &ModelConfig {
        vocab_ranges: vocab_ranges(config.vocab_size),
        ..config.clone()
    };
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
    let cost = Cost::of(config, &inventory, options);
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
        compress_memory_bytes: cost.memory,
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

/// Operation and byte counts of a compression.
struct Cost {
    operations: f64,
    memory: u64,
    scratch: u64,
}

impl Cost {
    fn of(config: &ModelConfig, inventory: &Inventory, options: &CompressOptions) -> Self {
        let tokens = options
            .calibration
            .windows
            .iter()
            .map(Vec::len)
            .sum::<usize>()
            .max(16 * 1024) as f64;
        let probe = options.probe_tokens as f64;
        let params: f64 = inventory.linears.iter().map(|l| l.weights() as f64).sum();
        // Tensors that read the same input share a Hessian; per layer there are about four of them.
        let mut sites: Vec<(Option<usize>, nash_models::Site, usize)> = config
            .linears()
            .iter()
            .map(|l| (l.layer, l.site, l.cols))
            .collect();
        sites.dedup();
        let gram: f64 = sites.iter().map(|s| (s.2 as f64).powi(2)).sum();
        // With gradients: forward, again and back, and a Hessian per linear instead of one per input.
        let calibrate = if options.sensitivity.weights_tokens() {
            let grams: f64 = inventory.linears.iter().map(|l| (l.cols as f64).powi(2)).sum();
            2.0 * tokens * (3.0 * params + grams)
        } else {
            2.0 * tokens * (params + gram)
        };
        // One sweep of the game: a product of every weight matrix with its Hessian.
        let sweep: f64 = inventory
            .linears
            .iter()
            .map(|l| 2.0 * l.weights() as f64 * l.cols as f64)
            .sum();
        let solve = sweep * (options.max_sweeps as f64 + 2.0) * 1.5;
        // Measuring: every linear once at the reference width, half of the layers on average, and the head.
        let head = 2.0 * (config.vocab_size * config.hidden_size) as f64;
        let measure = if options.sensitivity.measures() {
            inventory.linears.len() as f64 * probe * (params + head) + 4.0 * sweep
        } else {
            0.0
        };
        let largest = inventory.linears.iter().map(|l| l.weights()).max().unwrap_or(0);
        let widest = inventory.linears.iter().map(|l| l.cols as u64).max().unwrap_or(0);
        let states = tokens as u64 * config.hidden_size as u64 * 4;
        let probe_bytes = options.probe_tokens as u64
            * 4
            * (config.vocab_size + config.layers.len() * config.hidden_size) as u64;
        Self {
            operations: calibrate + measure + solve,
            memory: largest * 14 + 8 * widest * widest + states.max(probe_bytes) + (64 << 20),
            scratch: (gram * 2.0) as u64 + params as u64,
        }
    }
}

/// `f32` operations per second of this machine's matrix products, from a measurement of a few tens of milliseconds.
fn operations_per_second() -> f64 {
    const N: usize = 512;
    let (a, mut c) = (vec![1.0f32; N * N], vec![0.0f32; N * N]);
    let run = |c: &mut [f32]| {
        let start = Instant::now();
        gemm(
            1.0,
            MatRef::row_major(&a, N, N),
            MatRef::row_major(&a, N, N),
            0.0,
            MatMut::row_major(c, N, N),
        );
        start.elapsed().as_secs_f64()
    };
    let best = (0..6).map(|_| run(&mut c)).fold(f64::INFINITY, f64::min);
    2.0 * (N as f64).powi(3) / best.max(1e-9)
}
