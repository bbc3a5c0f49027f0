//! GGUF files that are malformed on purpose: each is refused with an error, and none allocates what it only claims.
#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

use nash_core::gguf::{Array, KEY_ALIGNMENT, Value};
use nash_core::gguf_write::GgufWriter;
use nash_core::{DType, ErrorKind, Gguf, Region, Tensor};

/// A GGUF file byte by byte.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    /// Magic, version 3, and the two counts.
    fn new(tensors: u64, metadata: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(metadata)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn string(self, text: impl AsRef<[u8]>) -> Self {
        self.u64(text.as_ref().len() as u64).bytes(text.as_ref())
    }

    /// An entry of the tensor table; `shape` is innermost first, as in the file.
    fn tensor(self, name: &str, shape: &[u64], dtype: u32, offset: u64) -> Self {
        let raw = self.string(name).u32(shape.len() as u32);
        shape
            .iter()
            .fold(raw, |raw, &dimension| raw.u64(dimension))
            .u32(dtype)
            .u64(offset)
    }

    /// Pads to the default alignment and appends `count` bytes of tensor data.
    fn data(mut self, count: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + count, 0);
        self
    }

    fn open(self) -> Result<Gguf, nash_core::CoreError> {
        Gguf::from_bytes(self.0)
    }
}

const F32: u32 = 0;
const Q4_0: u32 = 2;
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// The file is refused for the expected reason.
macro_rules! assert_refused {
    ($raw:expr, $pattern:pat) => {
        let error = $raw.open().unwrap_err();
        assert!(matches!(error.kind(), $pattern), "{error}");
    };
}

