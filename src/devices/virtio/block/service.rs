//! The disk's thread: joins queue, limits and file. Requests complete in whatever order the kernel answers; a
//! request that is not yet accepted stays in the queue, so a pause loses and repeats nothing.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memory::Ram;
use memory::ring::{Completed, Durability, Refused};
use virtio_bindings::bindings::virtio_blk::*;
use vmm_sys_util::epoll::EventSet;

use super::BlockStats;
use super::backend::{Answer, Disk, Lease, is_unsupported};
use super::lookout::Lookout;
use super::pending::Pending;
use super::request::{IDENTITY_BYTES, Refusal, Request, Terms};
use crate::EventFd;
use crate::limiter::Throttle;
use crate::limits::{
    BLOCK_IN_FLIGHT_BYTES_MAX, BLOCK_IN_FLIGHT_SEGMENTS_MAX, BLOCK_JOIN_WAIT_US, BLOCK_TURN_US,
};
use crate::virtio::{Chain, Fault, Handler, Progress, Queue, QueueWiring, Signals, Sources, Stand};

/// The descriptors besides the kick.
mod token {
    pub(super) const RING: u32 = 0;
    pub(super) const TIMER: u32 = 1;
    pub(super) const LIMITS: u32 = 2;
}

/// When a write has to be durable before it completes.
pub(super) struct Caching {
    pub(super) always_durable: bool,
    pub(super) follows_guest: bool,
    pub(super) writeback: Arc<AtomicBool>,
    /// What the configuration says to the next driver.
    pub(super) initial: bool,
}

impl Caching {
    pub(super) fn durability(&self) -> Durability {
        let durable = self.always_durable || (self.follows_guest && !self.writeback.load(Ordering::Relaxed));
        if durable { Durability::Durable } else { Durability::Cached }
    }
}

/// What a service works with.
pub(super) struct ServiceOptions {
    pub(super) wiring: QueueWiring,
    pub(super) lease: Lease,
    pub(super) throttle: Throttle,
    pub(super) terms: Terms,
    pub(super) identity: [u8; IDENTITY_BYTES],
    pub(super) stats: Arc<BlockStats>,
    pub(super) signals: Arc<dyn Signals>,
    pub(super) caching: Caching,
}

/// What the requests cost that the kernel works on.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct InFlight {
    bytes: u64,
    pub(super) segments: usize,
}

impl InFlight {
    fn add(&mut self, pending: &Pending) {
        self.bytes = self.bytes.saturating_add(pending.request.bytes());
        self.segments = self.segments.saturating_add(pending.chain.segments());
    }

    fn remove(&mut self, pending: &Pending) {
        self.bytes = self.bytes.saturating_sub(pending.request.bytes());
        self.segments = self.segments.saturating_sub(pending.chain.segments());
    }

    /// Whether nothing more is to be taken. The last request may reach beyond.
    fn is_full(self) -> bool {
        self.bytes >= BLOCK_IN_FLIGHT_BYTES_MAX || self.segments >= BLOCK_IN_FLIGHT_SEGMENTS_MAX
    }
}

/// What the thread does after it has looked for answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It looks again before it sleeps.
    MoreAtOnce,
    /// It sleeps until the ring calls.
    Sleep,
}

/// How much of the queue was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// All of it.
    All,
    /// What limits allow; the rest waits for them.
    AllThatMay,
    /// As much as one batch holds.
    ManyOfMore,
}

/// The thread's side of one queue.
pub(super) struct Service {
    index: u16,
    pub(super) queue: Queue,
    kick: Arc<EventFd>,
    memory: Arc<Ram>,
    /// There until the service ends.
    lease: Option<Lease>,
    /// By head, which is also the token in the ring.
    pending: Box<[Option<Pending>]>,
    /// What was taken last and not handed to the ring yet: the next may be joined to it.
    last: Option<Pending>,
    /// Writes to a part of a block of an overlay, of which another write is in flight.
    held: Vec<Pending>,
    /// Whether the last write was joined with another.
    joins: bool,
    throttle: Throttle,
    terms: Terms,
    identity: [u8; IDENTITY_BYTES],
    stats: Arc<BlockStats>,
    signals: Arc<dyn Signals>,
    caching: Caching,
    done: Vec<Completed>,
    pub(super) in_flight: InFlight,
    /// As much is in flight as may be; the next answer makes room.
    is_full: bool,
    pub(super) lookout: Lookout,
    /// Paused or broken: nothing is taken from the queue.
    is_quiet: bool,
}

