//! The engine for hosts without io_uring: each request is one system call in the submitting thread. It keeps
//! the order of submission and knows nothing of who asks.
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use super::{Durability, Files, Kind, Slot};

/// Requests waiting for their call and answers waiting to be taken; both at most the ring's depth.
#[derive(Debug, Default)]
pub(super) struct Plain {
    queued: VecDeque<usize>,
    answers: VecDeque<(usize, i32)>,
}

impl Plain {
    pub(super) fn queue(&mut self, index: usize) {
        self.queued.push_back(index);
    }

    pub(super) fn has_queued(&self) -> bool {
        !self.queued.is_empty()
    }

    pub(super) fn next_answer(&mut self) -> Option<(usize, i32)> {
        self.answers.pop_front()
    }

    /// Does everything queued; says whether there are answers to take.
    pub(super) fn submit(&mut self, files: &Files, slots: &[Slot]) -> bool {
        for index in self.queued.drain(..) {
            let Some(slot) = slots.get(index) else { continue };
            self.answers.push_back((index, call(files, slot)));
        }
        !self.answers.is_empty()
    }
}

/// The kernel's answer as io_uring would give it: what was done, or the error's number below zero.
fn call(files: &Files, slot: &Slot) -> i32 {
    let file = match (slot.kind, &files.backing) {
        (Kind::ReadBacking, Some(backing)) => backing,
        (Kind::ReadBacking, None) => return -libc::EBADF,
        _ => &files.own,
    };
    let fd = file.as_raw_fd();
    let vectors = slot.vectors.rest();
    // At most 1024 vectors, and offsets were checked to fit when the request was accepted.
    let (list, count) = (vectors.as_ptr(), vectors.len() as libc::c_int);
    let (offset, left) = (slot.offset as libc::off_t, slot.left as libc::off_t);
    let answer = match slot.kind {
        // SAFETY: `list` and `count` are one live slice whose buffers lie in mappings that the slot keeps alive
        // or in a static that is only read; `fd` is open because `file` is.
        Kind::Read | Kind::ReadBacking => unsafe { libc::preadv(fd, list, count, offset) },
        Kind::Write(durability) => {
            let flags = if durability == Durability::Durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, list, count, offset, flags) }
        }
        // SAFETY: takes no pointer; `fd` is open because `file` is.
        Kind::Sync => unsafe { libc::fdatasync(fd) as isize },
        Kind::Punch => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: takes no pointer; `fd` is open because `file` is.
            unsafe { libc::fallocate(fd, mode, offset, left) as isize }
        }
        Kind::Zero => {
            let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: takes no pointer; `fd` is open because `file` is.
            unsafe { libc::fallocate(fd, mode, offset, left) as isize }
        }
    };
    if answer < 0 {
        return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    // One call moves at most 0x7fff_f000 bytes.
    i32::try_from(answer).unwrap_or(i32::MAX)
}
