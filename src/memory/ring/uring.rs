//! The io_uring engine: one ring that can do nothing but the operations used here, on the files registered. It
//! knows slots by number; what they point to stays in place until their answer is taken.
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::{Durability, Files, Kind, Slot};

/// The registered files: the ring's own, and the backing file if it has one.
const FILE: Fixed = Fixed(0);
const BACKING: Fixed = Fixed(1);

/// The ring and what has been handed to it.
pub(super) struct Uring {
    ring: IoUring,
    /// Requests the kernel has not taken, in order.
    unsent: VecDeque<usize>,
    /// How many of `unsent` are already in the submission queue.
    pushed: usize,
    /// Nothing is submitted any more.
    retired: bool,
}

impl Uring {
    pub(super) fn new(files: &Files, ready: BorrowedFd<'_>, depth: u16) -> io::Result<Uring> {
        let ring = build(u32::from(depth).max(1))?;
        let submitter = ring.submitter();
        let files = std::iter::once(&files.own).chain(&files.backing);
        submitter.register_files(&files.map(|file| file.as_raw_fd()).collect::<Vec<_>>())?;
        submitter.register_eventfd(ready.as_raw_fd())?;
        // io_uring goes past a seccomp filter, so the ring itself refuses what a taken-over process would want of
        // it: other operations, other files, other registrations.
        let fixed_file = squeue::Flags::FIXED_FILE.bits();
        let mut restrictions = [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_allowed(fixed_file),
            Restriction::sqe_flags_required(fixed_file),
        ];
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Uring { ring, unsent: VecDeque::new(), pushed: 0, retired: false })
    }

    pub(super) fn queue(&mut self, index: usize) {
        self.unsent.push_back(index);
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Hands everything queued to the kernel in one call. After an error what was not taken is still queued.
    pub(super) fn submit(&mut self, slots: &[Slot]) -> io::Result<()> {
        let mut queue = self.ring.submission();
        for index in self.unsent.range(self.pushed..) {
            let entry = slots.get(*index).map(|slot| entry(slot, *index));
            let Some(entry) = entry else { break };
            // SAFETY: the vectors that the entry points to are part of a busy slot, which is neither changed nor
            // freed before its answer is taken; they lie in mappings the slot keeps alive.
            if unsafe { queue.push(&entry) }.is_err() {
                break;
            }
            self.pushed += 1;
        }
        drop(queue);
        if self.pushed == 0 {
            return Ok(());
        }
        let taken = self.ring.submit()?.min(self.pushed);
        self.unsent.drain(..taken);
        self.pushed -= taken;
        if self.unsent.is_empty() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EAGAIN)) }
    }

    /// Lets the kernel post answers it has held back for this thread.
    pub(super) fn collect(&mut self) {
        let queue = self.ring.submission();
        let held_back = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if held_back && self.pushed == 0 && !self.retired {
            // With nothing to submit this only fetches; a failure leaves the flag set for the next time.
            let _ = self.ring.submit();
        }
    }

    pub(super) fn next_answer(&mut self) -> Option<(usize, i32)> {
        let entry = self.ring.completion().next()?;
        // The numbers are those given by `entry`; whoever made up another is ignored by the caller.
        Some((usize::try_from(entry.user_data()).unwrap_or(usize::MAX), entry.result()))
    }

    /// Ends submission for good: what the kernel has not taken it never will.
    pub(super) fn retire(&mut self) -> Vec<usize> {
        self.retired = true;
        self.pushed = 0;
        self.unsent.drain(..).collect()
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("unsent", &self.unsent).finish_non_exhaustive()
    }
}

/// A disabled ring with whatever the kernel has to make it cheap. Not DEFER_TASKRUN: that binds the ring to one
/// thread for good, while a ring here outlives the threads of a device that is reset, so that the sandbox needs no
/// io_uring_setup. Measured with 4 KiB random reads, it changes nothing through the page cache, and on a file
/// opened past it gains 4 to 16 % at depth 32 and loses as much at depth 1.
fn build(depth: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled().setup_clamp().dontfork();
    let plain = builder.clone();
    match builder.setup_coop_taskrun().setup_taskrun_flag().build(depth) {
        // Kernels before 5.19 know neither.
        Err(cause) if cause.raw_os_error() == Some(libc::EINVAL) => plain.build(depth),
        built => built,
    }
}

fn entry(slot: &Slot, index: usize) -> squeue::Entry {
    let vectors = slot.vectors.rest();
    let (list, count) = (vectors.as_ptr(), vectors.len() as u32);
    // Most transfers are in one piece, for which the kernel then has no list to copy and check.
    let whole = match vectors {
        [only] => u32::try_from(only.iov_len).ok().map(|length| (only.iov_base.cast::<u8>(), length)),
        _ => None,
    };
    let file = if slot.kind == Kind::ReadBacking { BACKING } else { FILE };
    let entry = match slot.kind {
        Kind::Read | Kind::ReadBacking => match whole {
            Some((start, length)) => opcode::Read::new(file, start, length).offset(slot.offset).build(),
            None => opcode::Readv::new(file, list, count).offset(slot.offset).build(),
        },
        Kind::Write(durability) => {
            let flags = if durability == Durability::Durable { libc::RWF_DSYNC } else { 0 };
            match whole {
                Some((start, length)) => {
                    opcode::Write::new(FILE, start, length).offset(slot.offset).rw_flags(flags).build()
                }
                None => opcode::Writev::new(FILE, list, count).offset(slot.offset).rw_flags(flags).build(),
            }
        }
        Kind::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        Kind::Punch => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(FILE, slot.left).offset(slot.offset).mode(mode).build()
        }
        Kind::Zero => {
            let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(FILE, slot.left).offset(slot.offset).mode(mode).build()
        }
    };
    entry.user_data(index as u64)
}

#[cfg(test)]
impl Uring {
    /// What the kernel answers to operations a taken-over process might try; each should be refused.
    pub(super) fn probe_refusals(&mut self) -> Vec<Option<i32>> {
        use io_uring::types::Fd;
        let attempts = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/etc/hostname".as_ptr()).build(),
            opcode::Fsync::new(Fd(0)).build(),
        ];
        let mut answers = Vec::new();
        for attempt in attempts {
            // SAFETY: the one pointer among the attempts leads to a static string.
            unsafe { self.ring.submission().push(&attempt) }.unwrap();
            self.ring.submit_and_wait(1).unwrap();
            let result = self.ring.completion().next().unwrap().result();
            answers.push(result.checked_neg().filter(|number| *number > 0));
        }
        let registration = self.ring.submitter().unregister_files();
        answers.push(registration.err().and_then(|cause| cause.raw_os_error()));
        answers
    }
}
