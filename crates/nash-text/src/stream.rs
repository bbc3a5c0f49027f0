//! Streaming detokenization.
//!
//! A token may end in the middle of a character, so text is held back until the character is complete. What
//! comes out, flushed, is exactly `String::from_utf8_lossy` of all bytes: a sequence that can no longer become a
//! character is replaced by U+FFFD at once, by the standard's "maximal subpart" rule.

use crate::Tokenizer;

/// Turns token ids into text as they arrive. Made by [`Tokenizer::decode_stream`].
#[derive(Clone, Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Nothing has been taken in yet, so a dummy leading space may be due.
    at_start: bool,
    /// Bytes of a character that is not complete; at most three between calls.
    pending: Vec<u8>,
}

impl DecodeStream {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            at_start: true,
            pending: Vec::new(),
        }
    }

    /// The same stream for text that goes on where a prompt ended: a leading space is then part of the text, not
    /// SentencePiece's prefix.
    pub fn continuing(mut self) -> Self {
        self.at_start = false;
        self
    }

    /// Takes in one token; gives the text that is now complete, if any. Ids that no token has add nothing.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return None;
        }
        let mut bytes = self.tokenizer.id_to_bytes(id)?;
        if bytes.is_empty() {
            return None;
        }
        if std::mem::take(&mut self.at_start) && self.tokenizer.strips_space() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let text = take_complete(&mut self.pending);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the text: bytes still held back become one U+FFFD. The stream then stands at a new beginning.
    pub fn flush(&mut self) -> Option<String> {
        self.at_start = true;
        if self.pending.is_empty() {
            return None;
        }
        self.pending.clear();
        Some(char::REPLACEMENT_CHARACTER.to_string())
    }
}

/// Removes from `bytes` everything but an incomplete last character, and gives it as text.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
            }
            Err(error) => {
                let (valid, bad) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = bad;
                if let Some(length) = error.error_len() {
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &bad[length..];
                    continue;
                }
            }
        }
        break;
    }
    let taken = bytes.len() - rest.len();
    bytes.drain(..taken);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn streamed<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> String {
        let mut pending = Vec::new();
        let mut text = String::new();
        for chunk in chunks {
            pending.extend_from_slice(chunk);
            text.push_str(&take_complete(&mut pending));
            assert!(pending.len() <= 3, "{pending:?} is held back");
        }
        if !pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        text
    }

    #[test]
    fn a_character_is_never_emitted_half() {
        let mut pending = Vec::new();
        let texts: Vec<String> = "é🦙"
            .bytes()
            .map(|b| {
                pending.push(b);
                take_complete(&mut pending)
            })
            .collect();
        assert_eq!(texts, ["", "é", "", "", "", "🦙"]);
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_gives_the_lossy_text(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..=0xF5, Just(0xF0), Just(0x9F)], 0..40),
            cut in 1usize..6,
        ) {
            prop_assert_eq!(streamed(bytes.chunks(cut)), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn any_cut_of_text_gives_the_text(text in "\\PC{0,20}", cut in 1usize..4) {
            prop_assert_eq!(streamed(text.as_bytes().chunks(cut)), text);
        }
    }
}
