//! A dense model becomes a mixture of experts, which every other command takes.

use crate::common::{arg, failure, json, stdout, text, tiny_model};

fn number(value: &serde_json::Value, name: &str) -> f64 {
    value[name]
        .as_f64()
        .unwrap_or_else(|| panic!("{name} in {value}"))
}

#[test]
fn from_dense_to_packed_experts() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (source, text) = (tiny_model(dir.path(), 1), text(dir.path(), 2000));
    let carve = |out: &str, more: &[&str]| {
        let out = at(out);
        let fixed = [
            "carve",
            arg(&source),
            "-o",
            arg(&out),
            "--calibration-tokens",
            "2048",
        ];
        json(&fixed.iter().chain(more).copied().collect::<Vec<_>>())
    };
    let all = carve("all", &["--experts", "4", "--shared", "0", "--active", "1"]);
    assert_eq!((number(&all, "active"), number(&all, "experts")), (1.0, 4.0));
    let half = carve("half", &["--experts", "8", "--shared", "0", "--active", "0.5"]);
    assert!(
        number(&half, "active") <= 0.5 && number(&half, "max_regret") < 1e-3,
        "{half}"
    );

    let eval = |models: &[&str], more: &[&str]| {
        let fixed = [
            "--reference",
            arg(&source),
            "--text",
            arg(&text),
            "--ctx",
            "64",
            "--chunks",
            "4",
        ];
        let line: Vec<&str> = ["eval"]
            .iter()
            .chain(models)
            .chain(&fixed)
            .chain(more)
            .copied()
            .collect();
        json(&line)["rows"].as_array().unwrap().clone()
    };
    let (whole, part) = (at("all"), at("half"));
    let rows = eval(&[arg(&whole), arg(&part)], &[]);
    // Sums in another order: divergences of rounding errors alone.
    assert!(number(&rows[1], "kl_mean").abs() < 1e-6, "{}", rows[1]);
    assert!(number(&rows[2], "kl_mean") > 1e-6, "{}", rows[2]);

    // A reward for experts at hand is counted, and keeps more of them.
    let routing = ["--routing", "cache-aware", "--resident", "4", "--reward", "0,4"];
    let rows = eval(&[arg(&part)], &routing);
    let misses = |reward: f64| {
        let row = rows
            .iter()
            .find(|row| row["expert_use"]["rules"]["reward"] == reward)
            .unwrap();
        number(&row["expert_use"], "miss_rate")
    };
    assert!(misses(4.0) < 0.5 * misses(0.0), "{rows:?}");

    let packed = at("packed");
    // Experts this small are padded to four times their size.
    let made = [
        "compress",
        arg(&part),
        "-o",
        arg(&packed),
        "--method",
        "rtn",
        "--bpw",
        "12",
    ];
    assert!(number(&json(&made)["rows"][0], "file_bits_per_weight") <= 12.0);
    let speed = json(&[
        "bench",
        arg(&packed),
        "-p",
        "0",
        "-n",
        "4",
        "-r",
        "1",
        "--routing",
        "top-k",
    ]);
    let row = &speed["rows"][0];
    assert_eq!(number(&row["expert_use"], "experts_per_batch"), 4.0);
    let answer = ["run", arg(&packed), "--raw", "-p", "a", "-n", "3", "--temp", "0"];
    assert!(!stdout(&answer).trim_end_matches('\n').is_empty());
}

#[test]
fn single_neurons_are_the_yardstick() {
    let dir = tempfile::tempdir().unwrap();
    let (source, text) = (tiny_model(dir.path(), 1), text(dir.path(), 2000));
    let rows = json(&[
        "eval",
        arg(&source),
        "--reference",
        arg(&source),
        "--text",
        arg(&text),
        "--ctx",
        "64",
        "--chunks",
        "4",
        "--channels",
        "largest=1",
        "--channels",
        "largest=0.5",
        "--channels",
        "gate=0.5",
    ]);
    let kl: Vec<f64> = rows["rows"].as_array().unwrap()[2..]
        .iter()
        .map(|row| number(row, "kl_mean"))
        .collect();
    assert!(
        kl[0] == 0.0 && kl[1] > 0.0 && kl[2] > kl[1],
        "an oracle loses less than the gate: {kl:?}"
    );
}

#[test]
fn what_is_wrong_with_a_mixture_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (tiny_model(dir.path(), 1), dir.path().join("out"));
    let told = failure(&["run", arg(&source), "-p", "a", "--routing", "top-k"]);
    assert!(told.contains("no experts") && told.contains("carve"), "{told}");
    let told = failure(&["carve", arg(&source), "-o", arg(&out), "--active", "0.01"]);
    assert!(told.contains("0.010 of the neurons"), "{told}");
    std::fs::create_dir(&out).unwrap();
    let told = failure(&["carve", arg(&source), "-o", arg(&out)]);
    assert!(
        told.contains("exists already") && told.contains("--force"),
        "{told}"
    );
    let told = failure(&["eval", arg(&source), "--channels", "best=0.5"]);
    assert!(told.contains("largest, above or gate"), "{told}");
}
