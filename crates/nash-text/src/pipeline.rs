//! From a checked [`Vocabulary`] to the three JSON files of a Hugging Face tokenizer, in memory.
//!
//! A tokenizer read from a GGUF file and one read from a folder meet here: both are a [`Source`], and everything
//! else is derived from it. So a saved tokenizer cannot differ from the one that was saved.

use crate::pretokenizer::{Alphabet, PreTokenizer};
use crate::vocabulary::{Algorithm, Kind, Vocabulary};
use crate::{TextError, spm, stops};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

/// SentencePiece's visible space.
pub(crate) const SPACE: &str = "▁";

/// What a tokenizer is made of, wherever it came from.
pub(crate) struct Source {
    /// The file or folder, for messages.
    pub(crate) origin: PathBuf,
    /// `tokenizer.json`.
    pub(crate) pipeline: tokenizers::Tokenizer,
    /// `tokenizer_config.json`, with the chat template inside.
    pub(crate) config: Map<String, Value>,
    /// `generation_config.json`.
    pub(crate) generation: Map<String, Value>,
}

/// Builds the tokenizer that `vocabulary` describes.
///
/// # Errors
/// [`TextError::Invalid`] for contradictions, [`TextError::Tokenizer`] when the library refuses.
pub(crate) fn build(mut vocabulary: Vocabulary) -> Result<Source, TextError> {
    vocabulary.check()?;
    let config = config(&vocabulary);
    let generation = generation(&vocabulary);
    let specials = added_tokens(&vocabulary);
    let mut pipeline = match &mut vocabulary.algorithm {
        Algorithm::Bpe { pre, merges } => {
            let (pre, merges) = (*pre, std::mem::take(merges));
            byte_pairs(&vocabulary, pre, merges)?
        }
        Algorithm::SentencePiece => sentence_piece(&vocabulary)?,
    };
    let refused = |e| failed(&vocabulary.origin, e);
    pipeline.add_tokens(specials).map_err(refused)?;
    let bos = vocabulary.add_bos.then_some(vocabulary.roles.bos).flatten();
    let eos = vocabulary.add_eos.then_some(vocabulary.roles.eos).flatten();
    frame(&mut pipeline, bos, eos).map_err(refused)?;
    Ok(Source {
        origin: vocabulary.origin,
        pipeline,
        config,
        generation,
    })
}

fn failed(origin: &Path, error: tokenizers::Error) -> TextError {
    TextError::Tokenizer {
        file: origin.to_owned(),
        action: "load",
        message: error.to_string(),
    }
}

/// A part of the library's pipeline from its JSON form, which is also what the file will hold.
fn part<T: DeserializeOwned>(json: Value) -> tokenizers::Result<T> {
    Ok(serde_json::from_value(json)?)
}

/// Makes the tokenizer put `bos` before and `eos` behind a text, or neither.
pub(crate) fn frame(
    pipeline: &mut tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
) -> tokenizers::Result<()> {
    let text = |id: u32| pipeline.id_to_token(id).unwrap_or_default();
    let mark = |id: u32| json!({"SpecialToken": {"id": text(id), "type_id": 0}});
    let first = bos.map(mark).into_iter();
    let single: Vec<Value> = first
        .chain([json!({"Sequence": {"id": "A", "type_id": 0}})])
        .chain(eos.map(mark))
        .collect();
    if single.len() == 1 {
        pipeline.with_post_processor(None::<PostProcessorWrapper>);
        return Ok(());
    }
    let special: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|id| {
            (
                text(id),
                json!({"id": text(id), "ids": [id], "tokens": [text(id)]}),
            )
        })
        .collect();
    let pair: Vec<Value> = single
        .iter()
        .cloned()
        .chain([json!({"Sequence": {"id": "B", "type_id": 1}})])
        .collect();
    let template = json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
    });
    pipeline.with_post_processor(Some(part::<PostProcessorWrapper>(template)?));
    Ok(())
}

fn ids(vocabulary: &Vocabulary) -> impl Iterator<Item = (String, u32)> {
    vocabulary.tokens.iter().cloned().zip(0..)
}

fn unknown(vocabulary: &Vocabulary) -> Option<String> {
    vocabulary
        .roles
        .unk
        .map(|id| vocabulary.tokens[id as usize].clone())
}