impl Handler for Service {
    fn started(&mut self, sources: &Sources) -> io::Result<()> {
        if let Some(lease) = &self.lease {
            sources.add(&lease.ring.ready(), token::RING, EventSet::IN)?;
        }
        sources.add(&self.throttle.timer(), token::TIMER, EventSet::IN)?;
        sources.add(&self.throttle.changed(), token::LIMITS, EventSet::IN)
    }

    fn kicked(&mut self, _index: u16, _sources: &Sources) -> Result<Progress, Fault> {
        self.serve()
    }

    fn event(&mut self, token: u32, _sources: &Sources) -> Result<(), Fault> {
        let is_wanted = match token {
            token::RING => self.answered()?,
            _ => {
                self.throttle.woken();
                true
            }
        };
        if is_wanted && !self.is_quiet && self.serve()? == Progress::More {
            // It refuses only when its counter is full, and then the kick is heard anyway.
            let _ = self.kick.write(1);
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.lease.as_ref().map_or(0, |lease| lease.ring.in_flight()).saturating_add(self.held.len())
    }

    fn stand(&mut self) -> Option<Stand> {
        Some(Stand::of([(self.index, &self.queue)])?.with_limits(vec![self.throttle.save()]))
    }

    fn pausing(&mut self, _sources: &Sources) {
        self.is_quiet = true;
    }

    fn resumed(&mut self, _sources: &Sources) {
        self.is_quiet = false;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.caching.writeback.store(self.caching.initial, Ordering::Relaxed);
        if let Some(lease) = self.lease.take() {
            let disk = lease.disk.clone();
            lease.end();
            // What the kernel still worked on may have reached the file, though nobody will be told.
            for pending in self.pending.iter().flatten() {
                note_changes(&disk, pending, Outcome::Unknown);
            }
            let all = self.pending.iter().flatten().flat_map(Pending::all);
            all.for_each(|pending| disk.mark_changes(&pending.request));
        }
    }
}

impl Service {
    /// A service that has taken nothing.
    pub(super) fn new(options: ServiceOptions) -> Service {
        let ServiceOptions { wiring, lease, throttle, terms, identity, stats, signals, caching } = options;
        let QueueWiring { index, queue, kick } = wiring;
        Service {
            index,
            memory: Arc::clone(queue.memory()),
            pending: (0..queue.size()).map(|_| None).collect(),
            last: None,
            held: Vec::new(),
            joins: false,
            queue,
            kick,
            lease: Some(lease),
            throttle,
            terms,
            identity,
            stats,
            signals,
            caching,
            done: Vec::new(),
            in_flight: InFlight::default(),
            is_full: false,
            lookout: Lookout::default(),
            is_quiet: false,
        }
    }

    /// Takes what there is, hands it over in one system call and passes on what is already answered; again while more
    /// comes at once.
    pub(super) fn serve(&mut self) -> Result<Progress, Fault> {
        let begun = Instant::now();
        self.lookout.woken(begun);
        while begun.elapsed() < Duration::from_micros(BLOCK_TURN_US) {
            self.is_full = false;
            let taken = self.take_requests();
            if let Some(lease) = &mut self.lease {
                lease.ring.submit();
            }
            self.answer(Next::MoreAtOnce)?;
            match taken? {
                Taken::All if self.has_next_soon()? || self.queue.ask_for_kicks()? => {}
                Taken::All => {
                    self.answer(Next::Sleep)?;
                    self.note_sleep();
                    return Ok(Progress::Idle);
                }
                Taken::AllThatMay if !self.has_room_again() => {
                    self.answer(Next::Sleep)?;
                    return Ok(if self.has_room_again() { Progress::More } else { Progress::Idle });
                }
                Taken::AllThatMay | Taken::ManyOfMore => return Ok(Progress::More),
            }
        }
        Ok(Progress::More)
    }

