//! Packed and dense CPU kernels: one layout, every width, run-time CPU detection.
