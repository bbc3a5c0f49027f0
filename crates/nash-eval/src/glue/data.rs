//! Questions from files: tab-separated rows as GLUE and its sources publish them, Parquet as the Hugging Face hub does, LAMBADA as
//! JSON lines or plain lines.
//!
//! | task | files, the first that exists | columns |
//! | --- | --- | --- |
//! | sst2 | `sst2_dev.tsv`, `SST-2/dev.tsv`, [hub] | sentence, label; header line |
//! | mrpc | `mrpc_dev.tsv`, `MRPC/dev.tsv`, [hub] | label, id, id, sentence, sentence; header line |
//! | cola | `cola_dev.tsv`, `CoLA/dev.tsv`, [hub] | source, label, author's mark, sentence; no header |
//! | lambada | `lambada.jsonl`, `lambada_test.jsonl`, `lambada.txt`, [hub] | `{"text": …}`, or a passage, per line |
//!
//! Examples come from the file with `train` in place of `dev` or `validation`, or the first `<task>_train*.tsv` by name. There is
//! no quoting: a `"` is text. Cells are used as they stand, as the harness does (SST-2 sentences end in a space). Empty lines and a
//! byte order mark are passed over; everything else that does not fit is an error that names the line, or the row.
//!
//! In Parquet files columns are found by name: `sentence`, or `sentence1` and `sentence2`, and `label`.
//!
//! [hub]: hub_file

mod table;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Question, Task};
use table::parse_parquet;

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The questions to be answered.
    Dev,
    /// What examples are drawn from.
    Train,
}

impl Split {
    fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Train => "train",
        }
    }
}

/// What is wrong with a folder of data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// None of the files that a task could be in exists.
    #[error("{} has no data for {task}: looked for {tried}", dir.display())]
    Missing {
        /// The folder.
        dir: PathBuf,
        /// The task.
        task: Task,
        /// The names that would have worked, separated by commas.
        tried: String,
    },
    /// A file cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is not what its task calls for.
    #[error("{}, line {line}: {problem}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A Parquet file cannot be read as a whole.
    #[error("{}: {problem}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A row of a Parquet file is not what its task calls for.
    #[error("{}, row {row}: {problem}", file.display())]
    MalformedRow {
        /// The file.
        file: PathBuf,
        /// The row, from 1.
        row: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A file without a single question.
    #[error("{} has no rows", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// Fewer examples than are to be shown.
    #[error("{} examples were asked for, {} has {found}; use a smaller --shots", wanted, file.display())]
    TooFewExamples {
        /// The file.
        file: PathBuf,
        /// Rows in it.
        found: usize,
        /// Examples asked for.
        wanted: usize,
    },
}

/// Questions or errors, row by row.
type Rows = Vec<Result<Question, DataError>>;

/// Where the Hugging Face hub has a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubFile {
    /// The data set, `owner/name`.
    pub repo: &'static str,
    /// The file in it.
    pub path: String,
}

/// The file of a task on the Hugging Face hub. LAMBADA has one only.
#[must_use]
pub fn hub_file(task: Task, split: Split) -> HubFile {
    if task == Task::Lambada {
        return HubFile {
            repo: "EleutherAI/lambada_openai",
            path: "data/lambada_test_en.jsonl".to_owned(),
        };
    }
    let part = match split {
        Split::Dev => "validation",
        Split::Train => "train",
    };
    HubFile {
        repo: "nyu-mll/glue",
        path: format!("{task}/{part}-00000-of-00001.parquet"),
    }
}

