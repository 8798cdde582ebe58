//! What the threads of one move and the main thread share: the phase, changed by the table under one lock; chores for the
//! main thread; progress for those who look on.
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memory::marks::PAGE_BYTES;
use memory::owed::Owed;
use wire::migration::{MigrationStatus, Phase, Progress, SendLimits, Side};
use wire::transfer::{Head, Word};

use super::phase::{self, Course, Effect, Event, Said};
use super::{Error, Stream};
use crate::bell::Bell;
use crate::limits::MOVE_TOLD_EVERY_MS;
use crate::snapshot::Contents;

/// One move at one end.
pub(crate) struct Shared {
    side: Side,
    /// Whether it goes on from `ready` only when it is told from outside.
    pub(crate) is_held: bool,
    began: Instant,
    inner: Mutex<Inner>,
    changed: Condvar,
    bell: Arc<Bell>,
    pub(super) sent_bytes: AtomicU64,
    pub(super) skipped_bytes: AtomicU64,
    /// Every stream once more: to shut them, and for what a target says and asks for, from whatever thread. A source's words go
    /// between its frames, by the thread that decides.
    streams: Mutex<Vec<Stream>>,
    /// What a target may be owed.
    pub(super) owed: Option<Arc<Owed>>,
}

struct Inner {
    phase: Phase,
    course: Course,
    /// A target: all that was owed has come.
    whole: bool,
    /// A stream is gone.
    lost: bool,
    chores: VecDeque<Effect>,
    contents: Option<Box<Contents>>,
    detail: Option<String>,
    progress: Progress,
    /// What had been carried when it was last known how much is left.
    carried_bytes: u64,
    limits: SendLimits,
    /// When the next bytes may go, with a bound on bandwidth.
    due: Instant,
    told: Instant,
    stopped: Option<Instant>,
    /// A target's: when it last heard that the guest runs.
    ran: Instant,
    /// Since when the target's machine runs, before all of it is there.
    owing: Option<Instant>,
    ended: Option<Instant>,
}

impl Shared {
    pub(super) fn new(
        side: Side,
        is_held: bool,
        limits: SendLimits,
        bell: &Arc<Bell>,
        streams: Vec<Stream>,
        owed: Option<Arc<Owed>>,
    ) -> Arc<Shared> {
        let now = Instant::now();
        let inner = Inner {
            phase: Phase::Greet,
            course: Course::Copied,
            whole: false,
            lost: false,
            chores: VecDeque::new(),
            contents: None,
            detail: None,
            progress: Progress::default(),
            carried_bytes: 0,
            limits,
            due: now,
            told: now,
            stopped: None,
            ran: now,
            owing: None,
            ended: None,
        };
        Arc::new(Shared {
            side,
            is_held,
            began: now,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            bell: Arc::clone(bell),
            sent_bytes: AtomicU64::new(0),
            skipped_bytes: AtomicU64::new(0),
            streams: Mutex::new(streams),
            owed,
        })
    }

    /// Something has happened: the table says what follows. Chores are left to the main thread, and a target speaks. Answers
    /// the phase that follows, if it meant anything; others may have gone on from there.
    pub(crate) fn give(&self, event: Event) -> Option<Phase> {
        self.give_with(|_| event, None)
    }

