//! Whole runs on a tiny random model, and what is told when something is wrong with a model or a text.

use std::path::Path;

use crate::common::{arg, failure, json, nashswarm, stdout, text, tiny, tiny_model};
use nash_core::Tensor;

/// Compresses with little calibration; arguments after the fixed ones.
fn compress(source: &Path, out: &Path, more: &[&str]) -> serde_json::Value {
    let fixed = [
        "compress",
        arg(source),
        "-o",
        arg(out),
        "--calibration-tokens",
        "2048",
    ];
    json(&fixed.iter().chain(more).copied().collect::<Vec<_>>())
}

fn number(value: &serde_json::Value, name: &str) -> f64 {
    value[name]
        .as_f64()
        .unwrap_or_else(|| panic!("{name} in {value}"))
}

#[test]
fn from_source_to_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, text) = (
        tiny_model(dir.path(), 1),
        dir.path().join("small"),
        text(dir.path(), 2000),
    );

    let made = &compress(&source, &out, &["--bpw", "6"])["rows"][0];
    assert!(number(made, "file_bits_per_weight") <= 6.0);
    assert!(number(made, "compress_seconds") > 0.0);
    assert!(
        !dir.path().join("small.work").exists(),
        "nothing temporary is left"
    );
    let on_disk: u64 = ["config.json", "nashswarm.json", "model.safetensors"]
        .iter()
        .map(|name| std::fs::metadata(out.join(name)).unwrap().len())
        .sum();
    assert_eq!(
        number(made, "file_bytes"),
        on_disk as f64,
        "every byte is counted"
    );

    let inspected = json(&["inspect", arg(&out)]);
    assert_eq!(number(&inspected, "file_bytes"), on_disk as f64);
    assert_eq!(inspected["format"], "Nash-Swarm");
    assert_eq!(json(&["inspect", arg(&source)])["weights"], inspected["weights"]);

    let verified = json(&["verify", arg(&out), "--source", arg(&source), "--all"]);
    assert_eq!(verified["equilibrium"]["unsettled"], 0);

    let measured = json(&[
        "eval",
        arg(&out),
        arg(&source),
        "--reference",
        arg(&source),
        "--text",
        arg(&text),
        "-c",
        "128",
    ]);
    let rows = measured["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert!(number(&rows[1], "kl_mean") > 0.0);
    assert_eq!(
        number(&rows[2], "kl_max"),
        0.0,
        "the source is no different from itself"
    );
    assert_eq!(number(&rows[2], "top1_agreement"), 1.0);
    assert_eq!(rows[0]["perplexity"], rows[2]["perplexity"]);
    assert_eq!(rows[0]["chunks"], 15);

    let run = ["run", arg(&out), "-p", "hello", "-n", "8", "-s", "3"];
    assert_eq!(stdout(&run), stdout(&run), "the same seed gives the same answer");
}

#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 2);
    let make = |threads: &str| {
        let out = dir.path().join(format!("t{threads}"));
        compress(&source, &out, &["--bpw", "5", "-t", threads]);
        [
            "config.json",
            "nashswarm.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        .map(|name| std::fs::read(out.join(name)).unwrap())
    };
    assert!(make("1") == make("3"));
}

#[test]
fn budgets_and_widths_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 3);
    let sized = &compress(
        &source,
        &dir.path().join("a"),
        &["--size", "80kB", "--method", "rtn"],
    )["rows"][0];
    assert!(number(sized, "file_bytes") <= 80_000.0);
    let out = dir.path().join("b");
    compress(
        &source,
        &out,
        &["--bpw", "6", "--method", "gptq", "--tensor-type", "*.down_proj=8"],
    );
    let tensors = json(&["inspect", arg(&out)])["tensors"].clone();
    let down: Vec<_> = tensors
        .as_array()
        .unwrap()
        .iter()
        .filter(|t| t["name"].as_str().unwrap().contains("down_proj"))
        .collect();
    assert!(
        down.len() == 2 && down.iter().all(|t| t["kind"] == "8-bit"),
        "{down:?}"
    );
}

