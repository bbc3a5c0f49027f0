//! What the GGUF writer writes, the reader reads.

use nash_core::gguf::{Array, Value};
use nash_core::gguf_write::GgufWriter;
use nash_core::{DType, Gguf, Region, Tensor};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

fn array() -> impl Strategy<Value = Array> {
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..9).prop_map(Array::U8),
        vec(any::<i8>(), 0..9).prop_map(Array::I8),
        vec(any::<u16>(), 0..9).prop_map(Array::U16),
        vec(any::<i16>(), 0..9).prop_map(Array::I16),
        vec(any::<u32>(), 0..9).prop_map(Array::U32),
        vec(any::<i32>(), 0..9).prop_map(Array::I32),
        vec(any::<u64>(), 0..9).prop_map(Array::U64),
        vec(any::<i64>(), 0..9).prop_map(Array::I64),
        vec(-1e30f32..1e30, 0..9).prop_map(Array::F32),
        vec(-1e30f64..1e30, 0..9).prop_map(Array::F64),
        vec(any::<bool>(), 0..9).prop_map(Array::Bool),
        vec(".{0,9}", 0..9).prop_map(Array::String),
    ];
    leaf.prop_recursive(3, 30, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e30f32..1e30).prop_map(Value::F32),
        (-1e30f64..1e30).prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        ".{0,30}".prop_map(Value::String),
        array().prop_map(Value::Array),
    ]
}

/// Type, outer dimensions and blocks per row of a tensor.
fn tensor() -> impl Strategy<Value = (DType, Vec<usize>, usize)> {
    let stored: Vec<DType> = DType::ALL
        .iter()
        .copied()
        .filter(|dtype| dtype.ggml_id().is_some())
        .collect();
    (prop::sample::select(stored), vec(1usize..4, 0..4), 1usize..3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn everything_comes_back(
        metadata in btree_map("[a-z0-9._-]{1,20}", value(), 0..8),
        tensors in btree_map(".{1,20}", tensor(), 0..6),
        version in 2u32..=3,
    ) {
        let mut writer = GgufWriter::new().version(version);
        for (key, value) in &metadata {
            writer = writer.metadata(key, value.clone());
        }
        let mut written = Vec::new();
        for (name, (dtype, outer, blocks)) in tensors {
            let shape = [outer, vec![blocks * dtype.block_len()]].concat();
            let bytes = dtype.bytes(shape.iter().product()).unwrap();
            let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + name.len()) as u8).collect();
            let tensor = Tensor::new(name, dtype, shape, Region::from(data)).unwrap();
            writer = writer.tensor(tensor.clone());
            written.push(tensor);
        }
        let gguf = Gguf::from_bytes(writer.to_bytes().unwrap()).unwrap();
        prop_assert_eq!(gguf.version(), version);
        prop_assert_eq!(gguf.metadata(), &metadata);
        prop_assert_eq!(gguf.tensors().len(), written.len());
        for (found, written) in gguf.tensors().iter().zip(&written) {
            prop_assert_eq!(&found.name, &written.name);
            prop_assert_eq!((found.dtype, &found.shape), (written.dtype, &written.shape));
            prop_assert_eq!(&*found.data, &*written.data);
        }
    }
}

#[test]
fn a_type_that_gguf_lacks_is_refused() {
    let tensor = Tensor::new("a", DType::U8, vec![1], Region::from(vec![0])).unwrap();
    let error = GgufWriter::new().tensor(tensor).to_bytes().unwrap_err();
    assert!(
        error.to_string().contains("`a`") && error.hint().is_some(),
        "{error}"
    );
}
