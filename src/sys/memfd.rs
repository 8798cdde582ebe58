//! Memory as a file (memfd_create(2)): of fixed size, sealed, and returned to the host piece by piece. It
//! does not map anything. `memory` builds guest RAM on it.
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Makes a zeroed memfd of `bytes` bytes that nobody can shrink, grow or seal further, whoever holds it: a
/// mapping of it can therefore never meet SIGBUS for lack of file.
pub fn create(name: &str, bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
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
