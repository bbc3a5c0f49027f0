//! Candidate allocations, by the way that was asked for.

use nash_core::ModelFile;
use nash_games::allocation::{
    Evolution, Swarm, clear_with_couplings, evolve, greedy, knapsack, refine_prices,
};
use nash_games::{Player, clear_market};
use nash_kernels::Width;
use nash_models::LinearInfo;

use crate::QuantError;
use crate::allocate::{Curve, Inventory, Profile, players, uniform, widths};
use crate::curves::kind;
use crate::judge::{Judge, Scope};
use crate::options::{Allocation, Method};
use crate::session::Session;

/// Tokens of each of the two windows on which searches judge profiles.
const SEARCH_TOKENS: usize = 256;
/// Offspring of a generation of the evolutionary search.
const OFFSPRING: usize = 8;
/// Particles of the swarm.
const PARTICLES: usize = 10;
/// Bands of depth; tensors of a kind and a band share a price multiplier.
const BANDS: usize = 3;

/// What is to be allocated.
pub(crate) struct Wishes<'a> {
    pub(crate) inventory: &'a Inventory,
    /// Widths fixed by the user.
    pub(crate) fixed: &'a [Option<Width>],
    /// Bytes of the whole file.
    pub(crate) budget: u64,
}

impl Session<'_> {
    /// Allocations within the budget, the one asked for first. The market and its refinement by the swarm bring what they must not fall behind;
    /// the others stand alone.
    pub(crate) fn propose(
        &mut self,
        source: &ModelFile,
        wishes: &Wishes<'_>,
    ) -> Result<Vec<Profile>, QuantError> {
        let baseline = uniform(wishes.inventory, wishes.fixed, wishes.budget)?;
        // Where every width is given there is nothing to buy.
        if self.options.method != Method::Nash || wishes.fixed.iter().all(Option::is_some) {
            return Ok(vec![baseline]);
        }
        let mut profiles = match self.options.allocation {
            Allocation::Uniform => vec![baseline],
            Allocation::Evolution => vec![self.evolved(source, wishes, &baseline)?],
            Allocation::Market => vec![market(&self.players(wishes)?, wishes)?, baseline],
            Allocation::Swarm => {
                let players = self.players(wishes)?;
                let refined = self.refined(source, &players, wishes)?;
                vec![refined, market(&players, wishes)?, baseline]
            }
            Allocation::Greedy | Allocation::Knapsack | Allocation::Pairwise => vec![self.planned(wishes)?],
        };
        // An allocation that is there twice needs no contest.
        let mut seen: Vec<Vec<Width>> = Vec::new();
        profiles.retain(|profile| {
            let new = !seen.contains(&profile.widths);
            seen.push(profile.widths.clone());
            new
        });
        Ok(profiles)
    }

    fn players(&mut self, wishes: &Wishes<'_>) -> Result<Vec<Player>, QuantError> {
        let curves = self.curves()?;
        Ok(players(wishes.inventory, wishes.fixed, &curves))
    }

    /// Allocations that follow from measured losses without further evaluations of whole profiles.
    fn planned(&mut self, wishes: &Wishes<'_>) -> Result<Profile, QuantError> {
        let players = self.players(wishes)?;
        let budget = room(wishes);
        let failed = QuantError::game("allocation");
        let (name, chosen) = match self.options.allocation {
            Allocation::Greedy => ("greedy", greedy(&players, budget).map_err(failed)?),
            Allocation::Knapsack => ("knapsack", knapsack(&players, budget).map_err(failed)?.0),
            _ => {
                let couplings = self.couplings()?;
                let outcome = clear_with_couplings(&players, &couplings, budget).map_err(failed)?;
                let mut profile = profile("pairwise", wishes, &outcome.chosen);
                profile.predicted_kl = Some(outcome.loss);
                return Ok(profile);
            }
        };
        let loss = players.iter().zip(&chosen).map(|(p, &c)| p.choices[c].1).sum();
        Ok(Profile {
            predicted_kl: Some(loss),
            ..profile(name, wishes, &chosen)
        })
    }

    /// Searched without measured losses, from the uniform profile on.
    fn evolved(
        &mut self,
        source: &ModelFile,
        wishes: &Wishes<'_>,
        uniform: &Profile,
    ) -> Result<Profile, QuantError> {
        // Losses are not looked at.
        let nothing = Curve {
            kl_at_reference: Some(0.0),
            potential: vec![0.0; Width::ALL.len()],
            energy: 1.0,
            reference: 1.0,
        };
        let curves = vec![nothing; self.linears.len()];
        let players = players(wishes.inventory, wishes.fixed, &curves);
        let parent = uniform.widths.iter().zip(wishes.fixed).map(|(width, fixed)| {
            // A fixed width is the only choice.
            let all = Width::ALL.iter().position(|w| w == width).unwrap_or(0);
            if fixed.is_some() { 0 } else { all }
        });
        let rule = Evolution {
            evaluations: self.options.evaluations,
            offspring: OFFSPRING,
            seed: self.options.seed,
        };
        let mut search = self.search(source)?;
        let found = evolve(&players, parent.collect(), room(wishes), rule, |chosen| {
            search.loss(self, &widths(wishes.fixed, chosen))
        })?;
        Ok(profile("evolution", wishes, &found.chosen))
    }

    /// The market with price multipliers that a particle swarm found.
    fn refined(
        &self,
        source: &ModelFile,
        players: &[Player],
        wishes: &Wishes<'_>,
    ) -> Result<Profile, QuantError> {
        let groups = groups(&self.linears, self.model.config().num_layers());
        let rule = Swarm {
            particles: PARTICLES,
            evaluations: self.options.evaluations,
            seed: self.options.seed,
        };
        let mut search = self.search(source)?;
        let found = refine_prices(players, &groups, room(wishes), rule, |chosen| {
            search.loss(self, &widths(wishes.fixed, chosen))
        })?;
        Ok(profile("swarm", wishes, &found.chosen))
    }

    fn search(&self, source: &ModelFile) -> Result<Search, QuantError> {
        self.progress.stage("search", self.options.evaluations as u64);
        Ok(Search(Judge::new(
            self,
            source,
            &self.two_windows(SEARCH_TOKENS),
            Scope::Whole,
        )?))
    }
}

