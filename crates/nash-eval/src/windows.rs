//! Which tokens are evaluated and which positions are scored: the protocol of `llama-perplexity`.
//!
//! The tokens of the whole text are cut into windows of `ctx` tokens, a rest is dropped, every window is a sequence of
//! its own. If the tokenizer adds a BOS token, it takes the place of the first token of each window for evaluation.
//! Scored are the predictions made at positions `ctx/2 ..= ctx − 2`, of the tokens one further.

use crate::EvalError;

/// The windows of a text.
#[derive(Clone, Debug)]
pub struct Windows {
    tokens: Vec<u32>,
    ctx: usize,
    count: usize,
    bos: Option<u32>,
}

/// One window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window<'a> {
    /// What the model reads: `ctx` tokens, the first replaced by BOS where the tokenizer adds one.
    pub input: Vec<u32>,
    /// The position of the first scored prediction, `ctx / 2`.
    pub first: usize,
    /// The token that each scored position has to predict: `targets[i]` follows position `first + i`.
    pub targets: &'a [u32],
}

impl Windows {
    /// Cuts a tokenised text into windows.
    ///
    /// `tokens` is the whole text encoded with special tokens, `bos` the token that starts each window if the tokenizer
    /// adds one, `chunks` the most windows to use (`None`: all of them).
    ///
    /// # Errors
    /// If the text is shorter than a window, the window has no position to score, or `chunks` is 0.
    pub fn new(
        tokens: Vec<u32>,
        ctx: usize,
        chunks: Option<usize>,
        bos: Option<u32>,
    ) -> Result<Self, EvalError> {
        if ctx < 3 {
            return Err(EvalError::ContextTooSmall { ctx });
        }
        if chunks == Some(0) {
            return Err(EvalError::NoWindows);
        }
        let available = tokens.len() / ctx;
        if available == 0 {
            return Err(EvalError::TextTooShort {
                tokens: tokens.len(),
                ctx,
            });
        }
        let count = chunks.map_or(available, |wanted| wanted.min(available));
        Ok(Self {
            tokens,
            ctx,
            count,
            bos,
        })
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tokens in a window.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Scored positions in a window.
    pub fn scored(&self) -> usize {
        self.ctx - 1 - self.ctx / 2
    }

    /// The window of this index, `None` past the end.
    pub fn get(&self, index: usize) -> Option<Window<'_>> {
        if index >= self.count {
            return None;
        }
        let tokens = &self.tokens[index * self.ctx..(index + 1) * self.ctx];
        let mut input = tokens.to_vec();
        if let Some(bos) = self.bos {
            input[0] = bos;
        }
        let first = self.ctx / 2;
        Some(Window {
            input,
            first,
            targets: &tokens[first + 1..],
        })
    }

    /// The windows in order.
    pub fn iter(&self) -> impl Iterator<Item = Window<'_>> {
        (0..self.count).filter_map(|index| self.get(index))
    }

    /// An error if a token is not below `vocab`.
    pub(crate) fn check_vocabulary(&self, vocab: usize) -> Result<(), EvalError> {
        let used = &self.tokens[..self.count * self.ctx];
        match used
            .iter()
            .chain(&self.bos)
            .find(|&&token| token as usize >= vocab)
        {
            Some(&token) => Err(EvalError::TokenOutOfVocabulary { token, vocab }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_windows_of_llama_perplexity() {
        // 21 tokens, ctx 8: two windows, five tokens dropped; positions 4, 5, 6 predict 5, 6, 7.
        let windows = Windows::new((0..21).collect(), 8, None, Some(99)).unwrap();
        assert_eq!((windows.count(), windows.scored()), (2, 3));
        let second = windows.get(1).unwrap();
        assert_eq!(second.input, [99, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!((second.first, second.targets), (4, &[13, 14, 15][..]));
        assert_eq!(windows.get(2), None);
        assert_eq!(windows.iter().count(), 2);
    }

    #[test]
    fn odd_context_and_no_bos() {
        let windows = Windows::new((0..9).collect(), 7, Some(5), None).unwrap();
        let only = windows.get(0).unwrap();
        assert_eq!(only.input, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!((only.first, only.targets), (3, &[4, 5, 6][..]));
        assert_eq!(windows.scored(), 3);
    }

    #[test]
    fn bad_requests() {
        let text: Vec<u32> = (0..10).collect();
        assert!(matches!(
            Windows::new(text.clone(), 2, None, None),
            Err(EvalError::ContextTooSmall { ctx: 2 })
        ));
        assert!(matches!(
            Windows::new(text.clone(), 11, None, None),
            Err(EvalError::TextTooShort { tokens: 10, ctx: 11 })
        ));
        assert!(matches!(
            Windows::new(text.clone(), 5, Some(0), None),
            Err(EvalError::NoWindows)
        ));
        let windows = Windows::new(text, 5, None, Some(12)).unwrap();
        assert!(windows.check_vocabulary(13).is_ok());
        assert!(matches!(
            windows.check_vocabulary(12),
            Err(EvalError::TokenOutOfVocabulary { token: 12, vocab: 12 })
        ));
    }
}
