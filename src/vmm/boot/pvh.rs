//! The parameters of Xen's x86/HVM direct boot ABI, which Linux and others call PVH
//! (include/xen/interface/hvm/start_info.h). Called by `boot` when the kernel has the note.
use kvm::Start;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use memory::{Ram, layout};
use vm_memory::GuestAddress;

use super::{Error, Parameters};

const MAGIC: u32 = 0x336E_C578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
/// The module list follows the longest memory map.
const MODULES: u64 = layout::MEMORY_MAP + 0x800;

pub(super) fn prepare(ram: &Ram, entry: u64, parameters: &Parameters) -> Result<Start, Error> {
    let range = |entry: &super::MapEntry| hvm_memmap_table_entry {
        addr: entry.start,
        size: entry.bytes,
        type_: entry.kind as u32,
        reserved: 0,
    };
    let map: Vec<_> = parameters.map.iter().map(range).collect();
    let module = |initrd: super::initrd::Initrd| hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.bytes,
        ..Default::default()
    };
    let modules: Vec<_> = parameters.initrd.map(module).into_iter().collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: parameters.rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let mut all = BootParams::new(&start_info, GuestAddress(layout::START_INFO));
    all.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    all.set_modules(&modules, GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&all, ram).map_err(|_| Error::Write("PVH start info"))?;
    Ok(Start::Pvh { entry, start_info: layout::START_INFO })
}
