//! Whether a disk's thread looks for the next request itself for a moment, or sleeps until it is kicked. A guest that
//! asks again as soon as it is answered is served without a kick, an exit and a wake-up; one that does not costs
//! nothing, because looking is begun only after it would have paid, and ended by the first look in vain.
use std::time::{Duration, Instant};

use crate::limits::{BLOCK_LOOKOUT_US, BLOCK_LOOKOUT_WORTH_US};

/// What the last requests say about the next.
#[derive(Debug, Default)]
pub(super) struct Lookout {
    pays: bool,
    slept_at: Option<Instant>,
}

impl Lookout {
    /// The thread is called, by a kick above all.
    pub(super) fn woken(&mut self, now: Instant) {
        if let Some(slept_at) = self.slept_at.take() {
            let slept = now.saturating_duration_since(slept_at);
            self.pays = slept <= Duration::from_micros(BLOCK_LOOKOUT_WORTH_US);
        }
    }

    /// The thread waits for a kick.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.slept_at = Some(now);
    }

    /// Looks, when that pays, until `found` says so; answers whether it did.
    pub(super) fn find<E>(&mut self, mut found: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if !self.pays {
            return Ok(false);
        }
        let begun = Instant::now();
        while !found()? {
            if begun.elapsed() >= Duration::from_micros(BLOCK_LOOKOUT_US) {
                self.pays = false;
                return Ok(false);
            }
            std::hint::spin_loop();
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