    /// What the event is may depend on the phase that it meets.
    fn give_with(&self, event: impl FnOnce(Phase) -> Event, why: Option<String>) -> Option<Phase> {
        let mut inner = self.inner();
        let event = event(inner.phase);
        // What was promised to whoever holds it is taken back on no other word: that one may have been told more.
        let event = match event {
            Event::Heard(Said::Refused) if self.is_held && inner.phase == Phase::Commit => Event::Lost,
            other => other,
        };
        if event == Event::Lost && !inner.phase.is_end() {
            inner.lost = true;
        }
        let mut found = phase::step(self.side, inner.course, inner.phase, event);
        if inner.detail.is_none() && (found.is_some() || event == Event::Lost && !inner.phase.is_end()) {
            inner.detail = why;
        }
        let answer = found.map(|(next, _)| next);
        while let Some((next, effects)) = found {
            inner.enter(next);
            let machines = |effect: &&Effect| {
                matches!(effect, Effect::Pause | Effect::Build | Effect::Run | Effect::Resume | Effect::Drop)
            };
            inner.chores.extend(effects.iter().filter(machines));
            // With the phase in hand, so that words leave in the order of phases. Each is shorter than any socket's buffer.
            for effect in effects {
                if let Effect::Say(said) = effect {
                    self.say(*said, inner.detail.as_deref());
                }
            }
            let has_all = self.side == Side::Target && next == Phase::Owing && inner.whole;
            found = if has_all { phase::step(self.side, inner.course, next, Event::Done) } else { None };
        }
        let is_over = inner.phase.is_end();
        // What one stream does not carry is lost on all of them: they are replaced together.
        let is_cut = event == Event::Lost && inner.phase == Phase::Owing;
        drop(inner);
        if let (true, Some(owed)) = (is_over, &self.owed) {
            // Memory is as any other, or none: the main thread may wait for some of it, building what nobody will run.
            owed.end();
        }
        if is_cut {
            self.shut();
        }
        self.changed.notify_all();
        self.bell.moving();
        answer
    }

    /// The same of something that went wrong. The first reason is kept.
    pub(crate) fn fail(&self, event: Event, why: String) -> Option<Phase> {
        self.give_with(|_| event, Some(why))
    }

    /// How an error is told to the table.
    pub(super) fn fail_with(&self, error: &Error) {
        if matches!(error, Error::Over) {
            return;
        }
        // Whose the machine is is no question any more: it runs, or is about to. Where memory is owed other streams may do better.
        let event = |phase| match phase {
            _ if error.is_link() => Event::Lost,
            Phase::Release | Phase::Owing => Event::Lost,
            _ => Event::Failed,
        };
        self.give_with(event, Some(crate::log::chain(error)));
    }

    fn say(&self, said: Said, detail: Option<&str>) {
        let word = match said {
            _ if self.side == Side::Source => return,
            Said::Prepared => Word::Prepared,
            Said::Ready => Word::Ready,
            Said::Released => Word::Released,
            Said::Whole => Word::Whole,
            Said::Refused => Word::Refused { detail: detail.unwrap_or_default().to_owned() },
            Said::State | Said::Commit | Said::Abort => return,
        };
        // Who does not hear it finds the link broken.
        if let Some(first) = self.streams().first_mut() {
            let _ = word.write(first);
        }
    }

    /// A target asks for something on a stream, or says that something there is done. Who does not hear it finds the link
    /// broken.
    pub(super) fn ask(&self, stream: usize, ask: &Head) {
        if let Some(stream) = self.streams().get_mut(stream) {
            let _ = ask.write(stream);
        }
    }

    /// See [`Shared::ask`].
    pub(super) fn synced(&self, stream: usize) -> Result<(), Error> {
        match self.streams().get_mut(stream) {
            Some(told) => Word::Synced.write(told).map_err(Error::at(stream)),
            None => Err(Error::Over),
        }
    }

    /// Ends the streams, so that nobody waits for the other end.
    pub(crate) fn shut(&self) {
        self.streams().iter().for_each(Stream::shut);
    }

    /// Puts others in their place.
    pub(super) fn relink(&self, streams: Vec<Stream>) {
        *self.streams() = streams;
        let mut inner = self.inner();
        (inner.lost, inner.detail) = (false, None);
    }

    fn streams(&self) -> MutexGuard<'_, Vec<Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on some of memory is owed when the machine begins to run at the target.
    pub(super) fn owes(&self) {
        self.inner().course = Course::Owing;
    }

    pub(super) fn is_owing(&self) -> bool {
        self.inner().course == Course::Owing
    }

    /// All that was owed has come.
    pub(super) fn is_whole(&self) {
        self.inner().whole = true;
        if self.phase() == Phase::Owing {
            self.give(Event::Done);
        }
    }

