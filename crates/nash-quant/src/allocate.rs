//! Widths for every linear under a budget that counts every byte of the file.

use nash_games::{MarketOutcome, Player};
use nash_kernels::{GROUP, PackedShape, TILE_ROWS, Width};
use nash_models::{LinearInfo, ModelConfig, Site, matrix_name};

use crate::QuantError;

/// Shape of one linear.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LinearShape {
    /// Canonical name without `.weight`.
    pub name: String,
    /// Outputs m.
    pub rows: usize,
    /// Inputs n.
    pub cols: usize,
}

impl LinearShape {
    /// Bytes of the packed tensor: stream, row scales and codebook. `None` if it does not fit the address space.
    pub fn packed_bytes(&self, width: Width) -> Option<u64> {
        let stream = PackedShape {
            rows: self.rows,
            cols: self.cols,
            width,
        }
        .stream_bytes()? as u64;
        Some(stream + 2 * self.rows as u64 + width.codebook_len() as u64)
    }

    /// Number of weights.
    pub fn weights(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }
}

/// What a model file consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Every packed tensor.
    pub linears: Vec<LinearShape>,
    /// (name, elements) of every tensor kept in half precision: norms, biases, positions, routers.
    pub floats: Vec<(String, u64)>,
}

impl Inventory {
    /// The tensors that a configuration calls for. Routers are small and steer everything after them: they stay in half precision.
    pub fn of(config: &ModelConfig) -> Self {
        let (routers, linears): (Vec<_>, Vec<_>) =
            config.linears().into_iter().partition(|l| l.site == Site::Router);
        let shapes = |l: LinearInfo| LinearShape {
            name: l.name,
            rows: l.rows,
            cols: l.cols,
        };
        let floats = config
            .float_tensors()
            .into_iter()
            .map(|(name, shape)| (name, shape.iter().map(|&d| d as u64).product()));
        let routers = routers
            .into_iter()
            .map(|l| (format!("{}.weight", l.name), l.rows as u64 * l.cols as u64));
        Self {
            linears: linears.into_iter().map(shapes).collect(),
            floats: floats.chain(routers).collect(),
        }
    }

    /// Bits per weight of the linears alone.
    pub fn linear_bits_per_weight(&self, widths: &[Width]) -> f64 {
        let bytes: u64 = self
            .linears
            .iter()
            .zip(widths)
            .filter_map(|(l, &w)| l.packed_bytes(w))
            .sum();
        bytes as f64 * 8.0 / self.linears.iter().map(LinearShape::weights).sum::<u64>().max(1) as f64
    }

    /// All weights, packed or not: the denominator of the file's bits per weight.
    pub fn weights(&self) -> u64 {
        self.linears.iter().map(LinearShape::weights).sum::<u64>()
            + self.floats.iter().map(|f| f.1).sum::<u64>()
    }

    /// Bytes that do not depend on the widths: float tensors, and an upper bound of headers, configuration and report.
    pub fn fixed_bytes(&self) -> u64 {
        // What JSON takes beside the name: an entry of the safetensors header, of config.json, of the report, a digest.
        let [entry, config, row, digest] = [82, 40, 130, 70];
        let name = |name: &str| name.len() as u64;
        let float = |(n, elements): &(String, u64)| 2 * elements + 2 * name(n) + entry + digest;
        let linear = |l: &LinearShape| 6 * name(&l.name) + 30 + 3 * entry + config + row + digest;
        let (floats, linears): (u64, u64) = (
            self.floats.iter().map(float).sum(),
            self.linears.iter().map(linear).sum(),
        );
        floats + linears + 4096
    }

    /// Bytes of the file for a profile of widths; `None` on overflow.
    pub fn file_bytes(&self, widths: &[Width]) -> Option<u64> {
        self.linears
            .iter()
            .zip(widths)
            .try_fold(self.fixed_bytes(), |sum, (l, &w)| {
                sum.checked_add(l.packed_bytes(w)?)
            })
    }
}

/// Columns of embedding and output matrix that are stored apart.
const OUTLIERS: usize = GROUP;

