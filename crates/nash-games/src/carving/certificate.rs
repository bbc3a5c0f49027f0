//! Whether anybody gains by changing seats: every pair of neurons is asked, one after the other.

use rayon::prelude::*;

use crate::error::{GameError, check_len};

/// What was found about a division into experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SeatCertificate {
    /// Largest gain of a pair of neurons that would change places, in units of the worths; 0 at an equilibrium.
    pub max_regret: f64,
    /// Pairs that would gain.
    pub unsettled: usize,
    /// The potential: what all neurons are worth where they are.
    pub potential: f64,
}

/// Asks every pair of neurons in different experts, given `worths [n, experts]` and the expert of each neuron.
///
/// # Errors
/// If the lengths do not agree.
pub fn certify_seats(worths: &[f32], experts: usize, seats: &[u16]) -> Result<SeatCertificate, GameError> {
    check_len("worths", seats.len() * experts, worths.len())?;
    let worth = |neuron: usize, seat: u16| f64::from(worths[neuron * experts + usize::from(seat)]);
    let ask = |i: usize| {
        let mut found = SeatCertificate {
            potential: worth(i, seats[i]),
            ..SeatCertificate::default()
        };
        for j in i + 1..seats.len() {
            let (e, f) = (seats[i], seats[j]);
            // Gain by gain, so that exact numbers give an exact zero.
            let gain = (worth(i, f) - worth(i, e)) + (worth(j, e) - worth(j, f));
            if e != f && gain > 0.0 {
                found.max_regret = found.max_regret.max(gain);
                found.unsettled += 1;
            }
        }
        found
    };
    let each: Vec<SeatCertificate> = (0..seats.len()).into_par_iter().map(ask).collect();
    Ok(each
        .into_iter()
        .fold(SeatCertificate::default(), |all, one| SeatCertificate {
            max_regret: all.max_regret.max(one.max_regret),
            unsettled: all.unsettled + one.unsettled,
            potential: all.potential + one.potential,
        }))
}
