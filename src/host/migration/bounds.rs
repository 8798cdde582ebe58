//! How fast moves from here go and how long their guests may stand still, which can be changed as they go. A move does not outlive the
//! daemon but where memory is owed, so this is kept in memory. `Migrations` changes it; who sends looks here.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::migration::LimitMigration;
use uuid::Uuid;
use wire::limits::DOWNTIME_MS_MAX;
use wire::migration::SendLimits;

use super::limits;
use crate::error::{Error, Result};

/// The bounds of each move from here that has something to send.
#[derive(Debug, Clone, Default)]
pub(super) struct Bounds(Arc<Mutex<BTreeMap<Uuid, SendLimits>>>);

impl Bounds {
    /// A move has something to send, within these bounds unless it has others already; answers which.
    pub(super) fn begin(&self, id: Uuid, bounds: SendLimits) -> SendLimits {
        *self.all().entry(id).or_insert(bounds)
    }

    /// Those in force, if the move has something to send.
    pub(super) fn of(&self, id: Uuid) -> Option<SendLimits> {
        self.all().get(&id).copied()
    }

    /// Other ones, if the move has something to send still.
    pub(super) fn change(&self, id: Uuid, bounds: SendLimits) {
        if let Some(held) = self.all().get_mut(&id) {
            *held = bounds;
        }
    }

    /// It has nothing to send any more.
    pub(super) fn end(&self, id: Uuid) {
        self.all().remove(&id);
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<Uuid, SendLimits>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps what is sent of files within a bandwidth.
#[derive(Debug)]
pub(super) struct Pacer {
    since: Instant,
    from_bytes: u64,
    bandwidth: Option<u64>,
}

impl Pacer {
    pub(super) fn new(now: Instant) -> Pacer {
        Pacer { since: now, from_bytes: 0, bandwidth: None }
    }

    /// How long to wait before more is sent, when so many bytes were sent in all and this bandwidth, in bytes a second, is in force.
    pub(super) fn pause(&mut self, bandwidth: Option<u64>, sent_bytes: u64, now: Instant) -> Duration {
        if bandwidth != self.bandwidth {
            // What was sent before counts for the one before.
            *self = Pacer { since: now, from_bytes: sent_bytes, bandwidth };
        }
        let bytes = sent_bytes.saturating_sub(self.from_bytes);
        let due = bandwidth.map(|bandwidth| Duration::from_secs_f64(bytes as f64 / bandwidth.max(1) as f64));
        due.unwrap_or_default().saturating_sub(now.duration_since(self.since))
    }
}

/// What a caller asked for. Fails for bounds that no move has.
pub(super) fn asked(spec: LimitMigration) -> Result<SendLimits> {
    let out_of_range = |pointer, detail| Err(Error::invalid(pointer, "out_of_range", detail));
    if spec.bandwidth_bytes_per_s.is_some_and(|bandwidth| bandwidth < limits::BANDWIDTH_BYTES_MIN) {
        return out_of_range(
            "/bandwidth_bytes_per_s",
            format!("must be at least {}", limits::BANDWIDTH_BYTES_MIN),
        );
    }
    if spec.downtime_ms.is_some_and(|downtime_ms| !(1..=DOWNTIME_MS_MAX).contains(&downtime_ms)) {
        return out_of_range("/downtime_ms", format!("must be 1 to {DOWNTIME_MS_MAX}"));
    }
    let usual = SendLimits::default();
    Ok(SendLimits {
        downtime_ms: spec.downtime_ms.unwrap_or(usual.downtime_ms),
        bandwidth_bytes_per_s: spec.bandwidth_bytes_per_s,
        ..usual
    })
}

/// The same as words.
pub(super) fn words(bounds: SendLimits) -> String {
    let speed = match bounds.bandwidth_bytes_per_s {
        Some(bytes) => format!("at most {bytes} bytes a second"),
        None => "as fast as it can".to_owned(),
    };
    format!("it goes on {speed}, and its guest may stand still for {} ms", bounds.downtime_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_keeps_to_the_bandwidth_that_is_in_force() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut pacer = Pacer::new(start);
        // bandwidth in bytes a second, bytes sent in all, milliseconds since the beginning, milliseconds to wait
        let table = [
            (None, 50_000, 100, 0),
            // From here on.
            (Some(1_000), 51_000, 200, 0),
            (Some(1_000), 51_500, 300, 400),
            (Some(1_000), 51_500, 900, 0),
            // Faster: what was sent too slowly before gives no right to a burst, and what was sent too fast costs nothing.
            (Some(10_000), 52_500, 900, 0),
            (Some(10_000), 57_500, 1_000, 400),
            (None, 99_000, 1_000, 0),
        ];
        for (bandwidth, sent, now, pause) in table {
            let expected = Duration::from_millis(pause);
            assert_eq!(pacer.pause(bandwidth, sent, at(now)), expected, "{bandwidth:?} after {now} ms");
        }
    }

    #[test]
    fn a_move_has_the_bounds_that_it_was_given_last_until_it_ends() {
        let (bounds, id) = (Bounds::default(), Uuid::now_v7());
        let asked = |bandwidth| {
            asked(LimitMigration { bandwidth_bytes_per_s: Some(bandwidth), downtime_ms: None }).unwrap()
        };
        bounds.change(id, asked(2 << 20));
        assert_eq!(bounds.of(id), None, "nothing is sent");
        assert_eq!(bounds.begin(id, asked(4 << 20)), asked(4 << 20));
        bounds.change(id, asked(2 << 20));
        assert_eq!(bounds.begin(id, asked(4 << 20)), asked(2 << 20), "it was begun before");
        bounds.end(id);
        assert_eq!(bounds.of(id), None);
    }
}
