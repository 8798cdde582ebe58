//! Puts an initial RAM disk as high as the kernel can take it, out of the way of the kernel itself. The
//! content is not looked at.
use std::fs::File;

use memory::{Ram, layout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::kernel::Kernel;
use super::{Error, Image};

const PAGE_BYTES: u64 = 4096;

/// An initial RAM disk in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Loads it; `None` when the file is empty.
pub(super) fn load(ram: &Ram, file: &File, kernel: &Kernel) -> Result<Option<Initrd>, Error> {
    let read = |cause| Error::Read { what: "initrd", cause };
    let mut image = Image::new(file).map_err(read)?;
    let bytes = image.bytes();
    if bytes == 0 {
        return Ok(None);
    }
    let below = ram.find_region(GuestAddress(0)).map_or(0, |region| region.len());
    let Some(start) = place(bytes, below, kernel) else {
        let memory_bytes = ram.iter().map(|region| region.len()).sum();
        return Err(Error::InitrdTooLarge { initrd_bytes: bytes, kernel_end: kernel.end, memory_bytes });
    };
    // `place` found room, so the length fits a `usize` here.
    let length = usize::try_from(bytes).map_err(|_| Error::Write("initrd"))?;
    let read = |error| Error::Read { what: "initrd", cause: std::io::Error::other(error) };
    ram.read_exact_volatile_from(GuestAddress(start), &mut image, length).map_err(read)?;
    Ok(Some(Initrd { start, bytes }))
}

/// The highest whole page where `bytes` end below what RAM and kernel allow and start above the kernel.
fn place(bytes: u64, ram_below_4g: u64, kernel: &Kernel) -> Option<u64> {
    let end = ram_below_4g.min(kernel.initrd_last.saturating_add(1));
    let start = end.checked_sub(bytes)? & !(PAGE_BYTES - 1);
    (start >= kernel.end.max(layout::HIGH_RAM_START)).then_some(start)
}
