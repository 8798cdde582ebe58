//! Files below a directory, opened so that nobody who swaps names meanwhile can lead us elsewhere: no symbolic link
//! on the way, no way out, no file that has another name or another owner. It makes no directories.
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

/// What the file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading, whatever other names it has: of what nobody writes to any more.
    ReadLinked,
    /// Reading and writing.
    ReadWrite,
    /// Writing at the end; made for the owner alone when there is none.
    Append,
}

/// Opens the file `path`, relative to `directory`; the way to `directory` itself is trusted. Never waits for the other
/// end of a pipe. Fails with `ELOOP` at a symbolic link, with `EXDEV` when the path leads out, and with
/// `PermissionDenied` for a file that is not regular, has more than one name where that is not asked for, or belongs to somebody else
/// than the caller.
pub fn open(directory: &Path, path: &Path, access: Access) -> io::Result<File> {
    let flags = libc::O_DIRECTORY | libc::O_PATH;
    let directory = File::options().read(true).custom_flags(flags).open(directory)?;
    let flags = match access {
        Access::Read | Access::ReadLinked => OFlag::O_RDONLY,
        Access::ReadWrite => OFlag::O_RDWR,
        Access::Append => OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT,
    };
    let mode = if access == Access::Append { Mode::S_IRUSR | Mode::S_IWUSR } else { Mode::empty() };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let mut tries = RACES_MAX;
    let file = loop {
        match openat2(&directory, path, how) {
            // A rename elsewhere on the way (openat2(2), "EAGAIN").
            Err(Errno::EAGAIN) if tries > 0 => tries -= 1,
            result => break File::from(result?),
        }
    };
    // Looked at after it is open: from here on it is this file, whatever its name comes to mean.
    let found = file.metadata()?;
    let is_alone = found.nlink() == 1 || access == Access::ReadLinked;
    if !found.is_file() || !is_alone || found.uid() != nix::unistd::geteuid().as_raw() {
        let text = "the file is not an ordinary one of ours with a single name";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(file)
}

/// How often a rename on the way is waited out; the kernel's own advice is to try again a few times.
const RACES_MAX: u32 = 128;

#[cfg(test)]
mod tests;
