//! Storage against its bound, kernels against the definition, instruction sets against each other.

use proptest::prelude::*;

use super::*;
use crate::Isa;

fn noise(count: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| ((i as u32 + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) >> 8;
    (0..count).map(|i| value(i) as f32 / 8_388_608.0 - 1.0).collect()
}

/// Keys and values of one head. What was never written is as bad as can be.
struct Store {
    shape: ByteShape,
    keys: (Vec<u8>, Vec<f32>),
    values: (Vec<u8>, Vec<f32>),
}

impl Store {
    fn new(dim: usize, positions: usize) -> Self {
        let shape = ByteShape::new(dim);
        let codes = vec![0; shape.code_bytes(positions)];
        Self {
            shape,
            keys: (codes.clone(), vec![f32::NAN; shape.key_scales(positions)]),
            values: (codes, vec![f32::NAN; shape.value_scales(positions)]),
        }
    }

    /// `rows [P, D]` as keys and as values.
    fn filled(dim: usize, keys: &[f32], values: &[f32]) -> Self {
        let mut store = Self::new(dim, keys.len() / dim);
        for (position, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
            store
                .shape
                .store_key(key, position, &mut store.keys.0, &mut store.keys.1);
            store
                .shape
                .store_value(value, position, &mut store.values.0, &mut store.values.1);
        }
        store
    }

    fn keys(&self) -> ByteRun<'_> {
        let (codes, scales) = &self.keys;
        ByteRun { codes, scales }
    }

    fn values(&self) -> ByteRun<'_> {
        let (codes, scales) = &self.values;
        ByteRun { codes, scales }
    }
}

/// Half a step, the rounding of the scale, of its inverse and of the product included: three relative errors of 2⁻²⁴ of 127 steps.
fn half_step(largest: f64) -> f64 {
    largest / 127.0 * (0.5 + 2f64.powi(-15))
}

fn largest(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |max, v| f64::from(v.abs()).max(max))
}

proptest! {
    #[test]
    fn what_is_read_is_within_half_a_step(
        dim in 1usize..150, positions in 1usize..40, zoom in -30i32..30, seed in 0u32..1000
    ) {
        let scaled = |seed| noise(positions * dim, seed).into_iter().map(|v| v * (zoom as f32).exp2()).collect::<Vec<_>>();
        let (keys, values) = (scaled(seed), scaled(seed + 1));
        let store = Store::filled(dim, &keys, &values);
        let first = positions / 3;
        let mut read = vec![f32::NAN; (positions - first) * dim];
        store.shape.read_keys(store.keys(), first..positions, &mut read);
        for (key, read) in keys.chunks(dim).skip(first).zip(read.chunks(dim)) {
            for (key, read) in key.chunks(KEY_GROUP).zip(read.chunks(KEY_GROUP)) {
                for (x, y) in key.iter().zip(read) {
                    prop_assert!((f64::from(*x) - f64::from(*y)).abs() <= half_step(largest(key)), "{x} {y}");
                }
            }
        }
        read.fill(f32::NAN);
        store.shape.read_values(store.values(), first..positions, &mut read);
        for (value, read) in values.chunks(dim).skip(first).zip(read.chunks(dim)) {
            for (x, y) in value.iter().zip(read) {
                prop_assert!((f64::from(*x) - f64::from(*y)).abs() <= half_step(largest(value)), "{x} {y}");
            }
        }
    }

    #[test]
    fn scores_are_right_and_the_same_everywhere(
        heads in 1usize..10, positions in 1usize..300, dim in 1usize..140, seed in 0u32..100, skipped in 0usize..4
    ) {
        let (q, keys) = (noise(heads * dim, seed), noise(positions * dim, seed + 1));
        let store = Store::filled(dim, &keys, &keys);
        let blocks = skipped.min(positions.div_ceil(POSITIONS))..positions.div_ceil(POSITIONS);
        let (begin, stride) = (blocks.start * POSITIONS, blocks.len() * POSITIONS);
        let mut query = ByteQuery::default();
        query.quantize(store.shape, &q, 0.5);
        let mut expected = vec![f32::NAN; heads * stride];
        query.scores_with(Isa::Portable, store.shape, store.keys(), blocks.clone(), &mut expected);
        for (g, q) in q.chunks(dim).enumerate() {
            for (p, key) in keys.chunks(dim).enumerate().skip(begin) {
                let exact: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                // A product of two numbers that are each wrong by half a step, that of the query 128 times smaller, and the rounding of a few sums.
                let bound: f64 = q
                    .chunks(KEY_GROUP)
                    .zip(key.chunks(KEY_GROUP))
                    .map(|(q, k)| {
                        let (a, b) = (largest(q), largest(k));
                        q.len() as f64 * (half_step(a) / 128.0 * b + half_step(b) * a * (1.0 + 1.0 / 127.0))
                    })
                    .sum();
                let got = f64::from(expected[g * stride + p - begin]);
                prop_assert!((got - 0.5 * exact).abs() <= 0.5 * bound * (1.0 + 1e-5), "{got} {exact} {bound}");
            }
        }
        for isa in Isa::available() {
            let mut scores = vec![f32::NAN; expected.len()];
            query.scores_with(isa, store.shape, store.keys(), blocks.clone(), &mut scores);
            for (i, (a, b)) in scores.iter().zip(&expected).enumerate() {
                if begin + i % stride < positions {
                    prop_assert_eq!(a.to_bits(), b.to_bits(), "{} at {}", isa.name(), i);
                }
            }
        }
    }

    #[test]
    fn sums_of_values_are_right_and_the_same_everywhere(
        heads in 1usize..10, positions in 1usize..300, dim in 1usize..140, seed in 0u32..100, first in 0usize..40
    ) {
        let values = noise(positions * dim, seed);
        let store = Store::filled(dim, &values, &values);
        let counted = first.min(positions - 1)..positions;
        let begin = counted.start / POSITIONS * POSITIONS;
        let stride = (positions - begin).next_multiple_of(POSITIONS);
        let weights: Vec<f32> = noise(heads * stride, seed + 2).into_iter().map(f32::abs).collect();
        let start = noise(heads * dim, seed + 3);
        let mut query = ByteQuery::default();
        let mut expected = start.clone();
        let inputs = (store.values(), counted.clone());
        query.add_values_with(Isa::Portable, store.shape, inputs.clone(), &weights, &mut expected);
        for (g, weights) in weights.chunks(stride).enumerate() {
            for j in 0..dim {
                let terms = counted.clone().map(|p| (f64::from(weights[p - begin]), &values[p * dim..][..dim]));
                let exact: f64 = terms.clone().map(|(w, value)| w * f64::from(value[j])).sum();
                // A weight is wrong by half of 2⁻¹⁴ of the largest one, here at most 1; roundings of the sums are far below.
                let bound: f64 = terms
                    .map(|(w, value)| w * half_step(largest(value)) + 1.01 / 16383.0 / 2.0)
                    .sum();
                let got = f64::from(expected[g * dim + j]) - f64::from(start[g * dim + j]);
                prop_assert!((got - exact).abs() <= bound * (1.0 + 1e-5) + 1e-6, "{got} {exact} {bound}");
            }
        }
        for isa in Isa::available() {
            let mut out = start.clone();
            query.add_values_with(isa, store.shape, inputs.clone(), &weights, &mut out);
            prop_assert_eq!(&out, &expected, "{}", isa.name());
        }
    }
}

