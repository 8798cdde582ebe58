//! Settling a machine while its guest runs, its memory and then its disks: one thread copies piece after piece, and for the rest of
//! each the main thread makes the machine stand still. What a piece of memory is, and how it is turned, is in `memory`; one of a
//! disk's backing file is read by the thread and filled in as the machine stands still (`devices::virtio::block`).
//!
//! ```text
//! thread:       copy ─▶ copy what was written … ─▶ due ┐            ┌─▶ the next piece
//! main thread:                                         └─▶ stand still, copy the rest, turn, go on
//! ```
//!
//! A piece at a time, because that bounds what is held twice and how much is copied as the guest stands still, whatever it writes:
//! nobody has to be held back for it, and whoever gives it up leaves memory that is whole. What devices have in flight is waited for
//! in each pause, but not for long: the machine runs on then, and the piece is tried again. Between pauses it runs for many times
//! as long as they were.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::virtio::block::{self, Disk};
use kvm::DirtyLog;
use memory::settling::{Piece, Settling, shared_bytes};
use memory::{Extent, Pages, guard, marks};
use wire::settling::{self, MemoryStatus, SettleStage};
use wire::transfer::SHARD_BYTES;

use super::{Error, Machine, Save};
use crate::bell::Bell;
use crate::limits::{
    SETTLE_DRAIN_MS, SETTLE_DRAIN_MS_MAX, SETTLE_PAGES_MAX, SETTLE_ROUNDS_MAX, SETTLE_RUNS_ON,
    SETTLE_TRIES_EACH, SETTLE_TRIES_MAX, SETTLE_WRITE_PIECES, SETTLE_ZEROES_MAX,
};
use crate::log;
use crate::migrate::{self, ram};
use crate::threads::{self, ThreadKind};

/// A settling from its begin on. Dropped, it is given up and waited for.
pub(super) struct Settle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and the main thread see.
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    cancelled: AtomicBool,
    bell: Arc<Bell>,
    began: Instant,
}

struct Inner {
    stage: Stage,
    pauses: u32,
    longest: Duration,
    paused: Duration,
    ended: Option<Instant>,
}

enum Stage {
    Copying,
    /// A piece is to be turned.
    Due(Box<Due>),
    /// What became of that.
    Answered(Box<Answer>),
    Ended(Result<(), String>),
}

/// What is to be done as the machine stands still.
struct Due {
    chore: Chore,
    patience: Duration,
}

enum Chore {
    /// A piece of memory is turned, behind a copy of the pages in `left` and of what was written since they were found.
    Turn { work: Arc<Work>, piece: Arc<Piece>, left: Pages },
    /// A piece is filled into a disk.
    Fill { disk: Disk, piece: Arc<block::Piece> },
    /// All of a disk is filled in, and durable.
    Whole { disk: Disk },
}

struct Answer {
    /// What was left of a piece of memory.
    left: Option<Pages>,
    turn: Turn,
    /// For how long the guest stood still.
    took: Duration,
}

enum Turn {
    Done,
    /// The machine did not come to stand still in time, and runs on.
    NotStill(String),
    Failed(String),
}

/// Why it ends before all is settled.
enum Stop {
    GivenUp,
    Failed(String),
}

impl<E: Into<migrate::Error>> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Failed(log::chain(&error.into()))
    }
}

/// What of memory is held only while it goes on.
struct Work {
    settling: Settling,
    log: DirtyLog,
}

