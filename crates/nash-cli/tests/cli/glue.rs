//! Questions answered by a tiny random model, and what is told when something is wrong with the data.

use std::path::Path;

use crate::common::{arg, failure, json, nashswarm, stdout, tiny_model};

/// Invented questions: four tasks, each with a line for every label and a training file for two of them.
fn data(dir: &Path) {
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
    write(
        "sst2_dev.tsv",
        "sentence\tlabel\nlovely tea \t1\ncold soup \t0\na dull walk \t0\nwarm bread \t1\n",
    );
    write(
        "sst2_train.tsv",
        "sentence\tlabel\nnice hat \t1\nbad day \t0\nold milk \t0\ngood cat \t1\n",
    );
    write(
        "mrpc_dev.tsv",
        "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tIt rains.\tRain falls.\n0\t3\t4\tIt rains.\tIt is \"dry\".\n",
    );
    write(
        "cola_dev.tsv",
        "me1\t1\t\tHe sleeps.\nme1\t0\t*\tHim sleeps the.\nme2\t1\t\tShe runs.",
    );
    // The second row has lost its end.
    write("cola_train.tsv", "me1\t1\t\tI go.\nme1\t0\nme1\t0\t*\tGo I.\n");
    write(
        "lambada.jsonl",
        "{\"text\": \"the bird went back to its nest\"}\n{\"text\": \"she read the book\"}\n",
    );
}

#[test]
fn answers_of_a_model_and_its_reference() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    let (source, other) = (tiny_model(dir.path(), 21), tiny_model(dir.path(), 22));
    let command = [
        "glue",
        arg(&other),
        arg(&source),
        "--reference",
        arg(&source),
        "--data",
        arg(dir.path()),
        "--task",
        "sst2,cola,lambada",
        "--shots",
        "2,0",
    ];
    let report = json(&command);
    assert_eq!(report, json(&command), "the same seed, the same figures");
    let rows = report["rows"].as_array().unwrap();
    let kinds: Vec<String> = rows
        .iter()
        .step_by(3)
        .map(|row| {
            format!(
                "{} {} {}",
                row["task"].as_str().unwrap(),
                row["shots"],
                row["examples"]
            )
        })
        .collect();
    assert_eq!(
        kinds,
        ["sst2 0 4", "sst2 2 4", "cola 0 3", "cola 2 3", "lambada 0 2"]
    );
    for rows in rows.chunks(3) {
        let [reference, other, same] = rows else { panic!() };
        assert_eq!(reference["name"], "tiny-21.gguf");
        assert!(reference.get("agreement").is_none());
        assert_eq!(
            (&same["agreement"], &same["accuracy_change"]),
            (&1.0.into(), &0.0.into())
        );
        assert_eq!(same["accuracy"], reference["accuracy"]);
        for (low, value, high) in [
            ("accuracy_low", "accuracy", "accuracy_high"),
            ("agreement_low", "agreement", "agreement_high"),
            ("accuracy_change_low", "accuracy_change", "accuracy_change_high"),
        ] {
            let [low, value, high] = [low, value, high].map(|name| other[name].as_f64().unwrap());
            assert!(low <= value && value <= high);
        }
        assert_eq!(other.get("matthews").is_some(), other["task"] != "lambada");
        assert!(other["file_bytes"].as_u64() > Some(0));
    }
}

#[test]
fn a_limit_and_the_table() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    let source = tiny_model(dir.path(), 23);
    let file = dir.path().join("r.json");
    let shown = stdout(&[
        "glue",
        arg(&source),
        "-d",
        arg(dir.path()),
        "--limit",
        "2",
        "--json",
        arg(&file),
    ]);
    for part in [
        "sst2",
        "mrpc",
        "cola",
        "Matthews",
        "at most 2 questions of each task",
    ] {
        assert!(shown.contains(part), "{shown}");
    }
    assert!(
        !shown.contains("agreement") && !shown.contains("lambada"),
        "{shown}"
    );
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let examples: Vec<_> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| &row["examples"])
        .collect();
    assert_eq!(examples, [2, 2, 2]);
}

#[test]
fn a_bad_row_is_passed_over_among_examples_only() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    let source = tiny_model(dir.path(), 24);
    let output = nashswarm(&[
        "glue",
        arg(&source),
        "-d",
        arg(dir.path()),
        "--task",
        "cola",
        "--shots",
        "2",
    ])
    .assert()
    .success()
    .get_output()
    .clone();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("cola_train.tsv, line 2: 2 tab-separated columns instead of 4"),
        "{told}"
    );
}