    /// Passes on what the ring calls for. True when the queue is to be served: there is room again, or the guest may go on at
    /// once, for which it then needs no kick.
    pub(super) fn answered(&mut self) -> Result<bool, Fault> {
        let looks = !self.is_quiet && self.lookout.pays();
        if looks {
            self.queue.silence_kicks()?;
        }
        self.answer(Next::Sleep)?;
        let goes_on = looks || self.has_room_again();
        if !goes_on {
            self.note_sleep();
        }
        Ok(goes_on)
    }

    /// From here on a kick says how long the guest took to go on after its last answer.
    fn note_sleep(&mut self) {
        if self.in_flight() == 0 {
            self.lookout.sleeps(Instant::now());
        }
    }

    /// Looks for the next request, while there is no answer of the kernel's to wait for.
    fn has_next_soon(&mut self) -> Result<bool, Fault> {
        if self.in_flight() > 0 {
            return Ok(false);
        }
        self.lookout.find(|| self.queue.has_next())
    }

    fn has_room_again(&self) -> bool {
        self.is_full && !self.in_flight.is_full()
    }

    /// At most a queue full, so that commands are heard. The driver need not kick meanwhile.
    pub(super) fn take_requests(&mut self) -> Result<Taken, Fault> {
        let taken = self.take_all_that_may();
        let issued = self.last.take().map_or(Ok(()), |last| self.issue_taken(last));
        taken.and_then(|taken| issued.map(|()| taken))
    }

    fn take_all_that_may(&mut self) -> Result<Taken, Fault> {
        if self.throttle.is_waiting() {
            return Ok(Taken::AllThatMay);
        }
        self.queue.silence_kicks()?;
        for _ in 0..self.queue.size() {
            if self.in_flight.is_full() {
                self.is_full = true;
                return Ok(Taken::AllThatMay);
            }
            let Some(chain) = self.next_chain()? else { return Ok(Taken::All) };
            let request = Request::parse(&chain, &self.memory, &self.terms);
            let bytes = request.as_ref().map_or(0, Request::bytes);
            if !self.throttle.allows(bytes) {
                self.queue.give_back(chain);
                count(&self.stats.throttled);
                return Ok(Taken::AllThatMay);
            }
            match request {
                Ok(request) => self.accept(chain, request)?,
                Err(refusal) => self.refuse(chain, refusal)?,
            }
        }
        Ok(Taken::ManyOfMore)
    }

