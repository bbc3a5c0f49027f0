//! `glue`: answers to the questions of GLUE tasks, and of LAMBADA.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use comfy_table::Table;
use nash_eval::glue::{self, DataError, Quiz, Split, Task};
use nash_eval::report::{Report, Row, TaskReport};
use nash_eval::{EvalError, ModelScorer};

use crate::args::{Json, ModelsArg, Threads};
use crate::interrupt;
use crate::model::{self, Loaded};
use crate::out::say;
use crate::questions::{self, Source};
use crate::sizes::size_report;
use crate::table::table;
use crate::ui::{Ui, Unit};

/// Measure answers to questions: SST-2, MRPC, CoLA (GLUE) and LAMBADA
///
/// A model answers with what it finds most likely after the prompt. Prompts and scoring are those of the language model
/// evaluation harness; docs/glue.md shows them. Every figure has a 95 % bootstrap interval. With a reference, "agreement" is
/// how often both give the same answer, and "change" the accuracy gained or lost on the same questions: small losses show there
/// long before the accuracies differ by more than their intervals.
///
/// The questions come from the Hugging Face hub, nyu-mll/glue and EleutherAI/lambada_openai; what the tasks call for is fetched
/// once, into the hub's own cache (HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured). Or from a folder, DIR, with the files as
/// they are published: sst2_dev.tsv (sentence, label), mrpc_dev.tsv (label, id, id, sentence, sentence), cola_dev.tsv (source,
/// label, mark, sentence), or SST-2/dev.tsv and so on; for --shots the same with `train`; lambada.jsonl ({"text": …}). A clone of
/// the hub's data sets is such a folder, too.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm glue small --reference model.gguf
  nashswarm glue small --task sst2 --shots 0,4 --seed 1
  nashswarm glue small medium --limit 200 --json report.json    a quick look
  nashswarm glue model.gguf --data . --task lambada             last words, from a file here")]
pub(crate) struct Glue {
    #[command(flatten)]
    models: ModelsArg,
    /// Model whose answers the others are compared with, usually the source they were made from
    #[arg(short, long, value_name = "SOURCE")]
    reference: Option<PathBuf>,
    /// Folder with the data, or `hub`: fetch it
    #[arg(
        short,
        long,
        value_name = "DIR|hub",
        env = "NASHSWARM_DATA",
        default_value = questions::HUB
    )]
    data: PathBuf,
    /// Tasks: sst2, mrpc, cola, lambada
    #[arg(
        long,
        value_name = "TASK,…",
        value_delimiter = ',',
        default_value = "sst2,mrpc,cola"
    )]
    task: Vec<Task>,
    /// Examples shown before each question, drawn from the training file; several numbers are measured one after the other.
    /// LAMBADA is always measured without
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    shots: Vec<usize>,
    /// Questions of each task, drawn at random [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<NonZeroUsize>,
    /// Seed of the examples, of the questions drawn and of the intervals
    #[arg(short, long, value_name = "N", env = "NASHSWARM_SEED", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    json: Json,
}

impl Glue {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        // What is wrong with the data is told before models are loaded.
        let source = Source::open(&self.data, &self.parts(), ui)?;
        let quizzes = self.quizzes(&source, ui)?;
        let load = |path: &Path| model::load(path, ui);
        let reference = self.reference.as_deref().map(load).transpose()?;
        let models = self
            .models
            .paths()
            .map(load)
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut rows = Vec::new();
        for quiz in &quizzes {
            let expected = match &reference {
                Some(loaded) => {
                    let answers = answer(loaded, quiz, ui)?;
                    let report = glue::assess(quiz, &answers, None, self.seed);
                    rows.push(row(loaded, report, source.name(quiz.task))?);
                    Some(answers)
                }
                None => None,
            };
            for loaded in &models {
                let answers = answer(loaded, quiz, ui)?;
                let report = glue::assess(quiz, &answers, expected.as_deref(), self.seed);
                rows.push(row(loaded, report, source.name(quiz.task))?);
            }
        }
        let report = Report { rows };
        self.json.write(&report)?;
        if !self.json.replaces_table() {
            say!("{}", answers_table(&report.rows));
            say!("{}", self.protocol(&source));
        }
        Ok(())
    }

    /// The parts of the data that are needed.
    fn parts(&self) -> Vec<(Task, Split)> {
        let examples = self.shots.iter().any(|&number| number > 0);
        let train = |task: Task| (examples && task.takes_examples()).then_some((task, Split::Train));
        let tasks = self.task.iter();
        tasks
            .flat_map(|&task| [Some((task, Split::Dev)), train(task)])
            .flatten()
            .collect()
    }

    /// Every task with every number of examples.
    fn quizzes(&self, source: &Source, ui: &Ui) -> anyhow::Result<Vec<Quiz>> {
        let mut quizzes = Vec::new();
        let limit = self.limit.map(NonZeroUsize::get);
        for &task in &self.task {
            let questions = glue::read(&source.file(task, Split::Dev)?, task)?;
            let questions = glue::sample(questions, limit, self.seed);
            let numbers: BTreeSet<usize> = if task.takes_examples() {
                self.shots.iter().copied().collect()
            } else {
                BTreeSet::from([0])
            };
            for number in numbers {
                quizzes.push(Quiz {
                    task,
                    shots: self.examples(task, number, source, ui)?,
                    questions: questions.clone(),
                });
            }
        }
        Ok(quizzes)
    }

    /// Examples of a task from its training file.
    fn examples(
        &self,
        task: Task,
        wanted: usize,
        source: &Source,
        ui: &Ui,
    ) -> anyhow::Result<Vec<glue::Question>> {
        if wanted == 0 {
            return Ok(Vec::new());
        }
        let file = source.file(task, Split::Train)?;
        let (pool, errors) = glue::read_pool(&file, task)?;
        for error in errors {
            ui.note(&format!("no example is taken from {error}"));
        }
        let examples = glue::draw(&pool, wanted, self.seed);
        if examples.len() < wanted {
            let found = pool.len();
            return Err(DataError::TooFewExamples { file, found, wanted }.into());
        }
        Ok(examples)
    }

    fn protocol(&self, source: &Source) -> String {
        let questions = match self.limit {
            Some(limit) => format!("at most {limit} questions of each task, drawn"),
            None => "all questions".to_owned(),
        };
        let sources: BTreeSet<String> = self.task.iter().map(|&task| source.name(task)).collect();
        let sources: Vec<String> = sources.into_iter().collect();
        format!(
            "{questions} from {}; 95 % intervals from {} bootstrap resamples, seed {}",
            sources.join(" and "),
            glue::RESAMPLES,
            self.seed
        )
    }
}

