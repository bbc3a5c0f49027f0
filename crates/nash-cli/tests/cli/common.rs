//! A tiny random model with a byte tokenizer, and the command to run on it.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use nash_core::Tensor;
use nash_core::gguf_write::GgufWriter;

const LAYERS: usize = 2;
const WIDTH: usize = 64;
const FEED: usize = 128;
const MARKS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const VOCAB: usize = 256 + MARKS.len();

/// The command in an environment of its own: a user's settings and models must not change what is tested.
pub(crate) fn nashswarm(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("nashswarm").unwrap();
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NASHSWARM_")) {
        command.env_remove(name);
    }
    let home = std::env::temp_dir().join("nashswarm-tests-have-no-models");
    command
        .env("NASHSWARM_HOME", home)
        .env("RUST_BACKTRACE", "0")
        .env("COLUMNS", "100")
        .args(args);
    command
}

/// Standard output of a command that must succeed.
pub(crate) fn stdout(args: &[&str]) -> String {
    String::from_utf8(nashswarm(args).assert().success().get_output().stdout.clone()).unwrap()
}

/// The results of a command that must succeed, as JSON.
pub(crate) fn json(args: &[&str]) -> serde_json::Value {
    let args: Vec<&str> = args.iter().copied().chain(["--json", "-"]).collect();
    serde_json::from_str(&stdout(&args)).unwrap()
}

/// Exit status and stderr of a command that must fail; nothing may be on stdout.
pub(crate) fn failure(args: &[&str]) -> String {
    let output = nashswarm(args).assert().failure().get_output().clone();
    assert!(
        output.stdout.is_empty(),
        "stdout carries results only: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    format!(
        "status {}\n{}",
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap()
    )
}

/// Writes a random Llama of 2 layers and width 64, whose tokens are bytes.
pub(crate) fn tiny_model(dir: &Path, seed: u64) -> PathBuf {
    let path = dir.join(format!("tiny-{seed}.gguf"));
    tiny(seed, "llama").write(&path).unwrap();
    path
}

/// The model before it is written, of any architecture name.
pub(crate) fn tiny(seed: u64, architecture: &str) -> GgufWriter {
    let key = |name: &str| format!("{architecture}.{name}");
    let writer = GgufWriter::new()
        .metadata("general.architecture", architecture)
        .metadata(key("block_count"), LAYERS as u32)
        .metadata(key("context_length"), 256u32)
        .metadata(key("embedding_length"), WIDTH as u32)
        .metadata(key("feed_forward_length"), FEED as u32)
        .metadata(key("attention.head_count"), 4u32)
        .metadata(key("attention.head_count_kv"), 2u32)
        .metadata(key("attention.layer_norm_rms_epsilon"), 1e-5f32)
        .metadata(key("rope.freq_base"), 10000f32)
        .metadata(key("vocab_size"), VOCAB as u32);
    let mut random = Random(seed);
    let writer = tokenizer(writer);
    let writer = matrix(writer, "token_embd.weight", VOCAB, WIDTH, &mut random);
    let writer = (0..LAYERS).fold(writer, |writer, layer| block(writer, layer, &mut random));
    vector(writer, "output_norm.weight")
}

fn block(mut writer: GgufWriter, layer: usize, random: &mut Random) -> GgufWriter {
    let kv = WIDTH / 2;
    for (name, rows, cols) in [
        ("attn_q", WIDTH, WIDTH),
        ("attn_k", kv, WIDTH),
        ("attn_v", kv, WIDTH),
        ("attn_output", WIDTH, WIDTH),
        ("ffn_gate", FEED, WIDTH),
        ("ffn_up", FEED, WIDTH),
        ("ffn_down", WIDTH, FEED),
    ] {
        writer = matrix(writer, &format!("blk.{layer}.{name}.weight"), rows, cols, random);
    }
    let writer = vector(writer, &format!("blk.{layer}.attn_norm.weight"));
    vector(writer, &format!("blk.{layer}.ffn_norm.weight"))
}

fn matrix(writer: GgufWriter, name: &str, rows: usize, cols: usize, random: &mut Random) -> GgufWriter {
    let scale = 1.0 / (cols as f32).sqrt();
    let values: Vec<f32> = (0..rows * cols).map(|_| random.next() * 2.0 * scale).collect();
    writer.tensor(Tensor::from_f32(name, vec![rows, cols], &values).unwrap())
}

fn vector(writer: GgufWriter, name: &str) -> GgufWriter {
    writer.tensor(Tensor::from_f32(name, vec![WIDTH], &[1.0; WIDTH]).unwrap())
}

/// A byte-level BPE without merges: one token per byte, and three marks.
fn tokenizer(writer: GgufWriter) -> GgufWriter {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256u32..;
    // GPT-2 spells a byte that cannot be printed as the next character from U+0100 on.
    let spell = |byte: u32| {
        if printable(byte) {
            byte
        } else {
            others.next().unwrap()
        }
    };
    let bytes = (0..256)
        .map(spell)
        .map(|code| char::from_u32(code).unwrap().to_string());
    let tokens: Vec<String> = bytes
        .collect::<Vec<_>>()
        .into_iter()
        .chain(MARKS.map(String::from))
        .collect();
    let kinds: Vec<i32> = (0..VOCAB).map(|id| if id < 256 { 1 } else { 3 }).collect();
    writer
        .metadata("tokenizer.ggml.model", "gpt2")
        .metadata("tokenizer.ggml.pre", "gpt-2")
        .metadata("tokenizer.ggml.tokens", tokens)
        .metadata("tokenizer.ggml.token_type", kinds)
        .metadata("tokenizer.ggml.merges", Vec::<String>::new())
        .metadata("tokenizer.ggml.bos_token_id", 256u32)
        .metadata("tokenizer.ggml.eos_token_id", 258u32)
        .metadata("tokenizer.ggml.add_bos_token", false)
        .metadata(
            "tokenizer.chat_template",
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        )
}

/// Uniform numbers in [−1, 1) from Knuth's MMIX generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A text of this many bytes, which are as many tokens; no two windows are alike.
pub(crate) fn text(dir: &Path, length: usize) -> PathBuf {
    let words = ["tree", "river", "stone", "cloud", "bird"];
    let text: String = (0..length)
        .map(|i| format!("{} {i} ", words[i * i % 7 % 5]))
        .collect();
    let path = dir.join(format!("text-{length}.txt"));
    std::fs::write(&path, &text[..length]).unwrap();
    path
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
