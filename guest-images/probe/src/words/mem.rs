//! `mem=<mib>`: writes and verifies a pattern at both ends of every region of free RAM, so on
//! both sides of the hole below 4 GiB.

use crate::console::Line;
use crate::failure::Outcome;
use crate::words::note;
use crate::{Machine, check, memory};

const SEED: u64 = 0x6d65_6d00;

pub fn run(machine: &Machine, mib: u64, report: &mut Line) -> Outcome {
    let regions = machine.free.regions();
    check!(!regions.is_empty(), "no free RAM in the memory map");
    let half = (mib << 20) / 2;
    let pieces = || {
        regions.iter().flat_map(|region| {
            let middle = region.start + (region.end - region.start) / 2 / 8 * 8;
            [
                (region.start, middle.min(region.start + half)),
                (middle.max(region.end.saturating_sub(half)), region.end),
            ]
        })
    };
    let mut tested = 0;
    for (start, end) in pieces() {
        memory::fill(start, end - start, SEED, start / 8);
        tested += end - start;
    }
    for (start, end) in pieces() {
        if let Some(offset) = memory::first_difference(start, end - start, SEED, start / 8) {
            crate::fail!("wrong content at {:#x}", start + offset);
        }
    }
    let highest = regions.iter().map(|region| region.end).max().unwrap_or(0);
    note(report, format_args!("tested_kib={} regions={} top={highest:#x}", tested >> 10, regions.len()));
    Ok(())
}
