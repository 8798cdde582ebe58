//! When to stop the guest: pure arithmetic after each round. It knows what went over the streams, how long that took, and
//! how much was written meanwhile.
use std::time::Duration;

use wire::migration::{Mode, SendLimits};

use super::midway::Glimpse;

/// What one round has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Round {
    /// Counted from 1.
    pub(crate) number: u32,
    /// How long it took.
    pub(crate) took: Duration,
    /// Bytes that went over the streams.
    pub(crate) sent_bytes: u64,
    /// Bytes that were written meanwhile and are to be sent again.
    pub(crate) left_bytes: u64,
}

/// What was decided, and the figures for those who look on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) next: Next,
    pub(crate) bytes_per_s: u64,
    pub(crate) dirtied_bytes_per_s: u64,
    pub(crate) expected_downtime: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Stop the guest and send what is left.
    Stop,
    /// Another round, with vCPUs held back for so many hundredths of their time.
    Again { throttle_percent: u8 },
    /// Held back as far as it goes, the guest still writes faster than the streams take.
    GiveUp,
}

/// What is to be done in the standstill besides sending memory: stopping, the log, the state, building it anew.
const FIXED: Duration = Duration::from_millis(6);

/// Of a round that sent less, the rate is nobody's: such a round is mostly waiting.
const RATE_BYTES_MIN: u64 = 1 << 20;

/// The most that vCPUs are held back. What is left keeps a guest's connections alive.
const THROTTLE_PERCENT_MAX: u8 = 99;

/// Least step by which they are held back further.
const THROTTLE_PERCENT_STEP: u8 = 10;

/// Rounds at the most throttle before it is given up.
const ROUNDS_AT_MOST_MAX: u32 = 20;

/// The same where the rest can be owed: each of them takes as long as the first one.
const ROUNDS_AT_MOST_AUTO: u32 = 1;

/// What remembers one move's rounds.
#[derive(Debug, Clone)]
pub(crate) struct Convergence {
    rounds_at_most: u32,
    rate: u64,
    left_before: Option<u64>,
    throttle_percent: u8,
    at_most: u32,
}

impl Convergence {
    /// As long as there is hope.
    pub(crate) fn patient(mode: Mode) -> Convergence {
        let rounds_at_most = if mode == Mode::Auto { ROUNDS_AT_MOST_AUTO } else { ROUNDS_AT_MOST_MAX };
        Convergence { rounds_at_most, rate: 0, left_before: None, throttle_percent: 0, at_most: 0 }
    }

    /// What follows a round.
    pub(crate) fn after(&mut self, round: Round, limits: SendLimits) -> Decision {
        let per_s = |bytes: u64| {
            let per_s = u128::from(bytes) * 1_000_000_000 / round.took.as_nanos().max(1);
            u64::try_from(per_s).unwrap_or(u64::MAX)
        };
        if round.sent_bytes >= RATE_BYTES_MIN || self.rate == 0 {
            self.rate = per_s(round.sent_bytes).max(1);
        }
        let dirtied_bytes_per_s = per_s(round.left_bytes);
        let sending_us = u128::from(round.left_bytes) * 1_000_000 / u128::from(self.rate);
        let sending = Duration::from_micros(u64::try_from(sending_us).unwrap_or(u64::MAX));
        let expected_downtime = FIXED.saturating_add(sending);
        let next = self.next(round, dirtied_bytes_per_s, expected_downtime, limits);
        self.left_before = Some(round.left_bytes);
        Decision { next, bytes_per_s: self.rate, dirtied_bytes_per_s, expected_downtime }
    }

    /// What part of their time vCPUs are held back, in hundredths.
    pub(crate) fn throttle_percent(&self) -> u8 {
        self.throttle_percent
    }

    /// What follows from a round that is not over. Where the better half has gone, and more than half of that was written again, the
    /// guest writes as fast as the streams take or faster, and would be held back after this round or the next: what it writes
    /// until then would only be sent once more.
    pub(crate) fn midway(&mut self, Glimpse { all_bytes, gone_bytes, again_bytes }: Glimpse) {
        if gone_bytes >= all_bytes / 2 && again_bytes > gone_bytes / 2 {
            self.throttle_percent = THROTTLE_PERCENT_MAX;
        }
    }

    fn next(&mut self, round: Round, dirtied: u64, expected: Duration, limits: SendLimits) -> Next {
        if round.left_bytes == 0 || expected <= Duration::from_millis(limits.downtime_ms.into()) {
            return Next::Stop;
        }
        // A round that leaves three quarters of what the last one left, or less, gets there by itself, and soon. What the first
        // one sent is all that is there.
        let before = self.left_before.unwrap_or(round.sent_bytes);
        if round.left_bytes <= before / 4 * 3 {
            return Next::Again { throttle_percent: self.throttle_percent };
        }
        if self.throttle_percent == THROTTLE_PERCENT_MAX {
            self.at_most += 1;
            if self.at_most > self.rounds_at_most {
                return Next::GiveUp;
            }
        }
        // A guest that leaves as much as the last time may write over the same pages again and again: how fast cannot
        // be seen, only that it is too fast.
        let is_lower_bound = round.left_bytes >= before / 10 * 9;
        self.throttle_percent = self.throttle(dirtied, is_lower_bound);
        Next::Again { throttle_percent: self.throttle_percent }
    }

    /// So that the guest writes half of what the streams take: what it would write unhindered is what it wrote in the
    /// time it had. Of a lower bound nothing can be reckoned, and each round that shows no more than that takes as long as the
    /// first: it is held back as far as it goes. A guest that is behind its own pace writes as fast as memory is.
    fn throttle(&self, dirtied: u64, is_lower_bound: bool) -> u8 {
        let had = 100 - self.throttle_percent.min(99);
        let unhindered = u128::from(dirtied) * 100 / u128::from(had);
        let may = u128::from(self.rate / 2) * 100 / unhindered.max(1);
        let wanted = match is_lower_bound {
            true => THROTTLE_PERCENT_MAX,
            false => 100 - u8::try_from(may.min(100)).unwrap_or(100),
        };
        wanted.max(self.throttle_percent.saturating_add(THROTTLE_PERCENT_STEP)).min(THROTTLE_PERCENT_MAX)
    }
}

#[cfg(test)]
mod tests;
