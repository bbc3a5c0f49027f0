//! What a model is calibrated on: windows of tokens from a text, or from the model itself.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use nash_models::{GenerateOptions, Generator, KvCache, Sampler, SamplingParams};
use nash_quant::Calibration;
use nash_text::Tokenizer;
use rand::SeedableRng as _;
use rand_pcg::Pcg64Mcg;

use crate::failure::Hint as _;
use crate::model::{self, Loaded};
use crate::ui::{Ui, Unit};
use crate::{interrupt, texts};

/// Tokens in a window.
const WINDOW: usize = 512;

/// Where the text comes from, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The book that comes with the program.
    BuiltIn,
    /// Text that the model writes itself.
    Model,
    /// A text file.
    File(PathBuf),
}

impl FromStr for Source {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "book" => Self::BuiltIn,
            "self" => Self::Model,
            path => Self::File(path.into()),
        })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("book"),
            Self::Model => f.write_str("self"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// The calibration windows for a model: `tokens` tokens of them, or as many as the text has.
pub(crate) fn calibration(
    source: &Source,
    loaded: &Loaded,
    tokens: usize,
    seed: u64,
    ui: &Ui,
) -> anyhow::Result<Calibration> {
    let (text, description) = match source {
        Source::BuiltIn => (
            texts::CALIBRATION.to_owned(),
            "built-in book (Northanger Abbey)".to_owned(),
        ),
        Source::File(path) => (model::read_text(path)?, path.display().to_string()),
        Source::Model => return write_itself(loaded, tokens, seed, ui),
    };
    let windows = spread(loaded.tokenizer()?, &text, tokens, seed)?;
    Ok(Calibration { windows, description })
}

/// Windows of a text: for seed 0 spread evenly, so that all of it has a say; for other seeds drawn.
fn spread(tokenizer: &Tokenizer, text: &str, wanted: usize, seed: u64) -> anyhow::Result<Vec<Vec<u32>>> {
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let tokens = tokenizer.encode(text, false)?;
    let body = WINDOW - usize::from(bos.is_some());
    let available: Vec<&[u32]> = tokens.chunks_exact(body).collect();
    if available.is_empty() {
        return Err(anyhow::anyhow!(
            "the calibration text has {} tokens, one window needs {body}",
            tokens.len()
        ))
        .hint("give a longer text, or use `--calibration self`");
    }
    let count = wanted.div_ceil(WINDOW).clamp(1, available.len());
    let mut chosen: Vec<usize> = match seed {
        0 => (0..count).map(|i| i * available.len() / count).collect(),
        _ => {
            let mut rng = Pcg64Mcg::seed_from_u64(seed);
            rand::seq::index::sample(&mut rng, available.len(), count).into_vec()
        }
    };
    chosen.sort_unstable();
    let window = |index: usize| bos.into_iter().chain(available[index].iter().copied());
    Ok(chosen
        .into_iter()
        .map(|index: usize| window(index).collect())
        .collect())
}

/// Text sampled from the model at temperature 1, which follows its own distribution: any language, any domain.
fn write_itself(loaded: &Loaded, tokens: usize, seed: u64, ui: &Ui) -> anyhow::Result<Calibration> {
    let count = tokens.div_ceil(WINDOW).max(1);
    let tokenizer = loaded.tokenizer()?;
    let start = tokenizer.bos().or(tokenizer.eos()).unwrap_or(0);
    ui.begin(
        "the model writes its calibration text",
        (count * WINDOW) as u64,
        Unit::Steps,
    );
    let mut cache = KvCache::new(loaded.model.config(), WINDOW);
    let options = GenerateOptions {
        max_new_tokens: Some(WINDOW - 1),
        ..GenerateOptions::default()
    };
    let mut windows = Vec::with_capacity(count);
    for index in 0..count as u64 {
        // Unlikely tokens are left out: a slip early on would make the rest of a window nonsense.
        let params = SamplingParams {
            temperature: 1.0,
            min_p: 0.02,
            seed: seed.wrapping_add(index),
            ..SamplingParams::default()
        };
        let sampler = Sampler::new(params)?;
        let mut generator = Generator::new(&loaded.model, &mut cache, sampler, &[start], options.clone())?;
        for token in generator.by_ref() {
            token?;
            interrupt::check()?;
            ui.step(1);
        }
        windows.push(generator.tokens().to_vec());
    }
    ui.finish();
    Ok(Calibration {
        windows,
        description: format!("written by the model itself, seed {seed}"),
    })
}
