//! Model folders, split GGUF models and the detection of what a path is.
#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

use std::fs;
use std::path::{Path, PathBuf};

use nash_core::gguf_write::GgufWriter;
use nash_core::{DType, ErrorKind, Gguf, HfFolder, ModelFile, Tensor};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A safetensors file, written by the reference implementation.
fn weights(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn f32_tensor(name: &str, value: f32) -> (&str, Dtype, Vec<usize>, Vec<u8>) {
    (name, Dtype::F32, vec![1], value.to_le_bytes().to_vec())
}

fn config(dir: &Path) {
    fs::write(dir.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
}

fn index(dir: &Path, map: &[(&str, &str)]) {
    let map: serde_json::Map<_, _> = map
        .iter()
        .map(|(name, file)| ((*name).into(), json!(file)))
        .collect();
    fs::write(
        dir.join("model.safetensors.index.json"),
        json!({ "weight_map": map }).to_string(),
    )
    .unwrap();
}

#[test]
fn a_folder_with_one_file_is_read() {
    let dir = folder();
    config(dir.path());
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let bf16 = [1.0f32, -2.5]
        .iter()
        .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
        .collect();
    let f16 = [0.5f32, 3.0]
        .iter()
        .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
        .collect();
    let tensors = [
        f32_tensor("a", 1.5),
        ("b", Dtype::BF16, vec![2, 1], bf16),
        ("c", Dtype::F16, vec![1, 2], f16),
        ("empty", Dtype::F32, vec![0, 3], vec![]),
        ("odd", Dtype::F8_E8M0, vec![2], vec![1, 2]),
    ];
    weights(&dir.path().join("model.safetensors"), &tensors);
    let model = HfFolder::open(dir.path()).unwrap();
    let values = |name| model.tensor(name).unwrap().to_f32().unwrap();
    assert_eq!(
        (values("a"), values("b"), values("c")),
        (vec![1.5], vec![1.0, -2.5], vec![0.5, 3.0])
    );
    assert_eq!(values("empty"), [0.0; 0]);
    assert_eq!(model.tensor("b").unwrap().dtype, DType::BF16);
    assert!(model.tensor("b").unwrap().data.is_mapped());
    assert_eq!(model.config()["model_type"], "llama");
    assert_eq!(
        model.file("tokenizer.json"),
        Some(dir.path().join("tokenizer.json"))
    );
    assert_eq!(model.file("missing.json"), None);
    assert_eq!(model.file("../config.json"), None);
    let error = model.tensor("odd").unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::UnknownDType { dtype } if dtype == "F8_E8M0"),
        "{error}"
    );
    let error = model.tensor("missing").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MissingTensor { .. }) && error.path() == Some(dir.path()));
}

/// A model in two shards; `b` is also left over in the first.
fn sharded() -> TempDir {
    let dir = folder();
    config(dir.path());
    weights(
        &dir.path().join("one.safetensors"),
        &[f32_tensor("a", 1.0), f32_tensor("b", -1.0)],
    );
    weights(&dir.path().join("two.safetensors"), &[f32_tensor("b", 2.0)]);
    index(dir.path(), &[("a", "one.safetensors"), ("b", "two.safetensors")]);
    dir
}

#[test]
fn shards_are_read_as_the_index_says() {
    let dir = sharded();
    let model = HfFolder::open(dir.path()).unwrap();
    assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(model.tensor("b").unwrap().to_f32().unwrap(), [2.0]);
}

#[test]
fn missing_shard() {
    let dir = sharded();
    fs::remove_file(dir.path().join("two.safetensors")).unwrap();
    let error = HfFolder::open(dir.path()).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::MissingFile { file } if file == "two.safetensors"),
        "{error}"
    );
}

#[test]
fn index_names_a_tensor_that_is_not_there() {
    let dir = sharded();
    index(
        dir.path(),
        &[
            ("a", "one.safetensors"),
            ("b", "two.safetensors"),
            ("c", "two.safetensors"),
        ],
    );
    let error = HfFolder::open(dir.path()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MissingTensor { .. }), "{error}");
    assert_eq!(
        (error.tensor(), error.path()),
        (Some("c"), Some(dir.path().join("two.safetensors").as_path()))
    );
}