#[test]
fn a_dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 4);
    let plan = json(&["compress", arg(&source), "--dry-run", "--bpw", "6"]);
    assert!(number(&plan, "file_bits_per_weight") <= 6.0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_budget_from_the_free_memory() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 11);
    let plan = json(&["compress", arg(&source), "--dry-run", "--fit-ram"]);
    assert!(
        (7.9..=8.5).contains(&number(&plan, "file_bits_per_weight")),
        "a tiny model fits at any width"
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_compression_leaves_nothing_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, whole) = (
        tiny_model(dir.path(), 12),
        dir.path().join("out"),
        dir.path().join("whole"),
    );
    let command = [
        "compress",
        arg(&source),
        "-o",
        arg(&out),
        "--bpw",
        "6",
        "--calibration-tokens",
        "60000",
    ];
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_nashswarm"))
        .args(command)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !dir.path().join("out.work").exists() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it could be interrupted"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let kill = std::process::Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!out.exists(), "nothing that looks finished");

    stdout(&command.iter().copied().chain(["--resume"]).collect::<Vec<_>>());
    stdout(&[
        "compress",
        arg(&source),
        "-o",
        arg(&whole),
        "--bpw",
        "6",
        "--calibration-tokens",
        "60000",
    ]);
    let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(
        weights(&out) == weights(&whole),
        "interrupted or not, the same bytes"
    );
}

#[test]
fn the_model_can_write_its_calibration_text() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (tiny_model(dir.path(), 5), dir.path().join("o"));
    compress(&source, &out, &["--bpw", "6", "--calibration", "self"]);
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("nashswarm.json")).unwrap()).unwrap();
    assert_eq!(report["calibration"], "written by the model itself, seed 0");
}

#[test]
fn prompts_from_pipe_and_stop_texts() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 6);
    let run = ["run", arg(&source), "--raw", "-n", "12", "--temp", "0"];
    let piped = nashswarm(&run)
        .write_stdin("once upon")
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    let given = nashswarm(&run)
        .args(["-p", "once upon"])
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    assert_eq!(piped, given);
    let answer = String::from_utf8(given).unwrap();
    let stop: String = answer.chars().skip(2).take(2).collect();
    let cut = nashswarm(&run)
        .args(["-p", "once upon", "--stop", &stop])
        .assert()
        .success()
        .get_output()
        .stdout
        .clone();
    let before = &answer[..answer.find(&stop).unwrap()];
    assert_eq!(String::from_utf8(cut).unwrap(), format!("{before}\n"));
}

#[test]
fn a_chat_from_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 7);
    let output = nashswarm(&["chat", arg(&source), "-n", "4", "--temp", "0"])
        .write_stdin("/help\nhi\n/nonsense\n/reset\nhi\n/quit\nnever read\n")
        .assert()
        .success()
        .get_output()
        .clone();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("/system TEXT") && told.contains("there is no /nonsense"),
        "{told}"
    );
    let answers = String::from_utf8(output.stdout).unwrap();
    let half = answers.len() / 2;
    assert_eq!(
        answers[..half],
        answers[half..],
        "after /reset the same words get the same answer"
    );
}

#[test]
fn speed_has_its_fields() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 8);
    let report = json(&[
        "bench",
        arg(&source),
        "-p",
        "16",
        "-n",
        "4",
        "-r",
        "2",
        "-t",
        "1,2",
    ]);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(
        rows.iter()
            .map(|row| row["threads"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [1, 2]
    );
    for row in rows {
        assert!(
            number(row, "prefill_tokens_per_second") > 0.0 && number(row, "decode_tokens_per_second") > 0.0
        );
        assert!(number(row, "bandwidth_share") > 0.0 && number(row, "peak_memory_bytes") > 0.0);
    }
}

#[test]
fn json_goes_to_a_file_beside_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let (source, text, file) = (
        tiny_model(dir.path(), 9),
        text(dir.path(), 600),
        dir.path().join("r.json"),
    );
    let shown = stdout(&[
        "eval",
        arg(&source),
        "--text",
        arg(&text),
        "-c",
        "64",
        "--chunks",
        "2",
        "--json",
        arg(&file),
    ]);
    assert!(
        shown.contains("perplexity") && shown.contains("2 windows of 64 tokens"),
        "{shown}"
    );
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(report["rows"][0]["scored_tokens"], 62);
}

