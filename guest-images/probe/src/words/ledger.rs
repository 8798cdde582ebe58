//! `ledger[=<ms>[,<mib>]]`: counts in memory and on a disk, and expects both to agree before each count. Memory of one moment
//! with a disk of another does not: the disk lacks what was counted, or holds what memory knows nothing of. With each count it
//! rewrites so much memory beside that, and expects to find what it wrote there last.

use crate::console::Line;
use crate::failure::{Outcome, out_of_memory};
use crate::memory::{self, fill, first_difference};
use crate::virtio::disk::{Disk, SECTOR_BYTES};
use crate::words::{beat, button, dirty, note};
use crate::{Machine, check, clock, fail, say};

/// Where entries lie, one after the other, round and round.
const SECTORS: u64 = 512;
/// Entries that are read again before each count.
const LOOKED_BACK: u64 = 8;
/// What entries are told by from anything else on a disk.
const SEED: u64 = 0x1ed6e2;

pub fn run(machine: &Machine, disk: usize, interval_ms: u64, mib: u64, report: &mut Line) -> Outcome {
    let mut disk = Disk::require(disk)?;
    let buffer = memory::allocate(1).ok_or_else(out_of_memory)?;
    let mut button = button::listen(machine)?;
    // A disk that an earlier boot has counted on begins anew, so that what is found is of this one.
    for sector in 0..SECTORS {
        fill(buffer, SECTOR_BYTES, !SEED, sector);
        disk.write(sector, buffer, SECTOR_BYTES as u32)?;
    }
    let pages = (mib << 8).min(machine.free.pages());
    let mut count = 0u64;
    while !button.was_pressed() {
        for entry in count.saturating_sub(LOOKED_BACK)..count {
            check!(holds(&mut disk, buffer, entry)?, "the disk has lost entry {entry} of {count}");
        }
        check!(!holds(&mut disk, buffer, count)?, "the disk holds entry {count}, which memory has not made");
        // In memory first: whoever stops us between the two finishes what we have sent to the disk.
        let entry = count;
        count += 1;
        for index in 0..pages {
            let Some(page) = machine.free.page(index) else { fail!("page {index} does not exist") };
            dirty::visit(page, entry)?;
        }
        fill(buffer, SECTOR_BYTES, SEED, entry);
        disk.write(entry % SECTORS, buffer, SECTOR_BYTES as u32)?;
        disk.flush()?;
        let Some(now) = clock::kvmclock() else { fail!("no paravirtual clock offered") };
        say!("probe: ledger {entry} ns={}", now.system_ns);
        beat::sleep(interval_ms);
    }
    button.take()?;
    note(report, format_args!("entries={count}"));
    disk.device.reset()
}

fn holds(disk: &mut Disk, buffer: u64, entry: u64) -> Outcome<bool> {
    disk.read(entry % SECTORS, buffer, SECTOR_BYTES as u32)?;
    Ok(first_difference(buffer, SECTOR_BYTES, SEED, entry).is_none())
}
