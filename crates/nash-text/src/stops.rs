//! Which tokens end a generation.
//!
//! Files name at most one or two of them, and many name the wrong one; the marks themselves are few and well
//! known. The list is llama.cpp's (`special_eog_ids`), with one difference: marks that are also plausible text,
//! such as `</s>` (strike-through in HTML), count only when the vocabulary marks them as special.

use std::collections::BTreeSet;

/// Marks that no text contains by accident.
const MARKS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Marks that count only as special tokens.
const SPECIAL_MARKS: &[&str] = &["</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~["];

/// Whether `token` ends a generation by its text alone; such a token is treated as special even where a file
/// marks it as ordinary text.
pub(crate) fn is_stop_mark(token: &str) -> bool {
    MARKS.contains(&token)
}

/// The ids that end a generation: those `named` by the file, and the known marks among `specials` (pairs of id
/// and text).
pub(crate) fn end_of_generation<'a>(
    named: impl IntoIterator<Item = u32>,
    specials: impl IntoIterator<Item = (u32, &'a str)>,
) -> BTreeSet<u32> {
    let mut ids: BTreeSet<u32> = named.into_iter().collect();
    let mut texts = BTreeSet::new();
    let mut end = None;
    for (id, text) in specials {
        texts.insert(text);
        if text == "<|end|>" {
            end = Some(id);
        }
        if MARKS.contains(&text) || SPECIAL_MARKS.contains(&text) {
            ids.insert(id);
        }
    }
    // gpt-oss and Solar end each of several channels with <|end|> and the whole answer with another mark.
    let harmony = texts.contains("<|return|>") && texts.contains("<|call|>");
    let solar = texts.contains("<|flush|>") && texts.contains("<|calls|>");
    if let Some(end) = end.filter(|_| harmony || solar) {
        ids.remove(&end);
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_ids_and_known_marks_end_a_generation() {
        let specials = [(5, "<|im_start|>"), (6, "<|im_end|>"), (7, "</s>")];
        assert_eq!(end_of_generation([9], specials), BTreeSet::from([6, 7, 9]));
    }

    #[test]
    fn channel_ends_do_not_end_the_answer() {
        let specials = [(1, "<|end|>"), (2, "<|return|>"), (3, "<|call|>")];
        assert_eq!(end_of_generation([2], specials), BTreeSet::from([2, 3]));
        assert_eq!(end_of_generation([], [(1, "<|end|>")]), BTreeSet::from([1]));
    }
}
