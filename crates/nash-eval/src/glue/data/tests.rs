//! What is read, and what is told about what cannot be.

use super::super::parquet::tests::{Written, numbers, snappy, texts, write};
use super::*;
use proptest::prelude::*;

fn parsed(text: &str, name: &str, task: Task) -> Result<Vec<Question>, String> {
    parse(text.as_bytes(), Path::new(name), task)
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())
}

#[test]
fn the_published_prompts() {
    let rows = parsed(
        "sentence\tlabel\nthe tea was \"fine\" . \t1\r\ncold soup\t0\n",
        "s",
        Task::Sst2,
    )
    .unwrap();
    assert_eq!(
        rows[0],
        Question {
            line: 2,
            prompt: "the tea was \"fine\" . \nQuestion: Is this sentence positive or negative?\nAnswer:"
                .into(),
            answers: vec![" negative".into(), " positive".into()],
            label: true,
        }
    );
    assert_eq!((rows[1].line, rows[1].label, rows.len()), (3, false, 2));

    let rows = parsed(
        "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tIt rains.\tRain falls.\n",
        "m",
        Task::Mrpc,
    )
    .unwrap();
    assert_eq!(
        rows[0].prompt,
        "Sentence 1: It rains.\nSentence 2: Rain falls.\nQuestion: Do both sentences mean the same thing?\nAnswer:"
    );
    assert_eq!(
        (rows[0].answers.concat(), rows[0].label),
        (" no yes".to_owned(), true)
    );

    let rows = parsed(
        "me1\t0\t*\tHim sleeps the.\n\nme1\t1\t\tHe sleeps.",
        "c",
        Task::Cola,
    )
    .unwrap();
    assert_eq!(
        rows[0].prompt,
        "Him sleeps the.\nQuestion: Does this sentence make sense?\nAnswer:"
    );
    assert_eq!(
        rows.iter().map(|row| (row.line, row.label)).collect::<Vec<_>>(),
        [(1, false), (3, true)]
    );
}

#[test]
fn the_last_word() {
    // Spaces between the words before stay as they are; those after the last one are not a word.
    for (name, text) in [
        (
            "lambada.jsonl",
            "{\"text\": \"he said  my own name \", \"id\": 3}\n",
        ),
        ("lambada.txt", "he said  my own name \r\n"),
    ] {
        let rows = parsed(text, name, Task::Lambada).unwrap();
        let expected = Question {
            line: 1,
            prompt: "he said  my own".into(),
            answers: vec![" name".into()],
            label: true,
        };
        assert_eq!(rows, [expected]);
    }
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    for (task, name, text, problem) in [
        (
            Task::Sst2,
            "s.tsv",
            "sentence\tlabel\na\t1\nb\n",
            "s.tsv, line 3: 1 tab-separated column instead of 2",
        ),
        (
            Task::Sst2,
            "s.tsv",
            "a\t1\t0\n",
            "s.tsv, line 1: 3 tab-separated columns instead of 2",
        ),
        (
            Task::Sst2,
            "s.tsv",
            "a\tgood\n",
            "s.tsv, line 1: the label is `good` instead of 0 or 1",
        ),
        (
            Task::Sst2,
            "s.tsv",
            "label\tsentence\n1\ta\n",
            "s.tsv, line 1: the label is `sentence` instead of 0 or 1",
        ),
        (Task::Mrpc, "m", "1\t2\t3\t \ta\n", "m, line 1: column 4 is empty"),
        (Task::Cola, "c", "x\t1\t\t\n", "c, line 1: column 4 is empty"),
        (
            Task::Lambada,
            "l.jsonl",
            "{\"text\": \"a b\"}\n{\"txt\": 1}\n",
            "l.jsonl, line 2: it is not {\"text\": …}: missing field `text` at line 1 column 10",
        ),
        (
            Task::Lambada,
            "l.txt",
            "word \n",
            "l.txt, line 1: a passage needs two words at least",
        ),
    ] {
        assert_eq!(parsed(text, name, task), Err(problem.to_owned()));
    }
    let bytes = b"a\t1\n\xff\t1\n";
    let errors: Vec<String> = parse(bytes, Path::new("b"), Task::Sst2)
        .filter_map(|row| Some(row.err()?.to_string()))
        .collect();
    assert_eq!(errors, ["b, line 2: it is not UTF-8 text"]);
}

