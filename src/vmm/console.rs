//! The serial console's output on its way into the ring file, and the one-shot watch on it. Input goes straight
//! to the serial device. Written by vCPU threads, watched by the main thread.
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use wire::console::{Piece, Ring};

use crate::bell::Bell;
use crate::log;

/// No position can be beyond this, so a watch on it never fires.
const NO_WATCH: u64 = u64::MAX;

/// The console of one process; it goes on across resets.
pub(crate) struct Console {
    ring: Mutex<Ring>,
    written: AtomicU64,
    /// The bell rings once when more than this has been written.
    watched: AtomicU64,
    failed: AtomicBool,
    bell: Arc<Bell>,
}

/// What the serial device writes into.
pub(crate) struct Sink(Arc<Console>);

impl Console {
    pub(crate) fn new(ring: Ring, bell: Arc<Bell>) -> Arc<Console> {
        Arc::new(Console {
            written: AtomicU64::new(ring.written()),
            ring: Mutex::new(ring),
            watched: AtomicU64::new(NO_WATCH),
            failed: AtomicBool::new(false),
            bell,
        })
    }

    /// Total bytes written.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    /// Rings the bell once as soon as more than the least of `seen` has been written, at once if it has been;
    /// replaces the watch before. An empty iterator takes the watch away.
    pub(crate) fn watch(&self, seen: impl Iterator<Item = u64>) {
        self.watched.store(seen.min().unwrap_or(NO_WATCH), Ordering::SeqCst);
        self.ring_if_passed();
    }

    /// What the ring holds from a position on, at most so many bytes.
    pub(crate) fn read(&self, from: u64, length_max: usize) -> io::Result<Piece> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).read(from, length_max)
    }

    /// Puts down what another machine's console held from a position on.
    pub(crate) fn adopt(&self, position: u64, data: &[u8]) -> io::Result<()> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        self.written.store(ring.adopt(position, data)?, Ordering::SeqCst);
        drop(ring);
        self.ring_if_passed();
        Ok(())
    }

    /// Goes on where another process has written to the same ring, and writes no more.
    pub(crate) fn catch_up(&self) -> io::Result<()> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        self.written.store(ring.refresh()?, Ordering::SeqCst);
        drop(ring);
        self.ring_if_passed();
        Ok(())
    }

    pub(crate) fn sink(self: &Arc<Console>) -> Box<dyn Write + Send> {
        Box::new(Sink(Arc::clone(self)))
    }

    /// Either the writer sees the watch or the watcher sees what was written: both store before they load.
    fn ring_if_passed(&self) {
        let watched = self.watched.load(Ordering::SeqCst);
        if self.written() > watched {
            let fired = self.watched.compare_exchange(watched, NO_WATCH, Ordering::SeqCst, Ordering::SeqCst);
            if fired.is_ok() {
                self.bell.console();
            }
        }
    }
}

impl Write for Sink {
    /// Takes everything. When the file cannot be written, the output is lost, not the guest's time.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let console = &self.0;
        let mut ring = console.ring.lock().unwrap_or_else(PoisonError::into_inner);
        match ring.append(data) {
            Ok(written) => console.written.store(written, Ordering::SeqCst),
            Err(error) if !console.failed.swap(true, Ordering::Relaxed) => {
                log::line(format_args!("console output is being lost: {error}"));
            }
            Err(_) => (),
        }
        drop(ring);
        console.ring_if_passed();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
