//! Safetensors files and packed folders that are malformed on purpose.

use nash_core::{CoreError, ErrorKind, PackedFolder, Safetensors};
use serde_json::{Value, json};

/// A file with this header and this many bytes of data.
fn raw(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
    let header = header.as_ref();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn tensor(dtype: &str, shape: &[u64], offsets: [u64; 2]) -> Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets })
}

macro_rules! assert_refused {
    ($bytes:expr, $pattern:pat) => {
        let bytes: Vec<u8> = $bytes;
        let error = Safetensors::from_bytes(bytes.clone()).unwrap_err();
        assert!(matches!(error.kind(), $pattern), "{error}");
    };
}

#[test]
fn the_valid_file_is_accepted() {
    let header = json!({
        "__metadata__": { "format": "pt" },
        "b": tensor("F32", &[2], [4, 12]),
        "a": tensor("F16", &[2], [0, 4]),
    });
    let file = Safetensors::from_bytes(raw(header.to_string(), 12)).unwrap();
    assert_eq!(file.metadata()["format"], "pt");
    assert_eq!(file.tensor("b").unwrap().to_f32().unwrap(), [0.0; 2]);
    assert!(
        Safetensors::from_bytes(raw("{}", 0))
            .unwrap()
            .tensors()
            .is_empty()
    );
}

