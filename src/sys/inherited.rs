//! Descriptors a process was started with. Each can be taken once, so that nobody else owns what the taker
//! closes. Called first thing by the VMM's modes, before any descriptor of their own exists.
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, fcntl};

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

/// Has the kernel make room for so many descriptors at once. What it makes later it makes by doubling, and of a process with
/// threads everybody who opens something then waits until each processor has passed a quiet state (`expand_fdtable` in Linux's
/// fs/file.c): some milliseconds. `open` is any descriptor. Fails where the limit of open files is lower.
pub fn make_room(open: &impl AsFd, count: RawFd) -> io::Result<()> {
    let last = fcntl(open, FcntlArg::F_DUPFD_CLOEXEC(count - 1))?;
    Ok(nix::unistd::close(last)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_that_was_made_stays_when_it_is_not_used() {
        let null = std::fs::File::open("/dev/null").unwrap();
        make_room(&null, 700).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        assert!(size.trim().parse::<u32>().unwrap() >= 700, "{size}");
        assert!(make_room(&null, RawFd::MAX).is_err());
    }
}