#[test]
fn what_is_wrong_with_the_data_is_told() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    let source = tiny_model(dir.path(), 25);
    let long = format!("me1\t1\t\t{}\n", "word ".repeat(60));
    let folder = |name: &str, file: &str, text: &str| {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join(file), text).unwrap();
    };
    folder(
        "bad",
        "mrpc_dev.tsv",
        "1\t7\t8\tIt rains.\tRain falls.\n1\t7\t8\tIt rains.\n",
    );
    folder("label", "sst2_dev.tsv", "sentence\tlabel\nwarm bread\tgood\n");
    folder("none", "cola_dev.tsv", "\n");
    folder("long", "cola_dev.tsv", &long);
    for (name, data, options) in [
        ("missing", "bad", &["--task", "sst2"][..]),
        ("no_training", "", &["--task", "mrpc", "--shots", "1"]),
        ("few_examples", "", &["--task", "sst2", "--shots", "5"]),
        ("malformed", "bad", &["--task", "mrpc"]),
        ("label", "label", &["--task", "sst2"]),
        ("no_rows", "none", &["--task", "cola"]),
        ("long", "long", &["--task", "cola"]),
    ] {
        let data = dir.path().join(data);
        let args = ["glue", arg(&source), "--data", arg(&data)];
        let told = failure(&args.iter().chain(options).copied().collect::<Vec<_>>());
        let told = told.replace(dir.path().to_str().unwrap(), "DIR");
        assert!(told.starts_with("status 1\nerror: "), "{name}: {told}");
        insta::assert_snapshot!(format!("glue_{name}"), told);
    }
}

/// A cache of the hub that holds LAMBADA and CoLA; returns the folder that `HF_HOME` is to name.
fn hub_cache(dir: &Path) -> std::path::PathBuf {
    let home = dir.join("hf");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let keep = |repo: &str, file: &str, bytes: &[u8]| {
        let root = home.join("hub").join(repo);
        let file = root.join("snapshots").join(commit).join(file);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::create_dir_all(root.join("refs")).unwrap();
        std::fs::write(root.join("refs/main"), commit).unwrap();
        std::fs::write(file, bytes).unwrap();
    };
    let cola = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nash-eval/tests/hub/cola.parquet");
    let cola = std::fs::read(cola).unwrap();
    keep(
        "datasets--nyu-mll--glue",
        "cola/validation-00000-of-00001.parquet",
        &cola,
    );
    let passage = b"{\"text\": \"she read the book\"}\n";
    keep(
        "datasets--EleutherAI--lambada_openai",
        "data/lambada_test_en.jsonl",
        passage,
    );
    home
}

#[test]
fn the_hub_is_asked_when_no_folder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny_model(dir.path(), 26);
    let home = hub_cache(dir.path());
    let run = |options: &[&str], offline: &str| {
        let args = [&["glue", arg(&source)], options].concat();
        let mut command = nashswarm(&args);
        command
            .env_remove("HF_HUB_CACHE")
            .env("HF_HOME", &home)
            .env("HF_HUB_OFFLINE", offline)
            .env("HF_ENDPOINT", "http://127.0.0.1:1");
        command
    };
    let file = dir.path().join("r.json");
    let output = run(&["--task", "cola,lambada", "--json", arg(&file)], "1")
        .assert()
        .success()
        .get_output()
        .clone();
    let shown = String::from_utf8(output.stdout).unwrap();
    let cola = "nyu-mll/glue@0123456789abcdef0123456789abcdef01234567 on the Hugging Face hub";
    let told = format!(
        "all questions from {} and {cola}; ",
        cola.replace("nyu-mll/glue", "EleutherAI/lambada_openai")
    );
    assert!(shown.contains(&told), "{shown}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(
        (&report["rows"][0]["data"], &report["rows"][0]["examples"]),
        (&cola.into(), &2.into())
    );

    let failed = |options: &[&str], offline: &str| {
        let output = run(options, offline).assert().code(1).get_output().clone();
        let told = String::from_utf8(output.stderr).unwrap();
        told.replace(dir.path().to_str().unwrap(), "DIR")
    };
    insta::assert_snapshot!("glue_offline", failed(&["--task", "cola", "--shots", "2"], "1"));
    let told = failed(&["--task", "sst2"], "0");
    assert!(
        told.starts_with("error: nyu-mll/glue: the hub did not give its list of files: ")
            && told
                .contains("hint: give --data DIR, a folder with sst2/validation-00000-of-00001.parquet of "),
        "{told}"
    );
}
