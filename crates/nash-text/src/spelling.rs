//! The bytes that each token stands for.
//!
//! Decoding is concatenating bytes: what a token contributes never depends on its neighbours, except that a
//! SentencePiece text loses the one space that was put before it. That makes streaming exact and gives
//! constrained decoding its token table.

use crate::TextError;
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::Model as _;

/// Bytes of all tokens in one arena.
#[derive(Debug)]
pub(crate) struct Spelling {
    bytes: Vec<u8>,
    /// `ends[id - 1]..ends[id]` are the bytes of token `id`; a leading 0 is stored.
    ends: Vec<u32>,
    /// Ids that exist.
    known: Vec<bool>,
    /// Tokens that are marks rather than text.
    special: Vec<bool>,
    /// Whether one leading space of a decoded text is dropped.
    pub(crate) strips_space: bool,
}

impl Spelling {
    /// Reads every token of `pipeline`.
    ///
    /// # Errors
    /// [`TextError::Unsupported`] for a decoder that is not a concatenation of bytes, [`TextError::Invalid`] for
    /// ids too large to be a vocabulary.
    pub(crate) fn new(origin: &Path, pipeline: &tokenizers::Tokenizer) -> Result<Spelling, TextError> {
        let decoder = Decoder::of(origin, pipeline)?;
        let (model, added) = (pipeline.get_model(), pipeline.get_added_tokens_decoder());
        let mut spelling = Spelling {
            bytes: Vec::with_capacity(model.get_vocab_size() * 8),
            ends: vec![0],
            known: Vec::new(),
            special: Vec::new(),
            strips_space: decoder.strips_space,
        };
        // By number, until all are found: a list of all would be a copy of the whole vocabulary.
        let mut left = model.get_vocab_size();
        let last_added = added.keys().max().map_or(0, |id| *id as usize + 1);
        while (left > 0 || spelling.size() < last_added) && spelling.size() < crate::MAX_VOCABULARY {
            let id = spelling.size() as u32;
            let token = if left > 0 { model.id_to_token(id) } else { None };
            left -= usize::from(token.is_some());
            let special = match (added.get(&id), &token) {
                (Some(token), _) => {
                    decoder.spell_added(&token.content, token.special, &mut spelling.bytes);
                    Some(token.special)
                }
                (None, Some(token)) => {
                    decoder.spell(token, &mut spelling.bytes);
                    Some(false)
                }
                (None, None) => None,
            };
            spelling.known.push(special.is_some());
            spelling.special.push(special == Some(true));
            spelling.ends.push(spelling.bytes.len() as u32);
        }
        // Numbers beyond what any vocabulary has may be left, and gaps that nothing follows.
        let beyond = left > 0 || last_added > spelling.size();
        let size = spelling
            .known
            .iter()
            .rposition(|known| *known)
            .map_or(0, |last| last + 1);
        spelling.known.truncate(size);
        spelling.special.truncate(size);
        spelling.ends.truncate(size + 1);
        if size == 0 || beyond {
            return Err(TextError::Invalid {
                file: origin.to_owned(),
                key: "vocab".into(),
                problem: format!("has ids up to {}", size.saturating_sub(1)),
            });
        }
        Ok(spelling)
    }

    /// One more than the largest id.
    pub(crate) fn size(&self) -> usize {
        self.known.len()
    }

