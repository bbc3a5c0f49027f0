//! What a model answers: the log-likelihood of each answer after its prompt.
//!
//! As in the harness, prompt and answer are tokenised together and the answer's tokens are those past the prompt's own
//! number; the log-likelihood of an answer is the sum over them, not divided by its length.
//!
//! The tokens that all prompts start with (BOS and the examples) are run once and stay in the KV cache; what the answers
//! share (as a rule the whole prompt) is run once per question. Which tokens come from the cache depends on nothing but the
//! quiz, so a question is answered the same whatever came before it.
//!
//! T tokens fed, d hidden width, V vocabulary: hidden states `[T, d]`, logits `[T, V]`.

use std::ops::ControlFlow;

use nash_models::PREFILL_CHUNK;

use super::{Question, Task};
use crate::softmax::{first_non_finite, log_sum_exp};
use crate::{EvalError, PrefixScorer};

/// Questions of a task with the examples that are shown before each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quiz {
    /// The task.
    pub task: Task,
    /// Examples, shown in this order.
    pub shots: Vec<Question>,
    /// Questions.
    pub questions: Vec<Question>,
}

/// Gives the token ids of a text that begins a sequence: with BOS where the model wants one, without EOS.
pub type Encode<'a> = dyn FnMut(&str) -> Result<Vec<u32>, EvalError> + 'a;

/// Answers the questions of a quiz: for two answers whether the second is likelier than the first, for one whether it is what the
/// model would have said.
///
/// `progress` is called after each question with (questions done, right so far); `Break` stops with
/// [`EvalError::Cancelled`].
///
/// # Errors
/// If a prompt is longer than the model's positions, a token is not in its vocabulary, a logit is NaN or infinite, the
/// model or `encode` fails, or `progress` breaks.
pub fn answers(
    model: &mut dyn PrefixScorer,
    quiz: &Quiz,
    encode: &mut Encode<'_>,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Vec<bool>, EvalError> {
    let sheet = Sheet::new(quiz, encode)?;
    sheet.check(model, quiz)?;
    let longest = sheet.items.iter().map(Item::longest).max().unwrap_or(0);
    model.restart(longest)?;
    for chunk in sheet.prefix.chunks(PREFILL_CHUNK) {
        model.read_on(chunk)?;
    }
    let (mut answers, mut right) = (Vec::with_capacity(sheet.items.len()), 0);
    for (item, question) in sheet.items.iter().zip(&quiz.questions) {
        let scores = item.score(model, sheet.prefix.len(), question.line)?;
        let answer = match scores[..] {
            [first, second] => second.log_likelihood > first.log_likelihood,
            _ => scores.iter().any(|score| score.greedy),
        };
        answers.push(answer);
        right += usize::from(answer == question.label);
        if progress(answers.len(), right).is_break() {
            return Err(EvalError::Cancelled);
        }
    }
    Ok(answers)
}

/// A quiz in tokens.
struct Sheet {
    /// What every sequence starts with and the cache keeps.
    prefix: Vec<u32>,
    items: Vec<Item>,
}

/// A question in tokens.
struct Item {
    /// Prompt and answer, for each answer.
    sequences: Vec<Vec<u32>>,
    /// Tokens of the prompt, at least one more than the prefix.
    prompt: usize,
}

/// The score of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Score {
    /// `Σ ln p(token | all before)` over the tokens of the answer.
    log_likelihood: f64,
    /// Each of them is the most likely one at its place.
    greedy: bool,
}

impl Sheet {
    fn new(quiz: &Quiz, encode: &mut Encode<'_>) -> Result<Self, EvalError> {
        let shown: String = quiz.shots.iter().map(Question::example).collect();
        let mut prefix = encode(&shown)?;
        let mut items = Vec::with_capacity(quiz.questions.len());
        for question in &quiz.questions {
            let prompt = format!("{shown}{}", question.prompt);
            let item = Item::new(&prompt, question, encode)?;
            // The end of the examples can be split otherwise when text follows. One token of the prompt is left for the model to
            // read: its prediction is needed.
            let shared = item.sequences.iter().map(|tokens| common(&prefix, tokens));
            let shared = shared.min().unwrap_or(0).min(item.prompt - 1);
            prefix.truncate(shared);
            items.push(item);
        }
        Ok(Self { prefix, items })
    }

