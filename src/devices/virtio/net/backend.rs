//! The host's side of an interface: the tap. It knows no virtqueue; one read or write is one packet with its header.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use memory::Ram;
use memory::packet::{SendError, Sender};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sys::tap::Offloads;
use vm_memory::GuestAddress;

/// Why a descriptor cannot be an interface.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It is no tap, or one with other flags.
    #[error("the descriptor is no tap that a machine can use")]
    Tap(#[source] io::Error),
    /// It could not be made non-blocking.
    #[error("the tap cannot be made non-blocking")]
    NonBlocking(#[source] io::Error),
}

/// A tap as [`sys::tap::Tap::create`] makes it. Cheap to clone; whoever builds a machine again keeps a clone.
#[derive(Debug, Clone)]
pub struct Link {
    tap: Arc<File>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tap,
    /// Keeps packets apart as a tap does and knows no offloads.
    #[cfg(any(test, fuzzing))]
    Socket,
}

impl Link {
    /// Takes a tap, which is made non-blocking, and checks that it is what a machine needs.
    pub fn new(tap: File) -> Result<Link, LinkError> {
        sys::tap::inspect(tap.as_fd()).map_err(LinkError::Tap)?;
        Link::with(tap, Kind::Tap)
    }

    /// A packet socket in place of a tap.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn socket(socket: File) -> Result<Link, LinkError> {
        Link::with(socket, Kind::Socket)
    }

    fn with(tap: File, kind: Kind) -> Result<Link, LinkError> {
        let set = || {
            let flags = OFlag::from_bits_retain(fcntl(&tap, FcntlArg::F_GETFL)?);
            fcntl(&tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
        };
        set().map_err(|cause| LinkError::NonBlocking(cause.into()))?;
        Ok(Link { tap: Arc::new(tap), kind })
    }

    /// Tells the kernel what the guest finishes itself.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self.kind {
            Kind::Tap => sys::tap::set_offloads(self.tap.as_fd(), offloads),
            #[cfg(any(test, fuzzing))]
            Kind::Socket => Ok(()),
        }
    }

    /// The next packet with its header; `WouldBlock` when there is none.
    pub(super) fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        (&*self.tap).read(packet)
    }

    /// Whether the interface has been taken away.
    pub(super) fn has_gone(&self) -> bool {
        let mut asked = [PollFd::new(self.tap.as_fd(), PollFlags::empty())];
        // Errors are told unasked; a poll that fails tells nothing.
        matches!(poll(&mut asked, PollTimeout::ZERO), Ok(1))
    }

    /// Sends one packet with its header.
    pub(super) fn send(
        &self,
        sender: &mut Sender,
        header: &[u8],
        memory: &Ram,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
    ) -> Result<(), SendError> {
        sender.send(&*self.tap, header, memory, pieces).map(|_| ())
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.tap.as_raw_fd()
    }
}
