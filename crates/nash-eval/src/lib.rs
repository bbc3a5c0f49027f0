//! Measurements: perplexity, KL divergence, speed and memory.
