//! What a chain of codes answers: the path that a search found, if that gains; else every code for itself.

use nash_kernels::{CHAIN, WINDOW_BITS};

use super::search::Matrix;
use super::{TABLE, Trellis};

/// A chain in play.
pub(crate) struct Chain<'a> {
    /// H among its weights; `None` if only the diagonal counts.
    pub(crate) coupling: Option<&'a Matrix>,
    /// Diagonal of H.
    pub(crate) diagonal: &'a [f32; CHAIN],
    /// Residual `R = Δ H` at its weights.
    pub(crate) residual: [f32; CHAIN],
    /// Values now, in units of the weights.
    pub(crate) values: [f32; CHAIN],
    /// What a table entry of 1 is worth.
    pub(crate) step: f32,
    /// Which of its weights exist: a group at the end of a row can be short. The others have code 0.
    pub(crate) exists: [bool; CHAIN],
}

/// Weights whose value a code has a say in, at most: at 2 bits its own and two before it.
const REACH: usize = 3;

impl Chain<'_> {
    /// Takes `path` if that lowers the potential by more than `least · Σ h d²`. Returns the number of codes that changed.
    #[inline(always)]
    pub(crate) fn take(
        &self,
        trellis: &Trellis,
        path: &[u8; CHAIN],
        codes: &mut [u8; CHAIN],
        least: f32,
    ) -> u64 {
        if path == codes {
            return 0;
        }
        let values = trellis.chain_values(path);
        let change: [f32; CHAIN] = std::array::from_fn(|s| self.step * values[s] - self.values[s]);
        if !self.gains(&change, least) {
            return 0;
        }
        let moved = codes.iter().zip(path).filter(|(a, b)| a != b).count();
        *codes = *path;
        moved as u64
    }

    /// Every code takes its best answer, the last first, if that gains as much. Returns the number of codes that changed.
    #[inline(always)]
    pub(crate) fn respond_alone(mut self, trellis: &Trellis, codes: &mut [u8; CHAIN], least: f32) -> u64 {
        match trellis.bits {
            2 => self.each_alone::<4>(trellis, codes, least),
            3 => self.each_alone::<8>(trellis, codes, least),
            4 => self.each_alone::<16>(trellis, codes, least),
            5 => self.each_alone::<32>(trellis, codes, least),
            _ => self.each_alone::<64>(trellis, codes, least),
        }
    }

    /// Whether a change of values lowers the potential by more than `least · Σ h d²`.
    #[inline(always)]
    fn gains(&self, change: &[f32; CHAIN], least: f32) -> bool {
        let (mut potential, mut size) = (0.0, 0.0);
        for (i, d) in change.iter().enumerate().filter(|(i, _)| self.exists[*i]) {
            let own = self.diagonal[i] * d;
            let pull = match self.coupling {
                Some(h) => {
                    let mut lanes = [0.0f32; 16];
                    for (k, (h, d)) in h[i].iter().zip(change).enumerate() {
                        lanes[k % 16] += h * d;
                    }
                    lanes.iter().sum()
                }
                None => own,
            };
            potential += d * (2.0 * self.residual[i] + pull);
            size += d * own;
        }
        potential < -least * size
    }

    #[inline(always)]
    fn each_alone<const CODES: usize>(
        &mut self,
        trellis: &Trellis,
        codes: &mut [u8; CHAIN],
        least: f32,
    ) -> u64 {
        let mut moved = 0;
        // The window of the code after the one that is asked.
        let mut next = 0;
        for s in (0..CHAIN).rev() {
            if self.exists[s] && self.answer::<CODES>(trellis, codes, (s, next), least) {
                moved += 1;
            }
            next = (usize::from(codes[s]) | next << trellis.bits) % TABLE;
        }
        moved
    }

    /// The best answer of the code at `s`, before a code with window `next`, taken if it gains.
    #[inline(always)]
    fn answer<const CODES: usize>(
        &mut self,
        trellis: &Trellis,
        codes: &mut [u8; CHAIN],
        (s, next): (usize, usize),
        least: f32,
    ) -> bool {
        let bits = CODES.trailing_zeros() as usize;
        let reach = WINDOW_BITS.div_ceil(bits).min(s + 1);
        // Changes of the values at s, s − 1, s − 2, by the code that is tried.
        let mut d = [[0.0f32; CODES]; REACH];
        for (k, d) in d.iter_mut().enumerate().take(reach) {
            let values: [f32; CODES] = match k {
                0 => trellis.values_of_own(next),
                1 => trellis.values_one_before(next, codes[s - 1]),
                _ => trellis.values_two_before(codes[s - 1], codes[s - 2]),
            };
            for (d, v) in d.iter_mut().zip(values) {
                *d = self.step * v - self.values[s - k];
            }
        }
        let (mut gain, mut size) = ([0.0f32; CODES], [0.0f32; CODES]);
        for k in 0..reach {
            let mut pull = [2.0 * self.residual[s - k]; CODES];
            for (l, d) in d.iter().enumerate().take(reach) {
                let h = self.h(s - k, s - l);
                pull.iter_mut().zip(d).for_each(|(pull, d)| *pull += h * d);
            }
            let h = self.diagonal[s - k];
            for (((gain, size), d), pull) in gain.iter_mut().zip(&mut size).zip(&d[k]).zip(pull) {
                *gain -= d * pull;
                *size += h * d * d;
            }
        }
        let mut enough = [false; CODES];
        for ((enough, gain), size) in enough.iter_mut().zip(gain).zip(size) {
            *enough = gain > least * size;
        }
        if !enough.iter().fold(false, |any, e| any | e) {
            return false;
        }
        let mut code = usize::from(codes[s]) % CODES;
        let mut most = 0.0;
        for (other, gain) in gain.into_iter().enumerate() {
            if enough[other] && gain > most {
                (code, most) = (other, gain);
            }
        }
        if code == usize::from(codes[s]) {
            return false;
        }
        codes[s] = code as u8;
        for (k, d) in d.iter().enumerate().take(reach) {
            let d = d[code];
            self.values[s - k] += d;
            match self.coupling {
                Some(h) => {
                    // Of codes that are still to be asked.
                    for (residual, h) in self.residual[..=s].iter_mut().zip(&h[s - k]) {
                        *residual += d * h;
                    }
                }
                None => self.residual[s - k] += d * self.diagonal[s - k],
            }
        }
        true
    }

    /// H between two of its weights.
    #[inline(always)]
    fn h(&self, i: usize, j: usize) -> f32 {
        match self.coupling {
            _ if i == j => self.diagonal[i],
            Some(h) => h[i][j],
            None => 0.0,
        }
    }
}

