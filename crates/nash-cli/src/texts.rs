//! The texts that come with the program; `assets/README.md` says where they are from.

/// A book to calibrate on.
pub(crate) const CALIBRATION: &str = include_str!("../assets/calibration.txt");

/// Another book, by another author, to measure on.
pub(crate) const EVALUATION: &str = include_str!("../assets/evaluation.txt");
