//! How long work reports where it is and learns that it should stop.

/// Receives progress; shared between threads.
pub trait Progress: Sync {
    /// A stage of `total` steps begins.
    fn stage(&self, name: &str, total: u64);
    /// `n` more steps of the current stage are done.
    fn advance(&self, n: u64);
    /// Whether the user asked to stop; polled between steps.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Reports nothing and is never cancelled.
impl Progress for () {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}
