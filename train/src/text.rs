//! Text as tokens: a byte-level BPE vocabulary trained on the text itself, a part held back for validation, random windows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use rand::{RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, TokenizerBuilder, TokenizerImpl,
};

/// What ends a document.
pub(crate) const END: &str = "<|endoftext|>";
/// Every n-th document is held back.
const HELD_BACK: usize = 10;

type Tokenizer = TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, DecoderWrapper>;

/// A corpus, tokenized.
#[derive(Debug)]
pub(crate) struct Corpus {
    /// Tokens to train on: documents in the order of their names, each with an end.
    pub(crate) train: Vec<u32>,
    /// Tokens held back: those of every tenth document.
    pub(crate) validation: Vec<u32>,
    /// As `tokenizer.json` holds it.
    pub(crate) tokenizer: String,
    pub(crate) vocabulary: usize,
    pub(crate) end: u32,
}

impl Corpus {
    /// Of the `.txt` files in `folder`, with a vocabulary of `vocabulary` tokens trained on the documents that are not held back.
    pub(crate) fn read(folder: &Path, vocabulary: usize) -> Result<Self> {
        let documents = documents(folder)?;
        let (held, kept): (Vec<_>, Vec<_>) = documents
            .iter()
            .enumerate()
            .partition(|(index, _)| index % HELD_BACK == HELD_BACK - 1);
        ensure!(
            !held.is_empty(),
            "{}: {} documents (.txt) are too few, {HELD_BACK} are needed",
            folder.display(),
            kept.len()
        );
        let tokenizer = tokenizer(kept.iter().map(|(_, text)| text.as_str()), vocabulary)?;
        let end = tokenizer
            .token_to_id(END)
            .context("the vocabulary has no end of text")?;
        let encode = |part: &[(usize, &String)]| -> Result<Vec<u32>> {
            let mut ids = Vec::new();
            for (_, text) in part {
                let encoded = tokenizer
                    .encode(text.as_str(), false)
                    .map_err(anyhow::Error::from_boxed)?;
                ids.extend_from_slice(encoded.get_ids());
                ids.push(end);
            }
            Ok(ids)
        };
        Ok(Self {
            train: encode(&kept)?,
            validation: encode(&held)?,
            tokenizer: tokenizer.to_string(true).map_err(anyhow::Error::from_boxed)?,
            vocabulary: tokenizer.get_vocab_size(true),
            end,
        })
    }
}

/// The `.txt` files of a folder, by name; bytes that are not UTF-8 are replaced.
fn documents(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    let read = |path: &PathBuf| {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    paths.iter().map(read).collect()
}

fn tokenizer<'a>(texts: impl Iterator<Item = &'a str> + Send, vocabulary: usize) -> Result<Tokenizer> {
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocabulary)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer: Tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())))
        .build()
        .map_err(anyhow::Error::from_boxed)?;
    tokenizer
        .train(&mut trainer, texts)
        .map_err(anyhow::Error::from_boxed)?;
    Ok(tokenizer)
}

/// A batch: tokens and the ones that follow them, `[B·t]` each.
pub(crate) type Batch = (Vec<u32>, Vec<u32>);

/// Windows at random places, for ever.
#[derive(Debug)]
pub(crate) struct Windows<'a> {
    ids: &'a [u32],
    rng: Pcg64Mcg,
    batch: usize,
    context: usize,
}

impl<'a> Windows<'a> {
    pub(crate) fn new(ids: &'a [u32], (batch, context): (usize, usize), seed: u64) -> Result<Self> {
        if ids.len() <= context {
            bail!(
                "{} tokens of text are too few for a window of {context}",
                ids.len()
            );
        }
        Ok(Self {
            ids,
            rng: Pcg64Mcg::seed_from_u64(seed),
            batch,
            context,
        })
    }

    pub(crate) fn next(&mut self) -> Batch {
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..self.batch {
            let at = self.rng.random_range(0..self.ids.len() - self.context);
            tokens.extend_from_slice(&self.ids[at..at + self.context]);
            targets.extend_from_slice(&self.ids[at + 1..=at + self.context]);
        }
        (tokens, targets)
    }
}

/// Consecutive windows, whole batches of them: all of `ids`, or `batches`.
pub(crate) fn consecutive(
    ids: &[u32],
    (batch, context): (usize, usize),
    batches: usize,
) -> impl Iterator<Item = Batch> + '_ {
    let size = batch * context;
    let last = ids.len().saturating_sub(1) / size;
    (0..last.min(batches)).map(move |index| {
        let at = index * size;
        (ids[at..at + size].to_vec(), ids[at + 1..=at + size].to_vec())
    })
}
