//! Pairwise effects: what two tensors cost together beyond what each costs alone.
//!
//! Every tensor has up to 7 neighbours: the other tensors of its layer and the tensor of its kind in the next. The excess
//! `KL(t, s) − KL(t) − KL(s)` of pairs is measured in a few layers, divided by `√(KL(t) KL(s))`, and its mean over the layers is the
//! strength of all pairs of those kinds.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use nash_games::allocation::Coupling;
use nash_games::rounding::Problem;
use nash_models::{Linear, LinearInfo};

use crate::QuantError;
use crate::curves::kind;
use crate::probe::Probe;
use crate::session::Session;

/// Layers in which pairs are measured: so many, evenly spread.
const LAYERS: usize = 3;
/// Tensors of a layer that are paired, its first ones: more than a dense layer has.
const PAIRED: usize = 7;

/// Kinds of two neighbours, and whether the second one is in the next layer.
type Kinds = (String, String, bool);

impl Session<'_> {
    /// Neighbours with measured strengths.
    pub(crate) fn couplings(&mut self) -> Result<Vec<Coupling>, QuantError> {
        let layers = self.model.config().num_layers();
        let pairs = neighbours(&self.linears, layers);
        let strengths: Vec<(Kinds, f64)> = match self.scratch.get("couplings")? {
            Some(known) => known,
            None => {
                let measured = self.measure_couplings(&pairs, layers)?;
                self.scratch.put("couplings", &measured)?;
                measured
            }
        };
        let strengths: BTreeMap<Kinds, f64> = strengths.into_iter().collect();
        Ok(pairs
            .into_iter()
            .filter_map(|players| {
                let strength = *strengths.get(&self.kinds(players))?;
                Some(Coupling { players, strength })
            })
            .collect())
    }

    fn kinds(&self, [a, b]: [usize; 2]) -> Kinds {
        let (a, b) = (&self.linears[a], &self.linears[b]);
        (kind(a).into(), kind(b).into(), a.layer != b.layer)
    }

    fn measure_couplings(
        &mut self,
        pairs: &[[usize; 2]],
        layers: usize,
    ) -> Result<Vec<(Kinds, f64)>, QuantError> {
        let measured: Vec<usize> = (0..LAYERS).map(|i| (2 * i + 1) * layers / (2 * LAYERS)).collect();
        let of = |p: &&[usize; 2]| self.linears[p[0]].layer.is_some_and(|l| measured.contains(&l));
        let pairs: Vec<[usize; 2]> = pairs.iter().filter(of).copied().collect();
        self.progress.stage("measure pairs", pairs.len() as u64);
        let probe = Probe::new(&self.model, &self.two_windows(self.options.probe_tokens / 2))?;
        let mut alone: BTreeMap<usize, (Arc<dyn Linear>, f64)> = BTreeMap::new();
        let mut sums: BTreeMap<Kinds, (f64, f64)> = BTreeMap::new();
        for &pair in &pairs {
            self.check_cancelled()?;
            for t in pair {
                if let Entry::Vacant(slot) = alone.entry(t) {
                    let changed = self.reference_linear(t)?;
                    let change = vec![(self.linears[t].name.clone(), Arc::clone(&changed))];
                    let kl = probe.kl_of_all(&mut self.model, self.linears[t].layer, change)?;
                    slot.insert((changed, kl));
                }
            }
            let change = pair.map(|t| (self.linears[t].name.clone(), Arc::clone(&alone[&t].0)));
            let together = probe.kl_of_all(&mut self.model, self.linears[pair[0]].layer, change.into())?;
            let [a, b] = pair.map(|t| alone[&t].1);
            let root = (a * b).max(0.0).sqrt();
            if root > 0.0 {
                let sum = sums.entry(self.kinds(pair)).or_default();
                *sum = (sum.0 + (together - a - b) / root, sum.1 + 1.0);
            }
            self.progress.advance(1);
        }
        Ok(sums
            .into_iter()
            .map(|(k, (sum, count))| (k, sum / count))
            .collect())
    }

    fn reference_linear(&self, t: usize) -> Result<Arc<dyn Linear>, QuantError> {
        let info = &self.linears[t];
        let (weights, hessian) = (self.weights(info)?, self.hessian(info)?);
        let problem = Problem {
            weights: &weights,
            cols: info.cols,
            hessian: &hessian,
        };
        self.rounded_to_reference(info, problem)
    }
}

/// Pairs of neighbours, each once, the one in the lower layer first.
fn neighbours(linears: &[LinearInfo], layers: usize) -> Vec<[usize; 2]> {
    let mut pairs = Vec::new();
    for layer in 0..layers {
        let of = |layer: usize| {
            let here = (0..linears.len()).filter(move |&t| linears[t].layer == Some(layer));
            here.take(PAIRED)
        };
        let (here, above): (Vec<usize>, Vec<usize>) = (of(layer).collect(), of(layer + 1).collect());
        for (i, &a) in here.iter().enumerate() {
            pairs.extend(here[i + 1..].iter().map(|&b| [a, b]));
            let same = above.iter().find(|&&b| kind(&linears[b]) == kind(&linears[a]));
            pairs.extend(same.map(|&b| [a, b]));
        }
    }
    pairs
}
