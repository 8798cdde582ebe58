//! The threads of one end of a move.
use std::thread::JoinHandle;

use super::Error;
use crate::threads::{self, ThreadKind};

/// Those that have been started and not been waited for.
#[derive(Default)]
pub(super) struct Threads(Vec<JoinHandle<()>>);

impl Threads {
    pub(super) fn start(&mut self, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let run = move || {
            threads::enter(ThreadKind::Move);
            run();
        };
        let thread = std::thread::Builder::new().name("move".to_owned()).spawn(run);
        self.0.push(thread.map_err(|cause| Error::Host { doing: "start a thread", cause })?);
        Ok(())
    }

    /// Waits for their ends.
    pub(super) fn join(&mut self) {
        for thread in self.0.drain(..) {
            // A panic has aborted the process before it could get here.
            let _ = thread.join();
        }
    }
}