#[test]
fn what_is_wrong_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = tiny_model(dir.path(), 10);
    let long = text(dir.path(), 600);
    std::fs::write(path("short.txt"), "too short").unwrap();
    std::fs::write(path("binary.txt"), b"\x00\xff\xfe").unwrap();
    std::fs::write(path("notes.md"), "# notes").unwrap();
    std::fs::create_dir(path("empty")).unwrap();
    tiny(1, "mamba9").write(path("mamba9.gguf")).unwrap();
    let bytes = std::fs::read(&source).unwrap();
    std::fs::write(path("cut.gguf"), &bytes[..bytes.len() - 5000]).unwrap();
    let narrow = Tensor::from_f32("blk.1.attn_q.weight", vec![64, 32], &[0.0; 64 * 32]).unwrap();
    replace(&source, &path("shape.gguf"), narrow);
    replace(
        &source,
        &path("nan.gguf"),
        Tensor::from_f32("blk.1.attn_k.weight", vec![32, 64], &[f32::NAN; 2048]).unwrap(),
    );
    let cases: &[(&str, &[&str])] = &[
        ("missing_file", &["inspect", "nowhere.gguf"]),
        ("unknown_name", &["run", "owner/name", "-p", "x"]),
        ("not_a_model", &["inspect", "DIR/notes.md"]),
        ("empty_folder", &["inspect", "DIR/empty"]),
        (
            "unknown_architecture",
            &["eval", "DIR/mamba9.gguf", "--text", "DIR/text-600.txt"],
        ),
        ("truncated", &["eval", "DIR/cut.gguf"]),
        ("wrong_shape", &["eval", "DIR/shape.gguf"]),
        (
            "nan_weights",
            &["compress", "DIR/nan.gguf", "-o", "DIR/out", "--bpw", "6"],
        ),
        (
            "short_text",
            &["eval", "DIR/tiny-10.gguf", "--text", "DIR/short.txt"],
        ),
        (
            "binary_text",
            &["eval", "DIR/tiny-10.gguf", "--text", "DIR/binary.txt"],
        ),
        (
            "binary_calibration",
            &[
                "compress",
                "DIR/tiny-10.gguf",
                "-o",
                "DIR/out",
                "--calibration",
                "DIR/binary.txt",
            ],
        ),
        (
            "short_calibration",
            &[
                "compress",
                "DIR/tiny-10.gguf",
                "-o",
                "DIR/out",
                "--calibration",
                "DIR/short.txt",
            ],
        ),
        (
            "long_window",
            &[
                "eval",
                "DIR/tiny-10.gguf",
                "--text",
                "DIR/text-600.txt",
                "-c",
                "300",
            ],
        ),
        (
            "output_exists",
            &["compress", "DIR/tiny-10.gguf", "-o", "DIR/empty", "--bpw", "6"],
        ),
        (
            "budget_too_small",
            &["compress", "DIR/tiny-10.gguf", "-o", "DIR/out", "--size", "9kB"],
        ),
        (
            "no_such_tensor",
            &[
                "compress",
                "DIR/tiny-10.gguf",
                "-o",
                "DIR/out",
                "--bpw",
                "6",
                "--tensor-type",
                "*.k_prof=4",
            ],
        ),
        (
            "unwritable",
            &["compress", "DIR/tiny-10.gguf", "-o", "/proc/out", "--bpw", "6"],
        ),
        ("verify_source", &["verify", "DIR/tiny-10.gguf"]),
        ("no_prompt", &["run", "DIR/tiny-10.gguf"]),
        (
            "long_prompt",
            &["run", "DIR/tiny-10.gguf", "-f", "DIR/text-600.txt", "-c", "100"],
        ),
        (
            "bad_sampling",
            &["run", "DIR/tiny-10.gguf", "-p", "x", "--top-p", "2"],
        ),
        ("bad_config", &["plan", "DIR/notes.json"]),
    ];
    std::fs::write(path("notes.json"), "{\"model_type\": 7}").unwrap();
    assert!(long.is_file());
    for (name, args) in cases {
        let args: Vec<String> = args
            .iter()
            .map(|arg| arg.replace("DIR", dir.path().to_str().unwrap()))
            .collect();
        let told = failure(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let told = told.replace(dir.path().to_str().unwrap(), "DIR");
        assert!(told.starts_with("status 1\nerror: "), "{name}: {told}");
        // How small a file can be is the business of the packed format.
        let told = if *name == "budget_too_small" {
            without_numbers(&told)
        } else {
            told
        };
        insta::assert_snapshot!(format!("error_{name}"), told);
    }
    assert!(
        !path("out").exists(),
        "a failure leaves nothing that looks finished"
    );
}

/// The text with every number as `N`.
fn without_numbers(text: &str) -> String {
    let is_number = |word: &str| {
        word.trim_start_matches('(')
            .starts_with(|c: char| c.is_ascii_digit())
    };
    let line = |line: &str| {
        let words = line
            .split(' ')
            .map(|word| if is_number(word) { "N" } else { word });
        words.collect::<Vec<_>>().join(" ") + "\n"
    };
    text.lines().map(line).collect()
}

/// Copies a model with one tensor exchanged.
fn replace(source: &Path, to: &Path, tensor: Tensor) {
    let gguf = nash_core::Gguf::open(source).unwrap();
    let writer = nash_core::gguf_write::GgufWriter::new();
    let writer = gguf.metadata().iter().fold(writer, |writer, (key, value)| {
        writer.metadata(key.clone(), value.clone())
    });
    let writer = gguf.tensors().iter().fold(writer, |writer, old| {
        writer.tensor(if old.name == tensor.name {
            tensor.clone()
        } else {
            old.clone()
        })
    });
    writer.write(to).unwrap();
}
