//! Any bytes as a file of questions: errors with a line of the file, or questions with something to ask and to answer.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nash_eval::glue::{DataError, Task, parse};

fuzz_target!(|bytes: &[u8]| {
    let lines = bytes.split(|&byte| byte == b'\n').count();
    for (task, name) in [
        (Task::Sst2, "q.tsv"),
        (Task::Mrpc, "q.tsv"),
        (Task::Cola, "q.tsv"),
        (Task::Lambada, "q.txt"),
        (Task::Lambada, "q.jsonl"),
    ] {
        for row in parse(bytes, Path::new(name), task) {
            match row {
                Ok(question) => {
                    assert!((1..=lines).contains(&question.line) && !question.prompt.trim().is_empty());
                    assert!(question.answers.iter().all(|answer| answer.len() > 1 && answer.starts_with(' ')));
                }
                Err(DataError::Malformed { line, .. }) => assert!((1..=lines).contains(&line)),
                Err(error) => panic!("parsing reads no file: {error}"),
            }
        }
    }
});
