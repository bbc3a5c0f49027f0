//! `man`: the manual pages.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};

use crate::out;

/// Print the manual page, or write one page per command
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm man | man -l -
  nashswarm man -o ~/.local/share/man/man1")]
pub(crate) struct Man {
    /// Folder for the pages of all commands
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let command = crate::args::Cli::command();
        let Some(dir) = self.output else {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            out::write(format_args!("{}", String::from_utf8(page)?));
            return Ok(());
        };
        std::fs::create_dir_all(&dir)
            .and_then(|()| clap_mangen::generate_to(command, &dir))
            .with_context(|| format!("cannot write manual pages to {}", dir.display()))
    }
}