fn market(players: &[Player], wishes: &Wishes<'_>) -> Result<Profile, QuantError> {
    let outcome = clear_market(players, room(wishes)).map_err(QuantError::game("market"))?;
    Ok(Profile {
        predicted_kl: Some(outcome.loss),
        widths: widths(wishes.fixed, &outcome.chosen),
        name: "market",
        market: Some(outcome),
    })
}

/// A search in progress.
struct Search(Judge);

impl Search {
    fn loss(&mut self, session: &Session<'_>, widths: &[Width]) -> Result<f64, QuantError> {
        let loss = self.0.kl(session, widths, &|| ())?;
        session.progress.advance(1);
        Ok(loss)
    }
}

/// Bytes for packed tensors.
fn room(wishes: &Wishes<'_>) -> u64 {
    // The uniform profile was found before: the budget is not below the smallest size.
    wishes.budget.saturating_sub(wishes.inventory.fixed_bytes())
}

fn profile(name: &'static str, wishes: &Wishes<'_>, chosen: &[usize]) -> Profile {
    Profile {
        name,
        widths: widths(wishes.fixed, chosen),
        predicted_kl: None,
        market: None,
    }
}

/// Group of every linear: its kind and its band of depth.
fn groups<'a>(linears: &'a [LinearInfo], layers: usize) -> Vec<usize> {
    let mut known: Vec<(&'a str, usize)> = Vec::new();
    let group = |info: &'a LinearInfo| {
        let key = (kind(info), info.layer.map_or(0, |l| l * BANDS / layers.max(1)));
        known.iter().position(|k| *k == key).unwrap_or_else(|| {
            known.push(key);
            known.len() - 1
        })
    };
    linears.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use nash_models::Site;

    use super::*;

    #[test]
    fn groups_are_kinds_in_bands() {
        let linear = |name: &str, layer| LinearInfo {
            name: name.into(),
            layer,
            site: Site::AttnIn,
            rows: 8,
            cols: 64,
        };
        let linears = [
            linear("model.embed_tokens.0", None),
            linear("model.embed_tokens.1", None),
            linear("model.layers.0.self_attn.q_proj", Some(0)),
            linear("model.layers.0.self_attn.k_proj", Some(0)),
            linear("model.layers.1.self_attn.q_proj", Some(1)),
            linear("model.layers.5.self_attn.q_proj", Some(5)),
        ];
        assert_eq!(groups(&linears, 6), [0, 0, 1, 2, 1, 3]);
    }
}