#[test]
fn index_leads_out_of_the_folder() {
    let outside = folder();
    let secret = outside.path().join("secret.safetensors");
    weights(&secret, &[f32_tensor("a", 1.0)]);
    let relative = format!(
        "../{}/secret.safetensors",
        outside.path().file_name().unwrap().to_str().unwrap()
    );
    for name in [
        relative.as_str(),
        secret.to_str().unwrap(),
        "..",
        "sub/../x.safetensors",
        "",
    ] {
        let dir = folder();
        config(dir.path());
        index(dir.path(), &[("a", name)]);
        let error = HfFolder::open(dir.path()).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::UnsafePath { .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn tensor_in_two_shards() {
    let dir = sharded();
    weights(
        &dir.path().join("two.safetensors"),
        &[f32_tensor("b", 2.0), f32_tensor("extra", 0.0)],
    );
    weights(
        &dir.path().join("one.safetensors"),
        &[f32_tensor("a", 1.0), f32_tensor("extra", 1.0)],
    );
    let error = HfFolder::open(dir.path()).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::DuplicateName { name } if name == "extra"),
        "{error}"
    );
}

#[test]
fn broken_json_names_its_file() {
    for (file, contents) in [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", ""),
        ("config.json", "\"text\""),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", r#"{"weight_map": {"a": 3}}"#),
    ] {
        let dir = sharded();
        fs::write(dir.path().join(file), contents).unwrap();
        let error = HfFolder::open(dir.path()).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Invalid { what: "JSON", .. }),
            "{error}"
        );
        assert_eq!(error.path(), Some(dir.path().join(file).as_path()));
    }
}

#[test]
fn folders_that_lack_files_say_which() {
    let dir = folder();
    let missing = |dir: &Path| match HfFolder::open(dir).unwrap_err() {
        error if matches!(error.kind(), ErrorKind::MissingFile { .. }) => error.to_string(),
        error => panic!("{error}"),
    };
    assert!(missing(dir.path()).contains("config.json"));
    config(dir.path());
    assert!(missing(dir.path()).contains("model.safetensors"));
    fs::write(dir.path().join("pytorch_model.bin"), "pickle").unwrap();
    assert!(missing(dir.path()).contains("safe_serialization"));
    weights(&dir.path().join("x.safetensors"), &[f32_tensor("a", 1.0)]);
    assert!(
        HfFolder::open(dir.path()).is_ok(),
        "the only safetensors file is the model"
    );
    weights(&dir.path().join("y.safetensors"), &[f32_tensor("b", 1.0)]);
    assert!(missing(dir.path()).contains("model.safetensors.index.json"));
}

fn split(dir: &Path, no: u16, count: u16, total: i32, tensors: &[&str]) -> PathBuf {
    let mut writer = GgufWriter::new()
        .metadata("split.no", no)
        .metadata("split.count", count)
        .metadata("split.tensors.count", total);
    if no == 0 {
        writer = writer.metadata("general.architecture", "llama");
    }
    for name in tensors {
        writer = writer.tensor(Tensor::from_f32(*name, vec![1], &[f32::from(no)]).unwrap());
    }
    let path = dir.join(format!("m-{:05}-of-{count:05}.gguf", no + 1));
    writer.write(&path).unwrap();
    path
}

#[test]
fn any_part_of_a_split_model_opens_it() {
    let dir = folder();
    let paths = [
        split(dir.path(), 0, 3, 3, &["a"]),
        split(dir.path(), 1, 3, 3, &["b"]),
        split(dir.path(), 2, 3, 3, &["c"]),
    ];
    for path in &paths {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
        assert_eq!(gguf.tensor("c").unwrap().to_f32().unwrap(), [2.0]);
        assert_eq!(gguf.path(), Some(paths[0].as_path()));
        let bytes: u64 = paths.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert_eq!(gguf.file_bytes(), bytes);
    }
    assert!(
        matches!(ModelFile::open(dir.path()).unwrap(), ModelFile::Gguf(_)),
        "one model, three files"
    );
}

#[test]
fn missing_part() {
    let dir = folder();
    let first = split(dir.path(), 0, 3, 3, &["a"]);
    split(dir.path(), 2, 3, 3, &["c"]);
    let error = Gguf::open(&first).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::MissingFile { file } if file == "m-00002-of-00003.gguf"),
        "{error}"
    );
}