    /// The bytes of a token, `None` for an id that no token has.
    pub(crate) fn get(&self, id: u32) -> Option<&[u8]> {
        let i = id as usize;
        let known = *self.known.get(i)?;
        known.then(|| &self.bytes[self.ends[i] as usize..self.ends[i + 1] as usize])
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// How the text of a token becomes bytes.
#[derive(Debug, Default)]
struct Decoder {
    /// GPT-2's alphabet: character to byte.
    byte_level: Option<HashMap<char, u8>>,
    /// Replacements in order, such as `▁` by a space.
    replace: Vec<(String, String)>,
    /// `<0x0A>` is a byte.
    byte_fallback: bool,
    strips_space: bool,
}

impl Decoder {
    fn of(origin: &Path, pipeline: &tokenizers::Tokenizer) -> Result<Decoder, TextError> {
        let json = match pipeline.get_decoder().map(serde_json::to_value) {
            Some(Ok(json)) => json,
            _ => Value::Null,
        };
        let mut decoder = Decoder::default();
        decoder.read(&json).map_err(|name| TextError::Unsupported {
            file: origin.to_owned(),
            what: "decoder",
            name,
            supported: "ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip".into(),
        })?;
        Ok(decoder)
    }

    /// Takes over one decoder of `tokenizer.json`; on failure, gives the name of what it cannot do.
    fn read(&mut self, json: &Value) -> Result<(), String> {
        let field = |name: &str| json.get(name).and_then(Value::as_str);
        match field("type").unwrap_or("none") {
            "Sequence" => {
                let parts = json.get("decoders").and_then(Value::as_array);
                parts.into_iter().flatten().try_for_each(|part| self.read(part))
            }
            "ByteLevel" => {
                self.byte_level = Some(byte_alphabet());
                Ok(())
            }
            "Metaspace" => {
                let scheme = field("prepend_scheme").unwrap_or("always");
                self.replace
                    .push((field("replacement").unwrap_or("▁").into(), " ".into()));
                self.strips_space = scheme != "never";
                Ok(())
            }
            "Replace" => {
                let pattern = json.pointer("/pattern/String").and_then(Value::as_str);
                let pattern = pattern.ok_or("Replace with a regular expression")?;
                self.replace
                    .push((pattern.into(), field("content").unwrap_or_default().into()));
                Ok(())
            }
            "ByteFallback" => {
                self.byte_fallback = true;
                Ok(())
            }
            "Fuse" => Ok(()),
            "Strip" => {
                let count = |name: &str| json.get(name).and_then(Value::as_u64);
                if (field("content"), count("start"), count("stop")) != (Some(" "), Some(1), Some(0)) {
                    return Err("Strip of anything but one leading space".into());
                }
                self.strips_space = true;
                Ok(())
            }
            other => Err(other.to_owned()),
        }
    }

    fn spell(&self, token: &str, out: &mut Vec<u8>) {
        if let Some(alphabet) = &self.byte_level {
            let start = out.len();
            for c in token.chars() {
                match alphabet.get(&c) {
                    Some(&byte) => out.push(byte),
                    None => {
                        out.truncate(start); // not spelt in the alphabet: stands for itself
                        out.extend_from_slice(token.as_bytes());
                        return;
                    }
                }
            }
        } else if let Some(byte) = fallback_byte(token).filter(|_| self.byte_fallback) {
            out.push(byte);
        } else {
            self.replaced(token, out);
        }
    }

    /// Added tokens stand for themselves; those that are text have their spaces made visible like any other.
    fn spell_added(&self, token: &str, special: bool, out: &mut Vec<u8>) {
        if special {
            out.extend_from_slice(token.as_bytes())
        } else {
            self.replaced(token, out)
        }
    }

    fn replaced(&self, token: &str, out: &mut Vec<u8>) {
        let mut text = std::borrow::Cow::Borrowed(token);
        for (from, to) in &self.replace {
            if text.contains(from.as_str()) {
                text = text.replace(from.as_str(), to).into();
            }
        }
        out.extend_from_slice(text.as_bytes());
    }
}

/// The byte of a token like `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        u8::from_str_radix(hex, 16).ok()
    } else {
        None
    }
}

/// GPT-2's alphabet: printable bytes stand for themselves, the rest are moved up to U+0100 and beyond.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut moved = 0x100u32..;
    (0..=255u8)
        .filter_map(|b| {
            let code = if printable(b) { u32::from(b) } else { moved.next()? };
            Some((char::from_u32(code)?, b))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection_with_known_members() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        for (c, b) in [
            ('A', b'A'),
            ('Ġ', b' '),
            ('Ċ', b'\n'),
            ('ĉ', b'\t'),
            ('Ń', 0xAD),
            ('ÿ', 0xFF),
        ] {
            assert_eq!(alphabet[&c], b, "{c}");
        }
    }

    #[test]
    fn only_two_hex_digits_make_a_byte() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xE2));
        for not in ["<0x>", "<0xE>", "<0xE2F>", "<0x+1>", "0xE2", "<0xG0>"] {
            assert_eq!(fallback_byte(not), None, "{not}");
        }
    }
}
