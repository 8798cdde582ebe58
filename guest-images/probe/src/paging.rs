//! Identity page tables above the 4 GiB that boot.s maps: RAM there and BARs anywhere.
//! Only ever adds entries, so nothing needs flushing. Called by `memory` and `pci`.

use crate::cpu::mmio::{read64, write64};
use crate::memory;
use core::sync::atomic::{AtomicUsize, Ordering};

const LARGE_PAGE_BYTES: u64 = 2 << 20;
const TABLE: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;
const PRESENT: u64 = 1;
/// One table maps 1 GiB, one more is needed per 512 GiB in use. As in boot.s.
const TABLES: usize = 72;

static USED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    static pml4: [u64; 512];
    static page_tables: [[u64; 512]; TABLES];
}

/// Out of page tables, or an address no four-level table can map.
#[derive(Debug)]
pub struct CannotMap;

/// Maps `start..end` so that address equals physical address.
pub fn map(start: u64, end: u64) -> Result<(), CannotMap> {
    if end <= 4 << 30 {
        return Ok(());
    }
    if end > 1 << 47 {
        return Err(CannotMap);
    }
    let mut page = start.max(4 << 30) & !(LARGE_PAGE_BYTES - 1);
    while page < end {
        let pointers = table_at((&raw const pml4) as u64, page >> 39)?;
        let directory = table_at(pointers, page >> 30)?;
        write64(directory + (page >> 21 & 511) * 8, page | LARGE_PAGE);
        page += LARGE_PAGE_BYTES;
    }
    Ok(())
}

fn table_at(parent: u64, index: u64) -> Result<u64, CannotMap> {
    let slot = parent + (index & 511) * 8;
    let entry = read64(slot);
    if entry & PRESENT != 0 {
        return Ok(entry & !0xfff);
    }
    let number = USED.fetch_add(1, Ordering::Relaxed);
    if number >= TABLES {
        return Err(CannotMap);
    }
    let table = (&raw const page_tables) as u64 + number as u64 * 4096;
    memory::bytes_mut(table, 4096).fill(0);
    write64(slot, table | TABLE);
    Ok(table)
}