#[test]
fn parts_of_different_models() {
    let dir = folder();
    let first = split(dir.path(), 0, 2, 2, &["a"]);
    let second = split(dir.path(), 1, 2, 2, &["a"]);
    assert!(matches!(
        Gguf::open(&first).unwrap_err().kind(),
        ErrorKind::DuplicateName { .. }
    ));
    split(dir.path(), 1, 2, 2, &["b", "c"]);
    let error = Gguf::open(&first).unwrap_err();
    assert!(
        error.to_string().contains("the parts hold 3 tensors, not 2"),
        "{error}"
    );
    fs::copy(&first, &second).unwrap();
    let error = Gguf::open(&first).unwrap_err();
    assert!(error.to_string().contains("expected part 1 of 2"), "{error}");
    assert_eq!(error.path(), Some(second.as_path()));
}

#[test]
fn part_that_was_renamed() {
    let dir = folder();
    let first = split(dir.path(), 0, 2, 2, &["a"]);
    let renamed = dir.path().join("model.gguf");
    fs::rename(first, &renamed).unwrap();
    let error = Gguf::open(&renamed).unwrap_err();
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("NAME-00001-of-00002.gguf")),
        "{error}"
    );
}

#[test]
fn split_metadata_of_the_wrong_type() {
    let dir = folder();
    let path = dir.path().join("a-00001-of-00002.gguf");
    for (count, no) in [(1u64 << 40, 0), (2, 7)] {
        GgufWriter::new()
            .metadata("split.count", count)
            .metadata("split.no", no)
            .write(&path)
            .unwrap();
        assert!(Gguf::open(&path).is_err(), "{count} {no}");
    }
    GgufWriter::new()
        .metadata("split.count", "two")
        .write(&path)
        .unwrap();
    assert!(matches!(
        Gguf::open(&path).unwrap_err().kind(),
        ErrorKind::WrongType { .. }
    ));
}

#[test]
fn a_path_is_recognised_for_what_it_is() {
    let dir = folder();
    let gguf = dir.path().join("model.bin");
    GgufWriter::new()
        .metadata("general.architecture", "llama")
        .write(&gguf)
        .unwrap();
    assert!(
        matches!(ModelFile::open(&gguf).unwrap(), ModelFile::Gguf(_)),
        "by its bytes, not its name"
    );
    let hf = sharded();
    for path in ["", "one.safetensors", "config.json"] {
        assert!(
            matches!(ModelFile::open(hf.path().join(path)).unwrap(), ModelFile::Hf(_)),
            "{path:?}"
        );
    }
}

#[test]
fn a_folder_with_one_gguf_file_is_that_model() {
    let dir = folder();
    let writer = GgufWriter::new().metadata("general.architecture", "llama");
    writer.write(dir.path().join("one.gguf")).unwrap();
    assert!(matches!(ModelFile::open(dir.path()).unwrap(), ModelFile::Gguf(_)));
    writer.write(dir.path().join("two.gguf")).unwrap();
    let error = ModelFile::open(dir.path()).unwrap_err();
    assert!(
        error.hint().is_some_and(|hint| hint.contains("one.gguf")),
        "{error}"
    );
}

#[test]
fn what_is_no_model_is_refused_with_a_hint() {
    let dir = folder();
    let write = |name: &str, contents: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, contents).unwrap();
        path
    };
    let kind = |path: &Path| {
        let error = ModelFile::open(path).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        error
    };
    assert!(matches!(
        kind(&write("empty.gguf", b"")).kind(),
        ErrorKind::EmptyFile
    ));
    assert!(matches!(
        kind(&write("text.gguf", b"a text and no model")).kind(),
        ErrorKind::NotAModel { .. }
    ));
    assert!(matches!(
        kind(&write("short.gguf", b"GG")).kind(),
        ErrorKind::Truncated { .. }
    ));
    assert!(matches!(
        kind(&dir.path().join("missing.gguf")).kind(),
        ErrorKind::Io { .. }
    ));
    let empty = folder();
    assert!(matches!(kind(empty.path()).kind(), ErrorKind::NotAModel { .. }));
    assert!(kind(empty.path()).hint().is_some());
    fs::create_dir(dir.path().join("dir.gguf")).unwrap();
    assert!(Gguf::open(dir.path().join("dir.gguf")).is_err());
}
