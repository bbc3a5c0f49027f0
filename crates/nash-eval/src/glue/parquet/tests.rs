//! Files that another writer made, whole and damaged.

use std::sync::Arc;

use ::parquet::basic::Compression;
use ::parquet::data_type::Int32Type;
use ::parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};
use ::parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use ::parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

use super::*;

/// A column of a group of rows.
#[derive(Clone, Debug)]
pub(crate) enum Written {
    Texts(Vec<Option<String>>),
    Numbers(Vec<Option<i64>>),
    Small(Vec<Option<i32>>),
}

/// A column of texts.
pub(crate) fn texts(texts: &[&str]) -> Written {
    Written::Texts(texts.iter().map(|&text| Some(text.to_owned())).collect())
}

/// A column of numbers.
pub(crate) fn numbers(numbers: &[i64]) -> Written {
    Written::Numbers(numbers.iter().copied().map(Some).collect())
}

pub(crate) fn snappy() -> WriterPropertiesBuilder {
    WriterProperties::builder().set_compression(Compression::SNAPPY)
}

/// The bytes of a file with columns as in `optional binary sentence (UTF8); optional int64 label;`.
pub(crate) fn write(columns: &str, properties: WriterPropertiesBuilder, groups: &[Vec<Written>]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(&format!("message schema {{ {columns} }}")).unwrap());
    let optional: Vec<bool> = schema
        .get_fields()
        .iter()
        .map(|field| field.is_optional())
        .collect();
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties.build())).unwrap();
    for columns in groups {
        let mut group = file.next_row_group().unwrap();
        for (written, &optional) in columns.iter().zip(&optional) {
            let column = group.next_column().unwrap().unwrap();
            match written {
                Written::Texts(cells) => {
                    let array = |text: &String| ByteArray::from(text.as_str());
                    let cells: Vec<_> = cells.iter().map(|cell| cell.as_ref().map(array)).collect();
                    write_column::<ByteArrayType>(column, &cells, optional);
                }
                Written::Numbers(cells) => write_column::<Int64Type>(column, cells, optional),
                Written::Small(cells) => write_column::<Int32Type>(column, cells, optional),
            }
        }
        group.close().unwrap();
    }
    file.close().unwrap();
    bytes
}

fn write_column<T: ::parquet::data_type::DataType>(
    mut column: SerializedColumnWriter<'_>,
    cells: &[Option<T::T>],
    optional: bool,
) {
    let values: Vec<T::T> = cells.iter().flatten().cloned().collect();
    let levels: Vec<i16> = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
    let levels = optional.then_some(levels.as_slice());
    column.typed::<T>().write_batch(&values, levels, None).unwrap();
    column.close().unwrap();
}

const COLUMNS: &str = "optional binary sentence (UTF8); optional int64 label; optional int32 idx;";

/// Two groups of rows as the hub's files have them.
fn small() -> Vec<u8> {
    let group = |sentences: &[&str], labels: &[i64]| {
        let indices = (0..).map(Some).take(labels.len()).collect();
        vec![texts(sentences), numbers(labels), Written::Small(indices)]
    };
    let groups = [
        group(&["a good tea", "a cold soup", "a good tea"], &[1, 0, 1]),
        group(&["bread"], &[1]),
    ];
    write(COLUMNS, snappy(), &groups)
}

fn read(bytes: &[u8]) -> Result<Columns, String> {
    Columns::read(bytes.to_vec(), &["sentence"], &["label"])
}

fn refused(bytes: &[u8]) -> String {
    read(bytes).unwrap_err()
}

#[test]
fn columns_by_name() {
    let bytes = small();
    let found = read(&bytes).unwrap();
    let expected = ["a good tea", "a cold soup", "a good tea", "bread"];
    assert_eq!(found.texts, [expected.map(|text| Some(text.into())).to_vec()]);
    assert_eq!(found.numbers, [[1, 0, 1, 1].map(Some).to_vec()]);
    for (name, problem) in [
        ("text", "it has no column `text`; it has: sentence, label, idx"),
        (
            "sentence",
            "column `sentence`: it does not hold numbers of 64 bits",
        ),
        ("idx", "column `idx`: it does not hold numbers of 64 bits"),
    ] {
        assert_eq!(Columns::read(bytes.clone(), &[], &[name]).unwrap_err(), problem);
    }
}

