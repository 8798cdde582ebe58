//! Whether a file is final: nobody has it open for writing, or mapped so that it can be written through the mapping; and
//! whether it is unused: nobody else has it open or mapped at all. The kernel gives a read lease only in the first case, a
//! write lease only in the second (fcntl(2), "Leases"). Where nobody else can open the file, it stays so. A process that is being
//! started has what its parent had open until it executes its program, and counts: who expects a yes asks again for a while.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Whether nobody can write to `file` by what is open now. It is open for reading only, and belongs to the caller's user.
/// Fails where the file system knows no leases.
pub fn is_final(file: &File) -> io::Result<bool> {
    is_given(file, libc::F_RDLCK)
}

/// Whether nobody but the caller has `file` open, in this process or another, or mapped. It belongs to the caller's user. Fails
/// where the file system knows no leases.
pub fn is_unused(file: &File) -> io::Result<bool> {
    is_given(file, libc::F_WRLCK)
}

fn is_given(file: &File, kind: libc::c_int) -> io::Result<bool> {
    // Whoever opens the file while the lease lasts is held up, and the holder sent a signal: one that nobody heeds, where the
    // usual one would end the process.
    // SAFETY: the descriptor is open for the length of the call, and the argument of F_SETSIG is a number.
    let set = unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) };
    Errno::result(set)?;
    match lease(file, kind) {
        // Given back at once.
        Ok(()) => lease(file, libc::F_UNLCK).map(|()| true),
        Err(cause) if cause.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(false),
        Err(cause) => Err(cause),
    }
}

/// fcntl.h of Linux; the library has no name for it.
const F_SETSIG: libc::c_int = 10;

fn lease(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call, and the argument of F_SETLEASE is a number.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}
