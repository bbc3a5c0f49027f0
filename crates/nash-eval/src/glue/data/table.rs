//! Questions from the columns of a Parquet file.

use std::path::Path;

use super::super::Task;
use super::super::parquet::Columns;
use super::{Cells, DataError, Rows, label, question};

/// The questions of the bytes of a Parquet file, row by row; `file` is its name in errors.
///
/// # Errors
/// [`DataError::Unreadable`] where the file is damaged or of a kind that is not read here, or a column is missing or of another type.
/// What is wrong with a row is in its place.
pub(super) fn parse_parquet(bytes: Vec<u8>, file: &Path, task: Task) -> Result<Rows, DataError> {
    let table = Table::read(bytes, task).map_err(|problem| DataError::Unreadable {
        file: file.to_owned(),
        problem,
    })?;
    let row = |index| {
        let row = index + 1;
        let cells = table.cells(index);
        cells
            .and_then(|cells| question(row, task, &cells))
            .map_err(|problem| DataError::MalformedRow {
                file: file.to_owned(),
                row,
                problem,
            })
    };
    Ok((0..table.rows()).map(row).collect())
}

/// The columns that a task has questions from.
struct Table {
    /// Names of the columns of texts.
    names: &'static [&'static str],
    columns: Columns,
}

impl Table {
    fn read(bytes: Vec<u8>, task: Task) -> Result<Self, String> {
        let names: &[&str] = match task {
            Task::Sst2 | Task::Cola => &["sentence"],
            Task::Mrpc => &["sentence1", "sentence2"],
            Task::Lambada => &["text"],
        };
        let labels: &[&str] = if task.choices().is_some() { &["label"] } else { &[] };
        let columns = Columns::read(bytes, names, labels)?;
        Ok(Self { names, columns })
    }

    fn rows(&self) -> usize {
        self.columns.texts[0].len()
    }

    /// The cells of a row, or what is wrong with it.
    fn cells(&self, row: usize) -> Result<Cells<'_>, String> {
        let label = match self.columns.numbers.first() {
            Some(labels) => label(&labels[row].ok_or("`label` is empty")?.to_string())?,
            None => true,
        };
        Ok(Cells {
            first: self.text(0, row)?.into(),
            second: match self.names.len() {
                1 => "",
                _ => self.text(1, row)?,
            },
            label,
        })
    }

    /// The cell of a column of texts; it must not be empty.
    fn text(&self, column: usize, row: usize) -> Result<&str, String> {
        let name = self.names[column];
        let text = self.columns.texts[column][row]
            .as_ref()
            .map_or(&[][..], |text| text.data());
        let text = std::str::from_utf8(text).map_err(|_| format!("`{name}` is not UTF-8 text"))?;
        match text.trim() {
            "" => Err(format!("`{name}` is empty")),
            _ => Ok(text),
        }
    }
}
