//! The parameters of Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst), with the
//! descriptor table and page tables it starts on. Called by `boot` for every kernel without a PVH note.
use kvm::Start;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use memory::{Ram, layout};
use vm_memory::GuestAddress;

use super::{Error, Parameters, put};

/// "An undefined boot loader" in the registry of loaders.
const LOADER_OTHER: u8 = 0xFF;
const BOOT_FLAG: u16 = 0xAA55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const PROTOCOL: u16 = 0x20F;
const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Present, writable.
const TABLE: u64 = 0b11;
/// The same, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const TABLE_BYTES: u64 = 4096;
const MAPPED_GIB: u64 = 4;

pub(super) fn prepare(
    ram: &Ram,
    entry: u64,
    header: Option<setup_header>,
    parameters: &Parameters,
) -> Result<Start, Error> {
    let mut page = boot_params { hdr: header.unwrap_or_else(plain_header), ..Default::default() };
    page.hdr.type_of_loader = LOADER_OTHER;
    page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    page.hdr.cmdline_size = parameters.cmdline_bytes as u32;
    page.acpi_rsdp_addr = parameters.rsdp;
    if let Some(initrd) = parameters.initrd {
        page.hdr.ramdisk_image = initrd.start as u32;
        page.hdr.ramdisk_size = initrd.bytes as u32;
        page.ext_ramdisk_image = (initrd.start >> 32) as u32;
        page.ext_ramdisk_size = (initrd.bytes >> 32) as u32;
    }
    let mut table = page.e820_table;
    for (slot, entry) in table.iter_mut().zip(&parameters.map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.bytes, r#type: entry.kind as u32 };
    }
    page.e820_table = table;
    page.e820_entries = parameters.map.len().min(table.len()) as u8;
    let all = BootParams::new(&page, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&all, ram).map_err(|_| Error::Write("zero page"))?;

    let gdt = [0, 0, kvm::start::CODE64, kvm::start::DATA].map(u64::to_le_bytes).concat();
    put(ram, layout::BOOT_GDT, &gdt, "descriptor table")?;
    write_page_tables(ram)?;
    Ok(Start::Long {
        entry,
        zero_page: layout::ZERO_PAGE,
        page_tables: layout::BOOT_PAGE_TABLES,
        stack: layout::BOOT_STACK,
        gdt: (layout::BOOT_GDT, gdt.len() as u16),
    })
}

/// What an ELF kernel without a header of its own is told.
fn plain_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL,
        loadflags: LOADED_HIGH,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    }
}

/// Maps the first gibibytes onto themselves.
pub(crate) fn write_page_tables(ram: &Ram) -> Result<(), Error> {
    let top = layout::BOOT_PAGE_TABLES;
    let second = top + TABLE_BYTES;
    let third = second + TABLE_BYTES;
    let gigabytes: Vec<u64> = (0..MAPPED_GIB).map(|at| (third + at * TABLE_BYTES) | TABLE).collect();
    let pages: Vec<u64> = (0..MAPPED_GIB * 512).map(|at| (at * LARGE_PAGE_BYTES) | LARGE_PAGE).collect();
    let write = |address, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        put(ram, address, &bytes, "page tables")
    };
    write(top, &[second | TABLE])?;
    write(second, &gigabytes)?;
    write(third, &pages)
}