/// The file of a task in a folder.
///
/// # Errors
/// [`DataError::Missing`] if there is none.
pub fn find(dir: &Path, task: Task, split: Split) -> Result<PathBuf, DataError> {
    let (name, part) = (task.name(), split.name());
    let glue = |folder: &str| vec![format!("{name}_{part}.tsv"), format!("{folder}/{part}.tsv")];
    let mut tried = match task {
        Task::Sst2 => glue("SST-2"),
        Task::Mrpc => glue("MRPC"),
        Task::Cola => glue("CoLA"),
        Task::Lambada => ["lambada.jsonl", "lambada_test.jsonl", "lambada.txt"]
            .map(String::from)
            .to_vec(),
    };
    let present = |name: &String| Some(dir.join(name)).filter(|path| path.is_file());
    if let Some(found) = tried.iter().find_map(present) {
        return Ok(found);
    }
    if split == Split::Train && task.takes_examples() {
        let prefix = format!("{name}_train");
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(&prefix) && name.ends_with(".tsv"))
            .collect();
        names.sort();
        if let Some(first) = names.first() {
            return Ok(dir.join(first));
        }
        tried.push(format!("{prefix}*.tsv"));
    }
    // A folder that was cloned from the hub.
    let HubFile { path, .. } = hub_file(task, split);
    if let Some(found) = present(&path) {
        return Ok(found);
    }
    tried.push(path);
    Err(DataError::Missing {
        dir: dir.to_owned(),
        task,
        tried: tried.join(", "),
    })
}

/// All questions of a file: what is measured on must be whole.
///
/// # Errors
/// The first malformed line or row, a file that cannot be read, or one without rows.
pub fn read(file: &Path, task: Task) -> Result<Vec<Question>, DataError> {
    let questions = rows(file, task)?.into_iter().collect::<Result<_, _>>()?;
    some(questions, file)
}

/// The questions of a file that examples are drawn from, and the errors of its malformed lines or rows: of several
/// thousand rows a few may be missing (copies of MRPC go around in which two rows are run together).
///
/// # Errors
/// A file that cannot be read, or one without a row that is well-formed.
pub fn read_pool(file: &Path, task: Task) -> Result<(Vec<Question>, Vec<DataError>), DataError> {
    let (mut questions, mut errors) = (Vec::new(), Vec::new());
    for row in rows(file, task)? {
        match row {
            Ok(question) => questions.push(question),
            Err(error) => errors.push(error),
        }
    }
    match errors.pop() {
        Some(error) if questions.is_empty() => Err(error),
        last => {
            errors.extend(last);
            Ok((some(questions, file)?, errors))
        }
    }
}

/// The questions of the bytes of a text file, one by one; `file` is its name in errors, whose extension `jsonl` says that the
/// lines are JSON.
pub fn parse<'a>(
    bytes: &'a [u8],
    file: &'a Path,
    task: Task,
) -> impl Iterator<Item = Result<Question, DataError>> + 'a {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let json = has_extension(file, "jsonl");
    let lines = bytes.split(|&byte| byte == b'\n').zip(1..);
    lines.filter_map(move |(text, line)| {
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let row = match std::str::from_utf8(text) {
            Ok(text) if text.trim().is_empty() || (line == 1 && is_header(text, task)) => return None,
            Ok(text) => cells(text, task, json).and_then(|cells| question(line, task, &cells)),
            Err(_) => Err("it is not UTF-8 text".to_owned()),
        };
        Some(row.map_err(|problem| DataError::Malformed {
            file: file.to_owned(),
            line,
            problem,
        }))
    })
}

fn rows(file: &Path, task: Task) -> Result<Rows, DataError> {
    let bytes = bytes(file)?;
    if has_extension(file, "parquet") {
        return parse_parquet(bytes, file, task);
    }
    Ok(parse(&bytes, file, task).collect())
}

fn has_extension(file: &Path, wanted: &str) -> bool {
    file.extension().is_some_and(|extension| extension == wanted)
}

fn bytes(file: &Path) -> Result<Vec<u8>, DataError> {
    std::fs::read(file).map_err(|source| DataError::Read {
        file: file.to_owned(),
        source,
    })
}

fn some(questions: Vec<Question>, file: &Path) -> Result<Vec<Question>, DataError> {
    if questions.is_empty() {
        return Err(DataError::Empty {
            file: file.to_owned(),
        });
    }
    Ok(questions)
}

