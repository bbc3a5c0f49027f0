//! The loop: AdamW, a warm-up and a cosine, batches of random windows; then the held-back text with the bias alone, and with
//! rewards where the rule has them.

use std::time::Instant;

use anyhow::{Result, ensure};
use burn::module::Module as _;
use burn::optim::grad_clipping::GradientClippingConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::Device;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use crate::balance::{Router, Rule, Usage};
use crate::model::{Constants, Model, Shape};
use crate::text::{Corpus, Windows, consecutive};

/// Learning rates end at this share of the highest.
const LAST: f64 = 0.1;
/// Share of the steps in which the rate rises.
const WARM_UP: f64 = 0.05;
/// Share of the steps after which residents are rewarded.
const REMEMBER: f64 = 0.75;
/// Batches of the held-back text, at most.
const VALIDATION: usize = 40;

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Windows of a batch.
    pub(crate) batch: usize,
    pub(crate) steps: usize,
    /// The highest learning rate.
    pub(crate) rate: f64,
    /// α of the auxiliary loss, u of the loss-free bias, r of residents.
    pub(crate) strength: Option<f64>,
    pub(crate) seed: u64,
}

/// How it went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) rule: Rule,
    pub(crate) shape: Shape,
    pub(crate) plan: Plan,
    /// Mean loss of the last tenth of the steps, nats per token.
    pub(crate) train_loss: f64,
    /// Loss of the held-back text, experts chosen with the bias alone (and the reward of residents).
    pub(crate) validation_loss: f64,
    pub(crate) seconds: f64,
    /// Routing while training.
    pub(crate) training: Usage,
    /// Routing on the held-back text.
    pub(crate) validation: Usage,
}

/// Trains a model, and measures it.
pub(crate) fn train(
    shape: Shape,
    rule: Rule,
    plan: Plan,
    corpus: &Corpus,
    progress: &ProgressBar,
) -> Result<(Model, Router, Outcome)> {
    let device = Device::flex();
    let learning = device.clone().autodiff();
    let mut model = Model::new(shape, plan.seed, &learning);
    let mut router = Router::new(rule, &shape, plan.strength)?;
    let constants = Constants::new(shape, &learning);
    let mut optimizer = AdamWConfig::new()
        .with_beta_2(0.95)
        .with_epsilon(1e-8)
        .with_weight_decay(0.1)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();
    let mut windows = Windows::new(&corpus.train, (plan.batch, shape.context), plan.seed)?;
    progress.set_length(plan.steps as u64);
    let (start, late) = (Instant::now(), plan.steps - plan.steps.div_ceil(10));
    let (mut sum, mut count) = (0.0, 0usize);
    let remember = (plan.steps as f64 * REMEMBER) as usize;
    for step in 0..plan.steps {
        if step == remember {
            router.remember();
        }
        let (tokens, targets) = windows.next();
        let (loss, penalty) = model.loss(&constants, &tokens, &targets, &mut router);
        let value = loss.clone().inner().into_scalar::<f32>();
        ensure!(
            value.is_finite(),
            "the loss of step {step} is {value}: a lower --rate may help"
        );
        if step >= late {
            sum += f64::from(value);
            count += 1;
        }
        let total = match penalty {
            Some(penalty) => loss + penalty,
            None => loss,
        };
        let gradients = GradientsParams::from_grads(total.backward(), &model);
        model = optimizer.step(rate(plan, step), model, gradients);
        progress.set_message(format!("loss {value:.3}"));
        progress.inc(1);
    }
    let seconds = start.elapsed().as_secs_f64();
    let training = router.usage();
    router.restart(false);
    let (plain, constants) = (model.valid(), Constants::new(shape, &device));
    let mut losses = Vec::new();
    for (tokens, targets) in consecutive(&corpus.validation, (plan.batch, shape.context), VALIDATION) {
        let (loss, _) = plain.loss(&constants, &tokens, &targets, &mut router);
        losses.push(f64::from(loss.into_scalar::<f32>()));
    }
    ensure!(
        !losses.is_empty(),
        "the text held back is shorter than a batch of {} tokens",
        plan.batch * shape.context
    );
    let outcome = Outcome {
        rule,
        shape,
        plan,
        train_loss: sum / count.max(1) as f64,
        validation_loss: losses.iter().sum::<f64>() / losses.len() as f64,
        seconds,
        training,
        validation: router.usage(),
    };
    Ok((model, router, outcome))
}

/// The learning rate of a step.
fn rate(plan: Plan, step: usize) -> f64 {
    let done = (step + 1) as f64 / plan.steps as f64;
    if done < WARM_UP {
        return plan.rate * done / WARM_UP;
    }
    let way = (done - WARM_UP) / (1.0 - WARM_UP);
    plan.rate * (LAST + (1.0 - LAST) * 0.5 * (1.0 + (std::f64::consts::PI * way).cos()))
}
