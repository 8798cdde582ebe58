//! `changed`: waits until a disk's configuration changes and reads its first sector before and after.

use crate::console::Line;
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::disk::Disk;
use crate::words::note;
use crate::{check, clock, cpu, fail, memory, say};

const ENTRY: u16 = 1;
const VECTOR: u8 = 0x41;

pub fn run(index: usize, timeout_ms: u64, report: &mut Line) -> Outcome {
    let mut disk = Disk::require(index)?;
    let Some(msix) = disk.device.msix.as_ref() else { fail!("the disk has no MSI-X") };
    msix.route(ENTRY, VECTOR);
    msix.enable();
    disk.device.set_config_vector(ENTRY)?;
    let page = memory::allocate(1).ok_or_else(out_of_memory)?;
    let (seen, generation) = (cpu::interrupt_count(VECTOR), disk.device.generation());
    disk.read(0, page, 512)?;
    say!("probe: changed waiting sectors={} first={:#x}", disk.sectors, cpu::mmio::read64(page));
    let came = clock::spin_until(timeout_ms, || cpu::interrupt_count(VECTOR) > seen);
    check!(came, "no interrupt in {timeout_ms} ms");
    check!(disk.device.generation() != generation, "an interrupt and the old generation {generation}");
    let sectors = disk.device.config64(0);
    disk.read(0, page, 512)?;
    note(report, format_args!("sectors={sectors} first={:#x}", cpu::mmio::read64(page)));
    disk.device.reset()
}
