//! Sentence tasks by log-likelihood: SST-2, MRPC and CoLA of GLUE, and the last words of LAMBADA.
//!
//! A question is a prompt and its possible answers; the model's answer is the one that it finds most likely after the
//! prompt. Prompts, answers and the scoring are those of the [language model evaluation harness][harness]
//! (Gao et al., 2021; `lm_eval/tasks/glue/*/default.yaml` and `lm_eval/tasks/lambada/lambada_openai.yaml`), so its
//! published figures can be compared. What differs, on purpose: the examples of a few-shot prompt are the same for all
//! questions (the model reads them once) and balanced between the answers, and a limit draws questions at random
//! instead of taking the first ones (CoLA's are ordered by source).
//!
//! - [`find`], [`read`], [`read_pool`]: questions from the files of a folder. [`hub_file`]: where the hub has them.
//! - [`draw`], [`sample`]: examples and questions by seed.
//! - [`answers`]: what a model answers. [`assess`]: how good that is, with bootstrap intervals.
//!
//! The data sets: GLUE (Wang et al., ICLR 2019), SST-2 (Socher et al., EMNLP 2013), MRPC (Dolan & Brockett, IWP 2005),
//! CoLA (Warstadt et al., TACL 2019), LAMBADA (Paperno et al., ACL 2016).
//!
//! [harness]: https://github.com/EleutherAI/lm-evaluation-harness

mod data;
mod draw;
mod metrics;
mod parquet;
mod score;

use std::fmt;
use std::str::FromStr;

pub use data::{DataError, HubFile, Split, find, hub_file, parse, read, read_pool};
pub use draw::{draw, sample};
pub use metrics::{Interval, Metric, Outcome, RESAMPLES, Tally, assess, intervals};
pub use score::{Encode, Quiz, answers};

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Is a film review positive?
    Sst2,
    /// Do two sentences say the same?
    Mrpc,
    /// Is a sentence acceptable English?
    Cola,
    /// What is the last word of a passage?
    Lambada,
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 4] = [Self::Sst2, Self::Mrpc, Self::Cola, Self::Lambada];

    /// The name that users type and reports carry.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sst2 => "sst2",
            Self::Mrpc => "mrpc",
            Self::Cola => "cola",
            Self::Lambada => "lambada",
        }
    }

    /// The two answers of a classification, that of label 0 first; `None` where the answer is a word of the text.
    #[must_use]
    pub fn choices(self) -> Option<[&'static str; 2]> {
        match self {
            Self::Sst2 => Some([" negative", " positive"]),
            Self::Mrpc | Self::Cola => Some([" no", " yes"]),
            Self::Lambada => None,
        }
    }

    /// Whether examples can be shown before the question.
    #[must_use]
    pub fn takes_examples(self) -> bool {
        self.choices().is_some()
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = UnknownTask;

    fn from_str(text: &str) -> Result<Self, UnknownTask> {
        let found = Self::ALL.into_iter().find(|task| task.name() == text);
        found.ok_or_else(|| UnknownTask(text.to_owned()))
    }
}

/// There is no task of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no task `{0}`; there are sst2, mrpc, cola and lambada")]
pub struct UnknownTask(pub String);

/// A prompt and its possible answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Line in its file, from 1; of a Parquet file the row.
    pub line: usize,
    /// What the model reads.
    pub prompt: String,
    /// How it may go on, with the space that comes first. Two answers: the likelier one is the model's. One: it counts as
    /// given if each of its tokens is the model's most likely one.
    pub answers: Vec<String>,
    /// Whether the second of two answers is right; of a single answer always true.
    pub label: bool,
}

impl Question {
    /// The question with its right answer, as an example for others.
    fn example(&self) -> String {
        let right = if self.label {
            self.answers.last()
        } else {
            self.answers.first()
        };
        format!("{}{}\n\n", self.prompt, right.map_or("", String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_have_names() {
        for task in Task::ALL {
            assert_eq!(task.name().parse(), Ok(task));
        }
        let error = "qnli".parse::<Task>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no task `qnli`; there are sst2, mrpc, cola and lambada"
        );
    }

    #[test]
    fn an_example_shows_the_right_answer() {
        let mut question = Question {
            line: 1,
            prompt: "p:".into(),
            answers: vec![" no".into(), " yes".into()],
            label: true,
        };
        assert_eq!(question.example(), "p: yes\n\n");
        question.label = false;
        assert_eq!(question.example(), "p: no\n\n");
    }
}
