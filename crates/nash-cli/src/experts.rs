//! How tokens choose experts: options of every command that runs a mixture.

use std::sync::Arc;

use clap::{Args, ValueEnum, value_parser};
use nash_eval::routing::{ExpertRouting, ExpertRules, ExpertUse, Placed, UseHandle};
use nash_models::KvCache;

use crate::calibration::{Source, calibration};
use crate::failure::Hint as _;
use crate::interrupt;
use crate::model::Loaded;
use crate::out::say;
use crate::ui::{Ui, Unit};

/// Tokens that experts are placed by.
const PLACEMENT_TOKENS: usize = 8192;

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
    /// Experts that one fetch brings: a page of them
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = value_parser!(u16).range(1..), requires = "routing")]
    page: u16,
    /// Put experts that fire together on this text on one page: a file, `book` or `self` [default: pages are experts in stored order]
    #[arg(long, value_name = "FILE|book|self", value_parser = value_parser!(Source), requires = "routing")]
    place: Option<Source>,
    /// What an expert in fast memory is worth more, in standard deviations of a token's scores: higher fetches less and answers worse
    #[arg(
        long,
        value_name = "R,…",
        value_delimiter = ',',
        default_value = "0.5",
        requires = "routing"
    )]
    reward: Vec<f32>,
    /// Best experts of a token that it gets whatever is in fast memory: higher answers better and fetches more
    #[arg(long, value_name = "J", default_value_t = 1, requires = "routing")]
    keep: usize,
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
        let resident = self.resident.unwrap_or(moe.experts.div_ceil(2));
        if usize::from(self.page) > resident {
            return Err(anyhow::anyhow!(
                "a page of {} experts (--page) does not fit in fast memory for {resident} of them (--resident)",
                self.page
            ))
            .hint("make pages smaller, or memory larger");
        }
        let rewards = match rule {
            Rule::TopK => &[0.0],
            Rule::CacheAware => &self.reward[..],
        };
        let rules = |&reward: &f32| ExpertRules {
            resident,
            page: self.page.into(),
            reward,
            keep: self.keep,
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
            format!("--page={}", self.page),
            format!("--keep={}", self.keep),
            format!("--company={}", self.company),
            format!("--routing-batch={}", self.routing_batch),
        ];
        arguments.extend(self.resident.map(|n| format!("--resident={n}")));
        arguments.extend(self.place.iter().map(|source| format!("--place={source}")));
        arguments.extend(self.prices.then(|| "--prices".to_owned()));
        arguments
    }

    /// The pages of every layer, by which experts fire together on the text of `--place`; none if stored order will do.
    pub(crate) fn places(
        &self,
        loaded: &mut Loaded,
        rules: ExpertRules,
        ui: &Ui,
    ) -> anyhow::Result<Arc<[Placed]>> {
        let Some(source) = &self.place else {
            return Ok(Arc::default());
        };
        let text = calibration(source, loaded, PLACEMENT_TOKENS, 0, ui)?;
        let handle = install(loaded, ExpertRules { reward: 0.0, ..rules }, Arc::default());
        let longest = text.windows.iter().map(Vec::len).max().unwrap_or(0);
        let mut cache = KvCache::new(loaded.model.config(), longest);
        ui.begin("placing experts", text.windows.len() as u64, Unit::Steps);
        for window in &text.windows {
            interrupt::check()?;
            cache.reset();
            loaded.model.forward(window, &mut cache, &mut ())?;
            ui.step(1);
        }
        ui.finish();
        loaded.model.set_routing(None);
        Ok(handle.place()?.into())
    }

    /// Gives a model the first of the rules.
    pub(crate) fn apply(&self, loaded: &mut Loaded, ui: &Ui) -> anyhow::Result<Option<UseHandle>> {
        let Some(&rules) = self.rules(loaded)?.first() else {
            return Ok(None);
        };
        let places = self.places(loaded, rules, ui)?;
        Ok(Some(install(loaded, rules, places)))
    }
}

/// Gives a model a rule, and pages of experts.
pub(crate) fn install(loaded: &mut Loaded, rules: ExpertRules, places: Arc<[Placed]>) -> UseHandle {
    let routing = ExpertRouting::new(rules, places);
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
    let pages = match used.rules {
        Some(rules) if rules.page > 1 => format!(" on {:.2} pages of {}", used.pages_per_batch, rules.page),
        _ => String::new(),
    };
    format!(
        "{:.2} experts per batch and layer{pages}, {:.2} fetched ({:.1} %), MaxVio {:.2}",
        used.experts_per_batch,
        used.misses_per_batch,
        100.0 * used.miss_rate,
        used.max_violation
    )
}
