//! The command as a user meets it. Snapshots are updated with `INSTA_UPDATE=always cargo test -p nash-cli`, to be read before
//! they are committed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod contests;
mod glue;
mod mixtures;
mod models;
mod usage;
