//! Whether a disk's thread looks for the next request itself for a moment, or sleeps until it is kicked. A guest that
//! asks again as soon as it is answered is served without a kick, an exit and a wake-up. For one that does not, looking is
//! begun only after it would have paid, ended by the first look in vain, and begun again ever more seldom.
use std::time::{Duration, Instant};

use crate::limits::{BLOCK_LOOKOUT_US, BLOCK_LOOKOUT_WORTH_US, BLOCK_LOOKOUTS_FORGONE_MAX};

/// What the last requests say about the next.
#[derive(Debug)]
pub(super) struct Lookout {
    /// Requests in a row that would have been found, and how many it takes.
    worth: u32,
    wanted: u32,
    slept_at: Option<Instant>,
}

impl Default for Lookout {
    fn default() -> Lookout {
        Lookout { worth: 0, wanted: 1, slept_at: None }
    }
}

impl Lookout {
    /// The thread is called, by a kick above all.
    pub(super) fn woken(&mut self, now: Instant) {
        if let Some(slept_at) = self.slept_at.take() {
            let slept = now.saturating_duration_since(slept_at);
            let is_worth = slept <= Duration::from_micros(BLOCK_LOOKOUT_WORTH_US);
            self.worth = if is_worth { self.worth.saturating_add(1) } else { 0 };
        }
    }

    /// The thread waits for a kick.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.slept_at = Some(now);
    }

    /// Whether looking pays.
    pub(super) fn pays(&self) -> bool {
        self.worth >= self.wanted
    }

    /// Looks, when that pays, until `found` says so; answers whether it did.
    pub(super) fn find<E>(&mut self, mut found: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if !self.pays() {
            return Ok(false);
        }
        let begun = Instant::now();
        while !found()? {
            if begun.elapsed() >= Duration::from_micros(BLOCK_LOOKOUT_US) {
                self.worth = 0;
                self.wanted = self.wanted.saturating_mul(2).min(BLOCK_LOOKOUTS_FORGONE_MAX);
                return Ok(false);
            }
            std::hint::spin_loop();
        }
        self.wanted = 1;
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
