//! `get-models`: the models of `nash_fetch`'s catalogue, and an F16 reference of each.

use std::path::Path;

use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use nash_fetch::{CATALOG, ModelRef, Progress};

use crate::offgrid::{self, Noise};

/// What can be asked for.
pub(crate) fn names() -> PossibleValuesParser {
    CATALOG
        .iter()
        .map(|model| model.name)
        .chain(["all"])
        .collect::<Vec<_>>()
        .into()
}

/// Fetches the models to `dir` as `NAME.gguf`, and makes `NAME-ref.gguf` where it is missing.
pub(crate) fn run(dir: &Path, models: &[String]) -> anyhow::Result<()> {
    let all = models.iter().any(|name| name == "all");
    for model in CATALOG
        .iter()
        .filter(|model| all || models.iter().any(|name| name == model.name))
    {
        println!(
            "{}: {} ({}; terms: {})",
            model.name, model.title, model.precision, model.license
        );
        let bar = ProgressBar::new(model.bytes);
        bar.set_style(ProgressStyle::with_template(
            "{wide_bar} {bytes}/{total_bytes} {msg}",
        )?);
        let mut show = |progress: Progress<'_>| {
            bar.set_position(progress.bytes);
            bar.set_message(progress.item.to_owned());
        };
        let path = nash_fetch::fetch(&ModelRef::Catalog(model), dir, &mut show)?;
        bar.finish_and_clear();
        println!("  {} (sha256 checked)", path.display());

        let reference = dir.join(format!("{}-ref.gguf", model.name));
        if !reference.exists() {
            offgrid::run(&path, &reference, Noise::default())?;
        }
        println!("  {}", reference.display());
    }
    Ok(())
}
