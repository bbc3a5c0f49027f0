//! Decoder language models as data over shared blocks: configuration, forward pass, KV cache, sampling, generation.
