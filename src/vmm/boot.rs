//! Puts a kernel, its initial RAM disk, its command line and the tables that describe the machine into guest
//! memory. Everything comes from descriptors and may be hostile; nothing runs here. `machine::build` calls it.
//!
//! ```text
//! kernel ─▶ initrd ─▶ ACPI tables ─▶ PVH start info  or  zero page and page tables ─▶ Start
//! ```
use std::fs::File;

use kvm::Start;
use memory::{Ram, layout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

mod acpi;
mod image;
mod initrd;
mod kernel;
mod linux64;
mod pvh;

use image::Image;
pub(crate) use linux64::write_page_tables;

/// What a machine boots.
pub(crate) struct Source<'a> {
    pub(crate) kernel: &'a File,
    pub(crate) initrd: Option<&'a File>,
    pub(crate) cmdline: &'a str,
    pub(crate) vcpus: u8,
}

/// Why a machine cannot boot what it was given. The text is for the operator who chose it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the kernel is neither an ELF program nor a bzImage; it starts with {0:02x?}")]
    Format([u8; 4]),
    #[error("the kernel is shorter than a kernel's header")]
    Short,
    #[error("cannot read the {what}")]
    Read {
        what: &'static str,
        #[source]
        cause: std::io::Error,
    },
    #[error("the kernel cannot be loaded: {0}; is the file whole, and does the machine have memory for it?")]
    Load(String),
    #[error(
        "the kernel is not a 64-bit one with boot protocol 2.12 or newer, which every x86-64 kernel since 3.8 is"
    )]
    NotLong,
    #[error("the kernel's entry {0:#x} is not in memory")]
    Entry(u64),
    #[error(
        "the initrd of {initrd_bytes} bytes does not fit beside a kernel that ends at {kernel_end:#x}; the machine has {memory_bytes} bytes of memory"
    )]
    InitrdTooLarge { initrd_bytes: u64, kernel_end: u64, memory_bytes: u64 },
    #[error("cannot write the {0} into guest memory")]
    Write(&'static str),
}

/// `mov dx, RESET_PORT; mov al, 1; out dx, al; 1: hlt; jmp 1b` in 16-bit code: what firmware would do.
const RESET_CODE: [u8; 9] = {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    [0xBA, low, high, 0xB0, 0x01, 0xEE, 0xF4, 0xEB, 0xFD]
};

/// Prepares memory; answers how the boot processor starts.
pub(crate) fn prepare(ram: &Ram, source: &Source<'_>) -> Result<Start, Error> {
    let kernel = kernel::load(ram, source.kernel)?;
    let initrd = match source.initrd {
        Some(file) => initrd::load(ram, file, &kernel)?,
        None => None,
    };
    let mut cmdline = source.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    put(ram, layout::CMDLINE, &cmdline, "command line")?;
    put(ram, layout::RESET_VECTOR, &RESET_CODE, "reset vector")?;
    renew_generation(ram)?;
    let rsdp = acpi::write(ram, source.vcpus)?;
    let parameters =
        Parameters { rsdp, cmdline_bytes: cmdline.len() as u64 - 1, initrd, map: memory_map(ram) };
    match kernel.entry {
        kernel::Entry::Pvh(entry) => pvh::prepare(ram, entry, &parameters),
        kernel::Entry::Long(entry) => linux64::prepare(ram, entry, kernel.header, &parameters),
    }
}

/// Gives the guest a generation id that no other has.
pub(crate) fn renew_generation(ram: &Ram) -> Result<(), Error> {
    let mut id = [0; 16];
    sys::random::fill(&mut id).map_err(|cause| Error::Read { what: "host's entropy", cause })?;
    put(ram, layout::GENERATION_ID, &id, "generation id")
}

/// What either boot protocol tells the kernel.
struct Parameters {
    rsdp: u64,
    cmdline_bytes: u64,
    initrd: Option<initrd::Initrd>,
    map: Vec<MapEntry>,
}

/// One range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    bytes: u64,
    kind: MapKind,
}

/// Kinds of ranges, with the numbers of e820 (ACPI 6.5, table 15.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum MapKind {
    Usable = 1,
    Reserved = 2,
}

fn memory_map(ram: &Ram) -> Vec<MapEntry> {
    use vm_memory::GuestMemoryRegion;
    let entry = |start, end: u64, kind| MapEntry { start, bytes: end.saturating_sub(start), kind };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, MapKind::Usable),
        entry(layout::LOW_RAM_END, layout::HIGH_RAM_START, MapKind::Reserved),
    ];
    for region in ram.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        map.push(entry(start.max(layout::HIGH_RAM_START), end, MapKind::Usable));
    }
    // A kernel only believes the MCFG table when the area is reserved here or in the DSDT.
    map.push(MapEntry {
        start: layout::PCI_ECAM_START,
        bytes: layout::PCI_ECAM_BYTES,
        kind: MapKind::Reserved,
    });
    map.sort_by_key(|entry| entry.start);
    map
}

fn put(ram: &Ram, address: u64, data: &[u8], what: &'static str) -> Result<(), Error> {
    ram.write_slice(data, GuestAddress(address)).map_err(|_| Error::Write(what))
}

#[cfg(test)]
mod tests;
