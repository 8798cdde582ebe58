//! PCI functions on every bus, through ECAM, or through ports 0xcf8/0xcfc where there is none.
//! Uses the BARs the VMM assigned and assigns those it left at zero. Called by `virtio` and words.

use crate::acpi::Ecam;
use crate::cpu::{self, mmio};
use crate::paging;
use core::sync::atomic::{AtomicU64, Ordering};

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY_AND_MASTER: u16 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Where unassigned BARs go: below the IO-APIC, above any low RAM our VMM gives.
const WINDOW_START: u64 = 0xd000_0000;
const WINDOW_END: u64 = 0xfe00_0000;
/// Functions considered; more are not looked at.
const FUNCTIONS_MAX: usize = 64;

static ECAM_BASE: AtomicU64 = AtomicU64::new(0);
static ECAM_END: AtomicU64 = AtomicU64::new(0);
static WINDOW_NEXT: AtomicU64 = AtomicU64::new(WINDOW_START);

/// Which way configuration space is reached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Ecam,
    Ports,
}

/// Remembers where ECAM is.
pub fn set_up(ecam: Option<Ecam>) {
    let Some(ecam) = ecam else { return };
    let start = ecam.base + (u64::from(ecam.bus_first) << 20);
    let end = ecam.base + ((u64::from(ecam.bus_last) + 1) << 20);
    if paging::map(start, end).is_ok() {
        ECAM_BASE.store(ecam.base, Ordering::Relaxed);
        ECAM_END.store(end, Ordering::Relaxed);
    }
}

pub fn access() -> Access {
    if ECAM_BASE.load(Ordering::Relaxed) == 0 { Access::Ports } else { Access::Ecam }
}

/// One PCI function.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Function {
    pub bus: u8,
    pub device: u8,
    pub function: u8,
}

impl Function {
    fn ecam(self, offset: u16) -> u64 {
        ECAM_BASE.load(Ordering::Relaxed)
            + (u64::from(self.bus) << 20 | u64::from(self.device) << 15 | u64::from(self.function) << 12)
            + u64::from(offset)
    }

    fn select(self, offset: u16) {
        let address =
            u32::from(self.bus) << 16 | u32::from(self.device) << 11 | u32::from(self.function) << 8;
        cpu::out32(0xcf8, 1 << 31 | address | u32::from(offset & 0xfc));
    }

    pub fn read32_by(self, access: Access, offset: u16) -> u32 {
        match access {
            Access::Ecam => mmio::read32(self.ecam(offset & !3)),
            Access::Ports => {
                self.select(offset);
                cpu::in32(0xcfc)
            }
        }
    }

    pub fn read32(self, offset: u16) -> u32 {
        self.read32_by(access(), offset)
    }

    pub fn read16(self, offset: u16) -> u16 {
        (self.read32(offset) >> (8 * (offset & 2))) as u16
    }

    pub fn read8(self, offset: u16) -> u8 {
        (self.read32(offset) >> (8 * (offset & 3))) as u8
    }

    pub fn write32(self, offset: u16, value: u32) {
        match access() {
            Access::Ecam => mmio::write32(self.ecam(offset & !3), value),
            Access::Ports => {
                self.select(offset);
                cpu::out32(0xcfc, value);
            }
        }
    }

    pub fn write16(self, offset: u16, value: u16) {
        match access() {
            Access::Ecam => mmio::write16(self.ecam(offset & !1), value),
            Access::Ports => {
                self.select(offset);
                cpu::out16(0xcfc + (offset & 2), value);
            }
        }
    }

    /// Vendor in the low half, device in the high one; None where nothing answers.
    pub fn identity(self) -> Option<u32> {
        let identity = self.read32(0);
        (identity & 0xffff != 0xffff && identity != 0).then_some(identity)
    }

