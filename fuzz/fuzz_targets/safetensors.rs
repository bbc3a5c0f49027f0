//! Any bytes as a safetensors file: an error or a file whose every tensor decodes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nash_core::Safetensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Safetensors::from_bytes(bytes) else { return };
    for tensor in file.tensors() {
        let values = tensor.to_f32().expect("a tensor that was accepted decodes");
        assert_eq!(values.len(), tensor.elements());
    }
});
