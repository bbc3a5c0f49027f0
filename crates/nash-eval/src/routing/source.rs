//! Synthetic tokens and scores, as skewed as those of a router that nobody has balanced.
//!
//! A token is a point `z` in 8 dimensions: the centre of one of 32 topics (standard normal, times 0.8) plus its own part
//! (standard normal, times 0.6). Its score for expert e is `b_e + ⟨v_e, z⟩ + 0.5·ε`, with a bias `b_e` (standard normal), a direction `v_e`
//! (normal, unit variance in total) and noise ε; so bias, preference and noise have variances of 1, 1 and ¼. Its state
//! `x [d]` is `z` through a random matrix plus noise. Topics, biases and directions belong to the source; batches are drawn from it.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::RoutingShape;

const DIMENSIONS: usize = 8;
const TOPICS: usize = 32;

/// Where batches come from.
#[derive(Debug)]
pub struct Source {
    shape: RoutingShape,
    seed: u64,
    topics: Vec<f32>,
    bias: Vec<f32>,
    directions: Vec<f32>,
    embedding: Vec<f32>,
}

/// One batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[T, E]`.
    pub scores: Vec<f32>,
    /// `[T, d]`.
    pub states: Vec<f32>,
}

impl Source {
    /// The source of this seed.
    pub fn new(shape: RoutingShape, seed: u64) -> Self {
        let mut normal = Normal::new(seed, 0);
        let unit = (DIMENSIONS as f32).sqrt().recip();
        Self {
            shape,
            seed,
            topics: normal.many(TOPICS * DIMENSIONS, 0.8),
            bias: normal.many(shape.experts, 1.0),
            directions: normal.many(shape.experts * DIMENSIONS, unit),
            embedding: normal.many(shape.width * DIMENSIONS, unit),
        }
    }

    /// Batch `index`; the same one every time.
    pub fn batch(&self, index: u64) -> Batch {
        let mut normal = Normal::new(self.seed, index + 1);
        let mut batch = Batch {
            scores: Vec::with_capacity(self.shape.tokens * self.shape.experts),
            states: Vec::with_capacity(self.shape.tokens * self.shape.width),
        };
        for _ in 0..self.shape.tokens {
            let topic = normal.rng.random_range(0..TOPICS);
            let mut token = normal.many(DIMENSIONS, 0.6);
            let centre = &self.topics[topic * DIMENSIONS..][..DIMENSIONS];
            token.iter_mut().zip(centre).for_each(|(z, centre)| *z += centre);
            let along = |v: &[f32]| v.iter().zip(&token).map(|(v, z)| v * z).sum::<f32>();
            for (bias, direction) in self.bias.iter().zip(self.directions.chunks(DIMENSIONS)) {
                batch.scores.push(bias + along(direction) + 0.5 * normal.next());
            }
            for row in self.embedding.chunks(DIMENSIONS) {
                batch.states.push(along(row) + 0.5 * normal.next());
            }
        }
        batch
    }
}

/// Standard normal numbers (Box and Muller 1958).
pub(super) struct Normal {
    rng: Pcg64Mcg,
    spare: Option<f32>,
}

impl Normal {
    /// One stream of a seed; streams differ.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let offset = rng.random::<u64>();
        Self {
            rng: Pcg64Mcg::seed_from_u64(offset.wrapping_add(stream)),
            spare: None,
        }
    }

    fn next(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * (1.0 - self.rng.random::<f32>()).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * self.rng.random::<f32>()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// `count` numbers of this standard deviation.
    pub(super) fn many(&mut self, count: usize, deviation: f32) -> Vec<f32> {
        (0..count).map(|_| deviation * self.next()).collect()
    }
}
