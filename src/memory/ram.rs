//! Guest RAM: a sealed memfd of its own mapped shared, or somebody else's file mapped privately, until it is settled
//! (`settling`). Slots and dirty tracking are other matters.
//! `vmm` builds it once per machine; everyone else holds it in an `Arc`.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use crate::extent::Extent;
use crate::layout;
use crate::marks::{self, Marks};

/// The memory of one machine.
pub type Ram = GuestMemoryMmap<Marks>;

pub(crate) type Region = GuestRegionMmap<Marks>;

/// Why guest memory cannot be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is not one that can be mapped.
    #[error("{0} bytes of guest memory cannot be laid out")]
    Size(u64),
    /// The memfd failed.
    #[error("cannot make a memory file of {bytes} bytes")]
    File {
        /// The size asked for.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A file does not hold this machine's memory.
    #[error("the memory file has {found} bytes, the machine has {wanted} of memory")]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes of memory.
        wanted: u64,
    },
    /// A memory file can be made shorter by others who hold it, and the process would die of that.
    #[error("the memory file is not sealed against shrinking and growing")]
    NotSealed,
    /// The mapping failed.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// The size of the region.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        cause: MmapRegionError,
    },
    /// The regions do not form an address space.
    #[error("cannot join the regions of guest memory")]
    Join(#[source] GuestRegionCollectionError),
    /// A range is not wholly inside RAM.
    #[error("{bytes} bytes at {start:#x} are not guest memory")]
    Range {
        /// The first address.
        start: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// Memory could not be read or written.
    #[error("cannot copy guest memory")]
    Copy(#[source] io::Error),
    /// Memory cannot be protected against writes.
    #[error("cannot protect guest memory against writes")]
    Protect(#[source] io::Error),
    /// Nobody can be made to wait for pages that are still to come.
    #[error("cannot wait for pages of guest memory, or put them where they are waited for")]
    Missing(#[source] io::Error),
    /// Pages could not be returned to the host.
    #[error("cannot return guest memory to the host")]
    Discard(#[source] io::Error),
}

/// Makes the RAM of a machine: one memfd, one mapping per range of [`layout::ram_ranges`], nothing
/// populated. The mappings are left out of core dumps, which would hold a customer's memory.
pub fn new(memory_bytes: u64) -> Result<Arc<Ram>, Error> {
    build(memory_bytes, Backing::Fresh)
}

/// Where a machine's memory comes from. A file holds the ranges of [`layout::ram_ranges`] one after the other.
#[derive(Debug)]
pub enum Backing {
    /// A new memfd, all zeroes.
    Fresh,
    /// A sealed memfd that another process had, taken over as it is: what is written here is in it.
    Adopted(File),
    /// Any file. What is written here stays here; pages that are not are the file's, which must not change.
    Private(File),
}

/// Makes the RAM of a machine with what is in it.
pub fn build(memory_bytes: u64, backing: Backing) -> Result<Arc<Ram>, Error> {
    let file = match backing {
        Backing::Fresh => fresh_file(memory_bytes)?,
        Backing::Adopted(file) => {
            check_length(&file, memory_bytes)?;
            if !sys::memfd::is_sealed(&file) {
                return Err(Error::NotSealed);
            }
            file
        }
        Backing::Private(file) => return replace(map(memory_bytes, None)?, file),
    };
    map(memory_bytes, Some(file))
}

/// A memory file for so many bytes.
pub(crate) fn fresh_file(memory_bytes: u64) -> Result<File, Error> {
    let made = sys::memfd::create("guest-ram", memory_bytes);
    made.map_err(|cause| Error::File { bytes: memory_bytes, cause })
}

/// Maps a memory file; without one there are addresses that nobody has used yet.
fn map(memory_bytes: u64, file: Option<File>) -> Result<Arc<Ram>, Error> {
    let file = file.map(Arc::new);
    let sharing = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, bytes) in layout::ram_ranges(memory_bytes) {
        let size = usize::try_from(bytes).map_err(|_| Error::Size(bytes))?;
        let mut builder = MmapRegionBuilder::new_with_bitmap(size, Marks::with_len(size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | libc::MAP_NORESERVE);
        if let Some(file) = &file {
            builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
        }
        let mapping: MmapRegion<Marks> = builder.build().map_err(|cause| Error::Map { bytes, cause })?;
        advise(&mapping);
        regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(Error::Size(bytes))?);
        offset += bytes;
    }
    Ok(Arc::new(Ram::from_regions(regions).map_err(Error::Join)?))
}

/// Makes RAM with what is in a file, as [`Backing::Private`] says, at the addresses of memory that nobody has used: a VM
/// that knows these needs not be told others. Nobody is to use `unused` from here on. After a failure neither can be used.
/// The file is held by the mapping alone, so that it is let go of piece by piece as memory is settled.
pub fn replace(unused: Arc<Ram>, file: File) -> Result<Arc<Ram>, Error> {
    check_length(&file, unused.iter().map(|region| region.len()).sum())?;
    // Where a part could not be mapped anew there is nothing any more, and whatever the process maps next may come to lie
    // there: the mappings are never undone then.
    let unused = std::mem::ManuallyDrop::new(unused);
    let (mut offset, mut regions) = (0, Vec::new());
    for old in unused.iter() {
        let (start, size) = (old.as_ptr(), old.size());
        map_over(old, (0, old.len()), libc::MAP_PRIVATE, (&file, offset))?;
        let marks = Marks::within(size, Arc::clone(&unused));
        let builder = MmapRegionBuilder::new_with_bitmap(size, marks)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        // SAFETY: the range was just mapped whole with these flags, and stays so until `unused` is dropped, which the
        // region's marks hold.
        let mapping = unsafe { builder.with_raw_mmap_pointer(start) }.build();
        let mapping = mapping.map_err(|cause| Error::Map { bytes: old.len(), cause })?;
        advise(&mapping);
        regions.push(GuestRegionMmap::new(mapping, old.start_addr()).ok_or(Error::Size(old.len()))?);
        offset += old.len();
    }
    let ram = Arc::new(Ram::from_regions(regions).map_err(Error::Join)?);
    drop(std::mem::ManuallyDrop::into_inner(unused));
    Ok(ram)
}

/// Puts a part of another file in the place of that part of memory, as [`Backing::Private`] says. Only for memory that is
/// mapped privately; the file has the bytes at the offset they have in memory, whole pages, and never becomes shorter. After a
/// failure the memory is not to be used.
pub fn lay_over(ram: &Arc<Ram>, part: Extent, file: &File) -> Result<(), Error> {
    let Extent { offset, bytes } = part;
    let found = file.metadata().map_err(|cause| Error::File { bytes, cause })?.len();
    let end = offset.checked_add(bytes).filter(|end| *end <= found);
    let end = end.ok_or(Error::Length { found, wanted: offset.saturating_add(bytes) })?;
    let (mut before, mut done) = (0, 0);
    for region in ram.iter() {
        let (from, to) = (offset.max(before), end.min(before + region.len()));
        if from < to && own(region).is_none() {
            map_over(region, (from - before, to - from), libc::MAP_PRIVATE, (file, from)).inspect_err(
                |_| {
                    // A part may be unmapped, and the process have something else there before long.
                    std::mem::forget(Arc::clone(ram));
                },
            )?;
            done += to - from;
        }
        before += region.len();
    }
    if done == bytes { Ok(()) } else { Err(Error::Range { start: offset, bytes }) }
}

/// Maps a file from an offset on over a part of a region, from the byte `inside` on.
pub(crate) fn map_over(
    region: &Region,
    (inside, bytes): (u64, u64),
    sharing: libc::c_int,
    (file, offset): (&File, u64),
) -> Result<(), Error> {
    if inside.checked_add(bytes).is_none_or(|end| end > region.len()) {
        return Err(Error::Range { start: region.start_addr().0.saturating_add(inside), bytes });
    }
    let failed = |cause| Error::Map { bytes, cause: MmapRegionError::Mmap(cause) };
    let flags = sharing | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let offset = libc::off_t::try_from(offset).map_err(|cause| failed(io::Error::other(cause)))?;
    let (start, size) = (region.as_ptr().wrapping_add(inside as usize), bytes as usize);
    // SAFETY: the range was checked to lie in the one mapping that `region` owns; it stays readable and writable, and whoever
    // points into it reads other bytes, which guest memory does at any time.
    let mapped = unsafe { libc::mmap(start.cast(), size, protection, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    // What was said of the memory before went with it.
    // SAFETY: the range was just mapped; the advice changes nothing that the program can see.
    let _ = unsafe { libc::madvise(mapped, size, libc::MADV_DONTDUMP) };
    Ok(())
}

/// The kernel has refused to map something else over memory that a guest uses. It may have unmapped what was there, which
/// nothing can prove once other threads map things: the guest would see, and write to, whatever comes to lie there.
#[expect(clippy::panic, reason = "nothing that uses this memory can go on")]
pub(crate) fn lost(cause: &dyn std::error::Error) -> ! {
    panic!("a part of guest memory may be gone: {cause} ({:?})", cause.source());
}

/// The memory file that a region lies in from its beginning on, and how many of its bytes do: all of one that never was
/// anything else, and of one that was mapped privately what has been settled.
pub(crate) fn own(region: &Region) -> Option<(&FileOffset, u64)> {
    // Of what is mapped privately no region holds a file.
    region.file_offset().map(|file| (file, region.len())).or_else(|| marks::own(region))
}

/// A descriptor of the memory itself, for another process that is to go on with it. Nothing when some of it is private to this
/// one.
pub fn handle(ram: &Ram) -> Result<Option<File>, Error> {
    let mut found = None;
    for region in ram.iter() {
        let Some((offset, bytes)) = own(region) else { return Ok(None) };
        if bytes < region.len() {
            return Ok(None);
        }
        found = Some(offset);
    }
    let copied = found.map(|offset| offset.file().try_clone()).transpose();
    copied.map_err(|cause| Error::File { bytes: ram.iter().map(|region| region.len()).sum(), cause })
}

fn check_length(file: &File, wanted: u64) -> Result<(), Error> {
    let found = file.metadata().map_err(|cause| Error::File { bytes: wanted, cause })?.len();
    if found == wanted { Ok(()) } else { Err(Error::Length { found, wanted }) }
}

/// Both pieces of advice only help: a kernel without them runs the machine all the same.
pub(crate) fn advise<B: Bitmap>(mapping: &MmapRegion<B>) {
    advise_part(mapping, 0, mapping.size());
}

/// The same of a part of a mapping.
pub(crate) fn advise_part<B: Bitmap>(mapping: &MmapRegion<B>, inside: usize, bytes: usize) {
    if inside.checked_add(bytes).is_none_or(|end| end > mapping.size()) {
        return;
    }
    for advice in [libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE] {
        // SAFETY: the range was checked to lie in the mapping, which is owned by `mapping`; neither advice changes
        // what the memory holds or whether it is mapped.
        let _ = unsafe { libc::madvise(mapping.as_ptr().wrapping_add(inside).cast(), bytes, advice) };
    }
}

/// Whether the kernel may make huge pages of memory, which fills what is missing with zeroes.
pub(crate) fn allow_huge_pages(ram: &Ram, allowed: bool) {
    let advice = if allowed { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    for region in ram.iter() {
        // SAFETY: the range is the region's own mapping; the advice changes nothing that the program can see.
        let _ = unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
    }
}

/// Returns a range of guest memory to the host; the guest reads zeroes there until it writes again. The
/// range may be anything the guest says: outside RAM, or across a region's edge, it is refused.
pub fn discard(ram: &Ram, start: GuestAddress, bytes: u64) -> Result<(), Error> {
    let refused = Error::Range { start: start.0, bytes };
    let Some(region) = ram.find_region(start) else { return Err(refused) };
    let inside = start.0 - region.start_addr().0;
    if bytes == 0 || bytes > region.len() - inside {
        return Err(refused);
    }
    let held = marks::held(region);
    if *held {
        return Err(Error::Discard(io::ErrorKind::ResourceBusy.into()));
    }
    // What lies in a memory file of its own comes first.
    let settled = own(region).map(|(file, own_bytes)| (file, bytes.min(own_bytes.saturating_sub(inside))));
    let own_bytes = settled.map_or(0, |(_, bytes)| bytes);
    let mut done = match settled {
        Some((file, own_bytes)) if own_bytes > 0 => {
            sys::memfd::punch_hole(file.file(), file.start() + inside, own_bytes)
        }
        _ => Ok(()),
    };
    if own_bytes < bytes {
        done = done.and(renew(region, inside + own_bytes, bytes - own_bytes));
    }
    // Also after a failure: a part may be zero already. Who copies memory has to see that it is.
    marks::mark(region, inside, bytes);
    done.map_err(Error::Discard)
}

/// Least piece of a private mapping that is given back: what Linux reports free at once. Each makes the kernel keep
/// another mapping, of which a process has 65 530.
const RENEW_BYTES_MIN: u64 = 2 << 20;

/// Most pieces that are given back in one process.
const RENEWALS_MAX: u32 = 16_384;

static RENEWALS: AtomicU32 = AtomicU32::new(0);

/// Puts fresh zeroes in the place of a part of a private mapping. The pages behind it are the file's, which others use.
fn renew(region: &Region, inside: u64, bytes: u64) -> io::Result<()> {
    let is_whole = inside.is_multiple_of(4096) && bytes.is_multiple_of(4096);
    if !is_whole || bytes < RENEW_BYTES_MIN || RENEWALS.load(Ordering::Relaxed) >= RENEWALS_MAX {
        return Err(io::ErrorKind::Unsupported.into());
    }
    RENEWALS.fetch_add(1, Ordering::Relaxed);
    let (start, size) = (region.as_ptr().wrapping_add(inside as usize), bytes as usize);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: `inside` and `bytes` were checked to lie in the region, which is one mapping that `region` owns and
    // unmaps as a whole; the range stays readable and writable, and whoever points into it reads other bytes, which
    // guest memory does at any time.
    let renewed = unsafe { libc::mmap(start.cast(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if renewed == libc::MAP_FAILED {
        lost(&io::Error::last_os_error());
    }
    // SAFETY: the range was just mapped; the advice changes nothing that the program can see.
    let _ = unsafe { libc::madvise(renewed, size, libc::MADV_DONTDUMP) };
    Ok(())
}

#[cfg(test)]
mod tests;
