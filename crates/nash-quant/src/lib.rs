//! Compression of a model by games: calibration, rounding, allocation, packing, certificates.
