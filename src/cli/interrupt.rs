//! What is said or put away before a signal, such as Ctrl-C, ends this process. A thread takes the signals, so that it
//! works whatever the command is busy with. `toft run` passes its signals on to its machine and does without.
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{SigSet, Signal, raise};

use crate::error::Error;

/// What is done before the end.
static LAST: Mutex<Option<Box<dyn FnOnce() + Send>>> = Mutex::new(None);

/// Has something done before a signal ends this process, for as long as this is kept.
#[must_use]
pub(crate) struct BeforeEnd(());

pub(crate) fn before_end(act: impl FnOnce() + Send + 'static) -> BeforeEnd {
    *last() = Some(Box::new(act));
    BeforeEnd(())
}

impl Drop for BeforeEnd {
    fn drop(&mut self) {
        *last() = None;
    }
}

fn last() -> MutexGuard<'static, Option<Box<dyn FnOnce() + Send>>> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the signals that end a process. To be called before there is another thread, which could get them.
pub(crate) fn listen() -> Result<(), Error> {
    let signals = heeded();
    signals.thread_block().map_err(|cause| Error::Runtime(cause.into()))?;
    let take = move || {
        let Ok(signal) = signals.wait() else { return };
        if let Some(act) = last().take() {
            act();
        }
        // It ends by the signal all the same, so that a shell sees that and ends a loop around it.
        let _ = signals.thread_unblock();
        let _ = raise(signal);
    };
    std::thread::Builder::new().spawn(take).map(drop).map_err(Error::Runtime)
}

/// All but what is ignored: `nohup` and a shell's background mean that this process goes on.
fn heeded() -> SigSet {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let all = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];
    all.into_iter().filter(|signal| ignored >> (*signal as i32 - 1) & 1 == 0).collect()
}
