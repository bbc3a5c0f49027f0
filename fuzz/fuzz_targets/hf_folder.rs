//! Any `config.json`, index and shard, separated by newlines, as a model folder.
#![no_main]

use std::fs;

use libfuzzer_sys::fuzz_target;
use nash_core::ModelFile;

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |&byte| byte == b'\n');
    let dir = std::env::temp_dir().join(format!("nash-fuzz-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("the temporary folder can be written");
    for file in ["config.json", "model.safetensors.index.json", "model-1.safetensors"] {
        let path = dir.join(file);
        match parts.next().unwrap_or_default() {
            // An empty part is a file that is not there.
            [] => _ = fs::remove_file(path),
            contents => fs::write(path, contents).expect("the temporary folder can be written"),
        }
    }
    let Ok(model) = ModelFile::open(&dir) else { return };
    for name in model.names() {
        model.tensor(name).and_then(|tensor| tensor.to_f32()).expect("a tensor that was accepted decodes");
    }
});
