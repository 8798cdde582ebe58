//! How often events are recorded that a guest causes at will. It knows no clock and no record: the actor does.
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::limits::{GUEST_EVENT_EVERY, GUEST_EVENT_EVERY_MAX};

/// One server's events, each kind by itself, so that one does not hide another.
#[derive(Debug, Default)]
pub(super) struct Pace(BTreeMap<&'static str, Kind>);

#[derive(Debug)]
struct Kind {
    /// When the next may be recorded.
    due: Instant,
    /// The pause that ends then.
    pause: Duration,
    /// When it was last caused, recorded or not.
    seen: Instant,
    /// How many were not recorded since the last that was.
    missed: u64,
}

impl Pace {
    /// An event of this kind was caused. Answers how many were left out since the last one when it is to be recorded,
    /// nothing when it is left out.
    pub(super) fn takes(&mut self, kind: &'static str, now: Instant) -> Option<u64> {
        let Some(known) = self.0.get_mut(kind) else {
            let first = Kind { due: now + GUEST_EVENT_EVERY, pause: GUEST_EVENT_EVERY, seen: now, missed: 0 };
            self.0.insert(kind, first);
            return Some(0);
        };
        let is_calm = now.duration_since(known.seen) >= GUEST_EVENT_EVERY_MAX;
        known.seen = now;
        if now < known.due {
            known.missed = known.missed.saturating_add(1);
            return None;
        }
        known.pause = if is_calm { GUEST_EVENT_EVERY } else { (known.pause * 2).min(GUEST_EVENT_EVERY_MAX) };
        known.due = now + known.pause;
        Some(std::mem::take(&mut known.missed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events that are recorded of one that is caused every `every` for `span`.
    fn recorded(pace: &mut Pace, start: Instant, every: Duration, span: Duration) -> usize {
        let times = (0..).map(|count| start + every * count).take_while(|now| *now < start + span);
        times.filter(|now| pace.takes("server.reset", *now).is_some()).count()
    }

    #[test]
    fn a_guest_that_goes_on_for_a_day_is_told_of_some_thirty_times() {
        const HOUR: Duration = Duration::from_secs(3600);
        let (start, mut pace) = (Instant::now(), Pace::default());
        let first = recorded(&mut pace, start, Duration::from_secs(1), 24 * HOUR);
        assert!((24..=34).contains(&first), "{first}");
        // It costs no less the next day, and begins anew only after an hour without any.
        let second = recorded(&mut pace, start + 24 * HOUR, Duration::from_secs(1), 24 * HOUR);
        assert!((23..=25).contains(&second), "{second}");
        // Whoever waits for that has no more of it.
        let calm = recorded(&mut pace, start + 49 * HOUR, HOUR, 24 * HOUR);
        assert_eq!(calm, 24);
    }

    #[test]
    fn kinds_do_not_hide_each_other_and_what_is_left_out_is_counted() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        assert_eq!(pace.takes("server.reset", start), Some(0));
        assert_eq!(pace.takes("server.guest_panicked", start), Some(0));
        for _ in 0..5 {
            assert_eq!(pace.takes("server.reset", start), None);
        }
        assert_eq!(pace.takes("server.reset", start + GUEST_EVENT_EVERY), Some(5));
        // The pause has doubled.
        assert_eq!(pace.takes("server.reset", start + 2 * GUEST_EVENT_EVERY), None);
        assert_eq!(pace.takes("server.reset", start + 3 * GUEST_EVENT_EVERY), Some(1));
    }
}
