//! Packed model folders: written, opened, damaged, half finished.
#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

use std::fs;
use std::path::Path;

use half::f16;
use nash_core::packed_write::{PackedLayout, PackedWriter, TensorSpec};
use nash_core::{DType, ErrorKind, ModelFile, PackedFolder, PackedTensor, Region, Result, hash};
use nash_kernels::{PackedMatrix, PackedShape, Width};
use serde_json::{Map, Value, json};

/// Any bytes are valid codes; the scales are small numbers.
fn matrix(rows: usize, cols: usize, bits: u8, seed: usize) -> PackedMatrix {
    let shape = PackedShape {
        rows,
        cols,
        width: Width::new(bits).unwrap(),
    };
    let stream = (0..shape.stream_bytes().unwrap())
        .map(|i| ((i + seed) * 31 % 251) as u8)
        .collect();
    let row_scales = (0..rows).map(|r| f16::from_f32(0.01 * (r + 1) as f32)).collect();
    let codebook = (0..shape.width.codebook_len()).map(|i| i as i8 * 2 - 3).collect();
    PackedMatrix::new(shape, stream, row_scales, codebook).unwrap()
}

fn matrices() -> Vec<(String, PackedMatrix)> {
    let widths = [2, 3, 4, 5, 6, 8];
    widths
        .map(|bits| {
            (
                format!("layer.{bits}"),
                matrix(5 + usize::from(bits), 70, bits, 7),
            )
        })
        .into()
}

fn specs() -> Vec<TensorSpec> {
    let mut specs = vec![TensorSpec::Float {
        name: "norm.weight".into(),
        dtype: DType::F32,
        shape: vec![3],
    }];
    for (name, matrix) in matrices() {
        specs.push(TensorSpec::Packed {
            name,
            shape: matrix.as_ref().shape(),
        });
    }
    specs.push(TensorSpec::Float {
        name: "embed.weight".into(),
        dtype: DType::F16,
        shape: vec![2, 2],
    });
    specs
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

/// Writes everything, in another order than the layout.
fn write(dir: &Path) -> Result<PackedFolder> {
    let mut writer = PackedWriter::create(dir, PackedLayout::new(specs())?)?;
    for (name, matrix) in matrices().iter().rev() {
        writer.packed(name, matrix.as_ref())?;
    }
    writer.float("embed.weight", &[0.5, -1.0, 2.0, 0.1])?;
    writer.float("norm.weight", &[1.0, 1e-30, -2.5])?;
    writer.finish(
        object(json!({"model_type": "test"})),
        object(json!({"budget": 3.0})),
    )
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = write(dir.path()).unwrap();
    for (name, matrix) in matrices() {
        let (found, written) = (folder.packed(&name).unwrap(), matrix.as_ref());
        assert_eq!(found.shape(), written.shape());
        assert_eq!(found.as_ref().stream(), written.stream());
        assert_eq!(found.as_ref().row_scales(), written.row_scales());
        assert_eq!(found.as_ref().codebook(), written.codebook());
        assert_eq!(found.bytes(), written.bytes());
        assert!(found.stream().is_mapped());
    }
    assert_eq!(folder.packed_tensors().len(), 6);
    assert_eq!(
        folder.tensor("norm.weight").unwrap().to_f32().unwrap(),
        [1.0, 1e-30, -2.5]
    );
    let rounded = f16::from_f32(0.1).to_f32();
    assert_eq!(
        folder.tensor("embed.weight").unwrap().to_f32().unwrap(),
        [0.5, -1.0, 2.0, rounded]
    );
    assert_eq!(folder.config()["model_type"], "test");
    assert_eq!(
        folder.config()["quantization_config"]["tensors"]["layer.3"],
        json!({"bits": 3, "shape": [8, 70]})
    );
    assert_eq!(folder.report()["budget"], 3.0);
}

#[test]
fn the_size_is_known_to_the_byte_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let expected = PackedLayout::new(specs()).unwrap().file_bytes();
    let folder = write(dir.path()).unwrap();
    assert_eq!(folder.file_bytes(), expected);
    assert_eq!(
        fs::metadata(dir.path().join("model.safetensors")).unwrap().len(),
        expected
    );
}