    /// The next chore for the main thread, and how the move stands with it: without a chore, everything that the phase
    /// asks of the machine is done.
    pub(crate) fn next_chore(&self) -> (Option<Effect>, MigrationStatus) {
        let mut inner = self.inner();
        (inner.chores.pop_front(), self.status_of(&inner))
    }

    /// Whether there is one.
    pub(crate) fn has_chore(&self) -> bool {
        !self.inner().chores.is_empty()
    }

    pub(crate) fn phase(&self) -> Phase {
        self.inner().phase
    }

    /// Whether nothing is left for the threads to do but to end.
    pub(super) fn is_over(&self) -> bool {
        self.phase().is_end()
    }

    /// Waits while the main thread has the phase in hand; answers the one that follows.
    pub(super) fn wait_through(&self, phase: Phase) -> Phase {
        let mut inner = self.inner();
        while inner.phase == phase {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.phase
    }

    /// Goes from one phase to the next, unless somebody has ended it.
    pub(super) fn go_to(&self, next: Phase, event: Event) -> Result<(), Error> {
        if self.give(event) == Some(next) { Ok(()) } else { Err(Error::Over) }
    }

    /// The same when some work is done.
    pub(super) fn done(&self, next: Phase) -> Result<(), Error> {
        self.go_to(next, Event::Done)
    }

    /// What the machine is beside its memory: from the main thread to the one that sends it, or the other way.
    pub(crate) fn put(&self, contents: Contents) {
        self.inner().contents = Some(Box::new(contents));
    }

    pub(crate) fn take(&self) -> Option<Contents> {
        self.inner().contents.take().map(|contents| *contents)
    }

    pub(crate) fn limits(&self) -> SendLimits {
        self.inner().limits
    }

    pub(crate) fn set_limits(&self, limits: SendLimits) {
        let mut inner = self.inner();
        if inner.limits.bandwidth_bytes_per_s != limits.bandwidth_bytes_per_s {
            // What waits by the one before goes at once.
            inner.due = Instant::now();
        }
        inner.limits = limits;
        drop(inner);
        self.changed.notify_all();
    }

    /// When the guest will have stood still for as long as it may before it is given up.
    pub(super) fn standstill_ends(&self) -> (Instant, u128) {
        let inner = self.inner();
        let longest_ms = inner.limits.downtime_ms.saturating_add(inner.limits.standstill_ms);
        let from = inner.stopped.unwrap_or_else(Instant::now);
        (from + Duration::from_millis(longest_ms.into()), longest_ms.into())
    }

    /// A target's: a round begins, which is the last when the guest stands still.
    pub(super) fn hear_of_round(&self, last: bool) {
        let mut inner = self.inner();
        let now = Instant::now();
        if last {
            inner.stopped.get_or_insert(now);
        } else {
            inner.ran = now;
        }
    }

    /// For how long the guest has stood still, at a target that has its state. The hosts' wall clocks say so, and are believed as
    /// far as they agree with what was heard here: it stood still before its last round came, and ran when the one before began.
    pub(crate) fn stood_still(&self, by_wall: Duration) -> Duration {
        let inner = self.inner();
        let shortest = inner.stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
        by_wall.min(inner.ran.elapsed()).max(shortest)
    }

    /// Waits until so many bytes may go.
    pub(super) fn pace(&self, bytes: u64) {
        let mut inner = self.inner();
        let Some(per_s) = inner.limits.bandwidth_bytes_per_s else { return };
        let from = inner.due.max(Instant::now());
        inner.due = from + Duration::from_secs_f64(bytes as f64 / per_s.max(1) as f64);
        while !inner.phase.is_end() && inner.limits.bandwidth_bytes_per_s == Some(per_s) {
            let left = from.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notes how much is left to go, from which goes what is carried from now on.
    pub(super) fn note_left(&self, bytes: u64) {
        let carried_bytes = self.carried_bytes();
        let mut inner = self.inner();
        (inner.progress.left_bytes, inner.carried_bytes) = (bytes, carried_bytes);
    }

    /// What went over the streams, or did not have to.
    pub(super) fn carried_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed).saturating_add(self.skipped_bytes.load(Ordering::Relaxed))
    }

    /// Notes progress; tells of it from time to time.
    pub(super) fn note(&self, change: impl FnOnce(&mut Progress)) {
        let mut inner = self.inner();
        change(&mut inner.progress);
        if inner.told.elapsed() > Duration::from_millis(MOVE_TOLD_EVERY_MS) {
            inner.told = Instant::now();
            drop(inner);
            self.bell.moving();
        }
    }

    pub(crate) fn status(&self) -> MigrationStatus {
        self.status_of(&self.inner())
    }

    fn status_of(&self, inner: &Inner) -> MigrationStatus {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let end = inner.ended.unwrap_or_else(Instant::now);
        let went_on = inner.owing.unwrap_or(end);
        let carried = self.carried_bytes().saturating_sub(inner.carried_bytes);
        let left_bytes = match &self.owed {
            Some(owed) if inner.course == Course::Owing => owed.count() * PAGE_BYTES,
            _ => inner.progress.left_bytes.saturating_sub(carried),
        };
        let progress = Progress {
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            skipped_bytes: self.skipped_bytes.load(Ordering::Relaxed),
            left_bytes,
            downtime_us: inner.stopped.map_or(0, |stopped| us(went_on.duration_since(stopped))),
            total_us: us(end.duration_since(self.began)),
            ..inner.progress
        };
        MigrationStatus {
            side: self.side,
            phase: inner.phase,
            in_doubt: inner.lost && phase::in_doubt(self.side, inner.phase),
            owes: inner.course == Course::Owing,
            link_lost: inner.lost && inner.phase == Phase::Owing,
            progress,
            detail: inner.detail.clone(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn enter(&mut self, next: Phase) {
        self.phase = next;
        if next == Phase::Pause {
            self.stopped = Some(Instant::now());
        }
        if next == Phase::Owing {
            self.owing.get_or_insert_with(Instant::now);
        }
        if next.is_end() {
            self.ended.get_or_insert_with(Instant::now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets some time pass.
    fn pass() {
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(20) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_waits_by_a_bandwidth_goes_when_it_is_another() {
        let limits = |per_s| SendLimits { bandwidth_bytes_per_s: Some(per_s), ..SendLimits::default() };
        let bell = Arc::new(Bell::new().unwrap());
        let shared = Shared::new(Side::Source, true, limits(1 << 20), &bell, Vec::new(), None);
        let began = Instant::now();
        // An hour's worth goes at once, and what follows would wait for it.
        shared.pace(3600 << 20);
        std::thread::scope(|scope| {
            scope.spawn(|| shared.pace(1));
            pass();
            shared.set_limits(limits(2 << 20));
        });
        shared.pace(1);
        assert!(began.elapsed() < Duration::from_secs(1800));
    }

    #[test]
    fn wall_clocks_are_believed_as_far_as_a_target_can_know() {
        let (hour, bell) = (Duration::from_secs(3600), Bell::new().unwrap());
        let shared =
            Shared::new(Side::Target, true, SendLimits::default(), &Arc::new(bell), Vec::new(), None);
        let began = Instant::now();
        // Memory that was handed over comes without rounds.
        assert_eq!(shared.stood_still(Duration::ZERO), Duration::ZERO);
        pass();
        shared.hear_of_round(false);
        let ran = Instant::now();
        pass();
        shared.hear_of_round(true);
        pass();
        // The source's clock is ahead, the target's is, and neither.
        let shortest = shared.stood_still(Duration::ZERO);
        assert!(shortest >= Duration::from_millis(20) && shortest < ran.elapsed());
        let longest = shared.stood_still(hour);
        assert!(longest >= Duration::from_millis(40) && longest < began.elapsed());
        let between = (shared.stood_still(Duration::ZERO) + longest) / 2;
        assert_eq!(shared.stood_still(between), between);
        // Whatever a source says in whatever order.
        shared.hear_of_round(false);
        assert!(shared.stood_still(hour) >= shortest);
    }
}
