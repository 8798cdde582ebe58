//! When a vCPU is held back whose guest writes faster than its memory is copied. What holds it is the brake.
use std::time::{Duration, Instant};

use crate::limits::{BRAKE_EVERY_MS, BRAKE_IDLE_MS, BRAKE_LOOK_US};

/// How a vCPU's time is cut: it runs, and is then held back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    /// For so long it runs, in CPU time of its thread.
    run: Duration,
    /// For so long it is held back.
    pub(super) nap: Duration,
}

/// Where one vCPU is in its slot.
#[derive(Debug)]
pub(super) struct Turn {
    /// When it was last free to run.
    free: Instant,
    /// CPU time of its thread when it was last held back, in nanoseconds.
    cpu_ns: u64,
}

/// What comes of looking at a vCPU.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// It is to be held back from now on.
    pub(super) holds: bool,
    /// Until it is to be looked at again.
    pub(super) again: Duration,
}

impl Slot {
    /// A slot of which so much is taken from the guest.
    pub(crate) fn new(throttle_percent: u8) -> Slot {
        let per_cent = Duration::from_micros(BRAKE_EVERY_MS * 10);
        let throttle_percent = u32::from(throttle_percent.min(100));
        Slot { run: per_cent * (100 - throttle_percent), nap: per_cent * throttle_percent }
    }

    /// Both parts of it.
    pub(crate) fn length(&self) -> Duration {
        self.run + self.nap
    }
}

impl Turn {
    pub(super) fn new(now: Instant) -> Turn {
        Turn { free: now, cpu_ns: 0 }
    }

    /// A vCPU whose thread has used so much CPU time since it was started. What counts is what it ran, not what it could have: beside
    /// threads that copy, it often waits longer for a processor than its share lasts, and would hardly run if it were held back by the
    /// clock.
    pub(super) fn look(&mut self, slot: &Slot, now: Instant, cpu_ns: u64) -> Look {
        let held = self.free.saturating_duration_since(now);
        if !held.is_zero() {
            return Look { holds: false, again: held + slot.run };
        }
        let left = slot.run.saturating_sub(Duration::from_nanos(cpu_ns.saturating_sub(self.cpu_ns)));
        if left.is_zero() {
            *self = Turn { free: now + slot.nap, cpu_ns };
            return Look { holds: true, again: slot.length() };
        }
        // One that has nothing to do does not write, either.
        let is_idle = now.duration_since(self.free) > slot.length();
        let least =
            if is_idle { Duration::from_millis(BRAKE_IDLE_MS) } else { Duration::from_micros(BRAKE_LOOK_US) };
        Look { holds: false, again: left.max(least) }
    }
}

#[cfg(test)]
mod tests;