#[test]
fn bad_numbers_stay_visible() {
    let dim = 40;
    for bad in [f32::NAN, f32::INFINITY] {
        let mut rows = noise(3 * dim, 1);
        rows[dim + 2] = bad;
        let store = Store::filled(dim, &rows, &rows);
        let mut query = ByteQuery::default();
        query.quantize(store.shape, &noise(dim, 2), 1.0);
        let mut scores = vec![0.0; POSITIONS];
        query.scores(store.shape, store.keys(), 0..1, &mut scores);
        assert_eq!(
            [0, 1, 2].map(|p| scores[p].is_nan()),
            [false, true, false],
            "{bad}"
        );
        let mut out = vec![0.0; dim];
        query.add_values(store.shape, (store.values(), 0..3), &[0.5; POSITIONS], &mut out);
        assert!(out.iter().all(|v| v.is_nan()), "{bad}");
    }
}

#[test]
fn zeros_are_zeros() {
    let rows = vec![0.0; 64];
    let store = Store::filled(64, &rows, &rows);
    let mut query = ByteQuery::default();
    query.quantize(store.shape, &rows, 1.0);
    let (mut scores, mut out) = (vec![f32::NAN; POSITIONS], vec![0.0; 64]);
    query.scores(store.shape, store.keys(), 0..1, &mut scores);
    assert_eq!(scores[0], 0.0);
    query.add_values(store.shape, (store.values(), 0..1), &[1.0; POSITIONS], &mut out);
    assert_eq!(out, rows);
}

#[test]
fn a_position_can_be_written_again() {
    let dim = 33;
    let (old, new) = (noise(dim, 1), noise(dim, 2));
    let mut again = Store::filled(dim, &old, &old);
    let (keys, values) = (&mut again.keys, &mut again.values);
    again.shape.store_key(&new, 0, &mut keys.0, &mut keys.1);
    again.shape.store_value(&new, 0, &mut values.0, &mut values.1);
    let fresh = Store::filled(dim, &new, &new);
    let read = |store: &Store| {
        let mut rows = [vec![0.0; dim], vec![0.0; dim]];
        store.shape.read_keys(store.keys(), 0..1, &mut rows[0]);
        store.shape.read_values(store.values(), 0..1, &mut rows[1]);
        rows
    };
    assert_eq!(read(&again), read(&fresh));
}