#[test]
fn every_truncation_is_refused() {
    let bytes = raw(json!({ "a": tensor("F32", &[2], [0, 8]) }).to_string(), 8);
    for length in 0..bytes.len() {
        let error = Safetensors::from_bytes(&bytes[..length]).unwrap_err();
        assert!(
            matches!(
                error.kind(),
                ErrorKind::Truncated { .. } | ErrorKind::OutOfBounds { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn surplus_bytes_are_refused() {
    assert_refused!(
        raw(json!({ "a": tensor("F32", &[2], [0, 8]) }).to_string(), 9),
        ErrorKind::UnusedBytes { .. }
    );
    assert_refused!(raw("{}", 1), ErrorKind::UnusedBytes { .. });
}

#[test]
fn lying_header_length() {
    for length in [100u64, 99_999_999] {
        assert_refused!(
            [&length.to_le_bytes()[..], b"{}"].concat(),
            ErrorKind::Truncated { .. }
        );
    }
    for length in [100_000_001, 1 << 40, u64::MAX] {
        assert_refused!(
            [&length.to_le_bytes()[..], b"{}"].concat(),
            ErrorKind::TooLarge { .. }
        );
    }
}

#[test]
fn header_that_is_no_json_object() {
    for header in [
        "",
        "[]",
        "3",
        "{",
        "{\"a\"",
        "null",
        "{\"a\": 1}",
        "{} x",
        "\u{feff}{}",
    ] {
        assert_refused!(raw(header, 0), ErrorKind::Invalid { .. });
    }
}

#[test]
fn header_that_is_not_utf8() {
    assert_refused!(raw(b"{\"\xff\": 1}", 0), ErrorKind::Invalid { .. });
}

#[test]
fn header_nested_too_deeply() {
    let header = format!("{{\"a\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_refused!(raw(header, 0), ErrorKind::Invalid { .. });
}

#[test]
fn duplicate_names() {
    let entry = tensor("F32", &[1], [0, 4]);
    assert_refused!(
        raw(format!("{{\"a\": {entry}, \"a\": {entry}}}"), 4),
        ErrorKind::Invalid { .. }
    );
    assert_refused!(
        raw(r#"{"__metadata__": {}, "__metadata__": {}}"#, 0),
        ErrorKind::Invalid { .. }
    );
}

#[test]
fn numbers_that_are_no_sizes() {
    for (shape, offsets) in [
        ("[-1]", "[0, 4]"),
        ("[1.5]", "[0, 4]"),
        ("[1]", "[0, -4]"),
        ("[1]", "[0]"),
    ] {
        let header = format!(r#"{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#);
        assert_refused!(raw(header, 4), ErrorKind::Invalid { .. });
    }
    let header = r#"{"a": {"dtype": "F32", "shape": [99999999999999999999], "data_offsets": [0, 4]}}"#;
    assert_refused!(raw(header, 4), ErrorKind::Invalid { .. });
}

#[test]
fn shape_that_overflows() {
    for shape in [&[u64::MAX, 2][..], &[1 << 62], &[0, u64::MAX, u64::MAX]] {
        assert_refused!(
            raw(json!({ "a": tensor("F32", shape, [0, 4]) }).to_string(), 4),
            ErrorKind::SizeOverflow { .. }
        );
    }
}

#[test]
fn size_that_contradicts_the_shape() {
    for (dtype, shape) in [
        ("F32", &[2][..]),
        ("F64", &[1]),
        ("U8", &[3]),
        ("F32", &[0]),
        ("F16", &[1]),
    ] {
        assert_refused!(
            raw(json!({ "a": tensor(dtype, shape, [0, 4]) }).to_string(), 4),
            ErrorKind::SizeMismatch { .. }
        );
    }
}

#[test]
fn offsets_outside_of_the_file() {
    for offsets in [[0, 8], [4, 0], [u64::MAX - 3, u64::MAX], [1 << 60, (1 << 60) + 4]] {
        assert_refused!(
            raw(json!({ "a": tensor("F32", &[1], offsets) }).to_string(), 4),
            ErrorKind::OutOfBounds { .. }
        );
    }
}

#[test]
fn overlapping_tensors() {
    let header = json!({ "a": tensor("F32", &[1], [0, 4]), "b": tensor("U8", &[2], [3, 5]) });
    assert_refused!(raw(header.to_string(), 5), ErrorKind::Overlap { .. });
    let header = json!({ "a": tensor("F32", &[1], [0, 4]), "b": tensor("F32", &[1], [0, 4]) });
    assert_refused!(raw(header.to_string(), 4), ErrorKind::Overlap { .. });
}

#[test]
fn holes_between_tensors() {
    let header = json!({ "a": tensor("F32", &[1], [0, 4]), "b": tensor("U8", &[1], [5, 6]) });
    assert_refused!(
        raw(header.to_string(), 6),
        ErrorKind::UnusedBytes { start: 4, end: 5 }
    );
}

#[test]
fn a_tensor_of_unknown_type_is_refused_and_not_the_file() {
    let file =
        Safetensors::from_bytes(raw(json!({ "a": tensor("F4", &[2], [0, 1]) }).to_string(), 1)).unwrap();
    assert!(matches!(
        file.tensor("a").unwrap_err().kind(),
        ErrorKind::UnknownDType { .. }
    ));
    assert!(matches!(
        file.tensor("b").unwrap_err().kind(),
        ErrorKind::MissingTensor { .. }
    ));
}

/// A packed model of one matrix `w` of 4 × 64 at 2 bits (68 bytes of stream) and one norm; `change` spoils it.
fn packed(change: impl FnOnce(&mut Value, &mut Value)) -> Result<PackedFolder, CoreError> {
    let mut config = json!({ "quantization_config": {
        "quant_method": "nashswarm",
        "format_version": 2,
        "group_size": 64,
        "tensors": { "w": { "bits": 2, "shape": [4, 64] } },
    }});
    let mut header = json!({
        "n": tensor("F32", &[1], [0, 4]),
        "w.row_scales": tensor("F16", &[4], [4, 12]),
        "w.packed": tensor("U8", &[68], [12, 80]),
        "w.codebook": tensor("I8", &[64], [80, 144]),
    });
    change(&mut config, &mut header);
    PackedFolder::from_bytes(config.to_string().as_bytes(), b"{}", raw(header.to_string(), 144))
}

#[test]
fn the_valid_packed_model_is_accepted() {
    let folder = packed(|_, _| ()).unwrap();
    assert_eq!(folder.packed("w").unwrap().shape().rows, 4);
    assert_eq!(folder.names().collect::<Vec<_>>(), ["n"]);
    assert!(matches!(
        folder.packed("v").unwrap_err().kind(),
        ErrorKind::MissingTensor { .. }
    ));
    assert!(matches!(
        folder.tensor("w").unwrap_err().kind(),
        ErrorKind::MissingTensor { .. }
    ));
    assert!(matches!(
        folder.verify(|_| ()).unwrap_err().kind(),
        ErrorKind::MissingKey { .. }
    ));
}

#[test]
fn packed_model_of_another_format() {
    let spoil = |key: &str, value: Value| {
        packed(|config, _| config["quantization_config"][key] = value)
            .unwrap_err()
            .to_string()
    };
    assert!(spoil("quant_method", json!("gptq")).contains("quant_method is \"gptq\""));
    for (version, hint) in [(1, "compress the model again"), (3, "a newer version")] {
        let error = spoil("format_version", json!(version));
        assert!(
            error.contains(&format!("version {version} is not supported")),
            "{error}"
        );
        assert!(error.contains(hint), "{error}");
    }
    assert!(spoil("format_version", json!("2")).contains("no format_version"));
    assert!(spoil("group_size", json!(128)).contains("group_size is 128"));
    assert!(spoil("tensors", json!([])).contains("invalid quantization_config"));
    assert!(spoil("tensors", json!({ "w": { "bits": 2 } })).contains("shape"));
    let error = packed(|config, _| *config = json!({})).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MissingKey { .. }), "{error}");
}

#[test]
fn packed_model_with_a_bad_width() {
    for bits in [0, 1, 7, 9, 255] {
        let error = packed(|config, _| config["quantization_config"]["tensors"]["w"]["bits"] = json!(bits))
            .unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Invalid { .. }) && error.tensor() == Some("w"),
            "{error}"
        );
    }
}

#[test]
fn packed_model_whose_shape_contradicts_its_bytes() {
    for shape in [[4, 65], [5, 64], [8, 64], [3, 64], [u64::MAX, u64::MAX]] {
        let error = packed(|config, _| config["quantization_config"]["tensors"]["w"]["shape"] = json!(shape))
            .unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Layout(_)), "{shape:?}: {error}");
    }
    let error = packed(|config, _| config["quantization_config"]["tensors"]["w"]["shape"] = json!([0, 64]))
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ZeroDimension { .. }), "{error}");
}

