//! Answers: prompt in, text out piece by piece, until the model, a stop text, a limit or the user ends it.

use std::time::Instant;

use clap::Args;
use nash_models::{
    FinishReason, GenerateOptions, Generator, KvCache, PREFILL_CHUNK, Sampler, SamplingParams, StopMatch,
    StopMatcher,
};

use crate::args::{KvArg, KvName, Sampling};
use crate::model::Loaded;
use crate::ui::{Ui, Unit};
use crate::{format, interrupt};

/// Context used when none is asked for; the cache of a whole long context could fill the memory.
const DEFAULT_CTX: usize = 4096;

/// How long it may get.
#[derive(Clone, Debug, Args)]
pub(crate) struct Limits {
    /// Tokens to generate at most [default: until the model ends]
    #[arg(short = 'n', long = "predict", value_name = "N", env = "NASHSWARM_PREDICT")]
    predict: Option<usize>,
    /// Tokens of prompt and answer together; 0 for all the model was trained for [default: 4096, or less]
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        value_name = "N",
        env = "NASHSWARM_CTX"
    )]
    ctx: Option<usize>,
    #[command(flatten)]
    kv: KvArg,
}

impl Limits {
    /// Only a limit on the answer.
    pub(crate) fn predict(tokens: usize) -> Self {
        Self {
            predict: Some(tokens),
            ctx: None,
            kv: KvArg { kv_type: KvName::Q8 },
        }
    }

    fn context(&self, trained: usize) -> usize {
        match self.ctx {
            Some(0) => trained,
            Some(ctx) => ctx,
            None => trained.min(DEFAULT_CTX),
        }
    }
}

/// A model in use: what it was told so far stays in its cache.
pub(crate) struct Session<'a> {
    loaded: &'a Loaded,
    cache: KvCache,
    params: SamplingParams,
    stops: Vec<String>,
    predict: Option<usize>,
}

/// An answer.
pub(crate) struct Answer {
    pub(crate) text: String,
    /// Lengths and speeds in one line.
    pub(crate) statistics: String,
    context_full: Option<usize>,
}

impl Answer {
    /// Tells the reader if the answer was cut for want of room.
    pub(crate) fn warn(&self) {
        if let Some(ctx) = self.context_full {
            eprintln!("the context of {ctx} tokens is full; give more room with `--ctx N`, or begin anew");
        }
    }
}

impl<'a> Session<'a> {
    /// A session with memory for the whole context.
    pub(crate) fn new(loaded: &'a Loaded, limits: &Limits, sampling: &Sampling) -> anyhow::Result<Self> {
        let mut session = Self::with_params(loaded, limits, sampling.params())?;
        session.stops = sampling.stop.clone();
        Ok(session)
    }

    /// A session without stop texts.
    pub(crate) fn with_params(
        loaded: &'a Loaded,
        limits: &Limits,
        params: SamplingParams,
    ) -> anyhow::Result<Self> {
        // Wrong parameters are told before a long prompt is read.
        Sampler::new(params.clone())?;
        let config = loaded.model.config();
        let capacity = limits.context(config.context_length);
        let cache = KvCache::with_type(config, capacity, limits.kv.kv_type.into());
        Ok(Self {
            loaded,
            cache,
            params,
            stops: Vec::new(),
            predict: limits.predict,
        })
    }

    /// Answers a prompt, giving out the text as it comes. Ctrl-C ends the answer without an error.
    pub(crate) fn answer(
        &mut self,
        prompt: &[u32],
        ui: &Ui,
        emit: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        let tokenizer = self.loaded.tokenizer()?;
        let capacity = self.cache.capacity();
        let sampler = Sampler::new(self.params.clone())?;
        // The next answer of a conversation draws other numbers.
        self.params.seed = self.params.seed.wrapping_add(1);
        let options = GenerateOptions {
            end_of_generation: tokenizer.end_of_generation().clone(),
            max_new_tokens: self.predict,
        };
        let start = Instant::now();
        let reused = self.cache.len();
        if prompt.len() > PREFILL_CHUNK {
            ui.begin("reading the prompt", prompt.len() as u64, Unit::Steps);
        }
        let mut done = 0;
        let mut progress = |position: usize, _| {
            ui.step((position - done) as u64);
            done = position;
        };
        let generator = Generator::with_progress(
            &self.loaded.model,
            &mut self.cache,
            sampler,
            prompt,
            (options, &mut progress),
        );
        ui.finish();
        let mut generator = generator?;
        let read = start.elapsed();

        let start = Instant::now();
        let mut stream = tokenizer.decode_stream(true);
        let mut stops = StopMatcher::new(self.stops.iter().cloned());
        let (mut text, mut stopped) = (String::new(), false);
        let mut show = |piece: String| {
            text.push_str(&piece);
            if piece.is_empty() { Ok(()) } else { emit(&piece) }
        };
        while !stopped && !interrupt::stopped() {
            let Some(token) = generator.next() else { break };
            let Some(piece) = stream.push(token?) else {
                continue;
            };
            match stops.push(&piece) {
                StopMatch::Text(piece) => show(piece)?,
                StopMatch::Stopped(piece) => {
                    show(piece)?;
                    stopped = true;
                }
            }
        }
        if !stopped {
            match stream.flush().map(|piece| stops.push(&piece)) {
                Some(StopMatch::Stopped(piece)) => show(piece)?,
                Some(StopMatch::Text(piece)) => show(piece + &stops.flush())?,
                None => show(stops.flush())?,
            }
        }
        let (generated, wrote) = (generator.generated(), start.elapsed());
        let statistics = format!(
            "prompt of {} tokens ({} in the cache before) in {}; {generated} tokens in {}, {:.1} tokens/s",
            prompt.len(),
            reused.min(prompt.len()),
            format::duration(read),
            format::duration(wrote),
            generated as f64 / wrote.as_secs_f64().max(1e-9)
        );
        let context_full = (generator.finish_reason() == Some(FinishReason::ContextFull)).then_some(capacity);
        Ok(Answer {
            text,
            statistics,
            context_full,
        })
    }
}
