//! Unix seqpacket sockets that carry descriptors (unix(7), SCM_RIGHTS). A packet is whole or an error: what
//! does not fit is refused, never cut. `wire` puts JSON on top.
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect,
    listen, sendmsg, socket, socketpair,
};

/// The kernel's bound on descriptors in one packet (SCM_MAX_FD in include/net/scm.h).
pub const DESCRIPTORS_MAX: usize = 253;

/// Control data for as many descriptors as there can be, in words, which keeps it aligned.
const CONTROL_WORDS: usize = {
    // SAFETY: arithmetic only.
    let bytes = unsafe { libc::CMSG_SPACE((DESCRIPTORS_MAX * size_of::<RawFd>()) as u32) };
    (bytes as usize).div_ceil(size_of::<u64>())
};

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

    /// Length of the packet that [`Socket::receive`] takes next, 0 when the peer has closed. Takes nothing.
    pub fn next_length(&self) -> io::Result<usize> {
        // SAFETY: a msghdr is numbers and pointers, for all of which zero is a value: no room for data or descriptors.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        let flags = libc::MSG_PEEK | libc::MSG_TRUNC;
        // SAFETY: `header` leads nowhere, so nothing is written but its own fields.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, flags) };
        usize::try_from(length).map_err(|_| io::Error::last_os_error())
    }

    /// Receives one packet into `data`; returns its length and descriptors, which are closed on exec. Length 0
    /// means that the peer has closed. A packet longer than `data` or with more than `descriptors_max`
    /// descriptors is dropped whole, its descriptors closed, and reported as `InvalidData`.
    pub fn receive(&self, data: &mut [u8], descriptors_max: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut control = [0_u64; CONTROL_WORDS];
        let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        // SAFETY: a msghdr is numbers and pointers, for all of which zero is a value.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        // SAFETY: `header` leads to `data` and `control` with their own lengths; both outlive the call.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        // Taken before anything else is looked at: a process that can hold no more descriptors gets some of them,
        // and only their owner closes those.
        let descriptors = take_descriptors(&header);
        let cut = libc::MSG_TRUNC | libc::MSG_CTRUNC;
        if header.msg_flags & cut != 0 || descriptors.len() > descriptors_max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "packet or descriptors over the limit"));
        }
        Ok((length, descriptors))
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

/// Owns every descriptor that recvmsg(2) has put into the control data of `header`.
fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: `header` describes control data that recvmsg has written and that is still in place.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: the macros of cmsg(3) give null or a whole, aligned header inside the control data.
    while let Some(message) = unsafe { at.as_ref() } {
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: arithmetic only.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = message.cmsg_len.saturating_sub(empty) / size_of::<RawFd>();
            // SAFETY: arithmetic only; the data follows the header.
            let data = unsafe { libc::CMSG_DATA(at) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: the message's length says that it holds `count` numbers.
                let number = unsafe { data.add(index) };
                // SAFETY: as above; the number need not be aligned.
                let raw = unsafe { number.read_unaligned() };
                // SAFETY: the kernel installed `raw` for this message, and nothing else knows its number.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        // SAFETY: as for the first.
        at = unsafe { libc::CMSG_NXTHDR(header, at) };
    }
    descriptors
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
