//! Looking into the forward pass.

use crate::manifest::Site;

/// Sees the input of every linear, before it is multiplied. The unit type sees nothing.
pub trait Tap {
    /// `x [tokens, cols]` goes into all linears of this layer and site, once for all of them. For [`Site::Head`] the
    /// layer is the number of layers. Experts that no token chose are not reported.
    fn input(&mut self, layer: usize, site: Site, x: &[f32], tokens: usize, cols: usize);

    /// Whether it has yet to see something of this layer. Where it has not, a layer may end early and leave its output unfinished.
    fn wants_more(&self) -> bool {
        true
    }
}

impl Tap for () {
    fn input(&mut self, _: usize, _: Site, _: &[f32], _: usize, _: usize) {}
}
