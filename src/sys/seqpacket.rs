//! Unix seqpacket sockets that carry descriptors (unix(7), SCM_RIGHTS). A packet is whole or an error: what
//! does not fit is refused, never cut. `wire` puts JSON on top.
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, listen, recvmsg, sendmsg, socket, socketpair,
};

/// The kernel's bound on descriptors in one packet (SCM_MAX_FD in include/net/scm.h).
pub const DESCRIPTORS_MAX: usize = 253;

/// A connected seqpacket socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// A listening seqpacket socket.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Socket {
    /// Two sockets connected to each other, both closed on exec.
    pub fn pair() -> io::Result<(Socket, Socket)> {
        let (one, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Socket(one), Socket(other)))
    }

    /// Connects to the listener at `path`.
    pub fn connect(path: &Path) -> io::Result<Socket> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Socket(fd))
    }

    /// Makes sends and receives answer `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        set_nonblocking(self.0.as_fd())
    }

    /// Sends one packet. Fails with `InvalidInput` when there are more descriptors than the kernel passes, and
    /// with `BrokenPipe` (never a signal) when the peer has gone.
    pub fn send(&self, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one packet"));
        }
        let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(data)], control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Receives one packet into `data`; returns its length and descriptors, which are closed on exec. Length 0
    /// means that the peer has closed. A packet longer than `data` or with more than `descriptors_max`
    /// descriptors is dropped whole, its descriptors closed, and reported as `InvalidData`.
    pub fn receive(&self, data: &mut [u8], descriptors_max: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let mut slices = [IoSliceMut::new(data)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let mut descriptors = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                for fd in raw {
                    // SAFETY: the kernel installed `fd` for this message, and nothing else knows its number.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
        if received.flags.intersects(cut) || descriptors.len() > descriptors_max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "packet or descriptors over the limit"));
        }
        Ok((received.bytes, descriptors))
    }
}

impl Listener {
    /// Binds to `path`, which must not exist, and listens. Closed on exec.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        // A daemon that restarts and a person who looks: more than a handful at once are not ours.
        listen(&fd, Backlog::new(8)?)?;
        Ok(Listener(fd))
    }

    /// Makes `accept` answer `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        set_nonblocking(self.0.as_fd())
    }

    /// Takes the next connection.
    pub fn accept(&self) -> io::Result<Socket> {
        let raw = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: `accept4` returned a new descriptor that nothing else knows.
        Ok(Socket(unsafe { OwnedFd::from_raw_fd(raw) }))
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Socket {
    /// Takes over a descriptor that is a connected seqpacket socket; anything else fails at first use.
    fn from(fd: OwnedFd) -> Socket {
        Socket(fd)
    }
}

impl From<OwnedFd> for Listener {
    /// Takes over a descriptor that is a listening seqpacket socket; anything else fails at first use.
    fn from(fd: OwnedFd) -> Listener {
        Listener(fd)
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> OwnedFd {
        listener.0
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> OwnedFd {
        socket.0
    }
}
