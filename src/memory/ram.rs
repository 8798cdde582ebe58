//! Guest RAM in one sealed memfd, mapped shared. Slots, dirty tracking and page faults are other matters.
//! `vmm` builds it once per machine; everyone else holds it in an `Arc`.
use std::io;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use crate::layout;

/// The memory of one machine.
pub type Ram = GuestMemoryMmap<()>;

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
    /// Pages could not be returned to the host.
    #[error("cannot return guest memory to the host")]
    Discard(#[source] io::Error),
}

/// Makes the RAM of a machine: one memfd, one mapping per range of [`layout::ram_ranges`], nothing
/// populated. The mappings are left out of core dumps, which would hold a customer's memory.
pub fn new(memory_bytes: u64) -> Result<Arc<Ram>, Error> {
    let file = sys::memfd::create("guest-ram", memory_bytes)
        .map_err(|cause| Error::File { bytes: memory_bytes, cause })?;
    let file = Arc::new(file);
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, bytes) in layout::ram_ranges(memory_bytes) {
        let size = usize::try_from(bytes).map_err(|_| Error::Size(bytes))?;
        let mapping: MmapRegion<()> = MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|cause| Error::Map { bytes, cause })?;
        advise(&mapping);
        regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(Error::Size(bytes))?);
        offset += bytes;
    }
    Ok(Arc::new(Ram::from_regions(regions).map_err(Error::Join)?))
}

/// Both pieces of advice only help: a kernel without them runs the machine all the same.
fn advise(mapping: &MmapRegion<()>) {
    for advice in [libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE] {
        // SAFETY: the range is the mapping just made and still owned by `mapping`; neither advice changes
        // what the memory holds or whether it is mapped.
        let _ = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    }
}

/// Returns a range of guest memory to the host; the guest reads zeroes there until it writes again. The
/// range may be anything the guest says: outside RAM, or across a region's edge, it is refused.
pub fn discard(ram: &Ram, start: GuestAddress, bytes: u64) -> Result<(), Error> {
    let refused = Error::Range { start: start.0, bytes };
    let Some(region) = ram.find_region(start) else { return Err(refused) };
    let inside = start.0 - region.start_addr().0;
    let Some(file) = region.file_offset() else { return Err(refused) };
    if bytes == 0 || bytes > region.len() - inside {
        return Err(refused);
    }
    sys::memfd::punch_hole(file.file(), file.start() + inside, bytes).map_err(Error::Discard)
}

#[cfg(test)]
mod tests;
