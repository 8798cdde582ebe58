//! Processes held by descriptor (pidfd_open(2)), so that a number the kernel has given to somebody else is
//! never signalled. It starts nothing; `spawn` does.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use nix::sys::signal::Signal;

/// A process, alive or dead. Its descriptor becomes readable when the process has ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It called exit with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl PidFd {
    /// Opens a process by number; the caller must know that it has not been reaped since it was named.
    pub fn open(pid: i32) -> io::Result<PidFd> {
        // SAFETY: the call takes two integers and no memory.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let raw = i32::try_from(check(raw)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        // SAFETY: the kernel returned a new descriptor that nothing else knows.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(raw) }))
    }

    /// Sends a signal. A process that has ended is `NotFound`.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let (fd, signal) = (self.0.as_raw_fd(), signal as i32);
        // SAFETY: a null siginfo asks the kernel to fill it as kill(2) would; no memory is passed.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<u8>(), 0) };
        match check(result) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(io::ErrorKind::NotFound.into()),
            result => result.map(drop),
        }
    }

    /// Whether the process has ended, without reaping it. Works for processes that are nobody's children.
    pub fn has_ended(&self) -> io::Result<bool> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut polled, PollTimeout::ZERO)? > 0)
    }

    /// Reaps a child of the calling process; `None` while it lives. Fails with `ECHILD` for other processes.
    pub fn reap(&self) -> io::Result<Option<Ended>> {
        let reaped = reap(libc::P_PIDFD, self.0.as_raw_fd() as libc::id_t)?;
        Ok(reaped.map(|(_, ended)| ended))
    }
}

/// Reaps whichever child of the calling process has ended, and answers its number; `None` when none has, or there is none.
pub fn reap_any() -> io::Result<Option<(i32, Ended)>> {
    match reap(libc::P_ALL, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        reaped => reaped,
    }
}

fn reap(kind: libc::idtype_t, id: libc::id_t) -> io::Result<Option<(i32, Ended)>> {
    // SAFETY: `siginfo_t` is plain data for which zeros are valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG;
    // SAFETY: `info` is valid for writes and outlives the call.
    check(unsafe { libc::waitid(kind, id, &mut info, flags) }.into())?;
    // SAFETY: waitid succeeded, so the fields of a child's siginfo are set or still zero.
    let pid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok(match (pid, info.si_code) {
        (0, _) => None,
        (_, libc::CLD_EXITED) => Some((pid, Ended::Code(status))),
        _ => Some((pid, Ended::Signal(status))),
    })
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for PidFd {
    /// Takes over a descriptor that is a pidfd; anything else fails at first use.
    fn from(fd: OwnedFd) -> PidFd {
        PidFd(fd)
    }
}

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> OwnedFd {
        pidfd.0
    }
}
