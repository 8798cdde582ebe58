//! Whether a file is final: nobody has it open for writing, or mapped so that it can be written through the mapping.
//! The kernel gives a read lease only then (fcntl(2), "Leases"). Where nobody else can open the file, it stays so.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Whether nobody can write to `file` by what is open now. It is open for reading only, and belongs to the caller's user.
/// Fails where the file system knows no leases.
pub fn is_final(file: &File) -> io::Result<bool> {
    match lease(file, libc::F_RDLCK) {
        // Given back at once: who opens the file to write meanwhile would be held up, and the holder sent a signal.
        Ok(()) => lease(file, libc::F_UNLCK).map(|()| true),
        Err(cause) if cause.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(false),
        Err(cause) => Err(cause),
    }
}

fn lease(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call, and the argument of F_SETLEASE is a number.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_final_when_the_last_who_could_write_has_let_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(!is_final(&reader).unwrap());
        let twin = writer.try_clone().unwrap();
        drop(writer);
        assert!(!is_final(&reader).unwrap(), "another name for the same opening");
        drop(twin);
        assert!(is_final(&reader).unwrap());
        // Asking changes nothing: it can be opened again.
        drop(File::options().write(true).open(&path).unwrap());
        assert!(is_final(&reader).unwrap());
    }
}
