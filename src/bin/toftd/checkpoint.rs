//! What a debug build of the daemon does at each checkpoint, as a test's environment orders: `TOFT_CHECKPOINTS=FILE`
//! appends the point's name to a file, `TOFT_DIE_AT=N` kills the daemon at the Nth, `TOFT_DIE_AT=NAME:N` at the Nth of
//! that name. Release builds have none of it.
//! `flags` calls it.
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use host::{Checkpoint, Fate};
use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;

struct Ordered {
    passed: AtomicU64,
    die_at: Option<DieAt>,
    names: Option<File>,
}

struct DieAt {
    /// Counts points of this name alone, where one is given: the background passes points of its own in between.
    name: Option<String>,
    number: u64,
}

/// What the environment orders, if it orders anything.
pub(crate) fn ordered() -> anyhow::Result<Option<Arc<dyn Checkpoint>>> {
    let die_at = std::env::var("TOFT_DIE_AT").ok();
    let names = std::env::var_os("TOFT_CHECKPOINTS");
    if die_at.is_none() && names.is_none() {
        return Ok(None);
    }
    let die_at = die_at.as_deref().map(DieAt::read).transpose()?;
    let open = |path| File::options().create(true).append(true).open(path);
    let names = names.map(open).transpose().context("TOFT_CHECKPOINTS cannot be opened")?;
    Ok(Some(Arc::new(Ordered { passed: AtomicU64::new(0), die_at, names })))
}

impl DieAt {
    fn read(text: &str) -> anyhow::Result<DieAt> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (Some(name.to_owned()), number),
            None => (None, text),
        };
        let number = number.parse().context("TOFT_DIE_AT is to be N or NAME:N")?;
        Ok(DieAt { name, number })
    }
}

impl Checkpoint for Ordered {
    fn reached(&self, point: &'static str) -> Fate {
        if let Some(mut names) = self.names.as_ref() {
            // One write, so that lines of threads do not mix; a full disk only loses a test's notes.
            let _ = names.write_all(format!("{point}\n").as_bytes());
        }
        let counts = |die_at: &DieAt| die_at.name.as_deref().is_none_or(|name| name == point);
        let Some(die_at) = self.die_at.as_ref().filter(|die_at| counts(die_at)) else { return Fate::Live };
        if self.passed.fetch_add(1, Ordering::SeqCst) + 1 == die_at.number {
            // As `kill -9` would, in the middle of whatever the other threads do.
            let _ = kill(getpid(), Signal::SIGKILL);
            return Fate::Die;
        }
        Fate::Live
    }
}