    /// The next chain; after a write also one that comes a moment later, if the driver is likely just making it available.
    fn next_chain(&mut self) -> Result<Option<Chain>, Fault> {
        let chain = self.queue.pop()?;
        let is_wanted =
            self.last.as_ref().is_some_and(|last| last.is_write() && (self.joins || last.is_joined()));
        if chain.is_some() || !is_wanted {
            return Ok(chain);
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(BLOCK_JOIN_WAIT_US) {
            if self.queue.has_next()? {
                return self.queue.pop();
            }
            std::hint::spin_loop();
        }
        Ok(None)
    }

    fn accept(&mut self, chain: Chain, request: Request) -> Result<(), Fault> {
        if request == Request::Identity {
            return match chain.write(&self.memory, 0, &self.identity) {
                Ok(()) => self.complete(chain, VIRTIO_BLK_S_OK as u8),
                Err(_) => self.refuse(chain, Refusal::Malformed),
            };
        }
        let Some(lease) = &self.lease else { return self.refuse(chain, Refusal::Malformed) };
        if matches!(request, Request::Discard(_)) && lease.disk.keeps_data() {
            // Only a hint. A hole would show the backing file's block again, or cost a copy of all that is given up.
            self.count_success(&request);
            return self.complete(chain, VIRTIO_BLK_S_OK as u8);
        }
        let pending = Pending::new(chain, request, self.caching.durability(), &lease.disk);
        self.in_flight.add(&pending);
        let Some(last) = &mut self.last else {
            self.last = Some(pending);
            return Ok(());
        };
        match last.join(pending) {
            Ok(()) => Ok(()),
            Err(pending) => self.last.replace(pending).map_or(Ok(()), |last| self.issue_taken(last)),
        }
    }

    /// Hands what was taken to the ring, with what was joined to it.
    fn issue_taken(&mut self, last: Pending) -> Result<(), Fault> {
        if last.is_write() {
            self.joins = last.is_joined();
        }
        self.issue(last)
    }

    /// Hands requests that were to be done as one to the ring one by one, so that each has an answer of its own.
    fn issue_each(&mut self, first: Pending, followers: Vec<Pending>) -> Result<(), Fault> {
        let mut outcome = self.issue(first);
        for pending in followers {
            outcome = outcome.and(self.issue(pending));
        }
        outcome
    }

    /// Hands the next step of a request to the ring.
    fn issue(&mut self, mut pending: Pending) -> Result<(), Fault> {
        match self.prepare(&pending) {
            Ok(Ready::Now) => {}
            Ok(Ready::Later) => {
                self.held.push(pending);
                return Ok(());
            }
            Err(cause) => return self.settle(pending, Answer::Own(Err(cause))),
        }
        let started = match &mut self.lease {
            Some(lease) => pending.start(lease, &self.memory),
            None => Err(Refused::Full),
        };
        match (started, self.pending.get_mut(usize::from(pending.chain.head()))) {
            (Ok(()), Some(place)) => {
                *place = Some(pending);
                Ok(())
            }
            // The queue's heads are below its size, and each is in flight once; so what is refused here is a buffer
            // outside memory.
            _ => {
                let followers = pending.take_followers();
                if !followers.is_empty() {
                    return self.issue_each(pending, followers);
                }
                self.in_flight.remove(&pending);
                self.refuse(pending.chain, Refusal::Malformed)
            }
        }
    }

    /// Has the kernel work on what was taken.
    #[cfg(test)]
    pub(super) fn submit(&mut self) {
        if let Some(lease) = &mut self.lease {
            lease.ring.submit();
        }
    }

    /// Has what a step changes be kept where somebody copies the disk, and the blocks of an overlay that it writes in part be in its
    /// own file; these not while somebody else may be writing one as a whole, over which it would then be copied.
    fn prepare(&self, pending: &Pending) -> io::Result<Ready> {
        let Some(disk) = self.lease.as_ref().map(|lease| &lease.disk) else { return Ok(Ready::Now) };
        let Some((offset, bytes)) = pending.changes() else { return Ok(Ready::Now) };
        disk.before_change(offset, bytes);
        let Some(overlay) = disk.overlay() else { return Ok(Ready::Now) };
        for block in overlay.edges(offset, bytes) {
            if self.pending.iter().flatten().any(|other| other.writes_to(block)) {
                return Ok(Ready::Later);
            }
            overlay.copy_up(block)?;
        }
        Ok(Ready::Now)
    }

    /// Passes on what the kernel has answered.
    fn answer(&mut self, next: Next) -> Result<(), Fault> {
        let mut done = std::mem::take(&mut self.done);
        match (&mut self.lease, next) {
            (Some(lease), Next::Sleep) => lease.ring.reap(&mut done),
            (Some(lease), Next::MoreAtOnce) => lease.ring.reap_awake(&mut done),
            (None, _) => {}
        }
        let mut first_fault = Ok(());
        for Completed { token, result } in done.drain(..) {
            let place = usize::try_from(token).ok().and_then(|head| self.pending.get_mut(head));
            let Some(pending) = place.and_then(Option::take) else { continue };
            let answer = match &self.lease {
                Some(lease) if pending.is_durable() => lease.disk.judge(result),
                _ => Answer::Own(result),
            };
            first_fault = first_fault.and(self.settle(pending, answer));
        }
        self.done = done;
        for pending in std::mem::take(&mut self.held) {
            first_fault = first_fault.and(self.issue(pending));
        }
        // Also steps that were started just now.
        if let Some(lease) = &mut self.lease {
            lease.ring.submit();
        }
        first_fault?;
        if self.queue.wants_signal()? {
            self.signals.queue_used(self.index);
        }
        Ok(())
    }

    /// Goes on with a request after a step, or completes it.
    fn settle(&mut self, mut pending: Pending, answer: Answer) -> Result<(), Fault> {
        // What others have lost is told as it is: nothing of it is tried again.
        let (result, is_final) = match answer {
            Answer::Own(result) => (result, false),
            Answer::Others(cause) => (Err(cause), true),
        };
        if let Some(lease) = &self.lease {
            note_changes(&lease.disk, &pending, Outcome::of(&result));
            pending.all().for_each(|pending| lease.disk.mark_changes(&pending.request));
        }
        let followers = pending.take_followers();
        if result.is_err() && !is_final && !followers.is_empty() {
            return self.issue_each(pending, followers);
        }
        let next = match (&self.lease, &result) {
            (Some(lease), Ok(())) => pending.goes_on(&lease.disk),
            (Some(lease), Err(cause)) => !is_final && pending.goes_another_way(&lease.disk, cause),
            (None, _) => false,
        };
        if next {
            return self.issue(pending);
        }
        let kind = result.as_ref().err().map(io::Error::kind);
        let mut outcome = self.finish(pending, result);
        for pending in followers {
            outcome = outcome.and(self.finish(pending, kind.map_or(Ok(()), |kind| Err(kind.into()))));
        }
        outcome
    }

    /// Completes a request of which nothing is left to do.
    fn finish(&mut self, pending: Pending, result: io::Result<()>) -> Result<(), Fault> {
        self.in_flight.remove(&pending);
        let Pending { chain, request, .. } = pending;
        let status = match (&request, result) {
            (_, Ok(())) => {
                self.count_success(&request);
                VIRTIO_BLK_S_OK as u8
            }
            // Only a hint, so a file that cannot do it has no error.
            (Request::Discard(_), Err(cause)) if is_unsupported(&cause) => VIRTIO_BLK_S_UNSUPP as u8,
            (_, Err(_)) => {
                count(&self.stats.errors);
                VIRTIO_BLK_S_IOERR as u8
            }
        };
        self.complete(chain, status)
    }

    fn count_success(&self, request: &Request) {
        let stats = &self.stats;
        match request {
            Request::Read { bytes, .. } => {
                count(&stats.reads);
                stats.read_bytes.fetch_add(u64::from(*bytes), Ordering::Relaxed);
            }
            Request::Write { bytes, .. } => {
                count(&stats.writes);
                stats.written_bytes.fetch_add(u64::from(*bytes), Ordering::Relaxed);
            }
            Request::Flush => count(&stats.flushes),
            Request::Discard(_) | Request::WriteZeroes(_) => count(&stats.discards),
            Request::Identity => {}
        }
    }

    fn refuse(&mut self, chain: Chain, refusal: Refusal) -> Result<(), Fault> {
        if refusal == Refusal::Malformed {
            count(&self.stats.malformed);
        }
        self.complete(chain, refusal.status())
    }

    /// Writes the status into the last byte and hands the chain back. The length says how many bytes from the
    /// start were surely written: all after a success, and after a failure only a status that stands alone.
    fn complete(&mut self, chain: Chain, status: u8) -> Result<(), Fault> {
        let writable_bytes = chain.writable_bytes();
        let answered = match writable_bytes.checked_sub(1) {
            Some(at) => chain.write(&self.memory, at, &[status]).is_ok(),
            None => false,
        };
        let is_whole = u32::from(status) == VIRTIO_BLK_S_OK || writable_bytes == 1;
        self.queue.complete(chain, if answered && is_whole { writable_bytes } else { 0 })
    }
}

/// Whether a step can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ready {
    Now,
    /// When what is in flight has been answered.
    Later,
}

/// What is known of a step that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Some of it may be.
    Unknown,
}

impl Outcome {
    fn of(result: &io::Result<()>) -> Outcome {
        if result.is_ok() { Outcome::Done } else { Outcome::Unknown }
    }
}

/// Notes which blocks of an overlay lie in its own file now, before anybody is told.
fn note_changes(disk: &Disk, pending: &Pending, outcome: Outcome) {
    let Some(overlay) = disk.overlay() else { return };
    let Some((offset, bytes)) = pending.changes() else { return };
    match outcome {
        Outcome::Done => overlay.wrote(offset, bytes),
        // Where that cannot be told either, they stay what they were.
        Outcome::Unknown => overlay.look(offset, bytes).unwrap_or_default(),
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