/// The columns with the largest mean squares in front of the output matrix, given the diagonal of its Hessian; none for models so narrow that they would be
/// most of it, and for those whose vocabulary stays whole.
pub(crate) fn outliers(diagonal: &[f32], vocab: usize) -> Vec<u32> {
    if diagonal.len() < 4 * OUTLIERS || vocab_ranges(vocab).is_empty() {
        return Vec::new();
    }
    let mut columns: Vec<u32> = (0..diagonal.len() as u32).collect();
    let energy = |c: u32| diagonal[c as usize];
    columns.sort_by(|&a, &b| energy(b).total_cmp(&energy(a)).then(a.cmp(&b)));
    columns.truncate(OUTLIERS);
    columns.sort_unstable();
    columns
}

/// Rows of the ranges that embedding and output matrix are cut into, each a player of the market: twice a 32nd, a 16th and seven times
/// an eighth of the vocabulary, in whole tiles. Rows are in order of merges, so frequent tokens come first. Small vocabularies stay whole.
pub(crate) fn vocab_ranges(vocab: usize) -> Vec<usize> {
    const SHARES: [usize; 10] = [32, 32, 16, 8, 8, 8, 8, 8, 8, 8];
    const LEAST: usize = 4096;
    if vocab < LEAST {
        return Vec::new();
    }
    let mut ranges = SHARES.map(|share| (vocab / share).next_multiple_of(TILE_ROWS));
    let last = SHARES.len() - 1;
    ranges[last] = vocab - ranges[..last].iter().sum::<usize>();
    ranges.to_vec()
}

/// Loss of every linear at every width, from one measurement and the layer errors.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Curve {
    /// Mean KL divergence (nats per token) of the model when only this tensor is compressed, by the reference rounding. `None` where it
    /// was not measured.
    pub kl_at_reference: Option<f64>,
    /// Layer error Φ at each of [`Width::ALL`], on a sample of rows.
    pub potential: Vec<f64>,
    /// Energy `Σ w H wᵀ` of the same rows.
    pub energy: f64,
    /// Layer error Φ of the reference rounding of the same rows.
    pub reference: f64,
}

impl Curve {
    /// Predicted loss at the width with index `w`: the measured one scaled by the layer error (second order).
    pub fn loss(&self, w: usize) -> f64 {
        let kl = self
            .kl_at_reference
            .unwrap_or_else(|| self.relative_error())
            .max(0.0);
        if self.reference > 0.0 {
            kl * self.potential[w] / self.reference
        } else {
            0.0
        }
    }

    /// Layer error of the reference rounding as a share of the energy, at least a tiny positive number.
    pub(crate) fn relative_error(&self) -> f64 {
        (self.reference / self.energy.max(f64::MIN_POSITIVE)).max(1e-12)
    }
}

/// Widths fixed by `--tensor-type PATTERN=WIDTH`, one entry per linear.
///
/// # Errors
/// If a pattern matches no linear.
pub(crate) fn fixed_widths(
    linears: &[LinearShape],
    rules: &[(String, Width)],
) -> Result<Vec<Option<Width>>, QuantError> {
    let matches = |pattern: &str, name: &str| glob(pattern, name) || glob(pattern, matrix_name(name));
    for (pattern, _) in rules {
        if !linears.iter().any(|l| matches(pattern, &l.name)) {
            let problem = format!(
                "matches no tensor; names are like `{}`",
                linears.first().map_or("", |l| &l.name)
            );
            return Err(QuantError::TensorType {
                pattern: pattern.clone(),
                problem,
            });
        }
    }
    Ok(linears
        .iter()
        .map(|l| rules.iter().find(|(p, _)| matches(p, &l.name)).map(|r| r.1))
        .collect())
}

/// Whether `pattern` with `*` (any run) and `?` (any one character) matches all of `name`.
pub(crate) fn glob(pattern: &str, name: &str) -> bool {
    let (p, n): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // reachable[j]: the pattern read so far matches the first j characters.
    let mut reachable = vec![false; n.len() + 1];
    reachable[0] = true;
    for &c in &p {
        let mut next = vec![false; n.len() + 1];
        for j in 0..=n.len() {
            next[j] = match c {
                '*' => reachable[j] || (j > 0 && next[j - 1]),
                '?' => j > 0 && reachable[j - 1],
                _ => j > 0 && reachable[j - 1] && n[j - 1] == c,
            };
        }
        reachable = next;
    }
    reachable[n.len()]
}

