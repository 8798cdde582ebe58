//! Descriptors a process was started with. Each can be taken once, so that nobody else owns what the taker
//! closes. Called first thing by the VMM's modes, before any descriptor of their own exists.
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// Numbers that can be taken are below this.
pub const NUMBER_MAX: RawFd = 31;

static TAKEN: AtomicU32 = AtomicU32::new(0);

/// Takes over the descriptor with this number, closed on exec from then on. Fails when the number was taken
/// before, is standard input, output or error, or is not open.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
    if !(3..=NUMBER_MAX).contains(&number) {
        return Err(invalid("no such descriptor is inherited"));
    }
    let bit = 1 << number;
    if TAKEN.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
        return Err(invalid("the inherited descriptor was taken before"));
    }
    // SAFETY: F_SETFD on any number changes no memory; a number that is not open is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open (checked above). It came from the process that started this one, and the
    // bit makes sure that this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
