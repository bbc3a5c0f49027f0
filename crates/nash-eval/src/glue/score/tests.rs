//! The path with a kept prefix against the plain definition, exactly on a made-up model and closely on real ones.

use std::path::Path;

use nash_core::ModelFile;
use nash_models::Model;

use super::*;
use crate::{ModelScorer, Scorer};

const VOCAB: usize = 64;

/// A model whose prediction depends on every token read so far: the state is a hash of them, the logits follow from it.
#[derive(Default)]
struct Hashed {
    read: Vec<u32>,
    /// Tokens run, all in all.
    work: usize,
    positions: usize,
}

impl Hashed {
    fn row(tokens: &[u32]) -> Vec<f32> {
        let mix = |state: u64, &token: &u32| (state ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
        let state = tokens.iter().fold(0xcbf2_9ce4_8422_2325, mix);
        (0..VOCAB as u64)
            .map(|j| ((state.rotate_left(j as u32) ^ j) % 1000) as f32 / 200.0)
            .collect()
    }
}

impl Scorer for Hashed {
    fn vocab(&self) -> usize {
        VOCAB
    }
    fn width(&self) -> usize {
        VOCAB
    }
    fn positions(&self) -> Option<usize> {
        Some(self.positions)
    }
    fn hidden(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError> {
        Ok((1..=tokens.len())
            .flat_map(|end| Self::row(&tokens[..end]))
            .collect())
    }
    fn logits(&mut self, hidden: &[f32], out: &mut [f32]) -> Result<(), EvalError> {
        out.copy_from_slice(hidden);
        Ok(())
    }
}

impl PrefixScorer for Hashed {
    fn restart(&mut self, _: usize) -> Result<(), EvalError> {
        self.read.clear();
        Ok(())
    }
    fn keep_common_prefix(&mut self, tokens: &[u32]) -> usize {
        let kept = common(&self.read, tokens);
        self.read.truncate(kept);
        kept
    }
    fn read_on(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EvalError> {
        self.work += tokens.len();
        let from = self.read.len();
        self.read.extend_from_slice(tokens);
        Ok((from + 1..=self.read.len())
            .flat_map(|end| Self::row(&self.read[..end]))
            .collect())
    }
}

fn question(line: usize, prompt: &str, answers: &[&str], label: bool) -> Question {
    Question {
        line,
        prompt: prompt.into(),
        answers: answers.iter().map(|&answer| answer.into()).collect(),
        label,
    }
}

/// Three examples and questions whose answers have one token, several, a common start, different lengths.
fn quiz() -> Quiz {
    let shots = vec![
        question(7, "sun?", &[" n", " y"], true),
        question(8, "ice?", &[" n", " y"], false),
    ];
    let questions = vec![
        question(1, "fire?", &["n", "y"], true),
        question(2, "snow and more?", &[" cold", " warm"], false),
        question(3, "a?", &[" yes", " yesterday"], true),
        question(4, "stone", &["s", " by stone"], true),
    ];
    Quiz {
        task: Task::Cola,
        shots,
        questions,
    }
}

/// BOS and a token per byte; two line feeds are one token at the end of a text and two before other text, as in tokenizers that
/// split before a word.
fn encode(text: &str) -> Result<Vec<u32>, EvalError> {
    let id = |byte: &u8| u32::from(*byte) % 60 + 3;
    let (body, joined) = match text.strip_suffix("\n\n") {
        Some(body) => (body, Some(2)),
        None => (text, None),
    };
    Ok([1]
        .into_iter()
        .chain(body.as_bytes().iter().map(id))
        .chain(joined)
        .collect())
}

/// The scores by definition: the whole sequence run for each answer.
fn plain(model: &mut dyn PrefixScorer, item: &Item) -> Vec<Score> {
    let width = model.width();
    let score = |tokens: &Vec<u32>| {
        let hidden = model.hidden(&tokens[..tokens.len() - 1]).unwrap();
        let rows = Rows::new(model, &hidden[(item.prompt - 1) * width..], 0).unwrap();
        Score::new(rows.iter().zip(&tokens[item.prompt..]))
    };
    item.sequences.iter().map(score).collect()
}

/// The scores with the prefix kept, question after question.
fn kept(model: &mut dyn PrefixScorer, sheet: &Sheet) -> Vec<Vec<Score>> {
    let longest = sheet.items.iter().map(Item::longest).max().unwrap();
    model.restart(longest).unwrap();
    model.read_on(&sheet.prefix).unwrap();
    let score = |item: &Item| item.score(model, sheet.prefix.len(), 0).unwrap();
    sheet.items.iter().map(score).collect()
}

#[test]
fn a_kept_prefix_changes_nothing() {
    let quiz = quiz();
    let sheet = Sheet::new(&quiz, &mut encode).unwrap();
    let examples = "sun? y\n\nice? n\n\n".len();
    assert_eq!(
        sheet.prefix.len(),
        1 + examples - 2,
        "all but the line feeds that are split otherwise"
    );
    let mut model = Hashed::default();
    let want: Vec<_> = sheet.items.iter().map(|item| plain(&mut model, item)).collect();
    assert_eq!(kept(&mut model, &sheet), want);

    // Without examples BOS is what all share.
    let bare = Quiz {
        shots: Vec::new(),
        ..quiz
    };
    let sheet = Sheet::new(&bare, &mut encode).unwrap();
    assert_eq!(sheet.prefix, [1]);
    let want: Vec<_> = sheet.items.iter().map(|item| plain(&mut model, item)).collect();
    assert_eq!(kept(&mut model, &sheet), want);
}

#[test]
fn each_token_is_run_once() {
    let sheet = Sheet::new(&quiz(), &mut encode).unwrap();
    let mut model = Hashed::default();
    kept(&mut model, &sheet);
    // Prefix, then per question: line feeds, prompt, and of each answer all but the last token and what the answers share.
    let per_question = [
        2 + 5,
        2 + 14 + 1 + 3 + 3,
        2 + 2 + 4 - 1 + "terday".len(),
        2 + 5 + " by stone".len() - 1,
    ];
    assert_eq!(
        model.work,
        sheet.prefix.len() + per_question.iter().sum::<usize>()
    );
}

#[test]
fn answers_are_the_likelier_ones() {
    let quiz = quiz();
    let sheet = Sheet::new(&quiz, &mut encode).unwrap();
    let mut model = Hashed {
        positions: 100,
        ..Hashed::default()
    };
    let want: Vec<bool> = sheet
        .items
        .iter()
        .map(|item| plain(&mut model, item))
        .map(|scores| scores[1].log_likelihood > scores[0].log_likelihood)
        .collect();
    let mut told = Vec::new();
    let got = answers(&mut model, &quiz, &mut encode, &mut |done, right| {
        told.push((done, right));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(got, want);
    let right = got
        .iter()
        .zip(&quiz.questions)
        .filter(|(answer, question)| **answer == question.label)
        .count();
    assert_eq!(told.len(), 4);
    assert_eq!(told.last(), Some(&(4, right)));

    // The order of the questions is of no importance.
    let mut turned = quiz.clone();
    turned.questions.reverse();
    let mut got_turned = answers(&mut model, &turned, &mut encode, &mut |_, _| {
        ControlFlow::Continue(())
    })
    .unwrap();
    got_turned.reverse();
    assert_eq!(got_turned, want);
}

#[test]
fn a_single_answer_counts_if_the_model_would_say_it() {
    let mut model = Hashed {
        positions: 100,
        ..Hashed::default()
    };
    // Two tokens, each the most likely one after what is before it; the encoder here takes digits of base 64.
    let mut tokens = vec![1, 9];
    for _ in 0..2 {
        let top = log_sum_exp(&Hashed::row(&tokens)).1;
        tokens.push(top as u32);
    }
    let text = |tokens: &[u32]| {
        tokens
            .iter()
            .map(|&token| char::from(token as u8))
            .collect::<String>()
    };
    let mut other = tokens.clone();
    other[3] = (other[3] + 1) % VOCAB as u32;
    let quiz = Quiz {
        task: Task::Lambada,
        shots: Vec::new(),
        questions: vec![
            question(1, &text(&tokens[1..2]), &[&text(&tokens[2..])], true),
            question(2, &text(&other[1..2]), &[&text(&other[2..])], true),
        ],
    };
    let mut encode = |text: &str| Ok([1].into_iter().chain(text.bytes().map(u32::from)).collect());
    let got = answers(&mut model, &quiz, &mut encode, &mut |_, _| {
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(got, [true, false]);
}

#[test]
fn what_cannot_be_scored() {
    let quiz = quiz();
    let run = |positions, encode: &mut Encode<'_>, flow: ControlFlow<()>| {
        let mut model = Hashed {
            positions,
            ..Hashed::default()
        };
        answers(&mut model, &quiz, encode, &mut |_, _| flow).unwrap_err()
    };
    let go = ControlFlow::Continue(());
    // BOS, the examples, the prompt of line 2 and all but one token of its answer: 1 + 16 + 14 + 4.
    assert!(matches!(
        run(34, &mut encode, go),
        EvalError::PromptTooLong {
            line: 2,
            tokens: 35,
            limit: 34
        }
    ));
    assert!(matches!(
        run(100, &mut encode, ControlFlow::Break(())),
        EvalError::Cancelled
    ));
    let mut beyond = |text: &str| Ok(text.bytes().map(u32::from).collect());
    assert!(matches!(
        run(100, &mut beyond, go),
        EvalError::TokenOutOfVocabulary { .. }
    ));
    let mut nothing = |_: &str| Ok(Vec::new());
    assert!(matches!(
        run(100, &mut nothing, go),
        EvalError::NothingToScore { line: 1 }
    ));
}

/// On a model, kept keys and values are in half precision while those of a plain run are not: the tolerance for logits is that
/// of the golden tests of the models (1e-2 of their scale), twice per token for the logit and its normalisation.
#[test]
fn models_score_the_same_with_and_without_a_kept_prefix() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nash-models/tests/golden");
    for name in ["llama", "qwen2_window", "gemma3", "gpt2", "olmoe"] {
        let model = Model::load(&ModelFile::open(golden.join(name)).unwrap()).unwrap();
        let mut scorer = ModelScorer::new(&model);
        let sheet = Sheet::new(&quiz(), &mut encode).unwrap();
        for (item, got) in sheet.items.iter().zip(kept(&mut scorer, &sheet)) {
            let hidden = scorer.hidden(&item.sequences[0]).unwrap();
            let mut logits = vec![0.0; item.sequences[0].len() * VOCAB];
            scorer.logits(&hidden, &mut logits).unwrap();
            let scale = logits.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for ((want, got), tokens) in plain(&mut scorer, item).iter().zip(&got).zip(&item.sequences) {
                let answer = (tokens.len() - item.prompt) as f64;
                let difference = (want.log_likelihood - got.log_likelihood).abs();
                assert!(
                    difference <= 2e-2 * f64::from(scale) * answer,
                    "{name}: {want:?} {got:?}"
                );
                assert!(got.log_likelihood < 0.0, "{name}");
            }
        }
    }
}