/// A width for every linear.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// What proposed it, such as `market` or `uniform`.
    pub name: &'static str,
    /// One width per linear.
    pub widths: Vec<Width>,
    /// Predicted KL divergence, if there are curves.
    pub predicted_kl: Option<f64>,
    /// The market's outcome.
    pub market: Option<MarketOutcome>,
}

/// The widths on offer for a linear: the fixed one or all.
fn offers(fixed: Option<Width>) -> impl Iterator<Item = (usize, Width)> {
    Width::ALL
        .into_iter()
        .enumerate()
        .filter(move |(_, w)| fixed.is_none_or(|f| f == *w))
}

/// The players of the market for bits: sizes and predicted losses of every linear's formats.
pub(crate) fn players(inventory: &Inventory, fixed: &[Option<Width>], curves: &[Curve]) -> Vec<Player> {
    let linears = inventory.linears.iter().zip(fixed).zip(curves);
    linears
        .map(|((l, &f), curve)| Player {
            choices: offers(f)
                .map(|(i, w)| (l.packed_bytes(w).unwrap_or(u64::MAX / 1024), curve.loss(i)))
                .collect(),
        })
        .collect()
}

/// Widths of chosen formats.
pub(crate) fn widths(fixed: &[Option<Width>], chosen: &[usize]) -> Vec<Width> {
    let chosen = fixed.iter().zip(chosen);
    chosen
        .filter_map(|(&f, &c)| offers(f).nth(c).map(|(_, w)| w))
        .collect()
}

/// The same width everywhere; where the budget lies between two widths, tensors spread evenly over the model (in golden-ratio
/// order) get the larger one as long as it fits.
///
/// # Errors
/// If the budget is below the smallest size.
pub(crate) fn uniform(
    inventory: &Inventory,
    fixed: &[Option<Width>],
    budget: u64,
) -> Result<Profile, QuantError> {
    check_budget(inventory, fixed, budget)?;
    let at = |w: Width| -> Vec<Width> { fixed.iter().map(|f| f.unwrap_or(w)).collect() };
    let fits = |widths: &[Width]| inventory.file_bytes(widths).is_some_and(|b| b <= budget);
    let base = Width::ALL
        .into_iter()
        .rev()
        .find(|&w| fits(&at(w)))
        .unwrap_or(Width::ALL[0]);
    let mut widths = at(base);
    if let Some(larger) = Width::ALL.into_iter().find(|w| w.bits() > base.bits()) {
        let mut order: Vec<usize> = (0..widths.len()).filter(|&i| fixed[i].is_none()).collect();
        let golden = |i: usize| (i as f64 * 0.618_033_988_749_894_9).fract();
        order.sort_by(|&a, &b| golden(a).total_cmp(&golden(b)));
        for i in order {
            widths[i] = larger;
            if !fits(&widths) {
                widths[i] = base;
            }
        }
    }
    Ok(Profile {
        name: "uniform",
        widths,
        predicted_kl: None,
        market: None,
    })
}

