//! Profiles judged by the true loss: the KL divergence of the model from its source with tensors drafted at their widths.

use nash_core::ModelFile;
use nash_kernels::Width;
use nash_models::{LinearInfo, Model};

use crate::QuantError;
use crate::curves::is_measured;
use crate::packed::load;
use crate::probe::Probe;
use crate::session::Session;

/// Which tensors a judge looks at; the others stay the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every tensor.
    Whole,
    /// Those of the layers in which effects are measured, and of the vocabulary: enough to tell candidates apart, at a part of the drafts
    /// ([ADR 0026](../../../docs/adr/0026-candidates-are-judged-in-the-measured-layers.md)).
    Measured,
}

/// The source's predictions on some windows, and a model whose tensors are exchanged.
pub(crate) struct Judge {
    probe: Probe,
    model: Model,
    /// Whether each linear is looked at.
    judged: Vec<bool>,
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
        scope: Scope,
    ) -> Result<Self, QuantError> {
        let (layers, stride) = (
            session.model.config().num_layers(),
            session.options.probe_layer_stride,
        );
        let judged = |info: &LinearInfo| {
            scope == Scope::Whole || info.layer.is_none_or(|layer| is_measured(layer, layers, stride))
        };
        Ok(Self {
            probe: Probe::new(&session.model, windows)?,
            model: load(session, source)?,
            judged: session.linears.iter().map(judged).collect(),
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
        let slots = self.installed.iter_mut().zip(&self.judged).zip(&session.linears);
        for (((installed, &judged), info), &width) in slots.zip(widths) {
            if judged && *installed != Some(width) {
                let draft = session.draft(info, width)?;
                self.model.set_linear(&info.name, draft.linear())?;
                *installed = Some(width);
            }
            drafted();
        }
        self.probe.kl(&self.model)
    }
}