fn is_header(line: &str, task: Task) -> bool {
    match task {
        Task::Sst2 => line == "sentence\tlabel",
        Task::Mrpc => line.starts_with("Quality\t"),
        Task::Cola | Task::Lambada => false,
    }
}

/// What a row says, in whatever format it is stored.
struct Cells<'a> {
    /// The sentence, the first of two, or a passage.
    first: Cow<'a, str>,
    /// The second of two sentences.
    second: &'a str,
    /// Whether the second answer is right.
    label: bool,
}

/// The question of a row, with the published prompt, or what is wrong with it.
fn question(line: usize, task: Task, cells: &Cells<'_>) -> Result<Question, String> {
    let Cells { first, second, label } = cells;
    let (prompt, answers) = match task {
        Task::Sst2 => {
            let prompt = format!("{first}\nQuestion: Is this sentence positive or negative?\nAnswer:");
            (prompt, choices(task))
        }
        Task::Mrpc => {
            let prompt = format!(
                "Sentence 1: {first}\nSentence 2: {second}\nQuestion: Do both sentences mean the same thing?\nAnswer:"
            );
            (prompt, choices(task))
        }
        Task::Cola => {
            let prompt = format!("{first}\nQuestion: Does this sentence make sense?\nAnswer:");
            (prompt, choices(task))
        }
        Task::Lambada => {
            // The harness splits at spaces only; a trailing one would ask for an empty word.
            let (prompt, word) = first
                .trim_end()
                .rsplit_once(' ')
                .filter(|(prompt, _)| !prompt.trim().is_empty())
                .ok_or("a passage needs two words at least")?;
            (prompt.to_owned(), vec![format!(" {word}")])
        }
    };
    Ok(Question {
        line,
        prompt,
        answers,
        label: *label,
    })
}

/// The cells of a line, or what is wrong with it.
fn cells(text: &str, task: Task, json: bool) -> Result<Cells<'_>, String> {
    let (first, second, right) = match task {
        Task::Sst2 => {
            let [text, right] = columns(text)?;
            (text, "", right)
        }
        Task::Mrpc => {
            let [right, _, _, first, second] = columns(text)?;
            (first, second, right)
        }
        Task::Cola => {
            let [_, right, _, text] = columns(text)?;
            (text, "", right)
        }
        Task::Lambada => {
            let first = if json {
                json_text(text)?.into()
            } else {
                text.into()
            };
            return Ok(Cells {
                first,
                second: "",
                label: true,
            });
        }
    };
    Ok(Cells {
        first: first.into(),
        second,
        label: label(right)?,
    })
}

/// The cells of a row; the sentences among them must not be empty.
fn columns<const N: usize>(line: &str) -> Result<[&str; N], String> {
    let cells: Vec<&str> = line.split('\t').collect();
    let found = cells.len();
    let cells: [&str; N] = cells.try_into().map_err(|_| {
        format!(
            "{found} tab-separated column{} instead of {N}",
            if found == 1 { "" } else { "s" }
        )
    })?;
    // Column 2 of 4 is CoLA's mark of the author, which is empty for most sentences.
    let empty = |(index, cell): (usize, &&str)| cell.trim().is_empty() && (N, index) != (4, 2);
    match cells.iter().enumerate().position(empty) {
        Some(index) => Err(format!("column {} is empty", index + 1)),
        None => Ok(cells),
    }
}

fn label(cell: &str) -> Result<bool, String> {
    match cell.trim() {
        "0" => Ok(false),
        "1" => Ok(true),
        other => Err(format!("the label is `{other}` instead of 0 or 1")),
    }
}

fn choices(task: Task) -> Vec<String> {
    let choices = task.choices().into_iter().flatten();
    choices.map(String::from).collect()
}

fn json_text(line: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Passage {
        text: String,
    }
    serde_json::from_str(line)
        .map(|Passage { text }| text)
        .map_err(|error| format!("it is not {{\"text\": …}}: {error}"))
}

#[cfg(test)]
mod tests;
