//! Memory as a file (memfd_create(2)): of fixed size, sealed, and returned to the host piece by piece. It
//! does not map anything. `memory` builds guest RAM on it.
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};

/// Makes a zeroed memfd of `bytes` bytes that nobody can shrink, grow or seal further, whoever holds it: a
/// mapping of it can therefore never meet SIGBUS for lack of file.
pub fn create(name: &str, bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Makes a memfd of these bytes, which nobody can change any more, whoever holds it.
pub fn constant(name: &str, content: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all_at(content, 0)?;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(CONSTANT))?;
    Ok(file)
}

/// Whether a file is one of those.
pub fn is_constant(file: &File) -> bool {
    let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS);
    seals.is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(CONSTANT))
}

const CONSTANT: SealFlag = SealFlag::F_SEAL_WRITE
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// Whether a file is a memfd that nobody can shrink or grow.
pub fn is_sealed(file: &File) -> bool {
    let wanted = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS);
    seals.is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(wanted))
}

/// The first range at or after `from` that may hold something else than zeroes, as start and end in bytes; nothing
/// when there is only a hole up to the end. A file system that knows no holes tells one range.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    while let Some(start) = first_data(file, from)? {
        // Whoever punches a hole there in between moves the data on, and it is looked for again.
        if let Some(end) = seek(file, start, Whence::SeekHole)?.filter(|end| *end > start) {
            return Ok(Some((start, end)));
        }
    }
    Ok(None)
}

/// The beginning of that range. Its end costs a look at every page of it.
pub fn first_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, Whence::SeekData)
}

fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    match lseek(file.as_fd(), from, whence) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        // There is none.
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives the pages of a range back to the host; they read as zero from then on. Parts of pages at the edges
/// are zeroed in place. The file keeps its length.
pub fn punch_hole(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let out_of_range = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = i64::try_from(offset).map_err(out_of_range)?;
    let bytes = i64::try_from(bytes).map_err(out_of_range)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.as_fd(), flags, offset, bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests;
