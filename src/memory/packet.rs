//! Packets straight out of guest memory, one vectored system call each. It knows neither tap nor queue;
//! `devices::virtio::net` decides what is sent and where to.
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::GuestAddress;

use crate::Ram;
use crate::ring::{Refused, append};

/// Why a packet was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// A piece is not guest memory, or there are more than [`crate::ring::PIECES_MAX`] with the header.
    #[error("the packet cannot be gathered")]
    Gather(#[source] Refused),
    /// The kernel refused it.
    #[error("the packet was not taken")]
    Send(#[source] io::Error),
}

/// Sends packets; keeps its storage between them.
#[derive(Debug, Default)]
pub struct Sender {
    list: Vec<libc::iovec>,
}

// SAFETY: `list` is empty between calls, so no pointer ever changes threads.
unsafe impl Send for Sender {}

impl Sender {
    /// Sends `header` and then the pieces as one packet. After an error nothing was sent.
    pub fn send(
        &mut self,
        fd: impl AsFd,
        header: &[u8],
        memory: &Ram,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> Result<usize, SendError> {
        self.list.clear();
        // The kernel only reads what is sent, so the header stays as it is.
        let iov_base = header.as_ptr().cast_mut().cast();
        self.list.push(libc::iovec { iov_base, iov_len: header.len() });
        let filled = append(&mut self.list, memory, pieces).map_err(SendError::Gather);
        let sent = filled.and_then(|_| {
            let (list, count) = (self.list.as_ptr(), self.list.len() as libc::c_int);
            // SAFETY: `list` and `count` are one live slice; its buffers are `header` and parts of `memory`'s
            // mappings, both borrowed for longer than this call; the descriptor is open because `fd` is.
            let answer = unsafe { libc::writev(fd.as_fd().as_raw_fd(), list, count) };
            usize::try_from(answer).map_err(|_| SendError::Send(io::Error::last_os_error()))
        });
        self.list.clear();
        sent
    }
}

#[cfg(test)]
mod tests;