impl Trellis {
    /// Values of a weight for each code of its own, before a code with window `next`: a run of the table.
    #[inline(always)]
    fn values_of_own<const CODES: usize>(&self, next: usize) -> [f32; CODES] {
        let first = (next * CODES) % TABLE;
        let run = self.table.get(first..first + CODES);
        run.and_then(|run| run.try_into().ok()).unwrap_or([0.0; CODES])
    }

    /// Values of the weight before, whose code is `own`, for each code here.
    #[inline(always)]
    fn values_one_before<const CODES: usize>(&self, next: usize, own: u8) -> [f32; CODES] {
        let states = TABLE / CODES;
        let of_own = &self.by_code[usize::from(own) % CODES * states..][..states];
        // The bits of this code that the window before holds, and at 2 bits two more of the code after.
        if states > CODES {
            let first = next % (states / CODES) * CODES;
            std::array::from_fn(|code| of_own[(first + code) % states])
        } else {
            std::array::from_fn(|code| of_own[code % states])
        }
    }

    /// Values of the weight two before for each code here, given the codes of the two before: at 2 bits.
    #[inline(always)]
    fn values_two_before<const CODES: usize>(&self, before: u8, own: u8) -> [f32; CODES] {
        let codes = (usize::from(own) + usize::from(before) * CODES) % (CODES * CODES);
        std::array::from_fn(|code| self.table[(codes + code * CODES * CODES) % TABLE])
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::{Lanes, WithLanes, dispatch};
    use super::super::search::{Abreast, Lane};
    use super::super::tests::random;
    use super::*;

    struct Best<'a>(&'a Trellis, Lane<'a>, &'a Matrix);

    impl WithLanes for Best<'_> {
        type Output = [u8; CHAIN];

