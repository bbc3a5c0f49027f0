//! Neurons change seats: pairs of two experts swap while both together gain.

use std::cmp::Reverse;

use crate::error::{GameError, check_finite, check_len};

/// Neurons on the seats of experts, at fixed choices of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct SeatGame<'a> {
    /// What each neuron is worth in each expert, `[n, E]`.
    worths: &'a [f32],
    experts: usize,
}

/// How a play went.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Played {
    /// Sweeps over all pairs of experts.
    pub sweeps: usize,
    /// Pairs of neurons that changed places.
    pub swaps: usize,
    /// Whether the last sweep found nobody who gains.
    pub settled: bool,
}

impl<'a> SeatGame<'a> {
    /// A game with `worths [n, experts]`.
    ///
    /// # Errors
    /// If the length is no multiple of the experts, or a worth is not finite.
    pub fn new(worths: &'a [f32], experts: usize) -> Result<Self, GameError> {
        check_len("worths", worths.len() / experts.max(1) * experts, worths.len())?;
        check_finite("worths", worths)?;
        Ok(Self { worths, experts })
    }

    /// Plays from `seats [n]`, the expert of each neuron, to an equilibrium, or for `max_sweeps`. The number of neurons of each expert stays.
    ///
    /// # Errors
    /// If `seats` has another length than n, or names an expert that does not exist.
    pub fn play(&self, seats: &mut [u16], max_sweeps: usize) -> Result<Played, GameError> {
        check_len("seats", self.worths.len() / self.experts.max(1), seats.len())?;
        if let Some(&seat) = seats.iter().find(|&&seat| usize::from(seat) >= self.experts) {
            return Err(GameError::Seat {
                seat: seat.into(),
                experts: self.experts,
            });
        }
        let mut members = vec![Vec::new(); self.experts];
        for (neuron, &seat) in seats.iter().enumerate() {
            members[usize::from(seat)].push(neuron);
        }
        let mut played = Played::default();
        while !played.settled && played.sweeps < max_sweeps {
            let mut swaps = 0;
            for e in 0..self.experts {
                for f in e + 1..self.experts {
                    swaps += self.settle(e, f, &mut members);
                }
            }
            played.sweeps += 1;
            played.swaps += swaps;
            played.settled = swaps == 0;
        }
        for (expert, members) in members.iter().enumerate() {
            members.iter().for_each(|&neuron| seats[neuron] = expert as u16);
        }
        Ok(played)
    }

    /// All swaps between two experts that gain, the best pair first; their number. Afterwards no pair of theirs gains: who has
    /// swapped would lose by swapping back, and the rest are those who gain least.
    fn settle(&self, e: usize, f: usize, members: &mut [Vec<usize>]) -> usize {
        let gain = |neuron: usize, from: usize, to: usize| {
            let worths = &self.worths[neuron * self.experts..][..self.experts];
            f64::from(worths[to]) - f64::from(worths[from])
        };
        let ranked = |members: &[usize], from, to| {
            let mut ranked: Vec<(f64, usize)> = members.iter().map(|&i| gain(i, from, to)).zip(0..).collect();
            ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(Reverse(b.1).cmp(&Reverse(a.1))));
            ranked
        };
        let (ours, theirs) = (ranked(&members[e], e, f), ranked(&members[f], f, e));
        let pairs = ours.iter().zip(&theirs).take_while(|(a, b)| a.0 + b.0 > 0.0);
        let mut swaps = 0;
        for (&(_, a), &(_, b)) in pairs {
            let (i, j) = (members[e][a], members[f][b]);
            (members[e][a], members[f][b]) = (j, i);
            swaps += 1;
        }
        swaps
    }
}

#[cfg(test)]
mod tests {
    use super::super::certify_seats;
    use super::*;

    /// Worths of 12 neurons in 4 experts, with ties.
    fn worths() -> Vec<f32> {
        (0..48).map(|i| (i * 7919 % 23) as f32).collect()
    }

    fn total(worths: &[f32], seats: &[u16]) -> f32 {
        let each = worths.chunks(4).zip(seats);
        each.map(|(w, &seat)| w[usize::from(seat)]).sum()
    }

    #[test]
    fn play_raises_the_potential_to_a_certified_equilibrium_and_keeps_the_sizes() {
        let worths = worths();
        let start: Vec<u16> = (0..12).map(|i| [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3][i]).collect();
        let mut seats = start.clone();
        let game = SeatGame::new(&worths, 4).unwrap();
        assert!(certify_seats(&worths, 4, &start).unwrap().max_regret > 0.0);
        let mut last = total(&worths, &seats);
        loop {
            let played = game.play(&mut seats, 1).unwrap();
            let now = total(&worths, &seats);
            if played.settled {
                assert_eq!(now, last);
                break;
            }
            assert!(now > last, "every sweep with a swap gains: {last} {now}");
            last = now;
        }
        assert_eq!(certify_seats(&worths, 4, &seats).unwrap().max_regret, 0.0);
        for e in 0..4 {
            let count = |seats: &[u16]| seats.iter().filter(|&&s| s == e).count();
            assert_eq!(count(&seats), count(&start));
        }
    }

    #[test]
    fn between_two_experts_the_equilibrium_is_the_best_of_all_divisions() {
        let worths: Vec<f32> = (0..16).map(|i| (i * 37 % 19) as f32).collect();
        let best = (0u32..256)
            .filter(|set| set.count_ones() == 4)
            .map(|set| {
                (0..8)
                    .map(|i| worths[2 * i + (set >> i & 1) as usize])
                    .sum::<f32>()
            })
            .fold(0.0, f32::max);
        let mut seats = vec![0, 0, 0, 0, 1, 1, 1, 1];
        SeatGame::new(&worths, 2).unwrap().play(&mut seats, 9).unwrap();
        let found: f32 = worths
            .chunks(2)
            .zip(&seats)
            .map(|(w, &s)| w[usize::from(s)])
            .sum();
        assert_eq!(found, best);
    }

    #[test]
    fn wrong_inputs_are_refused() {
        assert!(SeatGame::new(&[1.0; 5], 2).is_err());
        assert!(SeatGame::new(&[f32::NAN, 1.0], 2).is_err());
        let game = SeatGame::new(&[0.0; 4], 2).unwrap();
        assert!(game.play(&mut [0], 1).is_err());
        assert!(matches!(game.play(&mut [0, 2], 1), Err(GameError::Seat { .. })));
    }
}
