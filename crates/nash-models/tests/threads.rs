//! The number of threads is chosen once per process, so every count runs in a process of its own.

#![expect(clippy::unwrap_used, reason = "a test says by panicking that it failed")]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::process::Command;

use nash_core::ModelFile;
use nash_models::{KvCache, KvType, Model};

const VARIABLE: &str = "NASH_MODELS_TEST_THREADS";
const MARK: &str = "digest of the logits: ";

/// Digest of the logits of several models, by prefill and by decode.
fn digest() -> u64 {
    let mut hasher = DefaultHasher::new();
    for name in ["llama", "gemma3", "gpt2", "qwen2_moe", "gpt_oss_mxfp4"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        let model = Model::load(&ModelFile::open(&folder).unwrap()).unwrap();
        // Longer than the tasks that the work is cut into.
        let tokens: Vec<u32> = (0..60).map(|i| i * 7 % 64).collect();
        for (chunk, kind) in [
            (1, KvType::F16),
            (60, KvType::F16),
            (1, KvType::Q8),
            (30, KvType::Q8),
        ] {
            let mut cache = KvCache::with_type(model.config(), tokens.len(), kind);
            for tokens in tokens.chunks(chunk) {
                let hidden = model.forward(tokens, &mut cache, &mut ()).unwrap();
                let mut out = vec![0.0; tokens.len() * model.config().vocab_size];
                model.logits(&hidden, &mut out, &mut ());
                out.iter().for_each(|v| v.to_bits().hash(&mut hasher));
            }
        }
    }
    hasher.finish()
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    if let Ok(threads) = std::env::var(VARIABLE) {
        nash_kernels::pool::set_threads(threads.parse().unwrap()).unwrap();
        println!("{MARK}{:016x}", digest());
        return;
    }
    let run = |threads: &str| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "results_do_not_depend_on_the_number_of_threads",
            ])
            .env(VARIABLE, threads)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let at = text.find(MARK).unwrap_or_else(|| panic!("no digest in {text}")) + MARK.len();
        text[at..at + 16].to_owned()
    };
    let one = run("1");
    for threads in ["2", "3", "7"] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}
