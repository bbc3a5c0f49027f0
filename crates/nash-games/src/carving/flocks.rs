//! The start: flocks of neurons that fire together, of given sizes.
//!
//! Every neuron sees the 7 others whose activity over the tokens is most like its own (cosine), as a starling does; the graph is made symmetric. A
//! flock grows from the most active neuron that is still free and takes in, one by one, the free neuron with the strongest ties to it.

use crate::error::GameError;
use crate::routing::{FLOCK, Neighbours};

/// The flock of each neuron. `activity [n, T]` is never negative; flock f has `sizes[f]` seats, n together.
///
/// # Errors
/// If the sizes do not add up to n, lengths do not agree, or a value is not finite.
pub fn flocks(activity: &[f32], neurons: usize, sizes: &[usize]) -> Result<Vec<u16>, GameError> {
    let tokens = activity.len() / neurons.max(1);
    crate::error::check_len("seats", neurons, sizes.iter().sum())?;
    let graph = Neighbours::nearest(activity, neurons, tokens, FLOCK)?;
    let total = |i: usize| {
        activity[i * tokens..][..tokens]
            .iter()
            .map(|&v| f64::from(v))
            .sum::<f64>()
    };
    let totals: Vec<f64> = (0..neurons).map(total).collect();
    let mut order: Vec<usize> = (0..neurons).collect();
    order.sort_by(|&a, &b| totals[b].total_cmp(&totals[a]).then(a.cmp(&b)));
    let mut flock = vec![u16::MAX; neurons];
    let mut free = order.into_iter();
    for (f, &size) in sizes.iter().enumerate() {
        let mut ties = vec![0u32; neurons];
        for _ in 0..size {
            let tied = (0..neurons)
                .filter(|&i| flock[i] == u16::MAX && ties[i] > 0)
                .max_by(|&a, &b| {
                    ties[a]
                        .cmp(&ties[b])
                        .then(totals[a].total_cmp(&totals[b]))
                        .then(b.cmp(&a))
                });
            let next = tied.or_else(|| free.find(|&i| flock[i] == u16::MAX));
            let Some(next) = next else { break };
            flock[next] = f as u16;
            graph.of(next).iter().for_each(|&i| ties[i as usize] += 1);
        }
    }
    Ok(flock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neurons_that_fire_together_stand_together() {
        // Three kinds of neurons of 16 each, shuffled; a kind fires at its third of the tokens.
        let kind = |i: usize| i * 5 % 3;
        let activity: Vec<f32> = (0..48 * 12)
            .map(|k| {
                let (i, t) = (k / 12, k % 12);
                if t % 3 == kind(i) {
                    1.0 + (i * t % 4) as f32 * 0.1
                } else {
                    0.0
                }
            })
            .collect();
        let found = flocks(&activity, 48, &[16, 16, 16]).unwrap();
        for i in 0..48 {
            for j in 0..48 {
                assert_eq!(found[i] == found[j], kind(i) == kind(j), "{i} {j}");
            }
        }
        assert!(flocks(&activity, 48, &[16, 16]).is_err());
    }
}