#[test]
fn the_same_tensors_give_the_same_bytes_in_any_order() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    write(dirs[0].path()).unwrap();
    let mut writer = PackedWriter::create(dirs[1].path(), PackedLayout::new(specs()).unwrap()).unwrap();
    writer.float("norm.weight", &[1.0, 1e-30, -2.5]).unwrap();
    for (name, matrix) in matrices() {
        writer.packed(&name, matrix.as_ref()).unwrap();
    }
    writer.float("embed.weight", &[0.5, -1.0, 2.0, 0.1]).unwrap();
    writer
        .finish(
            object(json!({"model_type": "test"})),
            object(json!({"budget": 3.0})),
        )
        .unwrap();
    for file in ["model.safetensors", "config.json", "nashswarm.json"] {
        let [a, b] = dirs
            .each_ref()
            .map(|dir| fs::read(dir.path().join(file)).unwrap());
        assert_eq!(hash::sha256(&a), hash::sha256(&b), "{file}");
    }
}

#[test]
fn the_file_is_valid_safetensors_for_the_reference_implementation() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path()).unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    // Six streams, six row scales, five codebooks, two floats.
    assert_eq!(file.len(), 19);
    assert_eq!(
        file.tensor("layer.4.packed").unwrap().data(),
        matrices()[2].1.as_ref().stream()
    );
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    assert_eq!((8 + header) % 64, 0, "the data section is aligned");
    for (name, view) in file.tensors() {
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(
            offset % (view.dtype().bitsize() / 8),
            0,
            "{name} is aligned to its elements"
        );
    }
}

#[test]
fn a_model_file_is_found_by_folder_and_by_either_file() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path()).unwrap();
    for path in ["", "model.safetensors", "config.json"] {
        let model = ModelFile::open(dir.path().join(path)).unwrap();
        assert!(matches!(model, ModelFile::Packed(_)), "{path}");
        assert!(model.tensor("norm.weight").is_ok());
    }
}

#[test]
fn verify_finds_a_flipped_bit() {
    let dir = tempfile::tempdir().unwrap();
    let folder = write(dir.path()).unwrap();
    let mut done = 0;
    folder.verify(|bytes| done = bytes).unwrap();
    assert!(done > 0 && done < folder.file_bytes());
    drop(folder);
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = PackedFolder::open(dir.path())
        .unwrap()
        .verify(|_| ())
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Checksum { .. }), "{error}");
    assert!(error.tensor().is_some() && error.path() == Some(&path));
}

#[test]
fn a_writer_that_is_killed_leaves_nothing_that_opens() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = PackedWriter::create(dir.path(), PackedLayout::new(specs()).unwrap()).unwrap();
    writer.float("norm.weight", &[1.0, 2.0, 3.0]).unwrap();
    // A killed process runs no destructors.
    std::mem::forget(writer);
    assert!(!dir.path().join("model.safetensors").exists());
    let error = ModelFile::open(dir.path()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotAModel { .. }), "{error}");
}

#[test]
fn a_folder_is_not_finished_before_its_last_file() {
    for missing in ["config.json", "nashswarm.json"] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        fs::remove_file(dir.path().join(missing)).unwrap();
        let error = PackedFolder::open(dir.path()).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::MissingFile { file } if file == missing),
            "{error}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path()).unwrap();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = PackedFolder::open(dir.path()).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Io { action: "open", .. }),
        "{error}"
    );
}

#[test]
fn a_writer_that_is_dropped_leaves_the_old_model() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path()).unwrap();
    drop(PackedWriter::create(dir.path(), PackedLayout::new([]).unwrap()).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    PackedFolder::open(dir.path()).unwrap().verify(|_| ()).unwrap();
}

#[test]
fn an_unfinished_model_cannot_be_finished_and_the_old_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path()).unwrap();
    let writer = PackedWriter::create(dir.path(), PackedLayout::new(specs()).unwrap()).unwrap();
    let error = writer.finish(Map::new(), Map::new()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MissingTensor { .. }), "{error}");
    PackedFolder::open(dir.path()).unwrap().verify(|_| ()).unwrap();
}