        fn run<L: Lanes>(self, lanes: L) -> [u8; CHAIN] {
            let (mut abreast, mut paths) = (Abreast::new(), [[0; CHAIN]]);
            abreast.set(self.0.bits, 0, self.1);
            abreast.search(lanes, self.0, Some(self.2), &[true; CHAIN], &mut paths);
            paths[0]
        }
    }

    #[test]
    fn values_by_code_are_those_of_the_windows() {
        for bits in 2..=6usize {
            let trellis = Trellis::new(bits, random(bits as u64));
            let mut codes: [u8; CHAIN] = std::array::from_fn(|s| (s * 29 % (1 << bits)) as u8);
            let s = 20;
            let next = usize::from(trellis.windows(&codes)[s + 1]);
            for code in 0..1usize << bits {
                codes[s] = code as u8;
                let expected = trellis.chain_values(&codes);
                let found = match bits {
                    2 => {
                        let two = trellis.values_two_before::<4>(codes[s - 1], codes[s - 2]);
                        assert_eq!(two[code], expected[s - 2]);
                        (
                            trellis.values_of_own::<4>(next)[code],
                            trellis.values_one_before::<4>(next, codes[s - 1])[code],
                        )
                    }
                    3 => (
                        trellis.values_of_own::<8>(next)[code],
                        trellis.values_one_before::<8>(next, codes[s - 1])[code],
                    ),
                    4 => (
                        trellis.values_of_own::<16>(next)[code],
                        trellis.values_one_before::<16>(next, codes[s - 1])[code],
                    ),
                    5 => (
                        trellis.values_of_own::<32>(next)[code],
                        trellis.values_one_before::<32>(next, codes[s - 1])[code],
                    ),
                    _ => (trellis.values_of_own::<64>(next)[code], expected[s - 1]),
                };
                assert_eq!(found, (expected[s], expected[s - 1]), "{bits} bits, code {code}");
            }
        }
    }

    #[test]
    fn an_answer_lowers_the_potential_until_nobody_gains() {
        for bits in 2..=6usize {
            let trellis = Trellis::new(bits, random(7));
            let root: [[f32; CHAIN]; CHAIN] = std::array::from_fn(|i| random(80 + i as u64));
            let h: Matrix = std::array::from_fn(|i| {
                std::array::from_fn(|j| root[i].iter().zip(&root[j]).map(|(a, b)| a * b).sum())
            });
            let target = random::<CHAIN>(9);
            let mut codes = [0u8; CHAIN];
            let potential = |codes: &[u8; CHAIN]| -> (f32, [f32; CHAIN]) {
                let values = trellis.chain_values(codes);
                let delta: [f32; CHAIN] = std::array::from_fn(|s| values[s] - target[s]);
                let residual: [f32; CHAIN] =
                    std::array::from_fn(|i| h[i].iter().zip(&delta).map(|(h, d)| h * d).sum());
                (delta.iter().zip(&residual).map(|(d, r)| d * r).sum(), residual)
            };
            let diagonal = std::array::from_fn(|s| h[s][s]);
            let mut last = potential(&codes).0;
            for round in 0.. {
                let (residual, values) = (potential(&codes).1, trellis.chain_values(&codes));
                let path = if round < 3 {
                    let lane = Lane {
                        residual: &residual,
                        values: &values,
                        diagonal: &diagonal,
                        step: 1.0,
                    };
                    dispatch(Best(&trellis, lane, &h))
                } else {
                    codes
                };
                let chain = Chain {
                    coupling: Some(&h),
                    diagonal: &diagonal,
                    residual,
                    values,
                    step: 1.0,
                    exists: [true; CHAIN],
                };
                let moved = chain.take(&trellis, &path, &mut codes, 1e-3);
                if moved == 0 && chain.respond_alone(&trellis, &mut codes, 1e-3) == 0 {
                    break;
                }
                let now = potential(&codes).0;
                assert!(
                    now < last && round < 50,
                    "{bits} bits, round {round}: {last} to {now}"
                );
                last = now;
            }
            for (s, code) in (0..CHAIN).flat_map(|s| (0..1u8 << bits).map(move |c| (s, c))) {
                let mut other = codes;
                other[s] = code;
                assert!(potential(&other).0 > last * 0.99, "{bits} bits: code {s} gains");
            }
        }
    }
}