/// Byte-level BPE, or Gemma 4's variant of it over visible spaces.
fn byte_pairs(
    vocabulary: &Vocabulary,
    pre: &PreTokenizer,
    merges: Vec<(String, String)>,
) -> Result<tokenizers::Tokenizer, TextError> {
    let metaspace = pre.alphabet == Alphabet::Metaspace;
    let mut builder = BPE::builder()
        .vocab_and_merges(ids(vocabulary).collect::<Vocab>(), merges)
        .ignore_merges(pre.ignore_merges)
        .byte_fallback(metaspace);
    if let Some(unk) = unknown(vocabulary).filter(|_| metaspace) {
        builder = builder.unk_token(unk).fuse_unk(true);
    }
    let mut steps: Vec<Value> = pre
        .splits
        .iter()
        .map(|s| json!({"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": false}))
        .collect();
    if !metaspace {
        steps.push(byte_level(true));
    }
    let assemble = || {
        let mut pipeline = tokenizers::Tokenizer::new(builder.build()?);
        let steps = json!({"type": "Sequence", "pretokenizers": steps});
        pipeline.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(steps)?));
        if pre.nfc {
            pipeline.with_normalizer(Some(part::<NormalizerWrapper>(json!({"type": "NFC"}))?))?;
        }
        if metaspace {
            visible_spaces(&mut pipeline, false)?;
        } else {
            pipeline.with_decoder(Some(part::<DecoderWrapper>(byte_level(false))?));
        }
        Ok(pipeline)
    };
    assemble().map_err(|e| failed(&vocabulary.origin, e))
}

fn byte_level(trim_offsets: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim_offsets, "use_regex": false})
}

/// SentencePiece BPE with byte fallback.
fn sentence_piece(vocabulary: &Vocabulary) -> Result<tokenizers::Tokenizer, TextError> {
    let merges = spm::merges(vocabulary)?;
    let mut builder = BPE::builder()
        .vocab_and_merges(ids(vocabulary).collect::<Vocab>(), merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unk) = unknown(vocabulary) {
        builder = builder.unk_token(unk);
    }
    let assemble = || {
        let mut pipeline = tokenizers::Tokenizer::new(builder.build()?);
        visible_spaces(&mut pipeline, vocabulary.add_space_prefix)?;
        Ok(pipeline)
    };
    assemble().map_err(|e| failed(&vocabulary.origin, e))
}

/// Spaces become `▁` on the way in and spaces again on the way out; with `prefix`, one more is put before the
/// text and taken away again.
fn visible_spaces(pipeline: &mut tokenizers::Tokenizer, prefix: bool) -> tokenizers::Result<()> {
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizer = part::<NormalizerWrapper>(json!({"type": "Sequence", "normalizers": normalizers}))?;
    pipeline.with_normalizer(Some(normalizer))?;
    pipeline.with_decoder(Some(part::<DecoderWrapper>(
        json!({"type": "Sequence", "decoders": decoders}),
    )?));
    Ok(())
}

/// The tokens that are found in a text before the algorithm runs.
fn added_tokens(vocabulary: &Vocabulary) -> Vec<AddedToken> {
    let spm = matches!(vocabulary.algorithm, Algorithm::SentencePiece);
    let added = |(id, token): (usize, &String)| {
        let special = match vocabulary.kinds[id] {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => stops::is_stop_mark(token),
            Kind::Normal if stops::is_stop_mark(token) => true,
            Kind::Normal | Kind::Unused | Kind::Byte => return None,
        };
        // SentencePiece finds runs of spaces after it has made them visible. (With a space put before the text, the
        // library would put one before the token too.)
        let spaces = spm && !vocabulary.add_space_prefix && !special && token.contains(' ');
        Some(AddedToken::from(token.clone(), special).normalized(spaces))
    };
    vocabulary.tokens.iter().enumerate().filter_map(added).collect()
}

fn config(vocabulary: &Vocabulary) -> Map<String, Value> {
    let mut config = Map::new();
    config.insert("add_bos_token".into(), vocabulary.add_bos.into());
    config.insert("add_eos_token".into(), vocabulary.add_eos.into());
    let roles = vocabulary.roles;
    for (name, id) in [
        ("bos_token", roles.bos),
        ("eos_token", roles.eos),
        ("unk_token", roles.unk),
        ("pad_token", roles.pad),
    ] {
        if let Some(id) = id {
            config.insert(name.into(), vocabulary.tokens[id as usize].clone().into());
        }
    }
    if let Some(template) = &vocabulary.chat_template {
        config.insert("chat_template".into(), template.clone().into());
    }
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config
}

fn generation(vocabulary: &Vocabulary) -> Map<String, Value> {
    let mut generation = Map::new();
    let roles = vocabulary.roles;
    if let Some(bos) = roles.bos {
        generation.insert("bos_token_id".into(), bos.into());
    }
    let named: std::collections::BTreeSet<u32> = roles
        .eos
        .into_iter()
        .chain(vocabulary.stops.iter().copied())
        .collect();
    if !named.is_empty() {
        generation.insert(
            "eos_token_id".into(),
            named.into_iter().collect::<Vec<_>>().into(),
        );
    }
    if let Some(pad) = roles.pad {
        generation.insert("pad_token_id".into(), pad.into());
    }
    generation
}
