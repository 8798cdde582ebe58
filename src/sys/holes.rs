//! What a file system has given to a file and nobody has written (`FS_IOC_FIEMAP`, Documentation/filesystems/fiemap.rst). It reads as
//! zeroes and counts as a hole for lseek(2), until a page of it is in the page cache: then it counts as data.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// include/uapi/linux/fiemap.h.
const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 1;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;

/// Extents of one call.
const EXTENTS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// The head alone is what the number's size counts: _IOWR('f', 11, struct fiemap).
const FS_IOC_FIEMAP: libc::Ioctl = 0xC020_660Bu32 as libc::Ioctl;

/// Gives back what was given to a file and never written, as a loss of power leaves it between the one and the other. Nobody writes to the
/// file meanwhile. A file system that tells no extents has none that outlive one.
pub fn clear_unwritten(file: &File) -> io::Result<()> {
    // What is only not written yet may be told as such, so it is looked again behind a flush; nearly always there is nothing.
    if !each_unwritten(file, 0, &mut |_, _| Ok(()))? {
        return Ok(());
    }
    each_unwritten(file, FIEMAP_FLAG_SYNC, &mut |offset, bytes| {
        crate::memfd::punch_hole(file, offset, bytes)
    })?;
    Ok(())
}

/// Calls with offset and length of each such range, in bytes; answers whether there was any.
fn each_unwritten(
    file: &File,
    flags: u32,
    found: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<bool> {
    let (length, mut start, mut any) = (file.metadata()?.len(), 0, false);
    while start < length {
        let mut map = Map {
            start,
            length: length - start,
            flags,
            mapped_extents: 0,
            extent_count: EXTENTS as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: `map` is a `struct fiemap` with room for as many extents as it says, which the kernel fills in.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
        match Errno::result(done) {
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => return Ok(false),
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        let extents = map.extents.get(..map.mapped_extents as usize).unwrap_or_default();
        let Some(last) = extents.last() else { break };
        for extent in extents.iter().filter(|extent| extent.flags & FIEMAP_EXTENT_UNWRITTEN != 0) {
            any = true;
            found(extent.logical, extent.length)?;
        }
        if last.flags & FIEMAP_EXTENT_LAST != 0 {
            break;
        }
        start = last.logical.saturating_add(last.length).max(start.saturating_add(1));
    }
    Ok(any)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

    use super::*;

    #[test]
    fn what_was_given_and_not_written_is_a_hole_again_and_what_was_written_stays() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1 << 20).unwrap();
        file.write_all_at(&[1; 65536], 0).unwrap();
        file.sync_all().unwrap();
        // Written, and not on the medium yet.
        file.write_all_at(&[2; 65536], 512 << 10).unwrap();
        file.write_all_at(&[3; 65536], 2 << 20).unwrap();
        clear_unwritten(&file).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let mut read = [0; 65536];
        for (offset, byte) in [(0, 1), (512 << 10, 2), (2 << 20, 3)] {
            file.read_exact_at(&mut read, offset).unwrap();
            assert!(read.iter().all(|found| *found == byte), "at {offset}");
        }
        let mut data = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = crate::memfd::next_data(&file, at).unwrap() {
            data.push((start, end - start));
            at = end;
        }
        assert_eq!(data, [(0, 65536), (512 << 10, 65536), (2 << 20, 65536)]);
        assert!(file.metadata().unwrap().blocks() * 512 < 4 * 65536);
        clear_unwritten(&file).unwrap();
    }
}
