//! How far a move is and what is to be expected of it, as its operation shows it: arithmetic on what a VMM says of its rounds, or
//! on bytes that have gone. It asks nobody and writes nothing; `live` and `carry` do.
use std::time::Duration;

use model::operation::Progress;
use wire::migration::{MigrationStatus, Phase, Progress as Moved};

/// Of less than so much gone no rate is told: it is mostly waiting.
const RATE_BYTES_MIN: u64 = 1 << 20;

/// What a round may leave of what it began with, in hundredths. A VMM holds back a guest that leaves more, or gives up: when it
/// ends cannot be told from a round that goes nowhere.
const LEAVES_PERCENT_MAX: u8 = 75;

/// What is remembered of a source from look to look.
#[derive(Debug, Default)]
pub(super) struct Outlook {
    round: u32,
    /// What this round had to send at its beginning, as far as it was seen.
    round_bytes: u64,
}

impl Outlook {
    /// How far a source is. What was sent again counts again, so the whole grows.
    pub(super) fn progress(&mut self, status: &MigrationStatus) -> Progress {
        let moved = &status.progress;
        if self.round != moved.rounds {
            *self = Outlook { round: moved.rounds, round_bytes: 0 };
        }
        self.round_bytes = self.round_bytes.max(moved.left_bytes);
        let sent = moved.sent_bytes.saturating_add(moved.skipped_bytes);
        let total = sent.saturating_add(moved.left_bytes);
        let share =
            |span: u64| u8::try_from(sent.saturating_mul(span).checked_div(total).unwrap_or(0)).unwrap_or(0);
        let (phase, percent) = match (status.phase, moved.rounds) {
            (Phase::Greet, _) => ("preparing", 1),
            (Phase::Rounds, 0 | 1) => ("copying", 1_u8.saturating_add(share(39)).min(40)),
            (Phase::Rounds, _) => ("copying_changes", 40_u8.saturating_add(share(45)).min(85)),
            (Phase::Owing, _) => ("sending_owed", 89_u8.saturating_add(share(10)).min(99)),
            _ => ("standing_still", 88),
        };
        let is_running = status.phase == Phase::Rounds;
        let expected_us = Some(moved.expected_downtime_us).filter(|us| is_running && *us > 0);
        Progress {
            phase: phase.to_owned(),
            percent,
            bytes_done: Some(sent),
            bytes_total: Some(total),
            bytes_per_s: Some(rate(moved)).filter(|rate| *rate > 0),
            remaining_s: remaining_s(status.phase, moved, self.round_bytes),
            expected_downtime_ms: expected_us.map(|us| us.div_ceil(1000)),
            throttle_percent: is_running.then_some(moved.throttle_percent),
        }
    }
}

/// How far a copy of files is that nobody writes to.
pub(super) fn of_files(sent: u64, total: u64, took: Duration) -> Progress {
    let part = sent.saturating_mul(88).checked_div(total).unwrap_or(88).min(88);
    let rate = Some(per_s(sent, took.as_micros())).filter(|rate| sent >= RATE_BYTES_MIN && *rate > 0);
    let left = total.saturating_sub(sent);
    Progress {
        phase: "copying".to_owned(),
        percent: 1 + u8::try_from(part).unwrap_or_default(),
        bytes_done: Some(sent),
        bytes_total: Some(total),
        bytes_per_s: rate,
        // How long the target then takes to have it on its medium nobody knows.
        remaining_s: rate.filter(|_| left > 0).map(|rate| left.div_ceil(rate)),
        ..Progress::default()
    }
}

/// Bytes a second: over the last round, or since the beginning where none has ended; 0 while that is not known.
fn rate(moved: &Moved) -> u64 {
    match moved.bytes_per_s {
        0 if moved.sent_bytes >= RATE_BYTES_MIN => per_s(moved.sent_bytes, moved.total_us.into()),
        rate => rate,
    }
}

/// In how many seconds a source has sent what it has to. In the first round nobody knows what the guest writes, so it is what is
/// left at the pace so far, where holes and zeroes go in no time. Later each round is taken to leave as great a part of what it
/// began with as the last one did, and so on to nothing. When the guest stands still, or runs elsewhere, nothing is added.
fn remaining_s(phase: Phase, moved: &Moved, round_bytes: u64) -> Option<u64> {
    let left = u128::from(moved.left_bytes);
    let rate = u128::from(rate(moved));
    if rate == 0 {
        return None;
    }
    let seconds = match (phase, moved.rounds) {
        (Phase::Greet | Phase::Moved | Phase::Returned | Phase::Dropped, _) => return None,
        (Phase::Rounds, 0 | 1) => {
            let gone = u128::from(moved.sent_bytes) + u128::from(moved.skipped_bytes);
            // A VMM may say what it likes.
            (left * u128::from(moved.total_us)).div_ceil(gone.max(1) * 1_000_000)
        }
        (Phase::Rounds, _) => {
            let dirtied = u128::from(moved.dirtied_bytes_per_s);
            if dirtied * 100 > rate * u128::from(LEAVES_PERCENT_MAX) {
                return None;
            }
            // What was written since the round began, in bytes times the rate.
            let gone = u128::from(round_bytes.saturating_sub(moved.left_bytes));
            let all = (left * rate).saturating_add(dirtied * gone);
            all.div_ceil(rate * (rate - dirtied))
        }
        _ => left.div_ceil(rate),
    };
    u64::try_from(seconds).ok()
}

fn per_s(bytes: u64, took_us: u128) -> u64 {
    let per_s = (u128::from(bytes) * 1_000_000).checked_div(took_us).unwrap_or(0);
    u64::try_from(per_s).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