#[test]
fn a_new_model_replaces_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path()).unwrap();
    let spec = TensorSpec::Float {
        name: "only".into(),
        dtype: DType::F32,
        shape: vec![1],
    };
    let mut writer = PackedWriter::create(dir.path(), PackedLayout::new([spec]).unwrap()).unwrap();
    writer.float("only", &[4.0]).unwrap();
    let folder = writer.finish(Map::new(), Map::new()).unwrap();
    assert_eq!(folder.names().collect::<Vec<_>>(), ["only"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[test]
fn wrong_writes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = PackedWriter::create(dir.path(), PackedLayout::new(specs()).unwrap()).unwrap();
    let error = writer.packed("layer.9", matrix(1, 1, 2, 0).as_ref()).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::MissingTensor { available: 6 }),
        "{error}"
    );
    let error = writer
        .packed("layer.3", matrix(8, 70, 4, 0).as_ref())
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ShapeMismatch { .. }), "{error}");
    let error = writer.float("norm.weight", &[1.0]).unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::SizeMismatch {
                expected: 12,
                found: 4,
                ..
            }
        ),
        "{error}"
    );
    let error = writer.float("norm.weight", &[1.0, f32::NAN, 0.0]).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::NotFinite { index: 1, .. }),
        "{error}"
    );
    let error = writer.float("embed.weight", &[0.0, 0.0, 1e6, 0.0]).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::NotFinite { index: 2, .. }),
        "too large for F16: {error}"
    );
    let error = writer.float("layer.3.packed", &[1.0]).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::NotFloat { dtype: DType::U8 }),
        "{error}"
    );
    writer.float("norm.weight", &[1.0; 3]).unwrap();
    let error = writer.float("norm.weight", &[1.0; 3]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DuplicateName { .. }), "{error}");
}

#[test]
fn wrong_layouts_are_refused() {
    let float = |name: &str, dtype, shape| TensorSpec::Float {
        name: name.into(),
        dtype,
        shape,
    };
    let packed = |rows, cols| TensorSpec::Packed {
        name: "p".into(),
        shape: PackedShape {
            rows,
            cols,
            width: Width::new(2).unwrap(),
        },
    };
    let kind = |specs: Vec<TensorSpec>| PackedLayout::new(specs).unwrap_err().to_string();
    assert!(kind(vec![float("a", DType::BF16, vec![1])]).contains("expected F16"));
    assert!(
        kind(vec![
            float("a", DType::F32, vec![1]),
            float("a", DType::F16, vec![1])
        ])
        .contains("twice")
    );
    assert!(kind(vec![packed(1, 1), float("p.packed", DType::F32, vec![1])]).contains("twice"));
    assert!(kind(vec![packed(0, 1)]).contains("dimension of zero"));
    assert!(kind(vec![packed(usize::MAX, usize::MAX)]).contains("overflows"));
    let half = vec![usize::MAX / 8];
    assert!(
        kind(
            (0..5)
                .map(|i| float(&i.to_string(), DType::F32, half.clone()))
                .collect()
        )
        .contains("overflows")
    );
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = PackedWriter::create(file.join("model"), PackedLayout::new([]).unwrap()).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Io { action: "create", .. }),
        "{error}"
    );
    assert!(error.to_string().contains("file/model"), "{error}");
}

#[test]
fn packed_tensors_with_bad_parts_are_refused() {
    let shape = PackedShape {
        rows: 4,
        cols: 64,
        width: Width::new(2).unwrap(),
    };
    let new = |stream: usize, scales: &[f32], codebook: &[i8]| {
        let scales: Vec<f16> = scales.iter().map(|&scale| f16::from_f32(scale)).collect();
        PackedTensor::new(
            "p",
            shape,
            Region::from(vec![0; stream]),
            scales,
            codebook.to_vec(),
        )
        .map_err(|e| e.to_string())
    };
    assert!(new(68, &[1.0; 4], &[0; 64]).is_ok());
    assert!(new(67, &[1.0; 4], &[0; 64]).unwrap_err().contains("stream"));
    assert!(new(68, &[1.0; 3], &[0; 64]).unwrap_err().contains("row scales"));
    assert!(new(68, &[1.0; 4], &[0; 4]).unwrap_err().contains("codebook"));
    assert!(new(68, &[1.0; 4], &[-128; 64]).unwrap_err().contains("-128"));
    assert!(
        new(68, &[1.0, f32::NAN, 1.0, 1.0], &[0; 64])
            .unwrap_err()
            .contains("row scale 1 is NaN")
    );
}