fn valid() -> Vec<u8> {
    GgufWriter::new()
        .metadata("general.architecture", "llama")
        .metadata("strings", vec!["a".to_owned(), "ü".to_owned()])
        .metadata(
            "nested",
            Array::Array(vec![Array::U8(vec![1, 2]), Array::F64(vec![0.5])]),
        )
        .metadata("gpt-oss.odd key!", -3i64)
        .tensor(Tensor::from_f32("a", vec![2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap())
        .tensor(Tensor::new("b", DType::Q4_0, vec![1, 64], Region::from(vec![0x42; 36])).unwrap())
        .to_bytes()
        .unwrap()
}

#[test]
fn the_valid_file_is_accepted_in_both_versions() {
    let gguf = Gguf::from_bytes(valid()).unwrap();
    assert_eq!(gguf.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(
        gguf.tensor("a").unwrap().to_f32().unwrap(),
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    );
    assert_eq!(gguf.tensor("b").unwrap().shape, [1, 64]);
    assert_eq!(gguf.strings("strings").unwrap(), ["a", "ü"]);
    let nested = Value::Array(Array::Array(vec![Array::U8(vec![1, 2]), Array::F64(vec![0.5])]));
    assert_eq!(gguf.get("nested"), Some(&nested));
    assert_eq!(gguf.get("gpt-oss.odd key!").and_then(Value::as_i64), Some(-3));
    let version_2 = GgufWriter::new().version(2).to_bytes().unwrap();
    assert_eq!(Gguf::from_bytes(version_2).unwrap().version(), 2);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = valid();
    // The last tensor has 36 bytes; the padding after it is not needed.
    let end = bytes.len() - (64 - 36);
    assert!(Gguf::from_bytes(&bytes[..end]).is_ok());
    for length in 0..end {
        let error = Gguf::from_bytes(&bytes[..length]).unwrap_err();
        let truncated = matches!(
            error.kind(),
            ErrorKind::Truncated { .. } | ErrorKind::OutOfBounds { .. }
        );
        assert!(truncated, "{length} bytes: {error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn every_flipped_byte_is_refused_or_harmless() {
    let bytes = valid();
    for at in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            if let Ok(gguf) = Gguf::from_bytes(damaged) {
                for tensor in gguf.tensors() {
                    assert_eq!(tensor.to_f32().unwrap().len(), tensor.elements());
                }
            }
        }
    }
}

#[test]
fn wrong_magic() {
    assert_refused!(
        Raw::default().bytes(b"GGML").data(64),
        ErrorKind::NotAModel { .. }
    );
    assert_refused!(Raw::default().data(64), ErrorKind::NotAModel { .. });
}

#[test]
fn unsupported_versions() {
    for version in [0, 1, 4, u32::MAX] {
        let raw = Raw(b"GGUF".to_vec()).u32(version).u64(0).u64(0);
        assert_refused!(raw, ErrorKind::UnsupportedVersion { .. });
    }
}

#[test]
fn big_endian_is_named() {
    let error = Raw(b"GGUF".to_vec())
        .u32(3u32.swap_bytes())
        .u64(0)
        .u64(0)
        .open()
        .unwrap_err();
    assert!(error.to_string().contains("big-endian"), "{error}");
}

#[test]
fn lying_tensor_count() {
    for count in [1, 1 << 20, 1 << 40, u64::MAX] {
        assert_refused!(Raw::new(count, 0), ErrorKind::Truncated { .. });
    }
}

#[test]
fn lying_metadata_count() {
    for count in [1, 1 << 40, u64::MAX] {
        assert_refused!(Raw::new(0, count), ErrorKind::Truncated { .. });
    }
}

#[test]
fn counts_beyond_any_sane_model() {
    // The bytes for two million tensors are there.
    assert_refused!(
        Raw::new(2_000_000, 0).data(2_000_000 * 24),
        ErrorKind::TooLarge { .. }
    );
    assert_refused!(
        Raw::new(0, 4_000_000).data(4_000_000 * 13),
        ErrorKind::TooLarge { .. }
    );
}

#[test]
fn lying_string_length() {
    for length in [1000, 1 << 50, u64::MAX] {
        assert_refused!(
            Raw::new(0, 1).u64(length).bytes(&[b'k'; 4]).data(0),
            ErrorKind::Truncated { .. }
        );
        let value = Raw::new(0, 1).string("k").u32(STRING).u64(length).bytes(b"text");
        assert_refused!(value, ErrorKind::Truncated { .. });
    }
}

#[test]
fn lying_array_count() {
    for element in [F32, STRING, ARRAY, 10] {
        for count in [100, 1 << 61, u64::MAX] {
            let raw = Raw::new(0, 1)
                .string("k")
                .u32(ARRAY)
                .u32(element)
                .u64(count)
                .bytes(&[0; 24]);
            assert_refused!(raw, ErrorKind::Truncated { .. });
        }
    }
}

#[test]
fn arrays_nested_too_deeply() {
    let raw = (0..10_000).fold(Raw::new(0, 1).string("k").u32(ARRAY), |raw, _| {
        raw.u32(ARRAY).u64(1)
    });
    assert_refused!(raw, ErrorKind::TooLarge { .. });
}

#[test]
fn unknown_metadata_type() {
    for kind in [13, u32::MAX] {
        assert_refused!(
            Raw::new(0, 1).string("k").u32(kind).data(64),
            ErrorKind::Invalid { .. }
        );
        let array = Raw::new(0, 1).string("k").u32(ARRAY).u32(kind).u64(1).data(64);
        assert_refused!(array, ErrorKind::Invalid { .. });
    }
}

#[test]
fn duplicate_metadata_key() {
    let raw = Raw::new(0, 2)
        .string("k")
        .u32(U32)
        .u32(1)
        .string("k")
        .u32(U32)
        .u32(2);
    assert_refused!(raw, ErrorKind::DuplicateName { .. });
}

#[test]
fn duplicate_tensor_name() {
    let raw = Raw::new(2, 0)
        .tensor("a", &[8], F32, 0)
        .tensor("a", &[8], F32, 32)
        .data(64);
    assert_refused!(raw, ErrorKind::DuplicateName { .. });
}

#[test]
fn names_that_are_not_utf8() {
    let key = Raw::new(0, 1).string(b"k\xff").u32(U32).u32(1);
    assert_refused!(key, ErrorKind::NotUtf8 { .. });
    let tensor = Raw::new(1, 0)
        .string(b"\xc3\x28")
        .u32(1)
        .u64(8)
        .u32(F32)
        .u64(0)
        .data(32);
    assert_refused!(tensor, ErrorKind::NotUtf8 { .. });
    let value = Raw::new(0, 1).string("k").u32(STRING).string(b"\xff");
    assert_refused!(value, ErrorKind::NotUtf8 { .. });
}

#[test]
fn name_too_long() {
    let raw = Raw::new(0, 1).string(vec![b'k'; 70_000]).u32(U32).u32(1);
    assert_refused!(raw, ErrorKind::TooLarge { .. });
}

#[test]
fn too_many_dimensions() {
    assert_refused!(
        Raw::new(1, 0).tensor("a", &[1; 9], F32, 0).data(32),
        ErrorKind::TooLarge { .. }
    );
    let raw = Raw::new(1, 0).string("a").u32(u32::MAX).data(64);
    assert_refused!(raw, ErrorKind::TooLarge { .. });
}

#[test]
fn zero_dimension() {
    for shape in [&[0][..], &[4, 0], &[0, u64::MAX]] {
        let raw = Raw::new(1, 0).tensor("a", shape, F32, 0).data(64);
        assert_refused!(raw, ErrorKind::ZeroDimension { .. });
    }
}

#[test]
fn shape_that_overflows() {
    for shape in [&[u64::MAX, 2][..], &[1 << 32, 1 << 32], &[1 << 62], &[u64::MAX]] {
        let raw = Raw::new(1, 0).tensor("a", shape, F32, 0).data(64);
        assert_refused!(raw, ErrorKind::SizeOverflow { .. });
    }
}

#[test]
fn offset_that_overflows() {
    let raw = Raw::new(1, 0).tensor("a", &[16], F32, u64::MAX - 31).data(64);
    assert_refused!(raw, ErrorKind::SizeOverflow { .. });
}

#[test]
fn row_that_is_not_whole_blocks() {
    let raw = Raw::new(1, 0).tensor("a", &[16, 2], Q4_0, 0).data(64);
    assert_refused!(raw, ErrorKind::PartialBlock { .. });
}

#[test]
fn unknown_tensor_type() {
    for id in [4, 5, 31, 36, 41, 1000, u32::MAX] {
        let raw = Raw::new(1, 0).tensor("a", &[32], id, 0).data(64);
        assert_refused!(raw, ErrorKind::UnknownDType { .. });
    }
}

#[test]
fn tensor_outside_of_the_file() {
    assert_refused!(
        Raw::new(1, 0).tensor("a", &[9], F32, 0).data(32),
        ErrorKind::OutOfBounds { .. }
    );
    assert_refused!(
        Raw::new(1, 0).tensor("a", &[8], F32, 32).data(32),
        ErrorKind::OutOfBounds { .. }
    );
    assert_refused!(
        Raw::new(1, 0).tensor("a", &[8], F32, 1 << 40).data(32),
        ErrorKind::OutOfBounds { .. }
    );
    assert_refused!(
        Raw::new(1, 0).tensor("a", &[1 << 50], F32, 0).data(32),
        ErrorKind::OutOfBounds { .. }
    );
    // No tensor data at all, not even padding.
    assert_refused!(
        Raw::new(1, 0).tensor("a", &[1], F32, 0),
        ErrorKind::OutOfBounds { .. }
    );
}

#[test]
fn overlapping_tensors() {
    let raw = Raw::new(2, 0)
        .tensor("a", &[16], F32, 0)
        .tensor("b", &[8], F32, 32)
        .data(96);
    let error = raw.open().unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Overlap { other } if other == "a"),
        "{error}"
    );
    assert_eq!(error.tensor(), Some("b"));
}

#[test]
fn misaligned_offset() {
    let raw = Raw::new(1, 0).tensor("a", &[1], F32, 4).data(64);
    assert_refused!(
        raw,
        ErrorKind::Misaligned {
            offset: 4,
            alignment: 32
        }
    );
}

#[test]
fn alignment_that_is_no_power_of_two() {
    for alignment in [0, 3, 31, u32::MAX] {
        let raw = Raw::new(0, 1).string(KEY_ALIGNMENT).u32(U32).u32(alignment);
        assert_refused!(raw, ErrorKind::Invalid { .. });
    }
    let text = Raw::new(0, 1).string(KEY_ALIGNMENT).u32(STRING).string("32");
    assert_refused!(text, ErrorKind::Invalid { .. });
}

#[test]
fn other_alignments_are_honoured() {
    for alignment in [1u32, 8, 64, 4096] {
        let header = Raw::new(1, 1)
            .string(KEY_ALIGNMENT)
            .u32(U32)
            .u32(alignment)
            .tensor("a", &[1], F32, 0);
        let mut bytes = header.0;
        bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
        bytes.extend(7.5f32.to_le_bytes());
        let gguf = Gguf::from_bytes(bytes).unwrap();
        assert_eq!(
            gguf.tensor("a").unwrap().to_f32().unwrap(),
            [7.5],
            "alignment {alignment}"
        );
    }
}

#[test]
fn part_of_a_split_model_needs_its_path() {
    let bytes = GgufWriter::new()
        .metadata("split.count", 2u16)
        .metadata("split.no", 0u16)
        .to_bytes()
        .unwrap();
    assert_refused!(Raw(bytes), ErrorKind::Invalid { .. });
}

#[test]
fn scales_of_nan_decode_to_nan_and_do_no_harm() {
    let mut block = vec![0x88; 18];
    block[..2].copy_from_slice(&0x7e00u16.to_le_bytes());
    let tensor = Tensor::new("a", DType::Q4_0, vec![1, 32], Region::from(block)).unwrap();
    assert!(tensor.to_f32().unwrap().iter().all(|value| value.is_nan()));
}

#[test]
fn values_of_the_wrong_type_are_named() {
    let gguf = Gguf::from_bytes(valid()).unwrap();
    let error = gguf.u64("general.architecture").unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::WrongType { found, .. } if found == "string"),
        "{error}"
    );
    let error = gguf.str("llama.block_count").unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::MissingKey { key } if key == "llama.block_count"),
        "{error}"
    );
    let error = gguf.tensor("missing").unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::MissingTensor { available: 2 }),
        "{error}"
    );
}
