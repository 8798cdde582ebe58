//! Packets straight between a descriptor and guest memory, one vectored system call each. It knows neither tap nor
//! queue; `devices::virtio::net` decides what is sent and where to.
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::GuestAddress;

use crate::Ram;
use crate::ring::{Refused, append, mark_written};

/// Storage for vectored calls, kept between packets.
#[derive(Default)]
pub struct PacketVectors {
    list: Vec<libc::iovec>,
}

// SAFETY: `list` is empty between calls, so no pointer ever changes threads.
unsafe impl Send for PacketVectors {}

impl PacketVectors {
    /// Sends `header` and then the pieces as one packet. Fails with `InvalidInput` when a piece is not guest
    /// memory or there are more than [`crate::ring::PIECES_MAX`] with the header; nothing is sent then.
    pub fn send(
        &mut self,
        fd: impl AsFd,
        header: &[u8],
        memory: &Ram,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> io::Result<usize> {
        self.list.clear();
        // The kernel only reads what is sent, so the header stays as it is.
        let iov_base = header.as_ptr().cast_mut().cast();
        self.list.push(libc::iovec { iov_base, iov_len: header.len() });
        let filled = append(&mut self.list, memory, pieces).map_err(refusal);
        let sent = filled.and_then(|_| {
            let (list, count) = (self.list.as_ptr(), self.list.len() as libc::c_int);
            // SAFETY: `list` and `count` are one live slice; its buffers are `header` and parts of `memory`'s
            // mappings, both borrowed for longer than this call; the descriptor is open because `fd` is.
            checked(unsafe { libc::writev(fd.as_fd().as_raw_fd(), list, count) })
        });
        self.list.clear();
        sent
    }

    /// Receives one packet into the pieces, in order; returns its length. What does not fit is lost, as is the
    /// way of packets. Fails with `InvalidInput` as [`PacketVectors::send`] does; nothing is received then.
    pub fn receive(
        &mut self,
        fd: impl AsFd,
        memory: &Ram,
        pieces: impl IntoIterator<Item = (GuestAddress, u32)> + Clone,
    ) -> io::Result<usize> {
        self.list.clear();
        let filled = append(&mut self.list, memory, pieces.clone()).map_err(refusal);
        let received = filled.and_then(|_| {
            let (list, count) = (self.list.as_ptr(), self.list.len() as libc::c_int);
            // SAFETY: `list` and `count` are one live slice; its buffers are parts of `memory`'s mappings, which
            // is borrowed for longer than this call; the descriptor is open because `fd` is.
            checked(unsafe { libc::readv(fd.as_fd().as_raw_fd(), list, count) })
        });
        self.list.clear();
        if received.is_ok() {
            mark_written(memory, pieces);
        }
        received
    }
}

fn checked(answer: isize) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

fn refusal(refused: Refused) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, refused)
}
