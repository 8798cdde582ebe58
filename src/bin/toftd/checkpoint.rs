//! What a debug build of the daemon does at each checkpoint, as a test's environment orders: `TOFT_CHECKPOINTS=FILE`
//! appends the point's name to a file, `TOFT_DIE_AT=N` kills the daemon at the Nth. Release builds have none of it.
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
    die_at: Option<u64>,
    names: Option<File>,
}

/// What the environment orders, if it orders anything.
pub(crate) fn ordered() -> anyhow::Result<Option<Arc<dyn Checkpoint>>> {
    let die_at = std::env::var("TOFT_DIE_AT").ok();
    let names = std::env::var_os("TOFT_CHECKPOINTS");
    if die_at.is_none() && names.is_none() {
        return Ok(None);
    }
    let die_at = die_at.map(|text| text.parse()).transpose().context("TOFT_DIE_AT is to be a number")?;
    let open = |path| File::options().create(true).append(true).open(path);
    let names = names.map(open).transpose().context("TOFT_CHECKPOINTS cannot be opened")?;
    Ok(Some(Arc::new(Ordered { passed: AtomicU64::new(0), die_at, names })))
}

impl Checkpoint for Ordered {
    fn reached(&self, point: &'static str) -> Fate {
        let number = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(mut names) = self.names.as_ref() {
            // One write, so that lines of threads do not mix; a full disk only loses a test's notes.
            let _ = names.write_all(format!("{point}\n").as_bytes());
        }
        if self.die_at == Some(number) {
            // As `kill -9` would, in the middle of whatever the other threads do.
            let _ = kill(getpid(), Signal::SIGKILL);
            return Fate::Die;
        }
        Fate::Live
    }
}
