//! The commands, one file each.

pub(crate) mod ablate;
pub(crate) mod bench;
pub(crate) mod carve;
pub(crate) mod chat;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod compress;
pub(crate) mod demo;
pub(crate) mod eval;
pub(crate) mod glue;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod man;
pub(crate) mod plan;
pub(crate) mod pull;
pub(crate) mod run;
pub(crate) mod verify;

use crate::args::{Command, Global};
use crate::ui::Ui;

/// Runs a command.
pub(crate) fn run(command: Command, global: &Global) -> anyhow::Result<()> {
    let ui = Ui::new(global.quiet);
    match command {
        Command::Demo(demo) => demo.run(&ui),
        Command::Compress(compress) => compress.run(&ui),
        Command::Carve(carve) => carve.run(&ui),
        Command::Eval(eval) => eval.run(&ui),
        Command::Compare(compare) => compare.run(&ui),
        Command::Ablate(ablate) => ablate.run(&ui),
        Command::Glue(glue) => glue.run(&ui),
        Command::Run(run) => run.run(&ui),
        Command::Chat(chat) => chat.run(&ui),
        Command::Inspect(inspect) => inspect.run(),
        Command::Verify(verify) => verify.run(&ui),
        Command::Plan(plan) => plan.run(),
        Command::Bench(bench) => bench.run(&ui),
        Command::Pull(pull) => pull.run(&ui),
        Command::List(list) => list.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
    }
}
