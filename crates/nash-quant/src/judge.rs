//! Profiles judged by the true loss: the KL divergence of the whole model with every tensor drafted at its width.

use nash_core::ModelFile;
use nash_kernels::Width;
use nash_models::Model;

use crate::QuantError;
use crate::packed::load;
use crate::probe::Probe;
use crate::session::Session;

/// The source's predictions on some windows, and a model whose tensors are exchanged.
pub(crate) struct Judge {
    probe: Probe,
    model: Model,
    /// Width at which each linear is in the model; `None` for the source's.
    installed: Vec<Option<Width>>,
}

impl Judge {
    /// A judge who knows the source's predictions on `windows`.
    ///
    /// # Errors
    /// If the source cannot run a window.
    pub(crate) fn new(
        session: &Session<'_>,
        source: &ModelFile,
        windows: &[Vec<u32>],
    ) -> Result<Self, QuantError> {
        Ok(Self {
            probe: Probe::new(&session.model, windows)?,
            model: load(session, source)?,
            installed: vec![None; session.linears.len()],
        })
    }

    /// Mean KL divergence in nats per token of the drafted model from the source. `drafted` is called after every tensor.
    ///
    /// # Errors
    /// If a tensor cannot be drafted.
    pub(crate) fn kl(
        &mut self,
        session: &Session<'_>,
        widths: &[Width],
        drafted: &dyn Fn(),
    ) -> Result<f64, QuantError> {
        let slots = self.installed.iter_mut().zip(&session.linears);
        for ((installed, info), &width) in slots.zip(widths) {
            if *installed != Some(width) {
                let draft = session.draft(info, width)?;
                self.model.set_linear(&info.name, draft.linear())?;
                *installed = Some(width);
            }
            drafted();
        }
        self.probe.kl(&self.model)
    }
}