fn check_budget(inventory: &Inventory, fixed: &[Option<Width>], budget: u64) -> Result<(), QuantError> {
    let smallest: Vec<Width> = fixed.iter().map(|f| f.unwrap_or(Width::ALL[0])).collect();
    match inventory.file_bytes(&smallest) {
        Some(smallest) if smallest <= budget => Ok(()),
        smallest => {
            let smallest = smallest.unwrap_or(u64::MAX);
            let bits = smallest as f64 * 8.0 / inventory.weights().max(1) as f64;
            Err(QuantError::BudgetTooSmall {
                budget,
                smallest,
                bits,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inventory() -> Inventory {
        let linears = (0..20)
            .map(|i| LinearShape {
                name: format!("layers.{i}.q_proj"),
                rows: 512,
                cols: 512,
            })
            .collect();
        Inventory {
            linears,
            floats: vec![("norm".into(), 512)],
        }
    }

    #[test]
    fn globs() {
        assert!(
            glob("*.q_proj", "layers.3.q_proj") && glob("layers.?.q*", "layers.3.q_proj") && glob("*", "")
        );
        assert!(!glob("*.q_proj", "layers.3.q_proj.bias") && !glob("layers.?.q_proj", "layers.13.q_proj"));
    }

    #[test]
    fn ranges_add_up_and_answer_to_the_name_of_their_matrix() {
        for vocab in [4096, 4099, 49_152, 151_936, 262_144] {
            let ranges = vocab_ranges(vocab);
            assert_eq!(ranges.iter().sum::<usize>(), vocab);
            assert!(ranges.iter().all(|&rows| rows > 0), "{ranges:?}");
        }
        assert!(vocab_ranges(300).is_empty());
        let ranges = ["lm_head.0", "lm_head.outliers.1"].map(|name| LinearShape {
            name: name.into(),
            rows: 8,
            cols: 64,
        });
        let six = Width::new(6);
        let found = fixed_widths(&ranges, &[("lm_head".into(), six.unwrap())]).unwrap();
        assert_eq!(found, [six, six]);
    }

    #[test]
    fn outliers_are_the_columns_with_most_energy() {
        let diagonal: Vec<f32> = (0..512).map(|c| if c % 8 == 3 { 9.0 } else { 1.0 }).collect();
        let found = outliers(&diagonal, 4096);
        assert!(found.len() == 64 && found.iter().all(|c| c % 8 == 3), "{found:?}");
        assert!(outliers(&diagonal[..128], 4096).is_empty() && outliers(&diagonal, 300).is_empty());
    }

    #[test]
    fn uniform_fills_the_budget_and_keeps_fixed_widths() {
        let inventory = inventory();
        let mut fixed = vec![None; 20];
        fixed[3] = Width::new(8);
        let budget = inventory.weights() * 37 / 80;
        let profile = uniform(&inventory, &fixed, budget).unwrap();
        let bytes = inventory.file_bytes(&profile.widths).unwrap();
        let step = inventory.linears[0].weights() / 8;
        assert!(
            bytes <= budget && bytes + step + 64 > budget,
            "{bytes} of {budget}"
        );
        assert_eq!(profile.widths[3].bits(), 8);
        let distinct: std::collections::BTreeSet<usize> = profile
            .widths
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != 3)
            .map(|(_, w)| w.bits())
            .collect();
        assert!(distinct.len() <= 2, "{distinct:?}");
    }

    #[test]
    fn the_market_gives_bits_to_those_who_need_them() {
        let inventory = inventory();
        let curves: Vec<Curve> = (0..20)
            .map(|i| Curve {
                kl_at_reference: Some(if i == 7 { 1.0 } else { 0.01 }),
                energy: 1.0,
                potential: Width::ALL.iter().map(|w| 0.25f64.powi(w.bits() as i32)).collect(),
                reference: 0.25f64.powi(3),
            })
            .collect();
        let budget = inventory.file_bytes(&[Width::new(3).unwrap(); 20]).unwrap();
        let players = players(&inventory, &[None; 20], &curves);
        let outcome = nash_games::clear_market(&players, budget - inventory.fixed_bytes()).unwrap();
        let widths = widths(&[None; 20], &outcome.chosen);
        assert!(widths[7].bits() >= 5, "{widths:?}");
        assert!(inventory.file_bytes(&widths).unwrap() <= budget);
    }

    #[test]
    fn impossible_wishes_are_errors() {
        let inventory = inventory();
        assert!(matches!(
            uniform(&inventory, &[None; 20], 1000),
            Err(QuantError::BudgetTooSmall { .. })
        ));
        let rule = ("*.bogus".to_string(), Width::ALL[0]);
        assert!(matches!(
            fixed_widths(&inventory.linears, &[rule]),
            Err(QuantError::TensorType { .. })
        ));
    }
}
