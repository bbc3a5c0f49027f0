//! Columns of a Parquet file, read by the crate `parquet`.
//!
//! It trusts its input: about one in 340 of the files that differ from a good one in a single byte makes it panic. A damaged file is an
//! error here, so it runs where a panic is caught, and what a file can make it take is bounded by [`LARGEST`] and [`MAX_ROWS`].

use std::panic::{AssertUnwindSafe, catch_unwind};

use ::parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use ::parquet::data_type::{ByteArray, ByteArrayType, DataType, Int64Type};
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use bytes::Bytes;

/// Bytes that a file may have; the largest file of questions has a twentieth of them.
const LARGEST: usize = 1 << 26;
/// Rows that a file may have; the largest file of questions has a quarter of them.
const MAX_ROWS: usize = 1 << 18;
/// Rows read at a time.
const BATCH: usize = 1 << 10;

/// Columns of a file, all of one length; a cell may be empty.
#[derive(Debug)]
pub(super) struct Columns {
    pub(super) texts: Vec<Vec<Option<ByteArray>>>,
    pub(super) numbers: Vec<Vec<Option<i64>>>,
}

impl Columns {
    /// The columns of texts and of whole numbers that have these names, or what is wrong with the file.
    pub(super) fn read(bytes: Vec<u8>, texts: &[&str], numbers: &[&str]) -> Result<Self, String> {
        if bytes.len() > LARGEST {
            return Err(format!(
                "it has {} bytes; at most {LARGEST} are read",
                bytes.len()
            ));
        }
        if bytes.starts_with(b"version https://git-lfs") {
            return Err("it only stands for the file, which `git lfs pull` fetches".to_owned());
        }
        let bytes = Bytes::from(bytes);
        // Nothing that a panic could leave half done is used afterwards.
        catch_unwind(AssertUnwindSafe(|| Self::of(bytes, texts, numbers)))
            .unwrap_or_else(|_| Err("it is damaged".to_owned()))
    }

    fn of(bytes: Bytes, texts: &[&str], numbers: &[&str]) -> Result<Self, String> {
        let file = SerializedFileReader::new(bytes).map_err(|e| e.to_string())?;
        let text = |name: &&str| {
            column::<ByteArrayType>(&file, name, |reader| match reader {
                ColumnReader::ByteArrayColumnReader(reader) => Ok(reader),
                _ => Err("it does not hold texts".to_owned()),
            })
        };
        let number = |name: &&str| {
            column::<Int64Type>(&file, name, |reader| match reader {
                ColumnReader::Int64ColumnReader(reader) => Ok(reader),
                _ => Err("it does not hold numbers of 64 bits".to_owned()),
            })
        };
        let columns = Self {
            texts: texts.iter().map(text).collect::<Result<_, _>>()?,
            numbers: numbers.iter().map(number).collect::<Result<_, _>>()?,
        };
        let texts = columns.texts.iter().map(Vec::len);
        let mut lengths = texts.chain(columns.numbers.iter().map(Vec::len));
        let first = lengths.next();
        match lengths.all(|length| Some(length) == first) {
            true => Ok(columns),
            false => Err("its columns differ in length".to_owned()),
        }
    }
}

/// The cells of a column, from the first row to the last.
fn column<T: DataType>(
    file: &SerializedFileReader<Bytes>,
    name: &str,
    typed: impl Fn(ColumnReader) -> Result<ColumnReaderImpl<T>, String>,
) -> Result<Vec<Option<T::T>>, String> {
    let schema = file.metadata().file_metadata().schema_descr();
    let Some(index) = schema.columns().iter().position(|column| column.name() == name) else {
        let names: Vec<&str> = schema.columns().iter().map(|column| column.name()).collect();
        return Err(format!("it has no column `{name}`; it has: {}", names.join(", ")));
    };
    let told = |problem: String| format!("column `{name}`: {problem}");
    let description = schema.column(index);
    if description.max_rep_level() > 0 || description.max_def_level() > 1 {
        return Err(told("it is nested".to_owned()));
    }
    let mut cells = Vec::new();
    for group in 0..file.num_row_groups() {
        let reader = file.get_row_group(group).and_then(|g| g.get_column_reader(index));
        let reader = typed(reader.map_err(|e| told(e.to_string()))?).map_err(told)?;
        append(reader, description.max_def_level() == 1, &mut cells).map_err(told)?;
    }
    Ok(cells)
}

/// Appends the cells that a reader has.
fn append<T: DataType>(
    mut reader: ColumnReaderImpl<T>,
    optional: bool,
    cells: &mut Vec<Option<T::T>>,
) -> Result<(), String> {
    loop {
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let given = optional.then_some(&mut levels);
        let (rows, ..) = reader
            .read_records(BATCH, given, None, &mut values)
            .map_err(|e| e.to_string())?;
        if rows == 0 {
            return Ok(());
        }
        if cells.len() + rows > MAX_ROWS {
            return Err(format!("it has more than {MAX_ROWS} rows"));
        }
        let mut values = values.into_iter();
        if optional {
            cells.extend(
                levels
                    .iter()
                    .map(|&level| (level > 0).then(|| values.next()).flatten()),
            );
        } else {
            cells.extend(values.map(Some));
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