#[test]
fn files_of_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let error = find(dir.path(), Task::Sst2, Split::Train)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with(
            "no data for sst2: looked for sst2_train.tsv, SST-2/train.tsv, sst2_train*.tsv, sst2/train-00000-of-00001.parquet"
        ),
        "{error}"
    );
    write("sst2_train_b.tsv", "a\t1\n");
    write("sst2_train_a.tsv", "a\t1\nwrong\nb\t0\n");
    let found = |split| find(dir.path(), Task::Sst2, split).unwrap();
    assert!(found(Split::Train).ends_with("sst2_train_a.tsv"));
    let (pool, errors) = read_pool(&found(Split::Train), Task::Sst2).unwrap();
    assert_eq!((pool.len(), errors.len()), (2, 1));
    assert!(read(&found(Split::Train), Task::Sst2).is_err());
    std::fs::create_dir(dir.path().join("SST-2")).unwrap();
    write("SST-2/dev.tsv", "sentence\tlabel\n");
    assert!(matches!(
        read(&found(Split::Dev), Task::Sst2),
        Err(DataError::Empty { .. })
    ));
    write("sst2_dev.tsv", "wrong\n");
    assert!(found(Split::Dev).ends_with("sst2_dev.tsv"));
    assert!(matches!(
        read_pool(&found(Split::Dev), Task::Sst2),
        Err(DataError::Malformed { line: 1, .. })
    ));
    assert!(matches!(
        read(&dir.path().join("none"), Task::Cola),
        Err(DataError::Read { .. })
    ));
}

const ONE: &str = "optional binary sentence (UTF8); optional int64 label;";
const TWO: &str = "optional int64 label; optional binary sentence2 (UTF8); optional binary sentence1 (UTF8);";

fn parsed_parquet(bytes: &[u8], task: Task) -> Result<Vec<Question>, String> {
    parse_parquet(bytes.to_vec(), Path::new("q.parquet"), task)
        .and_then(|rows| rows.into_iter().collect())
        .map_err(|error| error.to_string())
}

#[test]
fn parquet_gives_the_same_questions() {
    let one =
        |sentences: &[&str], labels: &[i64]| write(ONE, snappy(), &[vec![texts(sentences), numbers(labels)]]);
    let bytes = one(&["the tea was \"fine\" . ", "cold soup"], &[1, 0]);
    let lines = parsed("the tea was \"fine\" . \t1\ncold soup\t0\n", "s", Task::Sst2);
    assert_eq!(parsed_parquet(&bytes, Task::Sst2), lines);
    let lines = parsed("x\t0\t*\tHim sleeps the.\nx\t1\t\tHe sleeps.\n", "c", Task::Cola);
    let bytes = one(&["Him sleeps the.", "He sleeps."], &[0, 1]);
    assert_eq!(parsed_parquet(&bytes, Task::Cola), lines);
    // Columns in any order.
    let group = vec![numbers(&[1]), texts(&["Rain falls."]), texts(&["It rains."])];
    let bytes = write(TWO, snappy(), &[group]);
    let lines = parsed("1\t7\t8\tIt rains.\tRain falls.\n", "m", Task::Mrpc);
    assert_eq!(parsed_parquet(&bytes, Task::Mrpc), lines);
    assert_eq!(
        parsed_parquet(&bytes, Task::Cola).unwrap_err(),
        "q.parquet: it has no column `sentence`; it has: label, sentence2, sentence1"
    );
    let text = "optional binary text (UTF8);";
    let bytes = write(text, snappy(), &[vec![texts(&["he said  my own name "])]]);
    let lines = parsed("he said  my own name \n", "l.txt", Task::Lambada);
    assert_eq!(parsed_parquet(&bytes, Task::Lambada), lines);
}

