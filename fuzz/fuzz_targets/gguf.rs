//! Any bytes as a GGUF file: an error or a model whose every tensor decodes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nash_core::Gguf;

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes(bytes) else { return };
    for name in gguf.names() {
        let tensor = gguf.tensor(name).expect("a name of the file is a tensor of the file");
        let values = tensor.to_f32().expect("a tensor that was accepted decodes");
        assert_eq!(values.len(), tensor.elements());
    }
});