impl Machine {
    /// Has all memory be the machine's own, and all of its disks lie in their own files.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        self.check_not_moving()?;
        if self.save.as_ref().is_some_and(Save::is_under_way) {
            return Err(Error::State("the machine is being saved; wait for the end of that, or cancel it"));
        }
        let is_under_way = self.settle.as_ref().is_some_and(Settle::is_under_way);
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        let (ram, vm) = (Arc::clone(&parts.ram), Arc::clone(&parts.vm));
        let disks = self.lasting.drives.iter().filter(|disk| disk.shared_bytes() > 0).cloned();
        let (disks, shares_memory) = (disks.collect::<Vec<_>>(), shared_bytes(&ram) > 0);
        if is_under_way || (disks.is_empty() && !shares_memory) {
            return Ok(());
        }
        // Those before are let go of first: two must not log the same memory.
        self.settle = None;
        if !shares_memory {
            self.settle = Some(Settle::start(None, disks, &self.bell)?);
            return Ok(());
        }
        self.forget_sent();
        let settling = Settling::begin(&ram)?;
        let log = DirtyLog::start(&vm)?;
        marks::start(&ram);
        let started = Settle::start(Some(Work { settling, log }), disks, &self.bell);
        self.settle = Some(started.inspect_err(|_| marks::stop(&ram))?);
        Ok(())
    }

    /// Gives up the settling that is under way, if one is.
    pub(crate) fn cancel_settle(&mut self) {
        if let Some(settle) = &mut self.settle {
            settle.cancel();
        }
    }

    /// Whose memory is, and the disks.
    pub(crate) fn memory_status(&self) -> Result<MemoryStatus, Error> {
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        Ok(MemoryStatus {
            total_bytes: self.plan.spec.memory_bytes,
            shared_bytes: shared_bytes(&parts.ram),
            disks_shared_bytes: self.lasting.drives.iter().map(Disk::shared_bytes).sum(),
            settling: self.settle.as_ref().map(Settle::status),
        })
    }

    /// Turns or fills the piece that is due, if one is.
    pub(crate) fn turn_piece(&mut self) {
        let Some(shared) = self.settle.as_ref().map(|settle| Arc::clone(&settle.shared)) else { return };
        let Some(Due { chore, patience }) = shared.take_due() else { return };
        let (began, has_run) = (Instant::now(), !self.is_paused());
        let (left, done) = match chore {
            Chore::Turn { work, piece, mut left } => {
                let done = self.standing_still(patience, || work.turn(&piece, &mut left));
                (Some(left), done)
            }
            Chore::Fill { disk, piece } => {
                (None, self.standing_still(patience, || of_disk(disk.fill(&piece))))
            }
            Chore::Whole { disk } => (None, self.standing_still(patience, || of_disk(disk.make_whole()))),
        };
        let turn = match done {
            Ok(Ok(())) => Turn::Done,
            Err(error @ (Error::NotParked(_) | Error::NotDrained(_))) => Turn::NotStill(log::chain(&error)),
            Ok(Err(error)) | Err(error) => Turn::Failed(log::chain(&error)),
        };
        let took = if has_run { began.elapsed() } else { Duration::ZERO };
        if self.parts.as_ref().is_some_and(|parts| shared_bytes(&parts.ram) == 0) {
            self.below.clear();
        }
        shared.answer(Answer { left, turn, took });
    }

    /// Does something as no vCPU runs and nothing is in flight. The guest's clock goes on: it is over in a moment.
    fn standing_still<T>(&self, patience: Duration, work: impl FnOnce() -> T) -> Result<T, Error> {
        if self.is_paused() {
            return Ok(work());
        }
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        parts.crew.park_within(patience)?;
        let done = parts.root.pause_within(patience).map(|()| {
            let done = work();
            parts.root.resume();
            done
        });
        parts.crew.open();
        Ok(done?)
    }
}

impl Settle {
    fn start(work: Option<Work>, disks: Vec<Disk>, bell: &Arc<Bell>) -> Result<Settle, Error> {
        let inner = Inner {
            stage: Stage::Copying,
            pauses: 0,
            longest: Duration::ZERO,
            paused: Duration::ZERO,
            ended: None,
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            bell: Arc::clone(bell),
            began: Instant::now(),
        });
        let theirs = Arc::clone(&shared);
        let run = move || {
            threads::enter(ThreadKind::Settle);
            theirs.run(work.map(Arc::new), &disks);
        };
        let thread = std::thread::Builder::new().name("settle".to_owned()).spawn(run);
        let thread = thread.map_err(|cause| Error::Host { what: "the thread settle".to_owned(), cause })?;
        Ok(Settle { shared, thread: Some(thread) })
    }

    fn is_under_way(&self) -> bool {
        !matches!(self.shared.inner().stage, Stage::Ended(_))
    }

    fn status(&self) -> settling::Settling {
        let inner = self.shared.inner();
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let until = inner.ended.unwrap_or_else(Instant::now);
        settling::Settling {
            stage: match &inner.stage {
                Stage::Copying | Stage::Due(_) | Stage::Answered(_) => SettleStage::UnderWay,
                Stage::Ended(Ok(())) => SettleStage::Settled,
                Stage::Ended(Err(detail)) => SettleStage::Failed { detail: detail.clone() },
            },
            pauses: inner.pauses,
            longest_pause_us: us(inner.longest),
            paused_us: us(inner.paused),
            total_us: us(until.duration_since(self.shared.began)),
        }
    }

    fn cancel(&mut self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        // With the lock, so that nobody begins to wait in between.
        drop(self.shared.inner());
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic has aborted the process before it could get here.
            let _ = thread.join();
        }
    }
}