#[test]
fn packed_model_with_a_missing_part() {
    for part in ["w.packed", "w.row_scales", "w.codebook"] {
        let error = packed(|_, header| {
            let entry = header.as_object_mut().unwrap().remove(part).unwrap();
            header["other"] = entry;
        });
        let error = error.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::MissingTensor { .. }), "{error}");
        assert_eq!(error.tensor(), Some(part));
    }
}

#[test]
fn packed_model_with_a_part_of_the_wrong_type_or_shape() {
    let error = packed(|_, header| header["w.packed"] = tensor("I8", &[68], [12, 80])).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DTypeMismatch { .. }), "{error}");
    let error = packed(|_, header| header["w.row_scales"] = tensor("BF16", &[4], [4, 12])).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DTypeMismatch { .. }), "{error}");
    let error = packed(|_, header| header["w.packed"] = tensor("U8", &[4, 17], [12, 80])).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ShapeMismatch { .. }), "{error}");
    let error = packed(|_, header| header["n"] = tensor("F4", &[8], [0, 4])).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::UnknownDType { .. }), "{error}");
}

#[test]
fn packed_model_with_parts_that_belong_to_nothing() {
    let error = packed(|config, _| config["quantization_config"]["tensors"] = json!({})).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFloat { .. }), "{error}");
}

#[test]
fn packed_model_with_scales_that_are_not_finite() {
    let config = json!({ "quantization_config": {
        "quant_method": "nashswarm", "format_version": 2, "group_size": 64,
        "tensors": { "w": { "bits": 8, "shape": [1, 1] } },
    }});
    let header =
        json!({ "w.row_scales": tensor("F16", &[1], [0, 2]), "w.packed": tensor("U8", &[260], [2, 262]) });
    let mut bytes = raw(header.to_string(), 262);
    let open = |bytes: &[u8]| PackedFolder::from_bytes(config.to_string().as_bytes(), b"{}", bytes);
    assert!(open(&bytes).is_ok());
    let at = bytes.len() - 262;
    for scale in [0x7c00u16, 0xfc00, 0x7e00] {
        bytes[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        let error = open(&bytes).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::NotFinite { index: 0, .. }),
            "{error}"
        );
    }
}