#[test]
fn what_is_wrong_is_told_with_its_row() {
    let row = |sentence: Option<&str>, label: Option<i64>| {
        let sentences = vec![Some("a".to_owned()), sentence.map(str::to_owned)];
        let labels = vec![Some(1), label];
        let bytes = write(
            ONE,
            snappy(),
            &[vec![Written::Texts(sentences), Written::Numbers(labels)]],
        );
        parsed_parquet(&bytes, Task::Cola).unwrap_err()
    };
    assert_eq!(
        row(Some("b"), Some(-1)),
        "q.parquet, row 2: the label is `-1` instead of 0 or 1"
    );
    assert_eq!(row(Some("b"), None), "q.parquet, row 2: `label` is empty");
    assert_eq!(row(Some(" "), Some(1)), "q.parquet, row 2: `sentence` is empty");
    assert_eq!(row(None, Some(1)), "q.parquet, row 2: `sentence` is empty");
    let labels = "optional binary sentence (UTF8); optional binary label (UTF8);";
    let bytes = write(labels, snappy(), &[vec![texts(&["a"]), texts(&["1"])]]);
    assert_eq!(
        parsed_parquet(&bytes, Task::Sst2).unwrap_err(),
        "q.parquet: column `label`: it does not hold numbers of 64 bits"
    );
}

#[test]
fn a_folder_cloned_from_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("cola")).unwrap();
    std::fs::create_dir_all(dir.path().join("data")).unwrap();
    let keep = |task, split, bytes: &[u8]| {
        std::fs::write(dir.path().join(hub_file(task, split).path), bytes).unwrap();
    };
    let rows = |labels: &[i64]| {
        let sentences: Vec<&str> = labels.iter().map(|_| "He sleeps.").collect();
        write(ONE, snappy(), &[vec![texts(&sentences), numbers(labels)]])
    };
    keep(Task::Cola, Split::Dev, &rows(&[1, 0]));
    keep(Task::Cola, Split::Train, &rows(&[1, 2, 0]));
    keep(Task::Lambada, Split::Dev, b"{\"text\": \"she read\"}\n");
    let found = |task, split| find(dir.path(), task, split).unwrap();
    assert!(found(Task::Cola, Split::Dev).ends_with("cola/validation-00000-of-00001.parquet"));
    assert_eq!(read(&found(Task::Cola, Split::Dev), Task::Cola).unwrap().len(), 2);
    let (pool, errors) = read_pool(&found(Task::Cola, Split::Train), Task::Cola).unwrap();
    assert_eq!((pool.len(), errors.len()), (2, 1));
    assert!(
        errors[0]
            .to_string()
            .ends_with("row 2: the label is `2` instead of 0 or 1")
    );
    let lambada = read(&found(Task::Lambada, Split::Dev), Task::Lambada).unwrap();
    assert_eq!(lambada[0].answers, [" read"]);
    // A file without rows, and a damaged one, from which no examples are taken either.
    keep(Task::Cola, Split::Dev, &rows(&[]));
    let result = read(&found(Task::Cola, Split::Dev), Task::Cola);
    assert!(matches!(result, Err(DataError::Empty { .. })));
    keep(Task::Cola, Split::Train, b"PAR1");
    let result = read_pool(&found(Task::Cola, Split::Train), Task::Cola);
    assert!(matches!(result, Err(DataError::Unreadable { .. })));
    // Tab-separated files come first.
    std::fs::write(dir.path().join("cola_dev.tsv"), "x\t1\t\tHe runs.\n").unwrap();
    assert!(found(Task::Cola, Split::Dev).ends_with("cola_dev.tsv"));
}

proptest! {
    #[test]
    fn any_bytes_give_rows_or_errors(bytes in prop::collection::vec(prop::sample::select(b"01\t\n\r a{}\":\xef\xbb\xbf*x".to_vec()), 0..200)) {
        for task in Task::ALL {
            for name in ["a.tsv", "a.jsonl"] {
                for row in parse(&bytes, Path::new(name), task).flatten() {
                    prop_assert!(!row.prompt.is_empty() && !row.answers.is_empty());
                    prop_assert!(row.answers.iter().all(|answer| answer.trim() != ""));
                }
            }
        }
    }
}