/// The answers of a model, by its own tokenizer.
fn answer(loaded: &Loaded, quiz: &Quiz, ui: &Ui) -> anyhow::Result<Vec<bool>> {
    let tokenizer = loaded.tokenizer()?;
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let mut encode = |text: &str| {
        let mut ids: Vec<u32> = bos.into_iter().collect();
        ids.extend(tokenizer.encode(text, false).map_err(EvalError::encode)?);
        Ok(ids)
    };
    let title = format!("{} on {}, shots: {}", loaded.name(), quiz.task, quiz.shots.len());
    ui.begin(&title, quiz.questions.len() as u64, Unit::Steps);
    let mut progress = |done: usize, right: usize| {
        ui.step(1);
        ui.remark(format!("accuracy {:.1} %", 100.0 * right as f64 / done as f64));
        if interrupt::stopped() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let mut scorer = ModelScorer::new(&loaded.model);
    let answers = glue::answers(&mut scorer, quiz, &mut encode, &mut progress)
        .with_context(|| format!("cannot measure {title}"))?;
    ui.finish();
    Ok(answers)
}

fn row(loaded: &Loaded, report: TaskReport, data: String) -> anyhow::Result<Row> {
    Ok(Row {
        name: loaded.name(),
        size: Some(size_report(&loaded.file)?),
        answers: Some(TaskReport {
            data: Some(data),
            ..report
        }),
        ..Row::default()
    })
}

/// One line per model, task and number of examples.
fn answers_table(rows: &[Row]) -> Table {
    let reports = || rows.iter().filter_map(|row| Some((row, row.answers.as_ref()?)));
    let compared = reports().any(|(_, report)| report.agreement.is_some());
    let mut headers = vec![
        "model",
        "task",
        "shots",
        "questions",
        "accuracy",
        "F1",
        "Matthews",
    ];
    if compared {
        headers.extend(["agreement", "change"]);
    }
    let mut table = table(&headers);
    for (row, r) in reports() {
        let mut cells = vec![
            row.name.clone(),
            r.task.clone(),
            r.shots.to_string(),
            r.examples.to_string(),
            share(Some(r.accuracy), Some(r.accuracy_low), Some(r.accuracy_high)),
            plain(r.f1, r.f1_low, r.f1_high),
            plain(r.matthews, r.matthews_low, r.matthews_high),
        ];
        if compared {
            cells.push(share(r.agreement, r.agreement_low, r.agreement_high));
            cells.push(change(r));
        }
        table.add_row(cells);
    }
    table
}

/// `87.2 % (84.9 to 89.3)`.
fn share(value: Option<f64>, low: Option<f64>, high: Option<f64>) -> String {
    interval(
        [value, low, high],
        |[value, low, high]| format!("{value:.1} % ({low:.1} to {high:.1})"),
        100.0,
    )
}

/// `0.872 (0.849 to 0.893)`.
fn plain(value: Option<f64>, low: Option<f64>, high: Option<f64>) -> String {
    interval(
        [value, low, high],
        |[value, low, high]| format!("{value:.3} ({low:.3} to {high:.3})"),
        1.0,
    )
}

/// `-1.2 % (-2.0 to -0.4)`.
fn change(r: &TaskReport) -> String {
    let values = [r.accuracy_change, r.accuracy_change_low, r.accuracy_change_high];
    interval(
        values,
        |[value, low, high]| format!("{value:+.1} % ({low:+.1} to {high:+.1})"),
        100.0,
    )
}

/// Nothing where there is no value.
fn interval(values: [Option<f64>; 3], write: impl Fn([f64; 3]) -> String, factor: f64) -> String {
    match values {
        // Adding 0 takes the sign off a zero that rounds to `-0.0`.
        [Some(value), Some(low), Some(high)] => write([value, low, high].map(|x| x * factor + 0.0)),
        _ => String::new(),
    }
}
