//! Channel-wise activation sparsity of dense feed-forward blocks: what carving into experts is compared with.
//!
//! A neuron i of a token counts by `s_i = |h_i|·‖w_i‖`, what it adds to the output (w_i its column of the down projection), or by its gate alone, `|act(g_i)|`,
//! which is known before its row of `up` is read. Neurons that do not count are set to zero. The products are computed in full: this measures quality, not speed. Sources: TEAL (Liu et al. 2024),
//! CATS (Lee et al. 2024).

use std::sync::Arc;

use nash_kernels::pool;

use crate::config::Activation;
use crate::math;

/// Which neurons of a dense block a token keeps.
#[derive(Debug, Clone, PartialEq)]
pub enum ChannelRule {
    /// This share of them, those with the largest `s_i`: an oracle, since `s_i` needs all of gate and up.
    Largest(f64),
    /// Those whose `s_i` is at least the threshold of the layer.
    Above(Vec<f32>),
    /// Those whose gate's `|act(g_i)|` is at least the threshold of the layer.
    GateAbove(Vec<f32>),
}

/// A rule with the norms that it needs.
#[derive(Debug, Clone)]
pub struct ChannelSparsity {
    /// The rule; thresholds are one per layer.
    pub rule: ChannelRule,
    /// `‖w_i‖` per layer, `[f]`.
    pub norms: Vec<Arc<[f32]>>,
}

impl ChannelSparsity {
    /// `inner [T, f]` is what the down projection would read, `gate` what the gate gave before its nonlinearity.
    pub(crate) fn apply(&self, layer: usize, gate: &[f32], inner: &mut [f32], kind: Activation) {
        let norms = &self.norms[layer];
        let f = norms.len();
        pool::for_each_chunk(inner, f, |token, h| match &self.rule {
            ChannelRule::Largest(share) => {
                let keep = (share * f as f64).round() as usize;
                let mut sizes: Vec<f32> = h.iter().zip(norms.iter()).map(|(h, n)| h.abs() * n).collect();
                if keep < f {
                    let (_, &mut least, _) = sizes.select_nth_unstable_by(f - keep.max(1), f32::total_cmp);
                    clear(h, norms, |h, n| h.abs() * n < least);
                }
            }
            ChannelRule::Above(thresholds) => {
                let least = thresholds[layer];
                clear(h, norms, |h, n| h.abs() * n < least);
            }
            ChannelRule::GateAbove(thresholds) => {
                let mut open = gate[token * f..][..f].to_vec();
                math::activate(kind, &mut open);
                for (h, open) in h.iter_mut().zip(open) {
                    if open.abs() < thresholds[layer] {
                        *h = 0.0;
                    }
                }
            }
        });
    }
}

fn clear(h: &mut [f32], norms: &[f32], small: impl Fn(f32, f32) -> bool) {
    for (h, &n) in h.iter_mut().zip(norms) {
        if small(*h, n) {
            *h = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparsity(rule: ChannelRule) -> ChannelSparsity {
        ChannelSparsity {
            rule,
            norms: vec![[1.0, 2.0, 1.0, 0.5].into()],
        }
    }

    #[test]
    fn each_rule_keeps_what_it_says() {
        let h = [1.0, -0.9, 0.2, 3.0, 0.1, 0.1, -0.5, 0.0];
        let gate = [9.0, 0.0, 9.0, 9.0, 0.0, 0.0, 9.0, -9.0];
        for (rule, expected) in [
            (
                ChannelRule::Largest(0.5),
                [0.0, -0.9, 0.0, 3.0, 0.0, 0.1, -0.5, 0.0],
            ),
            (ChannelRule::Largest(1.0), h),
            (
                ChannelRule::Above(vec![0.9]),
                [1.0, -0.9, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0],
            ),
            (
                ChannelRule::GateAbove(vec![1.0]),
                [1.0, 0.0, 0.2, 3.0, 0.0, 0.0, -0.5, 0.0],
            ),
        ] {
            let mut inner = h;
            sparsity(rule.clone()).apply(0, &gate, &mut inner, Activation::Silu);
            assert_eq!(inner, expected, "{rule:?}");
        }
    }
}
