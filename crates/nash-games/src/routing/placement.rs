//! Where experts lie: those that fire together share a page, so that one fetch brings what is wanted next.
//!
//! Fast memory fetches pages of m experts. Experts are the players, pages their strategies, and an expert is paid for its company:
//! `u_e = Σ_{f on the page of e} w_ef`, w the number of tokens that chose both. Pages are full, so a move is a swap of two experts; w is
//! symmetric, so `Φ = Σ_{pairs on one page} w_ef` rises by exactly what the two gain together, and play ends where no pair gains.
//!
//! For two experts per token, the pages a token touches are 2 minus whether both share one: the largest Φ is the fewest pages. For more it
//! is a bound: a page that holds j of a token's experts saves j − 1 fetches and counts j(j − 1)/2.

use crate::error::{GameError, check_finite, check_len};

/// How the game went.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Placed {
    /// The page of each expert, `[E]`.
    pub pages: Vec<u16>,
    /// Sweeps over all experts.
    pub sweeps: usize,
    /// Swaps made.
    pub swaps: usize,
    /// Φ at the start (flocks) and at the end.
    pub potential: [f64; 2],
    /// Whether the last sweep found no pair that gains.
    pub settled: bool,
}

/// Puts `experts` on pages of `per_page` (the last may hold fewer), given how often each two were chosen together, `together [E, E]`, symmetric.
/// Starts from flocks that grow around the busiest expert left, then plays to an equilibrium, or for `max_sweeps`.
///
/// # Errors
/// If lengths do not agree, a value is not finite, or there is nothing on a page.
pub fn place_experts(
    together: &[f32],
    experts: usize,
    per_page: usize,
    max_sweeps: usize,
) -> Result<Placed, GameError> {
    check_len("co-activations", experts * experts, together.len())?;
    check_finite("co-activations", together)?;
    check_len("experts on a page, at least", per_page.max(1), per_page)?;
    let company = Company { together, experts };
    let mut pages = flocks(&company, per_page);
    let mut placed = Placed {
        potential: [company.potential(&pages), 0.0],
        ..Placed::default()
    };
    while !placed.settled && placed.sweeps < max_sweeps {
        let mut swaps = 0;
        for e in 0..experts {
            // The best partner of all; ties to the lower one.
            let best = (0..experts)
                .filter(|&f| pages[f] != pages[e])
                .map(|f| (company.gain(&pages, e, f), f))
                .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
            if let Some((gain, f)) = best
                && gain > 0.0
            {
                pages.swap(e, f);
                swaps += 1;
            }
        }
        placed.sweeps += 1;
        placed.swaps += swaps;
        placed.settled = swaps == 0;
    }
    placed.potential[1] = company.potential(&pages);
    placed.pages = pages;
    Ok(placed)
}

/// The largest gain, in co-activations, that a swap of two experts would bring: 0 or less at an equilibrium. Asks every pair for Φ before and after, without
/// the solver's sums.
///
/// # Errors
/// If lengths do not agree.
pub fn certify_placement(together: &[f32], pages: &[u16]) -> Result<f64, GameError> {
    let experts = pages.len();
    check_len("co-activations", experts * experts, together.len())?;
    let potential = |pages: &[u16]| {
        let pairs = (0..experts).flat_map(|e| (0..e).map(move |f| (e, f)));
        let near = pairs.filter(|&(e, f)| pages[e] == pages[f]);
        near.map(|(e, f)| f64::from(together[e * experts + f]))
            .sum::<f64>()
    };
    let now = potential(pages);
    let mut largest = f64::NEG_INFINITY;
    for e in 0..experts {
        for f in (0..e).filter(|&f| pages[f] != pages[e]) {
            let mut moved = pages.to_vec();
            moved.swap(e, f);
            largest = largest.max(potential(&moved) - now);
        }
    }
    Ok(largest.max(0.0))
}

/// Who likes whom.
struct Company<'a> {
    together: &'a [f32],
    experts: usize,
}

impl Company<'_> {
    fn of(&self, e: usize, f: usize) -> f64 {
        f64::from(self.together[e * self.experts + f])
    }

    /// Company of `e` on `page`, without `but`.
    fn on(&self, pages: &[u16], e: usize, page: u16, but: usize) -> f64 {
        let mates = (0..self.experts).filter(|&f| pages[f] == page && f != e && f != but);
        mates.map(|f| self.of(e, f)).sum()
    }

    /// What `e` and `f` gain together if they swap.
    fn gain(&self, pages: &[u16], e: usize, f: usize) -> f64 {
        let (here, there) = (pages[e], pages[f]);
        self.on(pages, e, there, f) - self.on(pages, e, here, e) + self.on(pages, f, here, e)
            - self.on(pages, f, there, f)
    }

    fn potential(&self, pages: &[u16]) -> f64 {
        let of = |e: usize| self.on(pages, e, pages[e], e);
        (0..self.experts).map(of).sum::<f64>() / 2.0
    }
}

/// Page after page, around the busiest expert left: whoever has the most company there joins.
fn flocks(company: &Company<'_>, per_page: usize) -> Vec<u16> {
    let experts = company.experts;
    let busy = |e: usize| {
        (0..experts)
            .filter(|&f| f != e)
            .map(|f| company.of(e, f))
            .sum::<f64>()
    };
    let busy: Vec<f64> = (0..experts).map(busy).collect();
    let mut pages = vec![u16::MAX; experts];
    for seat in 0..experts {
        let page = (seat / per_page) as u16;
        let joins = (0..experts)
            .filter(|&e| pages[e] == u16::MAX)
            .map(|e| (company.on(&pages, e, page, e), busy[e], e))
            .max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)).then(b.2.cmp(&a.2)));
        if let Some((_, _, e)) = joins {
            pages[e] = page;
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn play_ends_where_no_swap_gains(
            experts in 1usize..14, per_page in 1usize..5, counts in proptest::collection::vec(0u8..20, 14 * 14)
        ) {
            let together: Vec<f32> = (0..experts * experts)
                .map(|i| {
                    let (e, f) = (i / experts, i % experts);
                    f32::from(counts[e.min(f) * 14 + e.max(f)])
                })
                .collect();
            let placed = place_experts(&together, experts, per_page, 1000).unwrap();
            prop_assert!(placed.settled && placed.potential[1] >= placed.potential[0]);
            prop_assert_eq!(certify_placement(&together, &placed.pages).unwrap(), 0.0);
            for page in 0..experts.div_ceil(per_page) {
                let members = placed.pages.iter().filter(|&&p| usize::from(p) == page).count();
                prop_assert_eq!(members, per_page.min(experts - page * per_page));
            }
        }
    }

    #[test]
    fn couples_end_on_one_page_and_a_bad_placement_is_told() {
        // 0 with 3, 1 with 2.
        let mut together = [1.0f32; 16];
        for (e, f) in [(0, 3), (1, 2)] {
            together[e * 4 + f] = 9.0;
            together[f * 4 + e] = 9.0;
        }
        let placed = place_experts(&together, 4, 2, 10).unwrap();
        assert_eq!(placed.pages[0], placed.pages[3]);
        assert_eq!(placed.potential[1], 18.0);
        assert_eq!(certify_placement(&together, &[0, 0, 1, 1]).unwrap(), 16.0);
        assert!(place_experts(&together, 4, 0, 10).is_err());
    }
}