impl Drop for Settle {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Shared {
    fn run(&self, work: Option<Arc<Work>>, disks: &[Disk]) {
        let mut result = work.as_ref().map_or(Ok(()), |work| self.pieces(work));
        if let Some(work) = work {
            marks::stop(work.settling.ram());
            // A piece that is due and was not turned holds it, too.
            let before = std::mem::replace(&mut self.inner().stage, Stage::Copying);
            drop((before, work));
        }
        if result.is_ok() {
            result = disks.iter().try_for_each(|disk| self.fill_disk(disk));
        }
        let result = result.map_err(|stop| match stop {
            Stop::GivenUp => "it was given up".to_owned(),
            Stop::Failed(detail) => {
                log::line(format_args!("what a machine shares is not settled: {detail}"));
                detail
            }
        });
        let mut inner = self.inner();
        inner.stage = Stage::Ended(result);
        inner.ended = Some(Instant::now());
    }

    /// Has all of a disk be in its own file.
    fn fill_disk(&self, disk: &Disk) -> Result<(), Stop> {
        let mut unwritten = 0;
        while let Some(piece) = disk.read_ahead().map_err(backing_trouble)? {
            let piece = Arc::new(piece);
            self.until_done(|| Chore::Fill { disk: disk.clone(), piece: Arc::clone(&piece) })?;
            // Now and then, so that no write waits for a page cache full of it as the machine stands still.
            unwritten += 1;
            if unwritten >= SETTLE_WRITE_PIECES {
                disk.write_out().map_err(backing_trouble)?;
                unwritten = 0;
            }
        }
        disk.sync().map_err(backing_trouble)?;
        // With every answer taken, as one may say that something is lost.
        self.until_done(|| Chore::Whole { disk: disk.clone() })
    }

    /// Has the main thread do something with a disk, again until it comes to that.
    fn until_done(&self, chore: impl Fn() -> Chore) -> Result<(), Stop> {
        for tries in 0.. {
            if self.is_cancelled() {
                return Err(Stop::GivenUp);
            }
            let answer = self.turn(Due { chore: chore(), patience: patience(tries) })?;
            if self.is_turned(answer.turn, answer.took, tries)? {
                break;
            }
        }
        Ok(())
    }

    /// What the main thread's answer comes to: done, or to be tried again. Lets the machine run first.
    fn is_turned(&self, turn: Turn, took: Duration, tries: u32) -> Result<bool, Stop> {
        let is_done = match turn {
            Turn::Failed(detail) => return Err(Stop::Failed(detail)),
            Turn::NotStill(detail) if tries >= SETTLE_TRIES_MAX => return Err(Stop::Failed(detail)),
            Turn::NotStill(_) => false,
            Turn::Done => true,
        };
        self.let_run(took);
        Ok(is_done)
    }

    fn pieces(&self, work: &Arc<Work>) -> Result<(), Stop> {
        // Of the piece alone, as is all that is asked for: what a piece costs is not to grow with memory.
        let mut left = Pages::of(ram::bytes(work.settling.ram()) / marks::PAGE_BYTES);
        while let Some(piece) = work.settling.next()? {
            let (extent, piece) = (piece.extent(), Arc::new(piece));
            // Marks of before are of what is copied now.
            marks::take_part(work.settling.ram(), extent, &mut left);
            left.set_range(
                extent.offset / marks::PAGE_BYTES,
                (extent.offset + extent.bytes) / marks::PAGE_BYTES,
            );
            self.copy(work, &piece, &left, true)?;
            left.clear_part(extent);
            let mut tries = 0;
            loop {
                self.copy_written(work, &piece, &mut left)?;
                let chore = Chore::Turn { work: Arc::clone(work), piece: Arc::clone(&piece), left };
                let answer = self.turn(Due { chore, patience: patience(tries) })?;
                left = answer.left.unwrap_or_else(|| Pages::of(0));
                if self.is_turned(answer.turn, answer.took, tries)? {
                    break;
                }
                tries += 1;
            }
            left.clear_part(extent);
        }
        Ok(())
    }

    /// Copies what was written of a piece until little is left, or it does not become less.
    fn copy_written(&self, work: &Work, piece: &Piece, left: &mut Pages) -> Result<(), Stop> {
        let extent = piece.extent();
        work.written(extent, left)?;
        for _ in 1..SETTLE_ROUNDS_MAX {
            if count(left, extent) <= SETTLE_PAGES_MAX {
                break;
            }
            self.copy(work, piece, left, false)?;
            left.clear_part(extent);
            work.written(extent, left)?;
        }
        Ok(())
    }

