//! `run`: one prompt, one answer.

use std::io::{IsTerminal as _, Read as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use nash_text::{Message, RenderOptions, Tokenizer};

use crate::args::{ModelArg, Sampling, Threads};
use crate::experts::{self, Experts};
use crate::failure::Hint as _;
use crate::generate::{Limits, Session};
use crate::out::say;
use crate::ui::Ui;
use crate::{interrupt, model, out};

/// Answer one prompt, or continue a text
///
/// With an instruct model the prompt is a user's message; --raw continues the text as it is. Text on standard input is put
/// after the prompt. The answer alone goes to standard output.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm run small -p 'Why is the sky blue?'
  git diff | nashswarm run small -p 'Write a commit message:' -n 60 --temp 0
  nashswarm run small --raw -p 'Once upon a time' -s 7 --stop '.'")]
pub(crate) struct Run {
    #[command(flatten)]
    model: ModelArg,
    /// Prompt
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the prompt
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Instruction to an instruct model
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the text without a chat template
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    experts: Experts,
}

impl Run {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        let prompt = self.prompt()?;
        let mut loaded = model::load(self.model.path(), ui)?;
        let handle = self.experts.apply(&mut loaded, ui)?;
        let tokens = self.tokens(loaded.tokenizer()?, &prompt)?;
        let mut session = Session::new(&loaded, &self.limits, &self.sampling)?;
        let answer = session.answer(&tokens, ui, &mut |piece| {
            out::write(format_args!("{piece}"));
            Ok(())
        })?;
        say!("");
        interrupt::check()?;
        tracing::info!("{}", answer.statistics);
        if let Some(used) = handle.map(|handle| handle.read()) {
            tracing::info!("{}", experts::summary(&used));
        }
        answer.warn();
        Ok(())
    }

    /// The prompt from option, file and standard input.
    fn prompt(&self) -> anyhow::Result<String> {
        let mut parts = Vec::new();
        parts.extend(self.prompt.clone());
        if let Some(path) = &self.file {
            parts.push(model::read_text(path)?);
        }
        if !std::io::stdin().is_terminal() {
            let mut piped = String::new();
            interrupt::wait(|| std::io::stdin().read_to_string(&mut piped))
                .context("cannot read standard input as text")?;
            parts.push(piped);
        }
        parts.retain(|part| !part.trim().is_empty());
        if parts.is_empty() {
            return Err(anyhow::anyhow!("there is no prompt")).hint("give -p 'TEXT', or pipe a text in");
        }
        Ok(parts.join("\n\n"))
    }

    fn tokens(&self, tokenizer: &Tokenizer, prompt: &str) -> anyhow::Result<Vec<u32>> {
        let template = if self.raw {
            None
        } else {
            tokenizer.chat_template().ok()
        };
        let Some(template) = template else {
            return Ok(tokenizer.encode(prompt, true)?);
        };
        let system = self.system.as_deref().map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
        Ok(tokenizer.encode_prompt(&template.render(&messages, &RenderOptions::answer())?, false)?)
    }
}
