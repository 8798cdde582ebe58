//! What the driver reads and writes of the balloon's configuration (virtio 1.2, section 5.5.4), as numbers that
//! both the device's thread and the operator's handle see.
use std::sync::atomic::{AtomicU32, Ordering};

use super::state::State;
use crate::bus::{little_endian, read_image};

/// The balloon counts pages of 4 KiB whatever the guest's page size.
pub(super) const PAGE_BYTES: u64 = 4096;

/// Offsets of what the driver writes.
const ACTUAL: u64 = 4;
const POISON: u64 = 12;

#[derive(Debug, Default)]
pub(super) struct Config {
    /// Pages the guest is asked to give.
    target_pages: AtomicU32,
    /// Pages the guest says it has given.
    actual_pages: AtomicU32,
    /// What the guest's free pages hold, when it negotiated VIRTIO_BALLOON_F_PAGE_POISON.
    poison: AtomicU32,
}

impl Config {
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let numbers = [
            self.target_pages.load(Ordering::SeqCst),
            self.actual_pages.load(Ordering::SeqCst),
            // free_page_hint_cmd_id, which VIRTIO_BALLOON_F_FREE_PAGE_HINT would give a meaning.
            0,
            self.poison.load(Ordering::SeqCst),
        ];
        let image: Vec<u8> = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
        read_image(&image, offset, data);
    }

    /// Whole fields only; what the driver may not write is left alone.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = u32::try_from(little_endian(data)) else { return };
        match (offset, data.len()) {
            (ACTUAL, 4) => self.actual_pages.store(value, Ordering::SeqCst),
            (POISON, 4) => self.poison.store(value, Ordering::SeqCst),
            _ => {}
        }
    }

    /// A driver starts with an empty balloon.
    pub(super) fn start(&self) {
        self.actual_pages.store(0, Ordering::SeqCst);
    }

    pub(super) fn save(&self) -> State {
        State {
            target_pages: self.target_pages.load(Ordering::SeqCst),
            actual_pages: self.actual_pages.load(Ordering::SeqCst),
            poison: self.poison.load(Ordering::SeqCst),
        }
    }

    pub(super) fn restore(&self, state: State) {
        self.target_pages.store(state.target_pages, Ordering::SeqCst);
        self.actual_pages.store(state.actual_pages, Ordering::SeqCst);
        self.poison.store(state.poison, Ordering::SeqCst);
    }

    pub(super) fn poison(&self) -> u32 {
        self.poison.load(Ordering::SeqCst)
    }

    /// Asks for `bytes`, rounded down to pages; true when that is something new.
    pub(super) fn set_target_bytes(&self, bytes: u64) -> bool {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.target_pages.swap(pages, Ordering::SeqCst) != pages
    }

    pub(super) fn target_bytes(&self) -> u64 {
        u64::from(self.target_pages.load(Ordering::SeqCst)).saturating_mul(PAGE_BYTES)
    }

    pub(super) fn actual_bytes(&self) -> u64 {
        u64::from(self.actual_pages.load(Ordering::SeqCst)).saturating_mul(PAGE_BYTES)
    }
}
