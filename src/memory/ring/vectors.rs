//! Lists of buffers for vectored system calls, checked against guest memory and kept valid as long as they
//! exist. Nothing here makes a system call.
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::Ram;

/// Most buffers in one request (UIO_MAXIOV in include/uapi/linux/uio.h).
pub const PIECES_MAX: usize = 1024;

/// Most buffers for which a released list keeps storage, 32 bytes each: more than most requests have. Whoever once fills a
/// ring with the longest requests does not keep it all.
pub(super) const PIECES_KEPT: usize = 32;

/// What zeroes are written from. Large enough that a request's vectors reach 64 MiB.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Most zeroes that one list can hold.
pub(super) const ZEROES_BYTES_MAX: u64 = (PIECES_MAX * ZEROES.len()) as u64;

/// Why a request cannot be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many requests are in flight as the ring holds.
    #[error("the ring is full")]
    Full,
    /// A piece is not wholly guest memory.
    #[error("a piece lies outside guest memory")]
    Outside,
    /// More pieces than [`PIECES_MAX`], or more zeroes than a request can write.
    #[error("the request is too long")]
    TooLong,
    /// The range ends beyond the largest file.
    #[error("the range ends beyond the largest file offset")]
    Offset,
}

/// Buffers for one request, with the memory they lie in.
#[derive(Debug, Default)]
pub(crate) struct Vectors {
    list: Vec<libc::iovec>,
    /// Buffers of `list` that are done with.
    done: usize,
    memory: Option<Arc<Ram>>,
    pieces: Vec<(GuestAddress, u32)>,
}

// SAFETY: the pointers in `list` lead into mappings that `memory` keeps alive, or into a static; neither belongs
// to a thread.
unsafe impl Send for Vectors {}

impl Vectors {
    /// Points to the pieces; returns how many bytes they are. After an error only `release` is of use.
    pub(super) fn fill(
        &mut self,
        memory: &Arc<Ram>,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> Result<u64, Refused> {
        self.release();
        self.memory = Some(Arc::clone(memory));
        let kept = &mut self.pieces;
        append(&mut self.list, memory, pieces.into_iter().inspect(|piece| kept.push(*piece)))
    }

    /// Points to `length` zeroes.
    pub(super) fn fill_zeroes(&mut self, length: u64) -> Result<u64, Refused> {
        self.release();
        if length > ZEROES_BYTES_MAX {
            return Err(Refused::TooLong);
        }
        let mut left = length as usize;
        while left > 0 {
            let iov_len = left.min(ZEROES.len());
            // The kernel only reads what is written to a file, so the static stays as it is.
            self.list.push(libc::iovec { iov_base: ZEROES.as_ptr().cast_mut().cast(), iov_len });
            left -= iov_len;
        }
        Ok(length)
    }

    /// What is not yet done.
    pub(super) fn rest(&self) -> &[libc::iovec] {
        self.list.get(self.done..).unwrap_or_default()
    }

    /// Marks the first `bytes` of the rest as done.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        while left > 0 {
            let Some(vector) = self.list.get_mut(self.done) else { return };
            let taken = left.min(vector.iov_len);
            vector.iov_len -= taken;
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(taken).cast();
            left -= taken;
            if vector.iov_len == 0 {
                self.done += 1;
            }
        }
    }

    /// Notes in the dirty bitmap what the kernel has written: KVM's own log does not see it.
    pub(super) fn mark_written(&self) {
        if let Some(memory) = &self.memory {
            mark_written(memory, self.pieces.iter().copied());
        }
    }

    /// Buffers for which there is storage.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.list.capacity() + self.pieces.capacity()
    }

    /// Lets go of the memory; keeps the storage for the next request, unless this one was uncommonly long.
    pub(super) fn release(&mut self) {
        self.list.clear();
        self.list.shrink_to(PIECES_KEPT);
        self.pieces.clear();
        self.pieces.shrink_to(PIECES_KEPT);
        self.memory = None;
        self.done = 0;
    }
}

/// Adds buffers for the pieces to `list`, which holds at most [`PIECES_MAX`]; returns how many bytes were added.
/// The pointers are good as long as `memory` lives.
pub(crate) fn append(
    list: &mut Vec<libc::iovec>,
    memory: &Ram,
    pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
) -> Result<u64, Refused> {
    let mut bytes = 0;
    for (address, length) in pieces {
        for slice in memory.get_slices(address, length as usize) {
            let slice = slice.map_err(|_| Refused::Outside)?;
            if list.len() == PIECES_MAX {
                return Err(Refused::TooLong);
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            list.push(libc::iovec { iov_base, iov_len: slice.len() });
        }
        bytes += u64::from(length);
    }
    Ok(bytes)
}

/// Notes the pieces in the dirty bitmap.
fn mark_written(memory: &Ram, pieces: impl IntoIterator<Item = (GuestAddress, u32)>) {
    for (address, length) in pieces {
        for slice in memory.get_slices(address, length as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
