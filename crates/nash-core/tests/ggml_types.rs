//! Every ggml type against the reference implementation (`tests/golden/make_ggml_types.py`), bit for bit.
#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

use std::path::PathBuf;

use nash_core::gguf::Value;
use nash_core::{DType, Gguf};

fn golden() -> Gguf {
    Gguf::open(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ggml_types.gguf")).unwrap()
}

#[test]
fn every_type_decodes_to_the_reference_bit_for_bit() {
    let gguf = golden();
    for &dtype in DType::ALL {
        // Integers, F32 and the types of safetensors are plain conversions.
        let is_plain = dtype == DType::F32 || matches!(dtype.name().as_bytes(), [b'I', b'1'..=b'8', ..]);
        if dtype.ggml_id().is_none() || is_plain {
            continue;
        }
        let tensor = gguf.tensor(dtype.name()).unwrap();
        let expected = gguf.tensor(&format!("{dtype}.f32")).unwrap();
        assert_eq!((tensor.dtype, expected.dtype), (dtype, DType::F32));
        assert_eq!(tensor.shape, expected.shape);
        let found = tensor.to_f32().unwrap();
        assert!(found.iter().any(|&v| v != 0.0), "{dtype}: nothing to compare");
        for (i, (found, expected)) in found.iter().zip(expected.to_f32().unwrap()).enumerate() {
            assert_eq!(
                found.to_bits(),
                expected.to_bits(),
                "{dtype} element {i}: {found:e}, expected {expected:e}"
            );
        }
    }
}

#[test]
fn a_file_of_the_reference_writer_is_read() {
    let gguf = golden();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.str("general.architecture").unwrap(), "test");
    assert_eq!(gguf.u64("test.seed").unwrap(), 20_261_123);
    assert_eq!(gguf.get("test.seed"), Some(&Value::U32(20_261_123)));
    assert_eq!(gguf.strings("test.strings").unwrap(), ["", "a", "naïve ☃"]);
    assert_eq!(gguf.names().next(), Some("Q4_0"));
    assert_eq!(gguf.tensor("Q4_0").unwrap().shape, [2, 96]);
}
