//! Who sees whom: the k nearest tokens by the cosine of their states, made symmetric.
//!
//! If i sees j but j does not see i, the routing game has no potential and may cycle, so an edge that either end asks for is seen by
//! both; a token has k neighbours at least, on average fewer than 2k. Exact: all pairs are compared, in blocks of rows.

use nash_kernels::dense::{MatMut, MatRef, gemm};
use rayon::prelude::*;

use crate::error::{GameError, check_finite, check_len};

/// Neighbours of a player: as many as a starling looks at (Ballerini et al. 2008).
pub const FLOCK: usize = 7;

/// Rows compared at once: bounds the memory, `BLOCK · T` floats.
const BLOCK: usize = 256;

/// A symmetric graph over the tokens of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbours {
    /// Where each list starts, and the end of the last, `[T + 1]`.
    starts: Vec<usize>,
    /// The lists, each ascending.
    lists: Vec<u32>,
}

impl Neighbours {
    /// The `k` nearest of each token by the cosine of `states [T, width]`, and all who have it among theirs. Ties go to the lower token;
    /// a state of zeros is equally far from all.
    ///
    /// # Errors
    /// If `states` is not `[tokens, width]` or holds a value that is not finite.
    pub fn nearest(states: &[f32], tokens: usize, width: usize, k: usize) -> Result<Self, GameError> {
        check_len("states", tokens * width, states.len())?;
        check_finite("states", states)?;
        let mut unit = states.to_vec();
        unit.par_chunks_mut(width.max(1)).for_each(|row| {
            let length = row
                .iter()
                .map(|&v| f64::from(v) * f64::from(v))
                .sum::<f64>()
                .sqrt();
            let factor = if length > 0.0 { 1.0 / length } else { 0.0 };
            row.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
        });
        let k = k.min(tokens.saturating_sub(1));
        let all = MatRef::row_major(&unit, tokens, width);
        let mut cosines = vec![0.0; BLOCK.min(tokens) * tokens];
        let mut edges = Vec::with_capacity(2 * tokens * k);
        for start in (0..tokens).step_by(BLOCK) {
            let rows = start..tokens.min(start + BLOCK);
            let block = &mut cosines[..rows.len() * tokens];
            let out = MatMut::row_major(block, rows.len(), tokens);
            gemm(1.0, all.rows_range(rows.clone()), all.t(), 0.0, out);
            let found: Vec<Vec<u32>> = rows
                .into_par_iter()
                .zip(block.par_chunks(tokens))
                .map(|(token, cosines)| largest(cosines, token, k))
                .collect();
            for (from, list) in (start as u32..).zip(found) {
                edges.extend(list.iter().flat_map(|&to| [(from, to), (to, from)]));
            }
        }
        edges.sort_unstable();
        edges.dedup();
        Ok(Self::of_edges(tokens, &edges))
    }

    /// Of given lists, a list of neighbours per token.
    ///
    /// # Errors
    /// [`GameError::Directed`] if a token is not in the list of one of its neighbours; [`GameError::Neighbour`] if
    /// one is named twice, is the token itself or does not exist.
    pub fn from_lists(lists: &[Vec<u32>]) -> Result<Self, GameError> {
        let tokens = lists.len();
        let mut edges = Vec::new();
        for (from, list) in lists.iter().enumerate() {
            edges.extend(list.iter().map(|&to| (from as u32, to)));
        }
        edges.sort_unstable();
        for (i, &(from, to)) in edges.iter().enumerate() {
            let (token, neighbour) = (from as usize, to as usize);
            if token == neighbour || neighbour >= tokens || (i > 0 && edges[i - 1] == edges[i]) {
                return Err(GameError::Neighbour {
                    token,
                    neighbour,
                    tokens,
                });
            }
            if edges.binary_search(&(to, from)).is_err() {
                return Err(GameError::Directed {
                    from: token,
                    to: neighbour,
                });
            }
        }
        Ok(Self::of_edges(tokens, &edges))
    }

    /// Edges sorted, both directions of each.
    fn of_edges(tokens: usize, edges: &[(u32, u32)]) -> Self {
        let starts = (0..=tokens)
            .map(|t| edges.partition_point(|e| (e.0 as usize) < t))
            .collect();
        let lists = edges.iter().map(|e| e.1).collect();
        Self { starts, lists }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.starts.len() - 1
    }

    /// The tokens that `token` sees, ascending.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn of(&self, token: usize) -> &[u32] {
        &self.lists[self.starts[token]..self.starts[token + 1]]
    }

    /// Pairs of tokens that see each other.
    pub fn pairs(&self) -> usize {
        self.lists.len() / 2
    }
}

/// The `k` tokens with the largest cosines, without `token` itself.
fn largest(cosines: &[f32], token: usize, k: usize) -> Vec<u32> {
    if k == 0 {
        return Vec::new();
    }
    let mut others: Vec<u32> = (0..cosines.len() as u32)
        .filter(|&j| j as usize != token)
        .collect();
    let order = |a: &u32, b: &u32| {
        cosines[*b as usize]
            .total_cmp(&cosines[*a as usize])
            .then(a.cmp(b))
    };
    others.select_nth_unstable_by(k - 1, order);
    others.truncate(k);
    others
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nearest_are_symmetric_and_nearest(
            tokens in 0usize..40, width in 1usize..6, k in 0usize..9, seed in proptest::collection::vec(-4i8..5, 240)
        ) {
            // Small integers: cosines of different pairs are equal or well apart.
            let states: Vec<f32> = (0..tokens * width).map(|i| f32::from(seed[i])).collect();
            let graph = Neighbours::nearest(&states, tokens, width, k).unwrap();
            prop_assert_eq!(graph.tokens(), tokens);
            let cosine = |i: usize, j: usize| {
                let row = |i: usize| states[i * width..][..width].iter().map(|&v| f64::from(v));
                let dot = |i, j| row(i).zip(row(j)).map(|(a, b)| a * b).sum::<f64>();
                dot(i, j) / (dot(i, i) * dot(j, j)).sqrt().max(f64::MIN_POSITIVE)
            };
            for i in 0..tokens {
                let list = graph.of(i);
                prop_assert!(list.len() >= k.min(tokens - 1) && list.is_sorted() && !list.contains(&(i as u32)));
                for &j in list {
                    prop_assert!(graph.of(j as usize).contains(&(i as u32)), "{i} sees {j} one way");
                    // One of the two has the other among its k nearest: fewer than k are clearly nearer.
                    let nearer = |i: usize, j: usize| (0..tokens).filter(|&l| l != i && cosine(i, l) > cosine(i, j) + 1e-5).count();
                    prop_assert!(nearer(i, j as usize) < k || nearer(j as usize, i) < k);
                }
            }
            let lists: Vec<Vec<u32>> = (0..tokens).map(|i| graph.of(i).to_vec()).collect();
            prop_assert_eq!(Neighbours::from_lists(&lists), Ok(graph));
        }
    }

    #[test]
    fn lists_that_are_no_symmetric_graph_are_refused() {
        let refused = |lists: &[Vec<u32>]| Neighbours::from_lists(lists).unwrap_err();
        assert_eq!(
            refused(&[vec![1], vec![]]),
            GameError::Directed { from: 0, to: 1 }
        );
        for (lists, neighbour) in [
            ([vec![0], vec![]], 0),
            ([vec![2], vec![]], 2),
            ([vec![1, 1], vec![0]], 1),
        ] {
            assert_eq!(
                refused(&lists),
                GameError::Neighbour {
                    token: 0,
                    neighbour,
                    tokens: 2
                }
            );
        }
    }
}
