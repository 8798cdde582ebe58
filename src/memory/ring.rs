//! File I/O straight between one file and guest memory: io_uring where the kernel gives it, plain system calls
//! where not, behind one interface. A second file can be read from, too. It knows no virtqueue and no device;
//! `devices::virtio::block` drives it.
//!
//! A request owns its vectors and a share of the memory until the kernel has answered, so nothing the kernel may
//! still touch is ever unmapped or reused. What lies in guest memory may change at any time; the kernel only
//! copies it.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestAddress;

use crate::Ram;

mod plain;
mod uring;
mod vectors;

use plain::Plain;
use uring::Uring;
use vectors::Vectors;
pub(crate) use vectors::append;
pub use vectors::{PIECES_MAX, Refused};

/// How long dropping a ring waits for the kernel. What is not answered then is leaked with the memory it may
/// still write, which is safe; a disk that hangs longer than this seldom comes back at all.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// How often one request is tried again after an interruption that made no progress.
const RETRIES_MAX: u8 = 16;

/// How often in a row the kernel may put a submission off before plain system calls take over: far more than a
/// shortage of memory lasts that anything else survives.
const STALLS_MAX: u32 = 1000;

/// What does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, restricted to the operations used here on its files.
    IoUring,
    /// One system call at a time in the thread that calls [`Ring::submit`].
    Plain,
}

/// What a completed write promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The page cache has it.
    Cached,
    /// The medium has it (RWF_DSYNC).
    Durable,
}

/// One answered request.
#[derive(Debug)]
pub struct Completed {
    /// What the request was given.
    pub token: u64,
    /// Success means that all of it was done.
    pub result: io::Result<()>,
}

/// The files of a ring.
#[derive(Debug, Clone)]
pub struct Files {
    /// Read and written.
    pub own: Arc<File>,
    /// Only read ([`Ring::read_backing`]). Held until the ring ends.
    pub backing: Option<Arc<File>>,
}

impl From<Arc<File>> for Files {
    fn from(own: Arc<File>) -> Files {
        Files { own, backing: None }
    }
}

/// A file that guest memory is read from and written to, with at most a fixed number of requests in flight.
#[derive(Debug)]
pub struct Ring {
    // Before the slots: a ring is closed before the vectors it points to are freed.
    uring: Option<Uring>,
    plain: Plain,
    engine: Engine,
    slots: Box<[Slot]>,
    free: Vec<usize>,
    files: Files,
    ready: EventFd,
    fell_back: Option<io::Error>,
    stalls: u32,
}

/// A request as an engine sees it.
#[derive(Debug, Default)]
struct Slot {
    token: u64,
    kind: Kind,
    offset: u64,
    /// Bytes still to be done, for [`Kind::Punch`] and [`Kind::Zero`] the length.
    left: u64,
    vectors: Vectors,
    retries: u8,
    busy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Kind {
    #[default]
    Sync,
    Read,
    ReadBacking,
    Write(Durability),
    Punch,
    Zero,
}

impl Ring {
    /// A ring of `depth` requests over these files, with io_uring if the kernel gives it. Made before a sandbox closes
    /// io_uring_setup; it may move to another thread and live through any number of users.
    pub fn new(files: impl Into<Files>, depth: u16) -> io::Result<Ring> {
        let mut ring = Ring::plain(files, depth)?;
        match Uring::new(&ring.files, ring.ready.as_fd(), depth) {
            Ok(uring) => (ring.uring, ring.engine) = (Some(uring), Engine::IoUring),
            Err(cause) => ring.fell_back = Some(cause),
        }
        Ok(ring)
    }

    /// A ring that does not use io_uring, for hosts that forbid it and for comparing.
    pub fn plain(files: impl Into<Files>, depth: u16) -> io::Result<Ring> {
        Ok(Ring {
            uring: None,
            plain: Plain::default(),
            engine: Engine::Plain,
            slots: (0..depth).map(|_| Slot::default()).collect(),
            free: (0..usize::from(depth)).rev().collect(),
            files: files.into(),
            ready: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            fell_back: None,
            stalls: 0,
        })
    }

    /// What does the work.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Why io_uring is not used although it was asked for.
    pub fn fallback_cause(&self) -> Option<&io::Error> {
        self.fell_back.as_ref()
    }

