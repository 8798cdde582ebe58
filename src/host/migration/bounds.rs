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
pub(super) struct Bounds(Arc<Mutex<BTreeMap<Uuid, Held>>>);

/// Those of one move.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    /// What was asked for, which nobody knows of a move that an earlier daemon began.
    wanted: Option<SendLimits>,
    /// What its VMM is known to go by.
    told: Option<SendLimits>,
}

impl Bounds {
    /// A move has something to send, within these bounds where they are known.
    pub(super) fn begin(&self, id: Uuid, wanted: Option<SendLimits>) {
        self.all().entry(id).or_insert(Held { wanted, told: None });
    }

    /// What was asked for last, if it is known.
    pub(super) fn wanted(&self, id: Uuid) -> Option<SendLimits> {
        self.all().get(&id)?.wanted
    }

    /// Other bounds. Answers whether the move has something to send still.
    pub(super) fn change(&self, id: Uuid, wanted: SendLimits) -> bool {
        let mut all = self.all();
        let Some(held) = all.get_mut(&id) else { return false };
        *held = Held { wanted: Some(wanted), told: None };
        true
    }

    /// What the VMM that sends is to be told.
    pub(super) fn untold(&self, id: Uuid) -> Option<SendLimits> {
        let held = *self.all().get(&id)?;
        held.wanted.filter(|_| held.wanted != held.told)
    }

    /// The VMM that sends goes by these.
    pub(super) fn told(&self, id: Uuid, bounds: SendLimits) {
        if let Some(held) = self.all().get_mut(&id) {
            held.told = Some(bounds);
        }
    }

    /// It has nothing to send any more.
    pub(super) fn end(&self, id: Uuid) {
        self.all().remove(&id);
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<Uuid, Held>> {
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
    fn a_vmm_is_told_what_was_asked_for_last_until_it_goes_by_it() {
        let (bounds, id) = (Bounds::default(), Uuid::now_v7());
        let asked = |bandwidth| {
            asked(LimitMigration { bandwidth_bytes_per_s: Some(bandwidth), downtime_ms: None }).unwrap()
        };
        let [slow, fast] = [2 << 20, 4 << 20].map(asked);
        assert!(!bounds.change(id, slow), "nothing is sent");
        bounds.begin(id, Some(fast));
        assert_eq!(bounds.untold(id), Some(fast));
        bounds.told(id, fast);
        assert_eq!(bounds.untold(id), None);
        assert!(bounds.change(id, slow));
        // It did not answer.
        assert_eq!((bounds.untold(id), bounds.untold(id)), (Some(slow), Some(slow)));
        // Others were asked for while it was told these, or the same again.
        bounds.change(id, fast);
        bounds.told(id, slow);
        assert_eq!(bounds.untold(id), Some(fast));
        bounds.begin(id, None);
        assert_eq!((bounds.wanted(id), bounds.untold(id)), (Some(fast), Some(fast)));
        bounds.end(id);
        assert_eq!((bounds.wanted(id), bounds.untold(id)), (None, None));
    }

    #[test]
    fn a_move_that_an_earlier_daemon_began_goes_on_as_it_did_until_bounds_are_asked_for() {
        let (bounds, id) = (Bounds::default(), Uuid::now_v7());
        bounds.begin(id, None);
        assert_eq!((bounds.wanted(id), bounds.untold(id)), (None, None));
        let unbound = asked(LimitMigration::default()).unwrap();
        assert!(bounds.change(id, unbound));
        assert_eq!(bounds.untold(id), Some(unbound));
    }
}