    /// Offsets of capabilities with `id`. A looping list ends after 48 entries.
    pub fn capabilities(self, id: u8) -> impl Iterator<Item = u16> {
        let has_list = self.read16(0x06) & STATUS_CAPABILITIES != 0;
        let mut next = if has_list { self.read8(0x34) & 0xfc } else { 0 };
        core::iter::from_fn(move || {
            let at = u16::from(next);
            if at == 0 {
                return None;
            }
            next = self.read8(at + 1) & 0xfc;
            Some(at)
        })
        .take(48)
        .filter(move |at| self.read8(*at) == id)
    }

    /// Enables memory access and bus mastering.
    pub fn enable(self) {
        self.write16(COMMAND, self.read16(COMMAND) | COMMAND_MEMORY_AND_MASTER);
    }

    /// Address of memory BAR `index`, assigned if the VMM did not, and mapped.
    pub fn bar(self, index: u8) -> Option<u64> {
        let offset = 0x10 + u16::from(index) * 4;
        let low = self.read32(offset);
        if index > 5 || low & 1 != 0 {
            return None;
        }
        let is_64_bit = low & 0x6 == 0x4;
        let high = if is_64_bit { u64::from(self.read32(offset + 4)) } else { 0 };
        let mut address = high << 32 | u64::from(low & !0xf);
        // Sizing switches decoding off, which is slow under a VMM, so only where the size matters.
        if address != 0 && address < 4 << 30 {
            return Some(address);
        }
        let bytes = self.bar_bytes(index);
        if bytes == 0 {
            return None;
        }
        if address == 0 {
            address = window(bytes)?;
            self.write32(offset, address as u32 | low & 0xf);
        }
        paging::map(address, address.checked_add(bytes)?).ok()?;
        Some(address)
    }

    /// Size of BAR `index`, zero where there is none; found as every system does, by writing ones.
    pub fn bar_bytes(self, index: u8) -> u64 {
        let offset = 0x10 + u16::from(index) * 4;
        let original = self.read32(offset);
        // Decoding must be off while the register does not hold an address.
        let command = self.read16(COMMAND);
        self.write16(COMMAND, command & !COMMAND_MEMORY_AND_MASTER);
        self.write32(offset, 0xffff_ffff);
        let mask = self.read32(offset) & if original & 1 != 0 { !0x3 } else { !0xf };
        self.write32(offset, original);
        self.write16(COMMAND, command);
        if mask == 0 { 0 } else { u64::from(!mask) + 1 }
    }
}

fn window(bytes: u64) -> Option<u64> {
    let mut start = WINDOW_NEXT.load(Ordering::Relaxed).next_multiple_of(bytes);
    let (ecam, ecam_end) = (ECAM_BASE.load(Ordering::Relaxed), ECAM_END.load(Ordering::Relaxed));
    if start < ecam_end && ecam < start + bytes {
        start = ecam_end.next_multiple_of(bytes);
    }
    let end = start.checked_add(bytes)?;
    WINDOW_NEXT.store(end, Ordering::Relaxed);
    (end <= WINDOW_END).then_some(start)
}

/// Calls `visit` for every function, bridges' buses included, until it returns true.
pub fn scan(mut visit: impl FnMut(Function, u32) -> bool) {
    let mut buses = [0u8; 16];
    let (mut bus_count, mut bus_next, mut seen) = (1, 0, 0);
    while bus_next < bus_count {
        let bus = buses[bus_next];
        bus_next += 1;
        for device in 0..32 {
            let first = Function { bus, device, function: 0 };
            let Some(_) = first.identity() else { continue };
            let functions = if first.read8(0x0e) & 0x80 != 0 { 8 } else { 1 };
            for function in 0..functions {
                let function = Function { bus, device, function };
                let Some(identity) = function.identity() else { continue };
                seen += 1;
                if seen > FUNCTIONS_MAX || visit(function, identity) {
                    return;
                }
                let secondary = function.read8(0x19);
                if function.read8(0x0e) & 0x7f == 1 && secondary > bus && bus_count < buses.len() {
                    buses[bus_count] = secondary;
                    bus_count += 1;
                }
            }
        }
    }
}
