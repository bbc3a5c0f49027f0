//! Packed weights in memory, and the source with its linears replaced by them.

use std::sync::Arc;

use nash_core::ModelFile;
use nash_kernels::{PackedMatrix, PackedRef, dequantize_row, matmul};
use nash_models::{Input, Linear, Model, ModelConfig, VocabParts};

use crate::QuantError;
use crate::allocate::vocab_ranges;
use crate::session::{Session, Solved};

/// The source with its vocabulary in ranges of rows, the columns whole.
pub(crate) fn load_in_ranges(source: &ModelFile) -> Result<Model, QuantError> {
    load_in_parts(source, |config| VocabParts {
        ranges: vocab_ranges(config.vocab_size),
        outliers: Vec::new(),
    })
}

/// The source with its vocabulary in the parts that the session has.
pub(crate) fn load(session: &Session<'_>, source: &ModelFile) -> Result<Model, QuantError> {
    let parts = session.model.config().vocab_parts.clone();
    load_in_parts(source, |_| parts)
}

/// The source with its vocabulary in parts. It streams: of a source that may be larger than memory, no more than a layer stays.
pub(crate) fn load_in_parts(
    source: &ModelFile,
    cut: impl FnOnce(&ModelConfig) -> VocabParts,
) -> Result<Model, QuantError> {
    let mut model = Model::load_in_parts(source, cut)?;
    model.set_streaming(true);
    Ok(model)
}

/// The source with its linears replaced by packed ones.
pub(crate) fn packed_model(
    session: &Session<'_>,
    source: &ModelFile,
    solved: &[Solved],
) -> Result<Model, QuantError> {
    let mut model = load(session, source)?;
    for (info, solved) in session.linears.iter().zip(solved) {
        model.set_linear(&info.name, solved.linear())?;
    }
    Ok(model)
}

impl Solved {
    /// The tensor as a model runs it; its bytes are shared.
    pub(crate) fn linear(&self) -> Arc<dyn Linear> {
        Arc::new(OwnedPacked(Arc::clone(&self.matrix)))
    }
}

/// A packed weight in memory, run by the same kernels as one in a file.
struct OwnedPacked(Arc<PackedMatrix>);

impl OwnedPacked {
    fn view(&self) -> PackedRef<'_> {
        PackedMatrix::as_ref(&self.0)
    }
}

impl Linear for OwnedPacked {
    fn rows(&self) -> usize {
        self.view().shape().rows
    }
    fn cols(&self) -> usize {
        self.view().shape().cols
    }
    fn forward(&self, input: &Input<'_>, y: &mut [f32]) {
        matmul(self.view(), input.activations(), y);
    }
    fn row(&self, row: usize, out: &mut [f32]) {
        dequantize_row(self.view(), row, out);
    }
    fn resident_bytes(&self) -> usize {
        self.view().stream().len()
    }
}
