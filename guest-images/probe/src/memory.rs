//! Guest RAM that is not the image: a bump allocator for rings and buffers, and what is left.
//! Freed only as a whole, at the end of each word. Called by drivers and by the memory words.

use crate::cpu;
use crate::paging;
use crate::start::{REGIONS_MAX, Region, Start};
use core::sync::atomic::{AtomicU64, Ordering};

pub const PAGE_BYTES: u64 = 4096;
/// Rings and buffers of one word; the memory words leave this much alone.
const ARENA_BYTES: u64 = 8 << 20;

static ARENA_START: AtomicU64 = AtomicU64::new(0);
static ARENA_NEXT: AtomicU64 = AtomicU64::new(0);
static ARENA_END: AtomicU64 = AtomicU64::new(0);

/// RAM the probe does not use itself, in whole pages.
#[derive(Clone, Copy)]
pub struct Free {
    regions: [Region; REGIONS_MAX],
    count: usize,
}

impl Free {
    /// Splits RAM into image, arena and free memory, and maps what lies above 4 GiB.
    pub fn set_up(start: &Start) -> Self {
        let (_, image_end) = cpu::image();
        let mut free = Self { regions: [Region::default(); REGIONS_MAX], count: 0 };
        for region in start.ram() {
            let mut first = region.start.next_multiple_of(PAGE_BYTES);
            let mut end = region.end & !(PAGE_BYTES - 1);
            if first <= image_end && image_end < end {
                let arena_end = image_end.saturating_add(ARENA_BYTES).min(end);
                ARENA_START.store(image_end, Ordering::Relaxed);
                ARENA_NEXT.store(image_end, Ordering::Relaxed);
                ARENA_END.store(arena_end, Ordering::Relaxed);
                first = arena_end;
            }
            if paging::map(first, end).is_err() {
                end = first;
            }
            // Below 1 MiB lie the VMM's tables and the trampoline.
            if first >= 1 << 20 && first < end {
                free.regions[free.count] = Region { start: first, end };
                free.count += 1;
            }
        }
        free
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    pub fn pages(&self) -> u64 {
        self.regions().iter().map(|region| (region.end - region.start) / PAGE_BYTES).sum()
    }

    /// Address of free page `index`, counted through all regions.
    pub fn page(&self, mut index: u64) -> Option<u64> {
        for region in self.regions() {
            let pages = (region.end - region.start) / PAGE_BYTES;
            if index < pages {
                return Some(region.start + index * PAGE_BYTES);
            }
            index -= pages;
        }
        None
    }
}

/// `pages` zeroed pages in a row, or None when the arena is used up.
pub fn allocate(pages: u64) -> Option<u64> {
    let address = ARENA_NEXT.load(Ordering::Relaxed);
    let end = address.checked_add(pages.checked_mul(PAGE_BYTES)?)?;
    if address == 0 || end > ARENA_END.load(Ordering::Relaxed) {
        return None;
    }
    ARENA_NEXT.store(end, Ordering::Relaxed);
    bytes_mut(address, end - address).fill(0);
    Some(address)
}

/// Frees everything allocated. Devices that know the memory must have been reset.
pub fn release_all() {
    ARENA_NEXT.store(ARENA_START.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// RAM as bytes. Callers pass ranges they allocated or took from [`Free`].
pub fn bytes(address: u64, len: u64) -> &'static [u8] {
    // SAFETY: identity-mapped RAM owned by the probe; words are sequential, and a device writes
    // it only between kick and completion, when no slice of it is held.
    unsafe { core::slice::from_raw_parts(address as *const u8, len as usize) }
}

/// As [`bytes`], to write.
pub fn bytes_mut(address: u64, len: u64) -> &'static mut [u8] {
    // SAFETY: as for `bytes`; no two slices of one range live at a time.
    unsafe { core::slice::from_raw_parts_mut(address as *mut u8, len as usize) }
}

/// A pattern that differs in every eight bytes and with every seed.
pub fn pattern(seed: u64, position: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ position.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 29;
    x.wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Writes the pattern over a range; `position` is that of its first eight bytes.
pub fn fill(address: u64, len: u64, seed: u64, position: u64) {
    for (index, word) in bytes_mut(address, len).chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&pattern(seed, position + index as u64).to_le_bytes());
    }
}

/// Offset of the first eight bytes that differ from the pattern.
pub fn first_difference(address: u64, len: u64, seed: u64, position: u64) -> Option<u64> {
    bytes(address, len)
        .chunks_exact(8)
        .enumerate()
        .find(|(index, word)| **word != pattern(seed, position + *index as u64).to_le_bytes())
        .map(|(index, _)| index as u64 * 8)
}
