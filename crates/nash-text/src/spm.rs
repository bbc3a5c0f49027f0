//! SentencePiece's byte pair encoding expressed as ranked merges.
//!
//! A SentencePiece BPE model has no merge list: the adjacent pair whose union is the token with the highest
//! score is joined first, the leftmost of equals. Listing for each token every way to split it into two tokens,
//! best score first, gives the same order to an engine that knows only ranks. Equal scores occur in practice
//! among runs of spaces; there the split with the longer left part goes first, so that a run grows from the
//! left as SentencePiece makes it grow. (The same construction as in the converters of Hugging Face
//! `transformers`.)

use crate::TextError;
use crate::vocabulary::Vocabulary;
use std::cmp::Reverse;

/// All merges of a scored vocabulary, best first. Control, unknown and byte tokens take no part, so text can
/// never become one of them.
pub(crate) fn merges(vocabulary: &Vocabulary) -> Result<Vec<(String, String)>, TextError> {
    let ids = vocabulary.index()?;
    let text_token = |piece: &str| {
        ids.get(piece)
            .copied()
            .filter(|&id| vocabulary.kinds[id as usize].is_text())
    };
    let mut found = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if !vocabulary.kinds[id].is_text() {
            continue;
        }
        for (left_chars, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (text_token(left), text_token(right)) {
                found.push(Merge {
                    id,
                    left_chars,
                    left,
                    right,
                    parts: (left_id, right_id),
                });
            }
        }
    }
    found.sort_by(|a, b| {
        let score = |m: &Merge<'_>| vocabulary.scores[m.id];
        let order = |m: &Merge<'_>| {
            (
                Reverse(m.left_chars),
                Reverse(m.right.chars().count()),
                m.id,
                m.parts,
            )
        };
        score(b)
            .total_cmp(&score(a))
            .then_with(|| order(a).cmp(&order(b)))
    });
    Ok(found
        .into_iter()
        .map(|m| (m.left.to_owned(), m.right.to_owned()))
        .collect())
}

struct Merge<'a> {
    id: usize,
    left_chars: usize,
    left: &'a str,
    right: &'a str,
    parts: (u32, u32),
}
