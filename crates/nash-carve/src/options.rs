//! What to carve.

use crate::CarveError;

/// Options of [`crate::carve`].
#[derive(Clone, Debug)]
pub struct CarveOptions {
    /// Routed experts of a layer; by default as many as have a good size.
    pub experts: Option<usize>,
    /// Neurons of the shared expert, about: those that the experts leave over join them; 0 for as few as possible, by default half of the active ones.
    pub shared: Option<usize>,
    /// Share of a block's neurons that a token may use, those of the shared expert included.
    pub active: f64,
    /// How the game starts.
    pub start: Start,
    /// Each layer chooses as many experts as pay best at one price, instead of the same number.
    pub market: bool,
    /// Times at most that neurons answer to the router and it to them.
    pub router_rounds: usize,
    /// Tokens of the calibration text, window by window.
    pub windows: Vec<Vec<u32>>,
    /// Seed of the random start.
    pub seed: u64,
}

/// How the carving game starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Neurons that fire together stand together, the strongest are shared.
    #[default]
    Flocks,
    /// At random.
    Random,
    /// As the neurons lie in the matrix.
    InOrder,
}

/// A block of f neurons in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Division {
    pub(crate) experts: usize,
    /// Neurons of a routed expert.
    pub(crate) width: usize,
    pub(crate) shared: usize,
    /// Routed experts per token.
    pub(crate) top_k: usize,
}

/// Columns that packed matrices pad their rows to: experts of fewer neurons would waste bytes.
const GROUP: usize = 64;
/// Parts of a block, about, if nobody says how many experts.
const PARTS: usize = 24;

impl CarveOptions {
    /// How a block of `f` neurons is divided: what is not asked for is half of the active neurons for the shared expert, and experts of a multiple of 64 neurons, about a 24th
    /// of the block. Neurons that are left over are shared.
    pub(crate) fn division(&self, f: usize) -> Result<Division, CarveError> {
        let whole = |n: f64| (n / GROUP as f64).round() as usize * GROUP;
        let shared = self.shared.unwrap_or(whole(self.active * f as f64 / 2.0)).min(f);
        let width = match self.experts {
            Some(experts) => (f - shared) / experts.max(1),
            None if f < GROUP * PARTS / 2 => f / PARTS,
            None => whole(f as f64 / PARTS as f64),
        };
        let experts = self
            .experts
            .unwrap_or((f - shared).checked_div(width).unwrap_or(0));
        if width == 0 || experts == 0 {
            return Err(CarveError::Division {
                experts,
                shared,
                width: f,
            });
        }
        let shared = f - experts * width;
        let top_k = ((self.active * f as f64 - shared as f64) / width as f64 + 1e-9).floor();
        if !(1.0..=experts as f64).contains(&top_k) {
            return Err(CarveError::Active {
                active: self.active,
                experts,
                least: (shared + width) as f64 / f as f64,
            });
        }
        Ok(Division {
            experts,
            width,
            shared,
            top_k: top_k as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_divided_without_a_rest() {
        let options = |experts, shared, active| CarveOptions {
            experts,
            shared,
            active,
            start: Start::Flocks,
            market: false,
            router_rounds: 0,
            windows: Vec::new(),
            seed: 0,
        };
        let division = |experts, width, shared, top_k| Division {
            experts,
            width,
            shared,
            top_k,
        };
        for (asked, f, expected) in [
            (options(None, None, 0.5), 1536, division(18, 64, 384, 6)),
            (options(None, None, 0.75), 1536, division(15, 64, 576, 9)),
            (options(None, None, 0.5), 4864, division(19, 192, 1216, 6)),
            (options(Some(8), Some(0), 0.5), 1536, division(8, 192, 0, 4)),
            (options(Some(7), None, 0.5), 72, division(7, 10, 2, 3)),
            (options(Some(4), Some(0), 1.0), 72, division(4, 18, 0, 4)),
        ] {
            assert_eq!(asked.division(f).unwrap(), expected, "{asked:?}");
        }
        for wrong in [options(Some(0), None, 0.5), options(Some(4), Some(72), 0.5)] {
            assert!(
                matches!(wrong.division(72), Err(CarveError::Division { .. })),
                "{wrong:?}"
            );
        }
        for wrong in [
            options(Some(4), Some(36), 0.5),
            options(None, None, 1.1),
            options(None, None, 0.0),
        ] {
            assert!(
                matches!(wrong.division(72), Err(CarveError::Active { .. })),
                "{wrong:?}"
            );
        }
    }
}
