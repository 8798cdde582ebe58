//! The MSI-X table of one function (PCI 3.0 section 6.8.2): where each entry sends its message.
//! Called by `virtio::Device` and the interrupt word.

use crate::apic;
use crate::cpu::mmio::{read32, read64, write32};
use crate::pci::Function;

const CAPABILITY: u8 = 0x11;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

pub struct Msix {
    function: Function,
    capability: u16,
    table: u64,
    pending: u64,
    pub entries: u16,
}

impl Msix {
    pub fn open(function: Function) -> Option<Self> {
        let capability = function.capabilities(CAPABILITY).next()?;
        let locate = |offset| {
            let word = function.read32(capability + offset);
            Some(function.bar((word & 7) as u8)? + u64::from(word & !7))
        };
        let entries = (function.read16(capability + 2) & 0x7ff) + 1;
        Some(Self { function, capability, table: locate(4)?, pending: locate(8)?, entries })
    }

    /// Sends entry `entry` to this processor at `vector`, unmasked.
    pub fn route(&self, entry: u16, vector: u8) {
        let (address, data) = apic::message(vector);
        let at = self.table + u64::from(entry) * 16;
        write32(at + 12, ENTRY_MASKED);
        write32(at, address as u32);
        write32(at + 4, (address >> 32) as u32);
        write32(at + 8, data);
        write32(at + 12, 0);
    }

    pub fn set_entry_mask(&self, entry: u16, is_masked: bool) {
        write32(self.table + u64::from(entry) * 16 + 12, is_masked.into());
    }

    pub fn is_pending(&self, entry: u16) -> bool {
        read64(self.pending + u64::from(entry / 64) * 8) >> (entry % 64) & 1 != 0
    }

    pub fn enable(&self) {
        let control = self.function.read16(self.capability + 2);
        self.function.write16(self.capability + 2, control & !MASK_ALL | ENABLE);
    }

    pub fn disable(&self) {
        let control = self.function.read16(self.capability + 2);
        self.function.write16(self.capability + 2, control & !ENABLE);
        for entry in 0..self.entries {
            let _ = read32(self.table + u64::from(entry) * 16 + 12);
            self.set_entry_mask(entry, true);
        }
    }
}
