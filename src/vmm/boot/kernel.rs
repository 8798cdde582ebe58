//! Loads a kernel: an ELF program, with or without a PVH note, or a bzImage. The format is told by its magic
//! number and never tried out. What is in the file is somebody else's word, so nothing here trusts it.
use std::fs::File;
use std::io::Read;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use memory::{Ram, layout};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{Error, Image};

const ELF_MAGIC: [u8; 4] = *b"\x7FELF";
const BZIMAGE_MAGIC_AT: usize = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";

/// Boot protocol 2.12 tells whether there is a 64-bit entry (Documentation/arch/x86/boot.rst).
const PROTOCOL_MIN: u16 = 0x20C;
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry of a bzImage lies, from its load address.
const LONG_ENTRY: u64 = 0x200;

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) entry: Entry,
    /// First address after everything the kernel will use before it reads the memory map.
    pub(super) end: u64,
    /// Highest address of an initrd that the kernel can take.
    pub(super) initrd_last: u64,
    /// The header a bzImage brings; it goes into the zero page.
    pub(super) header: Option<setup_header>,
}

/// Where and how a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// 32-bit, by the PVH note.
    Pvh(u64),
    /// 64-bit, by Linux's boot protocol.
    Long(u64),
}

pub(super) fn load(ram: &Ram, file: &File) -> Result<Kernel, Error> {
    let read = |cause| Error::Read { what: "kernel", cause };
    let mut image = Image::new(file).map_err(read)?;
    let mut head = Vec::new();
    let head_bytes = BZIMAGE_MAGIC_AT + BZIMAGE_MAGIC.len();
    image.by_ref().take(head_bytes as u64).read_to_end(&mut head).map_err(read)?;
    let kernel = match head.first_chunk() {
        None => return Err(Error::Short),
        Some(&ELF_MAGIC) => load_elf(ram, &mut image)?,
        Some(_) if head.get(BZIMAGE_MAGIC_AT..) == Some(BZIMAGE_MAGIC) => load_bzimage(ram, &mut image)?,
        Some(other) => return Err(Error::Format(*other)),
    };
    let (Entry::Pvh(entry) | Entry::Long(entry)) = kernel.entry;
    match ram.address_in_range(GuestAddress(entry)) {
        true => Ok(kernel),
        false => Err(Error::Entry(entry)),
    }
}

fn load_elf(ram: &Ram, image: &mut Image<'_>) -> Result<Kernel, Error> {
    let loaded = Elf::load(ram, None, image, None).map_err(loader_said)?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Entry::Pvh(entry.0),
        _ => Entry::Long(loaded.kernel_load.0),
    };
    Ok(Kernel { entry, end: loaded.kernel_end, initrd_last: layout::RAM_BELOW_4G_MAX - 1, header: None })
}

fn load_bzimage(ram: &Ram, image: &mut Image<'_>) -> Result<Kernel, Error> {
    let start = GuestAddress(layout::HIGH_RAM_START);
    let loaded = BzImage::load(ram, Some(start), image, Some(start)).map_err(loader_said)?;
    let KernelLoaderResult { kernel_load, kernel_end, setup_header: Some(header), .. } = loaded else {
        return Err(Error::NotLong);
    };
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_MIN || flags & XLF_KERNEL_64 == 0 {
        return Err(Error::NotLong);
    }
    // It unpacks itself to the address it prefers and needs that much room there.
    let unpacked_end = header.pref_address.max(kernel_load.0).saturating_add(header.init_size.into());
    Ok(Kernel {
        entry: Entry::Long(kernel_load.0.saturating_add(LONG_ENTRY)),
        end: kernel_end.max(unpacked_end),
        initrd_last: u64::from(header.initrd_addr_max),
        header: Some(header),
    })
}

fn loader_said(error: linux_loader::loader::Error) -> Error {
    Error::Load(error.to_string())
}