    fn check(&self, model: &dyn PrefixScorer, quiz: &Quiz) -> Result<(), EvalError> {
        let vocab = model.vocab();
        for (item, question) in self.items.iter().zip(&quiz.questions) {
            if let Some(limit) = model.positions()
                && item.longest() > limit
            {
                return Err(EvalError::PromptTooLong {
                    line: question.line,
                    tokens: item.longest(),
                    limit,
                });
            }
            let mut tokens = item.sequences.iter().flatten();
            if let Some(&token) = tokens.find(|&&token| token as usize >= vocab) {
                return Err(EvalError::TokenOutOfVocabulary { token, vocab });
            }
        }
        Ok(())
    }
}

impl Item {
    fn new(prompt: &str, question: &Question, encode: &mut Encode<'_>) -> Result<Self, EvalError> {
        let mut length = encode(prompt)?.len();
        let mut sequences = Vec::with_capacity(question.answers.len());
        for answer in &question.answers {
            let tokens = encode(&format!("{prompt}{answer}"))?;
            // A tokenizer that joins the answer to the prompt has it scored with the token they share.
            length = length.min(tokens.len().saturating_sub(1));
            sequences.push(tokens);
        }
        if length == 0 {
            return Err(EvalError::NothingToScore { line: question.line });
        }
        Ok(Self {
            sequences,
            prompt: length,
        })
    }

    /// Most tokens that the model reads: the last one of an answer is only predicted.
    fn longest(&self) -> usize {
        self.fed().map(<[u32]>::len).max().unwrap_or(0)
    }

    fn fed(&self) -> impl Iterator<Item = &[u32]> {
        self.sequences.iter().map(|tokens| &tokens[..tokens.len() - 1])
    }

    /// Scores the answers; the cache holds the first `prefix` tokens, and does so again afterwards.
    fn score(
        &self,
        model: &mut dyn PrefixScorer,
        prefix: usize,
        line: usize,
    ) -> Result<Vec<Score>, EvalError> {
        let width = model.width();
        let Some(first) = self.sequences.first() else {
            return Ok(Vec::new());
        };
        let shared = self.fed().map(|fed| common(fed, first)).min().unwrap_or(0);
        model.keep_common_prefix(&first[..prefix]);
        let hidden = model.read_on(&first[prefix..shared])?;
        // Rows from the last token of the prompt on; there the first token of the answer is predicted.
        let skipped = (self.prompt - 1).min(shared);
        let together = Rows::new(model, &hidden[(skipped - prefix) * width..], line)?;
        let mut scores = Vec::with_capacity(self.sequences.len());
        for tokens in &self.sequences {
            let fed = &tokens[..tokens.len() - 1];
            let own = if fed.len() > shared {
                model.keep_common_prefix(&fed[..shared]);
                let hidden = model.read_on(&fed[shared..])?;
                let skipped = (self.prompt - 1).saturating_sub(shared);
                Rows::new(model, &hidden[skipped * width..], line)?
            } else {
                Rows::default()
            };
            let rows = together.iter().chain(own.iter());
            scores.push(Score::new(rows.zip(&tokens[self.prompt..])));
        }
        Ok(scores)
    }
}

/// Logits of some positions, with their [`log_sum_exp`].
#[derive(Default)]
struct Rows {
    vocab: usize,
    logits: Vec<f32>,
    norms: Vec<(f64, usize)>,
}

impl Rows {
    fn new(model: &mut dyn PrefixScorer, hidden: &[f32], line: usize) -> Result<Self, EvalError> {
        if hidden.is_empty() {
            return Ok(Self::default());
        }
        let (vocab, positions) = (model.vocab(), hidden.len() / model.width());
        let mut logits = vec![0.0; positions * vocab];
        model.logits(hidden, &mut logits)?;
        for row in logits.chunks(vocab) {
            if let Some((token, value)) = first_non_finite(row) {
                return Err(EvalError::NonFiniteAnswer { line, token, value });
            }
        }
        let norms = logits.chunks(vocab).map(log_sum_exp).collect();
        Ok(Self { vocab, logits, norms })
    }

    fn iter(&self) -> impl Iterator<Item = (&[f32], (f64, usize))> {
        self.logits
            .chunks(self.vocab.max(1))
            .zip(self.norms.iter().copied())
    }
}

impl Score {
    fn new<'a>(rows: impl Iterator<Item = ((&'a [f32], (f64, usize)), &'a u32)>) -> Self {
        let start = Self {
            log_likelihood: 0.0,
            greedy: true,
        };
        rows.fold(start, |score, ((row, (norm, top)), &token)| Self {
            log_likelihood: score.log_likelihood + f64::from(row[token as usize]) - norm,
            greedy: score.greedy && top == token as usize,
        })
    }
}

/// Number of leading tokens that two sequences share.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
