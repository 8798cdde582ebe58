//! What the VMM hands over at the PVH entry: command line, memory map, ACPI's root pointer.
//! Copied at once, because it may lie in memory the probe uses later. Called by `main`.
//! Layout: Xen's `hvm_start_info` and `hvm_memmap_table_entry`.

use crate::console::Line;
use crate::cpu::mmio::{read8, read32, read64};

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
pub const REGIONS_MAX: usize = 16;

/// A piece of usable RAM.
#[derive(Clone, Copy, Default)]
pub struct Region {
    pub start: u64,
    pub end: u64,
}

pub struct Start {
    pub command_line: Line,
    pub rsdp: u64,
    pub regions: [Region; REGIONS_MAX],
    pub region_count: usize,
}

impl Start {
    /// Reads the start info at `address`. What it lacks stays empty.
    pub fn read(address: u64) -> Self {
        let mut start = Self {
            command_line: Line::new(),
            rsdp: 0,
            regions: [Region::default(); REGIONS_MAX],
            region_count: 0,
        };
        if read32(address) != MAGIC {
            return start;
        }
        let version = read32(address + 4);
        let command_line = read64(address + 24);
        if command_line != 0 {
            (command_line..)
                .map(read8)
                .take(crate::console::LINE_BYTES)
                .take_while(|byte| *byte != 0)
                .for_each(|byte| start.command_line.push(byte));
        }
        start.rsdp = read64(address + 32);
        if version >= 1 {
            let table = read64(address + 40);
            for index in 0..u64::from(read32(address + 48)) {
                let entry = table + index * 24;
                start.add(read64(entry), read64(entry + 8), read32(entry + 16));
            }
        }
        start
    }

    fn add(&mut self, address: u64, bytes: u64, kind: u32) {
        if kind == RAM && bytes != 0 && self.region_count < REGIONS_MAX {
            self.regions[self.region_count] = Region { start: address, end: address.saturating_add(bytes) };
            self.region_count += 1;
        }
    }

    pub fn ram(&self) -> &[Region] {
        &self.regions[..self.region_count]
    }

    pub fn ram_bytes(&self) -> u64 {
        self.ram().iter().map(|region| region.end - region.start).sum()
    }
}
