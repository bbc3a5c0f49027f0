//! The `nashswarm` command.
fn main() {}
