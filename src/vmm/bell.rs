//! What vCPUs and devices tell the main thread. One eventfd wakes it; what happened is kept here, bounded and
//! coalesced, until it looks. Nobody who rings waits for it.
use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::{EventFd, Notices};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use crate::limits::{FAULT_BYTES_MAX, FAULTS_EVERY_MS, FAULTS_MAX};

/// How the guest's run came to an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    PoweredOff,
    ResetAsked,
    TripleFault,
    GuestPanicked,
    /// KVM could not go on, in its words.
    Kvm(String),
}

/// What has happened since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct News {
    /// The first of them; what follows it is its consequence.
    pub(crate) ending: Option<Ending>,
    /// Device and detail, oldest first.
    pub(crate) faults: VecDeque<(String, String)>,
    /// Faults that were too many.
    pub(crate) faults_lost: u64,
    /// The console has passed the point somebody waits for.
    pub(crate) console: bool,
    /// A save has got further, or to its end.
    pub(crate) save: bool,
    /// A move has got further, or left a chore.
    pub(crate) moving: bool,
    /// A piece of memory is to be turned.
    pub(crate) settling: bool,
}

/// Rung by any thread, answered by the main thread.
pub(crate) struct Bell {
    event: EventFd,
    news: Mutex<News>,
    pace: Mutex<Pace>,
}

/// How many faults were kept in the span that is running.
struct Pace {
    began: Instant,
    kept: usize,
}

impl Pace {
    /// Counts one; `false` when it is one too many.
    fn keeps(&mut self, now: Instant) -> bool {
        if now.duration_since(self.began) >= Duration::from_millis(FAULTS_EVERY_MS) {
            *self = Pace { began: now, kept: 0 };
        }
        self.kept = self.kept.saturating_add(1);
        self.kept <= FAULTS_MAX
    }
}

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        let pace = Mutex::new(Pace { began: Instant::now(), kept: 0 });
        Ok(Bell { event: EventFd::new(EFD_NONBLOCK)?, news: Mutex::default(), pace })
    }

    /// Readable when there is news.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Tells that the guest's run has ended.
    pub(crate) fn end(&self, ending: Ending) {
        self.news().ending.get_or_insert(ending);
        self.ring();
    }

    /// Tells that the console holds what somebody waits for.
    pub(crate) fn console(&self) {
        self.news().console = true;
        self.ring();
    }

    /// Tells that a save has got further, or to its end.
    pub(crate) fn save(&self) {
        self.news().save = true;
        self.ring();
    }

    /// Tells that a move has got further, or has something to be done.
    pub(crate) fn moving(&self) {
        self.news().moving = true;
        self.ring();
    }

    /// Tells that a piece of memory is to be turned, for which the machine has to stand still.
    pub(crate) fn settling(&self) {
        self.news().settling = true;
        self.ring();
    }

    /// Whether the guest's run has ended and nobody has looked yet.
    pub(crate) fn has_ending(&self) -> bool {
        self.news().ending.is_some()
    }

    /// Takes everything that has happened.
    pub(crate) fn take(&self) -> News {
        // The order matters: what comes after the eventfd is cleared rings again.
        let _ = self.event.read();
        std::mem::take(&mut *self.news())
    }

    fn ring(&self) {
        // A full counter is a bell that rings already.
        let _ = self.event.write(1);
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notices for Bell {
    fn device_fault(&self, device: &str, mut detail: String) {
        let keeps = self.pace.lock().unwrap_or_else(PoisonError::into_inner).keeps(Instant::now());
        let cut = detail.floor_char_boundary(FAULT_BYTES_MAX);
        detail.truncate(cut);
        let mut news = self.news();
        if keeps && news.faults.len() < FAULTS_MAX {
            news.faults.push_back((device.to_owned(), detail));
        } else {
            news.faults_lost = news.faults_lost.saturating_add(1);
        }
        drop(news);
        self.ring();
    }
}

#[cfg(test)]
mod tests;
