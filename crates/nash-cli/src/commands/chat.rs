//! `chat`: a conversation on the terminal.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use clap::Args;
use nash_text::{Message, RenderOptions};
use rustyline::error::ReadlineError;

use crate::args::{ModelArg, Sampling, Threads};
use crate::generate::{Limits, Session};
use crate::out::say;
use crate::store::Store;
use crate::ui::Ui;
use crate::{interrupt, model, out};

const HELP: &str = "\
/help            this text
/reset           forget the conversation
/system TEXT     forget the conversation and begin a new one with this instruction
/quit            leave (also Ctrl-D)
Ctrl-C           stop the answer; at the prompt: drop the line
A line that ends in \\ goes on in the next one.";

/// Talk to a model
///
/// Needs a model with a chat template (an instruct model). Arrow keys bring back earlier lines, also of earlier
/// chats.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm chat small
  nashswarm chat small --system 'Answer in one sentence.' --temp 0.3
  printf 'Hello\\nWhat did I say?\\n' | nashswarm chat small --seed 1")]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArg,
    /// Instruction that the conversation begins with
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    sampling: Sampling,
}

/// A line the user typed.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Help,
    Reset,
    System(&'a str),
    Quit,
    Unknown(&'a str),
    Nothing,
    Say(&'a str),
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Self::Nothing;
        }
        if !line.starts_with('/') {
            return Self::Say(line);
        }
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/help" | "/?" => Self::Help,
            "/reset" | "/clear" => Self::Reset,
            "/system" => Self::System(rest.trim()),
            "/quit" | "/exit" | "/bye" => Self::Quit,
            _ => Self::Unknown(command),
        }
    }
}

impl Chat {
    pub(crate) fn run(self, ui: &Ui) -> anyhow::Result<()> {
        self.threads.apply()?;
        let loaded = model::load(self.model.path(), ui)?;
        let template = loaded.tokenizer()?.chat_template()?;
        let mut session = Session::new(&loaded, &self.limits, &self.sampling)?;
        let mut messages = opening(self.system.as_deref());
        let mut input = Input::open()?;
        if input.is_terminal() {
            ui.note(&format!("{}: /help for help, /quit to leave", loaded.name()));
        }
        while let Some(line) = input.read()? {
            match Line::parse(&line) {
                Line::Nothing => {}
                Line::Help => eprintln!("{HELP}"),
                Line::Quit => break,
                Line::Reset => messages.retain(|message| message.role == "system"),
                Line::System(text) => messages = opening(Some(text).filter(|text| !text.is_empty())),
                Line::Unknown(command) => eprintln!("there is no {command}; /help shows what there is"),
                Line::Say(text) => {
                    messages.push(Message::new("user", text));
                    let prompt = template.render(&messages, &RenderOptions::answer())?;
                    let tokens = loaded.tokenizer()?.encode_prompt(&prompt, false)?;
                    let answer = session.answer(&tokens, ui, &mut show);
                    say!("");
                    // A stopped answer stays in the conversation as far as it went.
                    let stopped = interrupt::clear();
                    match answer {
                        Ok(answer) => {
                            answer.warn();
                            tracing::info!("{}{}", answer.statistics, if stopped { ", stopped" } else { "" });
                            messages.push(Message::new("assistant", answer.text));
                        }
                        Err(error) => {
                            messages.pop();
                            eprintln!("error: {error:#}");
                        }
                    }
                }
            }
        }
        input.close();
        Ok(())
    }
}

fn opening(system: Option<&str>) -> Vec<Message> {
    system
        .map(|text| Message::new("system", text))
        .into_iter()
        .collect()
}

fn show(piece: &str) -> anyhow::Result<()> {
    out::write(format_args!("{piece}"));
    Ok(())
}

/// Lines from a terminal with editing and history, or from a pipe.
enum Input {
    Terminal {
        editor: Box<rustyline::DefaultEditor>,
        history: Option<std::path::PathBuf>,
    },
    Pipe(std::io::Stdin),
}

impl Input {
    fn open() -> anyhow::Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Pipe(std::io::stdin()));
        }
        let mut editor = rustyline::DefaultEditor::new().context("cannot use the terminal")?;
        let history = Store::open().ok().map(|store| store.dir().join("history.txt"));
        // The first chat has no history yet.
        history.as_ref().map(|path| editor.load_history(path));
        Ok(Self::Terminal {
            editor: Box::new(editor),
            history,
        })
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next line, with lines that end in `\` put together; `None` at the end.
    fn read(&mut self) -> anyhow::Result<Option<String>> {
        let mut text = String::new();
        loop {
            let Some(line) = self.read_line(if text.is_empty() { "> " } else { ". " })? else {
                return Ok(Some(text).filter(|text| !text.is_empty()));
            };
            match line.strip_suffix('\\') {
                Some(part) => {
                    text.push_str(part);
                    text.push('\n');
                }
                None => {
                    text.push_str(&line);
                    if let Self::Terminal { editor, .. } = self {
                        editor.add_history_entry(&text)?;
                    }
                    return Ok(Some(text));
                }
            }
        }
    }

    fn read_line(&mut self, prompt: &str) -> anyhow::Result<Option<String>> {
        match self {
            Self::Terminal { editor, .. } => match interrupt::wait(|| editor.readline(prompt)) {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Interrupted) => Ok(Some(String::new())),
                Err(ReadlineError::Eof) => Ok(None),
                Err(error) => Err(error.into()),
            },
            Self::Pipe(stdin) => {
                let mut line = String::new();
                if interrupt::wait(|| stdin.read_line(&mut line))? == 0 {
                    return Ok(None);
                }
                Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned()))
            }
        }
    }

    fn close(self) {
        if let Self::Terminal {
            mut editor,
            history: Some(path),
        } = self
        {
            let saved = path
                .parent()
                .map_or(Ok(()), std::fs::create_dir_all)
                .map_err(ReadlineError::from)
                .and_then(|()| editor.save_history(&path));
            if let Err(error) = saved {
                tracing::warn!("the history was not saved to {}: {error}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(Line::parse("  hello /help "), Line::Say("hello /help"));
        assert_eq!(Line::parse("/help"), Line::Help);
        assert_eq!(Line::parse("/system  be brief "), Line::System("be brief"));
        assert_eq!(Line::parse("/system"), Line::System(""));
        assert_eq!(Line::parse("/bye"), Line::Quit);
        assert_eq!(Line::parse("/halp me"), Line::Unknown("/halp"));
        assert_eq!(Line::parse("   "), Line::Nothing);
    }
}