    /// Readable when [`Ring::reap`] has something to do.
    pub fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// Requests accepted and not yet handed out by [`Ring::reap`].
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another request can be accepted.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Reads from `offset` of the file into the pieces of memory, in order.
    pub fn read(
        &mut self,
        token: u64,
        offset: u64,
        memory: &Arc<Ram>,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> Result<(), Refused> {
        self.accept(token, Kind::Read, offset, |vectors| vectors.fill(memory, pieces))
    }

    /// As [`Ring::read`], from the backing file. Without one the request fails.
    pub fn read_backing(
        &mut self,
        token: u64,
        offset: u64,
        memory: &Arc<Ram>,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> Result<(), Refused> {
        self.accept(token, Kind::ReadBacking, offset, |vectors| vectors.fill(memory, pieces))
    }

    /// Writes the pieces of memory to `offset` of the file, in order.
    pub fn write(
        &mut self,
        token: u64,
        offset: u64,
        memory: &Arc<Ram>,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
        durability: Durability,
    ) -> Result<(), Refused> {
        self.accept(token, Kind::Write(durability), offset, |vectors| vectors.fill(memory, pieces))
    }

    /// Makes every write that has completed durable (fdatasync).
    pub fn sync(&mut self, token: u64) -> Result<(), Refused> {
        self.accept(token, Kind::Sync, 0, |_| Ok(0))
    }

    /// Gives the space of a range back; it reads zero afterwards (FALLOC_FL_PUNCH_HOLE).
    pub fn punch(&mut self, token: u64, offset: u64, length: u64) -> Result<(), Refused> {
        self.accept(token, Kind::Punch, offset, |_| Ok(length))
    }

    /// Makes a range read zero and keeps its space (FALLOC_FL_ZERO_RANGE).
    pub fn zero(&mut self, token: u64, offset: u64, length: u64) -> Result<(), Refused> {
        self.accept(token, Kind::Zero, offset, |_| Ok(length))
    }

    /// Writes zeroes over a range, for files that can do neither of the above. At most
    /// [`Ring::WRITE_ZEROES_BYTES_MAX`].
    pub fn write_zeroes(
        &mut self,
        token: u64,
        offset: u64,
        length: u64,
        durability: Durability,
    ) -> Result<(), Refused> {
        self.accept(token, Kind::Write(durability), offset, |vectors| vectors.fill_zeroes(length))
    }

    /// The longest [`Ring::write_zeroes`], in bytes.
    pub const WRITE_ZEROES_BYTES_MAX: u64 = vectors::ZEROES_BYTES_MAX;

    fn accept(
        &mut self,
        token: u64,
        kind: Kind,
        offset: u64,
        fill: impl FnOnce(&mut Vectors) -> Result<u64, Refused>,
    ) -> Result<(), Refused> {
        let Some(&index) = self.free.last() else { return Err(Refused::Full) };
        let Some(slot) = self.slots.get_mut(index) else { return Err(Refused::Full) };
        let left = fill(&mut slot.vectors).inspect_err(|_| slot.vectors.release())?;
        // File offsets are signed: anything beyond would be cut or refused differently by each engine.
        if offset.checked_add(left).is_none_or(|end| i64::try_from(end).is_err()) {
            slot.vectors.release();
            return Err(Refused::Offset);
        }
        (slot.token, slot.kind, slot.offset, slot.left) = (token, kind, offset, left);
        (slot.retries, slot.busy) = (0, true);
        self.free.pop();
        self.queue(index);
        Ok(())
    }

    /// Hands everything accepted to the kernel, in one system call with io_uring. Answers come by [`Ring::reap`].
    pub fn submit(&mut self) {
        let sent = match &mut self.uring {
            Some(uring) if self.engine == Engine::IoUring => uring.submit(&self.slots),
            _ => Ok(()),
        };
        match sent {
            Ok(()) => self.stalls = 0,
            // The kernel wants answers taken first or is short of memory for a moment: come back for another try.
            Err(cause) if is_passing(&cause) && self.stalls < STALLS_MAX => {
                self.stalls += 1;
                self.call_again();
            }
            Err(cause) => self.fall_back(cause),
        }
        if self.plain.submit(&self.files, &self.slots) {
            self.call_again();
        }
    }

    /// Adds every answer there is to `done`. Transfers that came back short are carried on with.
    pub fn reap(&mut self, done: &mut Vec<Completed>) {
        // Quiet first, look after: an answer that comes between is then looked for twice, never missed.
        let _ = self.ready.read();
        self.reap_awake(done);
    }

    /// As [`Ring::reap`], but leaves [`Ring::ready`] as it is, which saves a system call: for a caller that reaps once more
    /// before it waits.
    pub fn reap_awake(&mut self, done: &mut Vec<Completed>) {
        if let Some(uring) = &mut self.uring {
            uring.collect();
        }
        // Bounded by the depth: a request has one answer, and those carried on with are submitted below.
        while let Some((index, result)) = self.next_answer() {
            let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.busy) else { continue };
            match slot.advance(result) {
                None => self.queue(index),
                Some(result) => {
                    slot.busy = false;
                    slot.vectors.release();
                    done.push(Completed { token: slot.token, result });
                    self.free.push(index);
                }
            }
        }
        if self.plain.has_queued() || self.uring.as_ref().is_some_and(Uring::has_unsent) {
            self.submit();
        }
    }

    /// Waits until nothing is in flight, for at most `patience`; the answers are added to `done`.
    pub fn drain(&mut self, patience: Duration, done: &mut Vec<Completed>) -> bool {
        let deadline = Instant::now() + patience;
        self.submit();
        loop {
            self.reap(done);
            if self.in_flight() == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let wait = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
            // An interrupted wait looks again and then waits for the rest.
            let _ = poll(&mut [PollFd::new(self.ready.as_fd(), PollFlags::POLLIN)], wait);
        }
    }

    fn queue(&mut self, index: usize) {
        match &mut self.uring {
            Some(uring) if self.engine == Engine::IoUring => uring.queue(index),
            _ => self.plain.queue(index),
        }
    }

    fn next_answer(&mut self) -> Option<(usize, i32)> {
        self.plain.next_answer().or_else(|| self.uring.as_mut().and_then(Uring::next_answer))
    }

    fn call_again(&self) {
        // It refuses only when its counter is full, and then it is readable anyway.
        let _ = self.ready.write(1);
    }

    /// io_uring refused a submission for good, as a filter that forbids io_uring_enter makes it. What it has not
    /// taken, and all that follows, is done plainly; what it has taken is still waited for.
    fn fall_back(&mut self, cause: io::Error) {
        self.engine = Engine::Plain;
        self.fell_back = Some(cause);
        if let Some(uring) = &mut self.uring {
            uring.retire().into_iter().for_each(|index| self.plain.queue(index));
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.drain(DROP_WAIT, &mut Vec::new()) {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl Slot {
    /// Takes the kernel's answer: the request's result, or nothing when it has to be carried on with.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let answer = self.judge(result);
        if answer.is_some() && matches!(self.kind, Kind::Read | Kind::ReadBacking) {
            // Also after a failure: the first pieces may have been written.
            self.vectors.mark_written();
        }
        answer
    }

    fn judge(&mut self, result: i32) -> Option<io::Result<()>> {
        let Ok(bytes) = u64::try_from(result) else {
            let cause = io::Error::from_raw_os_error(result.saturating_neg());
            if is_passing(&cause) && self.retries < RETRIES_MAX {
                self.retries += 1;
                return None;
            }
            return Some(Err(cause));
        };
        match self.kind {
            Kind::Sync | Kind::Punch | Kind::Zero => return Some(Ok(())),
            Kind::Read | Kind::ReadBacking if bytes == 0 && self.left > 0 => {
                return Some(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            Kind::Write(_) if bytes == 0 && self.left > 0 => {
                return Some(Err(io::ErrorKind::WriteZero.into()));
            }
            Kind::Read | Kind::ReadBacking | Kind::Write(_) => {}
        }
        let bytes = bytes.min(self.left);
        self.left -= bytes;
        self.offset += bytes;
        self.retries = 0;
        self.vectors.advance(bytes);
        (self.left == 0).then_some(Ok(()))
    }
}

/// Whether trying again may well work: EINTR, EAGAIN, EBUSY.
fn is_passing(cause: &io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests;
