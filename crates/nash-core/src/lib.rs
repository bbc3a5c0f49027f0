//! Tensors, model files (GGUF, safetensors, packed folders), checksums and atomic writes.
