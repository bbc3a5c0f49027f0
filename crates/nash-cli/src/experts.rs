//! How tokens choose experts: options of every command that runs a mixture.

use clap::{Args, ValueEnum};
use nash_eval::routing::{ExpertRouting, ExpertRules, ExpertUse, UseHandle};

use crate::failure::Hint as _;
use crate::model::Loaded;
use crate::out::say;

/// Rules for the choice of experts.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Experts (mixtures only)")]
pub(crate) struct Experts {
    /// How tokens choose experts; naming a rule also counts what they touch
    #[arg(long, value_enum, value_name = "RULE")]
    routing: Option<Rule>,
    /// Experts of a layer that fast memory has room for [default: half of them]
    #[arg(long, value_name = "N", requires = "routing")]
    resident: Option<usize>,
    /// What an expert in fast memory is worth more, in standard deviations of a token's scores: higher fetches less and answers worse
    #[arg(
        long,
        value_name = "R,…",
        value_delimiter = ',',
        default_value = "0.5",
        requires = "routing"
    )]
    reward: Vec<f32>,
    /// Give experts prices that balance their loads over the first tokens
    #[arg(long, requires = "routing")]
    prices: bool,
    /// What an expert is worth more to a token whose neighbour in the batch has it too, in the same unit
    #[arg(long, value_name = "B", default_value_t = 0.0, requires = "routing")]
    company: f32,
    /// Tokens that choose together, as if they were decoded together
    #[arg(long, value_name = "N", default_value_t = 1, requires = "routing")]
    routing_batch: usize,
}

/// Names of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rule {
    /// The best scores, as the model was made
    TopK,
    /// The best scores, experts in fast memory rewarded
    CacheAware,
}

impl Experts {
    /// The rules to measure, one for each reward; none if plain top-k goes uncounted.
    pub(crate) fn rules(&self, loaded: &Loaded) -> anyhow::Result<Vec<ExpertRules>> {
        let Some(rule) = self.routing else {
            return Ok(Vec::new());
        };
        let Some(moe) = &loaded.model.config().moe else {
            return Err(anyhow::anyhow!(
                "{} has no experts to route to",
                loaded.path.display()
            ))
            .hint("leave --routing out, or make a mixture with `nashswarm carve`");
        };
        let rewards = match rule {
            Rule::TopK => &[0.0],
            Rule::CacheAware => &self.reward[..],
        };
        let rules = |&reward: &f32| ExpertRules {
            resident: self.resident.unwrap_or(moe.experts.div_ceil(2)),
            reward,
            company: self.company,
            prices: self.prices,
            batch: self.routing_batch,
        };
        Ok(rewards.iter().map(rules).collect())
    }

    /// The options again, for another process.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let Some(rule) = self.routing.and_then(|rule| rule.to_possible_value()) else {
            return Vec::new();
        };
        let rewards: Vec<String> = self.reward.iter().map(f32::to_string).collect();
        let mut arguments = vec![
            format!("--routing={}", rule.get_name()),
            format!("--reward={}", rewards.join(",")),
            format!("--company={}", self.company),
            format!("--routing-batch={}", self.routing_batch),
        ];
        arguments.extend(self.resident.map(|n| format!("--resident={n}")));
        arguments.extend(self.prices.then(|| "--prices".to_owned()));
        arguments
    }

    /// Gives a model the first of the rules.
    pub(crate) fn apply(&self, loaded: &mut Loaded) -> anyhow::Result<Option<UseHandle>> {
        let rules = self.rules(loaded)?;
        Ok(rules.first().map(|&rules| install(loaded, rules)))
    }
}

/// Gives a model a rule.
pub(crate) fn install(loaded: &mut Loaded, rules: ExpertRules) -> UseHandle {
    let routing = ExpertRouting::new(rules);
    let handle = routing.handle();
    loaded.model.set_routing(Some(Box::new(routing)));
    handle
}

/// One line about what was touched, with the name of the model.
pub(crate) fn print(name: &str, used: &ExpertUse) {
    say!("{name}: {}", summary(used));
}

/// One line about what was touched.
pub(crate) fn summary(used: &ExpertUse) -> String {
    format!(
        "{:.2} experts per batch and layer, {:.2} of them fetched ({:.1} %), MaxVio {:.2}",
        used.experts_per_batch,
        used.misses_per_batch,
        100.0 * used.miss_rate,
        used.max_violation
    )
}
