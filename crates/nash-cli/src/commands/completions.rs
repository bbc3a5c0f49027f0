//! `completions`: shell completions on stdout.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::out;

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nashswarm completions bash > ~/.local/share/bash-completion/completions/nashswarm
  nashswarm completions zsh  > ~/.zfunc/_nashswarm
  nashswarm completions fish > ~/.config/fish/completions/nashswarm.fish")]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(
            self.shell,
            &mut crate::args::Cli::command(),
            "nashswarm",
            &mut script,
        );
        out::write(format_args!("{}", String::from_utf8(script)?));
        Ok(())
    }
}
