//! The one task that acts for a server. It does the work of the phase the record is in, one piece at a time,
//! and saves what comes of it; it holds no truth of its own.
//! It decides nothing: `lifecycle::step` does.
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use model::snapshot::GuestIdentity;
use model::{Code, SnapshotId, Time};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use wire::control::Notice;
use wire::launch::ExitStatus;

use super::lifecycle::{Event, Found, Life, Phase, Work};
use super::pace::Pace;
use super::record::ServerRecord;
use super::registry::{Entry, Workshop};
use super::{advance, effects, identity, limits, recover, restore, settle};
use crate::call;
use crate::error::Result;
use crate::store::{Tx, records};

/// A server's actor.
pub(super) struct Actor {
    workshop: Arc<Workshop>,
    entry: Arc<Entry>,
    notices: mpsc::Receiver<Notice>,
    /// Seen from before the record is read, so that none is missed.
    snapshots: watch::Receiver<()>,
    /// The snapshot that was being taken of it when its record was last seen, until what is left of it is tidied up.
    taking: Option<SnapshotId>,
    /// When events that a guest causes at will may be recorded again.
    pace: Pace,
    /// Ends with the word of a clone's guest that it is a server of its own. A task, since it may hold what the actor waits for.
    word: JoinSet<()>,
}

/// A piece of work in progress.
struct Busy {
    work: Work,
    run: u64,
    stop: Arc<AtomicBool>,
    future: BoxFuture<'static, Result<Event>>,
    /// What came of it, once it is done.
    outcome: Option<Result<Event>>,
}

impl Busy {
    /// Goes on with the work; returns when it is done. Cancel-safe.
    async fn advance(&mut self) {
        if self.outcome.is_none() {
            self.outcome = Some(Pin::new(&mut self.future).await);
        }
    }
}

/// Waits for `other` while the work in progress goes on: work that stands still keeps what it holds, such as its turn to
/// read the records, and `other` may wait for just that.
async fn beside<T>(busy: &mut Option<Busy>, other: impl Future<Output = T>) -> T {
    let going_on = async {
        if let Some(busy) = busy {
            busy.advance().await;
        }
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        biased;
        outcome = other => outcome,
        never = going_on => match never {},
    }
}

/// What woke the actor.
enum Woken {
    Done,
    Ended(Option<ExitStatus>),
    Deadline,
    Notice(Notice),
    Renewed,
    Poked,
    Disconnected,
}

impl Actor {
    pub(super) fn new(workshop: Arc<Workshop>, entry: Arc<Entry>, notices: mpsc::Receiver<Notice>) -> Actor {
        let snapshots = workshop.snapshots.ends();
        let (taking, pace, word) = (None, Pace::default(), JoinSet::new());
        Actor { workshop, entry, notices, snapshots, taking, pace, word }
    }

    /// Acts until the server is no more, or the records are closed. When they cannot be read or written for a while,
    /// it begins again as a new daemon would.
    pub(super) async fn run(mut self) {
        let id = self.entry.id;
        let mut pause = Pause::default();
        loop {
            match self.live().await {
                Ok(()) => return tracing::info!(server = %id, "is no more"),
                Err(cause) if cause.code == Code::Draining || self.workshop.core.store.is_dead() => return,
                Err(cause) => tracing::error!(server = %id, "its actor begins again: {}", cause.chain()),
            }
            pause.lengthen();
            pause.over().await;
        }
    }