    /// Copies those pages of a piece that are in `pages`, while they may be written.
    fn copy(&self, work: &Work, piece: &Piece, pages: &Pages, first: bool) -> Result<(), Stop> {
        let extent = piece.extent();
        for offset in (extent.offset..extent.offset + extent.bytes).step_by(SHARD_BYTES as usize) {
            if self.is_cancelled() {
                return Err(Stop::GivenUp);
            }
            let shard = Extent { offset, bytes: SHARD_BYTES.min(extent.offset + extent.bytes - offset) };
            // Before it is read: what is written from now on is found again.
            work.log.clear(shard, pages)?;
            let outlet = Own { piece, is_still: false };
            work.copy(shard, pages, first, outlet)?;
            guard::give_way();
        }
        Ok(())
    }

    /// Has the main thread do what is due.
    fn turn(&self, due: Due) -> Result<Answer, Stop> {
        let mut inner = self.inner();
        inner.stage = Stage::Due(Box::new(due));
        self.bell.settling();
        loop {
            match std::mem::replace(&mut inner.stage, Stage::Copying) {
                Stage::Answered(answer) => return Ok(*answer),
                // It is taken back, or turned before this thread is waited for.
                Stage::Due(_) if self.is_cancelled() => return Err(Stop::GivenUp),
                other => inner.stage = other,
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take_due(&self) -> Option<Due> {
        let mut inner = self.inner();
        match std::mem::replace(&mut inner.stage, Stage::Copying) {
            Stage::Due(due) => Some(*due),
            other => {
                inner.stage = other;
                None
            }
        }
    }

    fn answer(&self, answer: Answer) {
        let mut inner = self.inner();
        inner.pauses += u32::from(!answer.took.is_zero());
        inner.longest = inner.longest.max(answer.took);
        inner.paused += answer.took;
        inner.stage = Stage::Answered(Box::new(answer));
        drop(inner);
        self.changed.notify_all();
    }

    /// Lets the machine run behind a pause, for as long as that one allows.
    fn let_run(&self, paused: Duration) {
        let until = Instant::now() + paused * SETTLE_RUNS_ON;
        let mut inner = self.inner();
        while !self.is_cancelled() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// Adds what vCPUs and devices have written of a piece since it was last cleared, or taken.
    fn written(&self, piece: Extent, pages: &mut Pages) -> Result<(), migrate::Error> {
        self.log.collect_part(piece, pages)?;
        marks::take_part(self.settling.ram(), piece, pages);
        Ok(())
    }

    fn copy(&self, part: Extent, pages: &Pages, first: bool, mut to: Own<'_>) -> Result<(), migrate::Error> {
        ram::walk(self.settling.ram(), part, pages, &Pages::default(), first, &mut to).map(drop)
    }

    /// The rest of a piece, as nobody writes.
    fn turn(&self, piece: &Piece, left: &mut Pages) -> Result<(), Error> {
        self.written(piece.extent(), left)?;
        self.copy(piece.extent(), left, false, Own { piece, is_still: true })?;
        Ok(piece.turn()?)
    }
}

/// Where what is settled goes.
struct Own<'a> {
    piece: &'a Piece,
    /// Whether the machine stands still for it.
    is_still: bool,
}

impl ram::Outlet for Own<'_> {
    fn part(&mut self, part: Extent) -> Result<(), migrate::Error> {
        Ok(self.piece.copy(part)?)
    }

    fn zero(&mut self, part: Extent) -> Result<(), migrate::Error> {
        if self.is_still && part.bytes < SETTLE_ZEROES_MAX {
            return self.part(part);
        }
        Ok(self.piece.clear(part)?)
    }
}

fn of_disk(done: std::io::Result<()>) -> Result<(), Error> {
    done.map_err(|cause| Error::Host { what: "a disk".to_owned(), cause })
}

fn backing_trouble(cause: std::io::Error) -> Stop {
    Stop::Failed(format!("a disk cannot be filled from its backing file: {cause}"))
}

fn count(pages: &Pages, piece: Extent) -> u64 {
    pages.words_of(piece).iter().map(|word| u64::from(word.count_ones())).sum()
}

/// How long the machine may take to stand still for a piece after so many tries.
fn patience(tries: u32) -> Duration {
    let longer = SETTLE_DRAIN_MS.saturating_mul(1 << (tries / SETTLE_TRIES_EACH).min(16));
    Duration::from_millis(longer.min(SETTLE_DRAIN_MS_MAX))
}
