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
    let routing = [
        "--routing",
        "cache-aware",
        "--resident",
        "4",
        "--reward",
        "0,4",
        "--keep",
        "0",
    ];
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

/// A mixture whose router was trained; how it was made is told beside it.
fn trained() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/moe")
}

/// What `eval` says of the trained mixture with these options, on the built-in text: perplexity and use of experts.
fn routed(options: &[&str]) -> Vec<(f64, serde_json::Value)> {
    let fixed = [
        "eval",
        trained(),
        "--ctx",
        "128",
        "--chunks",
        "8",
        "--resident",
        "8",
    ];
    let report = json(&fixed.iter().chain(options).copied().collect::<Vec<_>>());
    let rows = report["rows"].as_array().unwrap().iter();
    rows.map(|row| (number(row, "perplexity"), row["expert_use"].clone()))
        .collect()
}

#[test]
fn rules_do_to_a_trained_router_what_they_are_for() {
    let plain = routed(&["--routing", "top-k", "--routing-batch", "8"]).remove(0);
    assert!(plain.0 < 300.0, "a vocabulary of 2048 was learnt: {}", plain.0);
    let same = |rule: &(f64, serde_json::Value)| {
        assert!(
            rule.0 > plain.0 && rule.0 < 1.2 * plain.0,
            "{} {}",
            plain.0,
            rule.0
        );
    };

    let rewarded = routed(&[
        "--routing",
        "cache-aware",
        "--reward",
        "0.5",
        "--routing-batch",
        "8",
    ])
    .remove(0);
    same(&rewarded);
    assert!(number(&rewarded.1, "misses_per_batch") < 0.8 * number(&plain.1, "misses_per_batch"));

    let together = routed(&["--routing", "top-k", "--company", "0.2", "--routing-batch", "8"]).remove(0);
    same(&together);
    assert!(number(&together.1, "experts_per_batch") < 0.9 * number(&plain.1, "experts_per_batch"));

    let balanced = routed(&["--routing", "top-k", "--prices", "--routing-batch", "8"]).remove(0);
    same(&balanced);
    assert!(number(&balanced.1, "max_violation") < 0.7 * number(&plain.1, "max_violation"));

    // Placement changes no answer.
    let pages = ["--routing", "top-k", "--page", "4"];
    let stored = routed(&pages).remove(0);
    let placed = routed(&[&pages[..], &["--place", "book"]].concat()).remove(0);
    assert_eq!(placed.0, stored.0);
    assert!(number(&placed.1, "pages_per_batch") < 0.9 * number(&stored.1, "pages_per_batch"));
    assert!(number(&placed.1, "misses_per_batch") < number(&stored.1, "misses_per_batch"));
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
    let pages = ["--routing", "top-k", "--page", "9", "--resident", "8"];
    let told = failure(&[&["run", trained(), "-p", "a"][..], &pages].concat());
    assert!(
        told.contains("9 experts (--page)") && told.contains("8 of them (--resident)"),
        "{told}"
    );
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