    async fn live(&mut self) -> Result<()> {
        let mut busy: Option<Busy> = None;
        let mut pause = Pause::default();
        let Some(record) = self.record().await? else { return Ok(()) };
        self.taking = self.taking.or(record.life.phase.snapshot());
        let mut known = match recover::look(&self.workshop, &self.entry, &record).await? {
            Some(event) => {
                let answers = matches!(event, Event::Found(Found::Alive(_)));
                self.save(record.life.run, event).await?;
                // One that has just left a greeting unanswered is not waited for again.
                if answers {
                    settle::look(&self.workshop, &self.entry, &record).await?;
                }
                None
            }
            None => Some(record),
        };
        loop {
            // What was just saved need not be read. Whoever changes it meanwhile pokes.
            let record = match known.take() {
                Some(record) => Some(record),
                None => beside(&mut busy, self.record()).await?,
            };
            let now = record.as_ref().and_then(|record| record.life.phase.snapshot());
            if let Some(left) = self.left(now, busy.as_ref()) {
                beside(&mut busy, self.workshop.snapshots.tidy(left)).await?;
            }
            let Some(record) = record else { return Ok(()) };
            let life = &record.life;
            if let Some(busy) = &busy
                && life.work() != Some(busy.work)
            {
                // Long work looks at this between its pieces; the rest is short and bounded.
                busy.stop.store(true, Ordering::SeqCst);
            }
            if let (None, Some(work), true) = (&busy, life.work(), pause.is_over()) {
                busy = Some(self.start(work, &record));
            }
            self.listen(&record);
            match self.wait(life, &mut busy, &pause).await {
                Woken::Done => {
                    match busy.take().and_then(|busy| Some((busy.work, busy.run, busy.outcome?))) {
                        Some((work, run, Ok(event))) => {
                            pause = Pause::default();
                            known = self.save(run, event).await?;
                            self.tidy(work).await?;
                        }
                        Some((_, _, Err(cause))) if self.workshop.core.store.is_dead() => return Err(cause),
                        Some((work, _, Err(cause))) => {
                            self.tidy(work).await?;
                            pause.lengthen();
                            tracing::warn!(server = %self.entry.id, "work is tried again: {}", cause.chain());
                        }
                        None => {}
                    }
                }
                Woken::Ended(status) => {
                    let told = async {
                        let id = self.entry.id;
                        let cage =
                            self.entry.machine().map_or_else(|| id.to_string(), |machine| machine.cage);
                        let end = effects::end_of(&self.workshop, id, cage, status).await;
                        self.save(life.run, Event::Ended(end)).await
                    };
                    known = beside(&mut busy, told).await?;
                }
                Woken::Deadline => {
                    known = beside(&mut busy, self.save(life.run, Event::DeadlinePassed)).await?
                }
                Woken::Notice(notice) => beside(&mut busy, self.take_notice(notice)).await?,
                Woken::Renewed => beside(&mut busy, identity::renewed(&self.workshop, self.entry.id)).await?,
                Woken::Disconnected => beside(&mut busy, self.reconnect()).await,
                // Whoever pokes has a reason to try at once.
                Woken::Poked => pause = Pause::default(),
            }
        }
    }

    /// Listens from when a clone's machine runs until it is gone.
    fn listen(&mut self, record: &ServerRecord) {
        let phase = &record.life.phase;
        if record.identity != Some(GuestIdentity::Unchanged) || phase.vmm().is_none() {
            self.word = JoinSet::new();
        } else if self.word.is_empty() && matches!(phase, Phase::Running { .. } | Phase::Paused { .. }) {
            let ring = self.workshop.core.dirs.server(self.entry.id).join("console.ring");
            self.word.spawn(identity::word(self.entry.clone(), ring));
        }
    }

    /// The snapshot that is taken no more, `now` being the one that is, and that no work under way tidies up at its end: an earlier
    /// daemon may have worked on it, or nobody.
    fn left(&mut self, now: Option<SnapshotId>, busy: Option<&Busy>) -> Option<SnapshotId> {
        let is_at_work = |id| busy.is_some_and(|busy| busy.work == Work::Snapshot { id });
        if self.taking.is_some_and(|taking| now != Some(taking) && is_at_work(taking)) {
            // Should it not come to its end, it is still known.
            return None;
        }
        std::mem::replace(&mut self.taking, now).filter(|left| now != Some(*left))
    }

