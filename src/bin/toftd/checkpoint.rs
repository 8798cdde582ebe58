//! What a debug build of the daemon does at each checkpoint, as a test's environment orders: `TOFT_CHECKPOINTS=FILE`
//! appends the point's name to a file, `TOFT_DIE_AT=N` kills the daemon at the Nth, `TOFT_DIE_AT=NAME:N` at the Nth of
//! that name; `TOFT_HOLD_AT` stops it there until it is sent SIGCONT. Release builds have none of it.
//! `flags` calls it.
use std::fs::File;
use std::io::Write;
use std::num::ParseIntError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use host::{Checkpoint, Fate};
use nix::sys::signal::{Signal, raise};

struct Ordered {
    signals: Vec<SignalAt>,
    names: Option<File>,
}

/// A signal that the daemon sends itself at a point.
struct SignalAt {
    signal: Signal,
    /// Counts points of this name alone, where one is given: the background passes points of its own in between.
    name: Option<String>,
    number: u64,
    passed: AtomicU64,
}

/// What the environment orders, if it orders anything.
pub(crate) fn ordered() -> anyhow::Result<Option<Arc<dyn Checkpoint>>> {
    let names = std::env::var_os("TOFT_CHECKPOINTS");
    let mut signals = Vec::new();
    for (variable, signal) in [("TOFT_DIE_AT", Signal::SIGKILL), ("TOFT_HOLD_AT", Signal::SIGSTOP)] {
        if let Ok(text) = std::env::var(variable) {
            let read = SignalAt::read(signal, &text);
            signals.push(read.with_context(|| format!("{variable} is to be N or NAME:N"))?);
        }
    }
    if signals.is_empty() && names.is_none() {
        return Ok(None);
    }
    let open = |path| File::options().create(true).append(true).open(path);
    let names = names.map(open).transpose().context("TOFT_CHECKPOINTS cannot be opened")?;
    Ok(Some(Arc::new(Ordered { signals, names })))
}

impl SignalAt {
    fn read(signal: Signal, text: &str) -> Result<SignalAt, ParseIntError> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (Some(name.to_owned()), number),
            None => (None, text),
        };
        Ok(SignalAt { signal, name, number: number.parse()?, passed: AtomicU64::new(0) })
    }

    /// Whether this is the point.
    fn is_reached(&self, point: &str) -> bool {
        self.name.as_deref().is_none_or(|name| name == point)
            && self.passed.fetch_add(1, Ordering::SeqCst) + 1 == self.number
    }
}

impl Checkpoint for Ordered {
    fn reached(&self, point: &'static str) -> Fate {
        if let Some(mut names) = self.names.as_ref() {
            // One write, so that lines of threads do not mix; a full disk only loses a test's notes.
            let _ = names.write_all(format!("{point}\n").as_bytes());
        }
        for reached in self.signals.iter().filter(|one| one.is_reached(point)) {
            // In the middle of whatever the other threads do, but to this one: a signal to the whole process is taken by
            // whichever thread comes first, and this one would go on past the point until it is stopped, too (signal(7)).
            let _ = raise(reached.signal);
            if reached.signal == Signal::SIGKILL {
                return Fate::Die;
            }
        }
        Fate::Live
    }
}
