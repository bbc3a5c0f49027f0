//! Any `config.json`, `nashswarm.json` and weights, separated by newlines, as a packed model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nash_core::PackedFolder;
use nash_kernels::dequantize_row;

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |&byte| byte == b'\n');
    let mut next = || parts.next().unwrap_or_default();
    let Ok(folder) = PackedFolder::from_bytes(next(), next(), next()) else { return };
    for tensor in folder.tensors() {
        tensor.to_f32().expect("a tensor that was accepted decodes");
    }
    for packed in folder.packed_tensors().values() {
        let shape = packed.shape();
        let mut row = vec![0.0; shape.cols];
        for r in 0..shape.rows {
            dequantize_row(packed.as_ref(), r, &mut row);
        }
    }
    // Right or wrong, the digests are compared without a panic.
    let _ = folder.verify(|_| ());
});