    /// Removes what work leaves that nobody wanted any more when it ended.
    async fn tidy(&mut self, ended: Work) -> Result<()> {
        match ended {
            Work::Snapshot { id } => {
                self.taking.take_if(|taking| *taking == id);
                self.workshop.snapshots.tidy(id).await
            }
            // Which may have been the last to need something of a snapshot.
            Work::Boot { .. } | Work::Resume | Work::Purge | Work::Settle { .. } | Work::TakeBack { .. } => {
                self.workshop.snapshots.let_go();
                Ok(())
            }
            Work::CopyBack { .. } => match self.record().await? {
                // One that is gone has been purged.
                Some(record) if record.life.phase.returns_to().is_none() => {
                    restore::forget_copies(&self.workshop, &record).await
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn start(&self, work: Work, record: &ServerRecord) -> Busy {
        let stop = Arc::new(AtomicBool::new(false));
        let doing = effects::Doing {
            workshop: self.workshop.clone(),
            entry: self.entry.clone(),
            record: record.clone(),
            stop: stop.clone(),
        };
        Busy { work, run: record.life.run, stop, future: Box::pin(doing.perform(work)), outcome: None }
    }

    async fn wait(&mut self, life: &Life, busy: &mut Option<Busy>, pause: &Pause) -> Woken {
        let process = self.entry.machine().map(|machine| machine.process);
        let watched = process.filter(|_| life.phase.vmm().is_some());
        let ended = async {
            match &watched {
                Some(process) => process.ended().await,
                None => std::future::pending().await,
            }
        };
        let done = async {
            match busy {
                Some(busy) => busy.advance().await,
                None => std::future::pending().await,
            }
        };
        let awaited = async {
            match life.awaited() {
                // Nobody ends while the workshop is there.
                Some(_) => drop(self.snapshots.changed().await),
                None => std::future::pending().await,
            }
        };
        let deadline = async {
            match life.deadline_ms() {
                Some(at_ms) => tokio::time::sleep(until(at_ms)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = done => Woken::Done,
            status = ended => Woken::Ended(status),
            () = self.entry.poke.notified() => Woken::Poked,
            () = awaited => Woken::Poked,
            () = deadline => Woken::Deadline,
            () = pause.over() => Woken::Poked,
            Some(notice) = self.notices.recv() => Woken::Notice(notice),
            Some(Ok(())) = self.word.join_next() => Woken::Renewed,
            () = disconnected(&self.entry, &life.phase) => Woken::Disconnected,
        }
    }

    async fn record(&self) -> Result<Option<ServerRecord>> {
        let id = self.entry.id;
        self.workshop.core.store.glance(move |connection| records::find(connection, id.0)).await
    }

    /// Answers the record as it was saved, or nothing when the server is no more.
    async fn save(&mut self, run: u64, event: Event) -> Result<Option<ServerRecord>> {
        let (id, capacity, dirs) = (self.entry.id, self.workshop.capacity, self.workshop.core.dirs.clone());
        tracing::debug!(server = %id, run, "{event:?}");
        let save = move |tx: &Tx<'_>| {
            let before = records::find::<ServerRecord>(tx, id.0)?;
            let taking = before.and_then(|before| before.life.phase.snapshot());
            Ok((taking, advance::event(tx, capacity, id, run, event, &dirs)?))
        };
        let (taking, saved) = self.workshop.core.store.write(save).await?;
        // One that was asked for since the record was read ends unseen otherwise.
        self.taking = taking.or(self.taking);
        if saved.is_none() {
            self.workshop.networks.wake();
        }
        self.entry.wake_readers();
        Ok(saved)
    }

    /// A VMM that lives and has closed its connection, or was never reached, is greeted again. Whoever wants something of the server
    /// meanwhile does not wait for that.
    async fn reconnect(&mut self) {
        tokio::select! {
            greeted = self.entry.link(limits::COMMAND) => {
                if let Err(cause) = greeted {
                    tracing::debug!(server = %self.entry.id, "its VMM does not answer: {cause}");
                }
            }
            () = self.entry.poke.notified() => self.entry.poke.notify_one(),
        }
    }

    async fn take_notice(&mut self, notice: Notice) -> Result<()> {
        let (kind, reason) = match notice {
            Notice::Booted { resets: 0 } | Notice::Console { .. } | Notice::Exiting(_) => return Ok(()),
            Notice::Restored | Notice::Save(_) => return Ok(()),
            Notice::Migration(_) => {
                self.entry.moved.notify_one();
                return Ok(());
            }
            Notice::Booted { resets } => {
                ("server.reset", format!("its machine was reset {resets} times in all"))
            }
            Notice::GuestPanicked => ("server.guest_panicked", "the guest's kernel crashed".to_owned()),
            Notice::DeviceFault { device, detail } => {
                let detail: String = detail.chars().take(limits::FAULT_CHARS_MAX).collect();
                ("server.device_fault", format!("{device}: {detail}"))
            }
        };
        if kind == "server.reset" {
            // With the old machine went its memory and what it was shown elsewhere, whether that is told or not.
            settle::forget_origin(&self.workshop, self.entry.id).await?;
        }
        let Some(missed) = self.pace.takes(kind, std::time::Instant::now()) else { return Ok(()) };
        let reason =
            if missed == 0 { reason } else { format!("{reason} ({missed} more since the last such event)") };
        let id = self.entry.id;
        self.workshop
            .core
            .store
            .write(move |tx| {
                let Some(record) = records::find::<ServerRecord>(tx, id.0)? else { return Ok(()) };
                advance::guest_event(tx, &record, kind, reason, &call::Actor::Guest)
            })
            .await
    }
}

/// Ends when a running machine's connection has closed or there is none, after a pause.
async fn disconnected(entry: &Entry, phase: &Phase) {
    let expected = matches!(phase, Phase::Running { .. } | Phase::Paused { .. });
    if !expected || entry.machine().is_none() {
        return std::future::pending().await;
    }
    if entry.is_linked() {
        entry.link_closed().await;
    }
    tokio::time::sleep(limits::RECONNECT).await;
}

/// How long to sleep for a time of the clock, which may be set meanwhile: it is looked at now and then.
fn until(at_ms: i64) -> Duration {
    let left_ms = at_ms.saturating_sub(Time::now().unix_ms());
    Duration::from_millis(u64::try_from(left_ms).unwrap_or_default()).min(limits::CLOCK)
}

/// How long work that failed waits before it is tried again.
#[derive(Default)]
struct Pause {
    length: Option<Duration>,
    until: Option<Instant>,
}

impl Pause {
    fn lengthen(&mut self) {
        let length = self.length.map_or(limits::RETRY, |length| (length * 2).min(limits::RETRY_MAX));
        *self = Pause { length: Some(length), until: Some(Instant::now() + length) };
    }

    fn is_over(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() >= until)
    }

    async fn over(&self) {
        match self.until {
            Some(until) if Instant::now() < until => tokio::time::sleep_until(until).await,
            _ => std::future::pending().await,
        }
    }
}
