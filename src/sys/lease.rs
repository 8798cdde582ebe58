//! Whether a file is final: nobody has it open for writing, or mapped so that it can be written through the mapping; and
//! whether it is unused: nobody else has it open or mapped at all. The kernel gives a read lease only in the first case, a
//! write lease only in the second (fcntl(2), "Leases"). Where nobody else can open the file, it stays so.
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

    #[test]
    fn a_file_is_unused_when_the_last_who_had_it_open_or_mapped_has_let_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, [1; 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert!(is_unused(&file).unwrap());
        let reader = File::open(&path).unwrap();
        assert!(!is_unused(&file).unwrap());
        // SAFETY: a new mapping of a file that keeps its length; it is unmapped below.
        let mapped = unsafe {
            let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
            libc::mmap(std::ptr::null_mut(), 4096, protection, flags, reader.as_raw_fd(), 0)
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        drop(reader);
        assert!(!is_unused(&file).unwrap(), "it is mapped");
        // SAFETY: the mapping made above, of which nobody has a reference.
        unsafe { libc::munmap(mapped, 4096) };
        assert!(is_unused(&file).unwrap());
    }

    /// Asked by one thread while others open the file: the signal that tells of them ends nobody.
    #[test]
    fn who_opens_a_file_meanwhile_is_not_hurt_and_hurts_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"x").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::thread::scope(|scope| {
            let opener = scope.spawn(|| (0..20_000).for_each(|_| drop(File::open(&path).unwrap())));
            while !opener.is_finished() {
                is_unused(&file).unwrap();
            }
        });
    }
}