/// What `Dataset.to_parquet` of the Python package `datasets` 5.2, which writes the hub's files, made of two invented rows.
#[test]
fn a_file_of_the_hubs_writer() {
    let bytes = include_bytes!("../../../tests/hub/cola.parquet");
    let found = read(bytes).unwrap();
    assert_eq!(
        found.texts,
        [["He sleeps.", "Him sleeps the."]
            .map(|text| Some(text.into()))
            .to_vec()]
    );
    assert_eq!(found.numbers, [[1, 0].map(Some).to_vec()]);
}

#[test]
fn what_is_not_read_is_named() {
    for columns in [
        "repeated binary sentence (UTF8);",
        "optional group more { optional binary sentence (UTF8); }",
    ] {
        let bytes = write(columns, snappy(), &[]);
        assert_eq!(refused(&bytes), "column `sentence`: it is nested");
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 72819\n";
    assert!(refused(pointer).contains("git lfs pull"));
    assert!(refused(b"sentence\tlabel\n").contains("Parquet"));
    assert!(refused(&vec![0; LARGEST + 1]).contains("at most"));
    let many = Written::Numbers(vec![Some(1); MAX_ROWS + 1]);
    let bytes = write("required int64 label;", snappy(), &[vec![many]]);
    assert!(bytes.len() < 5000, "{} bytes", bytes.len());
    let problem = Columns::read(bytes, &[], &["label"]).unwrap_err();
    assert_eq!(problem, "column `label`: it has more than 262144 rows");
}

#[test]
fn a_damaged_file_is_an_error() {
    let bytes = small();
    for length in 0..bytes.len() {
        assert!(read(&bytes[..length]).is_err(), "{length} bytes");
    }
    let mut bytes = bytes;
    for place in 0..bytes.len() {
        let right = bytes[place];
        for flip in [1, 0x80, 0xff] {
            bytes[place] = right ^ flip;
            // No panic gets out; what the byte says is another question.
            let _ = read(&bytes);
        }
        bytes[place] = right;
    }
}

/// Columns of 0 to 60 rows.
fn written() -> impl Strategy<Value = Vec<Written>> {
    (0..60usize).prop_flat_map(|rows| {
        let cell = prop::option::weighted(0.8, "[a-c]{0,3}");
        let label = prop::option::weighted(0.8, -1..3i64);
        let (sentences, labels) = (
            prop::collection::vec(cell, rows),
            prop::collection::vec(label, rows),
        );
        (sentences, labels).prop_map(|(s, l)| vec![Written::Texts(s), Written::Numbers(l)])
    })
}

proptest! {
    /// Small pages, dictionaries that are given up half-way, no compression, no dictionary, columns without empty cells.
    #[test]
    fn what_is_written_is_read(
        groups in prop::collection::vec(written(), 0..3),
        (packed, dictionary, optional) in any::<(bool, bool, bool)>(),
        (page, words) in (1..20usize, 1..40usize),
    ) {
        let properties = WriterProperties::builder()
            .set_compression(if packed { Compression::SNAPPY } else { Compression::UNCOMPRESSED })
            .set_dictionary_enabled(dictionary)
            .set_dictionary_page_size_limit(words)
            .set_data_page_row_count_limit(page)
            .set_write_batch_size(page);
        let mut groups = groups;
        if !optional {
            for written in groups.iter_mut().flatten() {
                match written {
                    Written::Texts(cells) => cells.iter_mut().for_each(|cell| *cell = Some(cell.take().unwrap_or_default())),
                    Written::Numbers(cells) => cells.iter_mut().for_each(|cell| *cell = Some(cell.take().unwrap_or_default())),
                    Written::Small(_) => (),
                }
            }
        }
        let columns = "optional binary sentence (UTF8); optional int64 label;";
        let columns = if optional { columns.to_owned() } else { columns.replace("optional", "required") };
        let found = read(&write(&columns, properties, &groups)).unwrap();
        let (mut expected, mut numbers) = (Vec::new(), Vec::new());
        for written in groups.into_iter().flatten() {
            match written {
                Written::Texts(cells) => expected.extend(cells.into_iter().map(|cell| cell.map(|cell| ByteArray::from(cell.as_str())))),
                Written::Numbers(cells) => numbers.extend(cells),
                Written::Small(_) => (),
            }
        }
        prop_assert_eq!(found.texts, [expected]);
        prop_assert_eq!(found.numbers, [numbers]);
    }
}
