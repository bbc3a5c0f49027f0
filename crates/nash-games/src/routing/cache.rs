//! The equilibrium cache: the prices of each layer, kept from batch to batch.
//!
//! The equilibrium of a batch is T·k choices, of no use to the next batch; its prices are E numbers that nearly balance it too. So what
//! is cached is `layer → prices`, with the statistics of the scores they were found for. If the scores of a batch have drifted too far from
//! those, the entry is dropped rather than used. The least recently used layer makes room for a new one. All methods may be called from any thread.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ScoreStatistics;

/// Default of the drift beyond which prices are dropped: see [`ScoreStatistics::drift_since`].
pub const DRIFT_LIMIT: f64 = 0.25;

/// What the cache has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CacheStatistics {
    /// Look-ups that found prices.
    pub hits: u64,
    /// Look-ups that did not, dropped entries included.
    pub misses: u64,
    /// Entries dropped because scores had drifted.
    pub invalidations: u64,
    /// Entries that made room for others.
    pub evictions: u64,
}

/// Prices per layer; see the module.
#[derive(Debug)]
pub struct PriceCache {
    capacity: usize,
    drift_limit: f64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<usize, Entry>,
    clock: u64,
    statistics: CacheStatistics,
}

#[derive(Debug)]
struct Entry {
    prices: Vec<f32>,
    scores: ScoreStatistics,
    used: u64,
}

impl PriceCache {
    /// For at most `capacity` layers; prices are dropped once scores have drifted by more than `drift_limit`.
    pub fn new(capacity: usize, drift_limit: f64) -> Self {
        Self {
            capacity,
            drift_limit,
            inner: Mutex::default(),
        }
    }

    /// Copies the prices of `layer` to `prices [E]` and returns `true`, if there are any, as many, and for scores like these.
    pub fn look_up(&self, layer: usize, scores: &ScoreStatistics, prices: &mut [f32]) -> bool {
        let mut inner = self.lock();
        inner.clock += 1;
        let now = inner.clock;
        let Some(entry) = inner.entries.get_mut(&layer) else {
            inner.statistics.misses += 1;
            return false;
        };
        let drift = scores.drift_since(&entry.scores);
        if drift <= self.drift_limit && entry.prices.len() == prices.len() {
            prices.copy_from_slice(&entry.prices);
            entry.used = now;
            inner.statistics.hits += 1;
            return true;
        }
        inner.entries.remove(&layer);
        inner.statistics.invalidations += 1;
        inner.statistics.misses += 1;
        false
    }

    /// Keeps the prices of `layer`, found for `scores`.
    pub fn store(&self, layer: usize, scores: &ScoreStatistics, prices: &[f32]) {
        if self.capacity == 0 {
            return;
        }
        let mut inner = self.lock();
        inner.clock += 1;
        let used = inner.clock;
        if let Some(entry) = inner.entries.get_mut(&layer) {
            // In place: a warm cache allocates nothing.
            entry.prices.clear();
            entry.prices.extend_from_slice(prices);
            entry.scores.clone_from(scores);
            entry.used = used;
            return;
        }
        if inner.entries.len() >= self.capacity {
            let oldest = inner
                .entries
                .iter()
                .min_by_key(|(_, entry)| entry.used)
                .map(|(&layer, _)| layer);
            if let Some(oldest) = oldest {
                inner.entries.remove(&oldest);
                inner.statistics.evictions += 1;
            }
        }
        let entry = Entry {
            prices: prices.to_vec(),
            scores: scores.clone(),
            used,
        };
        inner.entries.insert(layer, entry);
    }

    /// Drops the prices of `layer`: its router has changed.
    pub fn invalidate(&self, layer: usize) {
        let mut inner = self.lock();
        if inner.entries.remove(&layer).is_some() {
            inner.statistics.invalidations += 1;
        }
    }

    /// Layers in the cache.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether no layer is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What happened so far.
    pub fn statistics(&self) -> CacheStatistics {
        self.lock().statistics
    }

    /// Every update leaves the map whole, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(mean: [f32; 2]) -> ScoreStatistics {
        ScoreStatistics {
            mean: mean.to_vec(),
            deviation: vec![1.0; 2],
        }
    }

    #[test]
    fn keeps_drops_and_makes_room() {
        let cache = PriceCache::new(2, 0.5);
        let mut prices = [0.0; 2];
        assert!(!cache.look_up(0, &of([0.0, 0.0]), &mut prices));
        cache.store(0, &of([0.0, 0.0]), &[1.0, 2.0]);
        // A common shift is no drift, 0.4 of a deviation apart is little, 2 deviations are not.
        for (mean, hit) in [([5.0, 5.0], true), ([0.4, -0.4], true), ([2.0, -2.0], false)] {
            assert_eq!(cache.look_up(0, &of(mean), &mut prices), hit, "{mean:?}");
        }
        assert_eq!(prices, [1.0, 2.0]);
        for layer in 0..3 {
            cache.store(layer, &of([0.0, 0.0]), &[layer as f32, 0.0]);
            // Layer 0 stays in use.
            assert!(cache.look_up(0, &of([0.0, 0.0]), &mut prices));
        }
        assert_eq!((cache.len(), prices), (2, [0.0, 0.0]));
        assert!(!cache.look_up(1, &of([0.0, 0.0]), &mut prices));
        // Another number of experts under the same name is another router.
        assert!(!cache.look_up(2, &of([0.0, 0.0]), &mut [0.0; 3]));
        cache.invalidate(0);
        assert!(cache.is_empty());
        let expected = CacheStatistics {
            hits: 5,
            misses: 4,
            invalidations: 3,
            evictions: 1,
        };
        assert_eq!(cache.statistics(), expected);
        PriceCache::new(0, 0.5).store(0, &of([0.0, 0.0]), &[1.0, 2.0]);
    }

    #[test]
    fn is_shared_by_threads() {
        let cache = PriceCache::new(4, 0.5);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let cache = &cache;
                scope.spawn(move || {
                    let mut prices = [0.0; 2];
                    for round in 0..500 {
                        let layer = (round * (thread + 1)) % 7;
                        if cache.look_up(layer, &of([0.0, 0.0]), &mut prices) {
                            // Never a mixture of two entries.
                            assert_eq!(prices[0], -prices[1]);
                            assert_eq!(prices[0] as usize % 7, layer);
                        }
                        let value = (layer + 7 * thread) as f32;
                        cache.store(layer, &of([0.0, 0.0]), &[value, -value]);
                    }
                });
            }
        });
        let seen = cache.statistics();
        assert_eq!((seen.hits + seen.misses, cache.len()), (2000, 4));
    }
}
