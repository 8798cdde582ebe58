//! ACPI tables, as far as a bare guest needs them: processors, ECAM, sleep and reset registers.
//! No AML interpreter: of the DSDT only the `_S5_` package is found. Called by `main` once.

use crate::cpu::mmio::{read8, read32, read64};
use crate::cpu::{self, CPUS_MAX};

/// Reads a table longer than this as broken.
const TABLE_BYTES_MAX: u64 = 1 << 20;
const IO_SPACE: u8 = 1;

/// A register named by a generic address structure.
#[derive(Clone, Copy, Default)]
pub struct Register {
    is_port: bool,
    address: u64,
}

impl Register {
    fn read(at: u64) -> Option<Self> {
        let address = read64(at + 4);
        (address != 0).then(|| Self { is_port: read8(at) == IO_SPACE, address })
    }

    pub fn write8(self, value: u8) {
        if self.is_port {
            cpu::out8(self.address as u16, value);
        } else {
            cpu::mmio::write8(self.address, value);
        }
    }
}

#[derive(Clone, Copy)]
pub struct Ecam {
    pub base: u64,
    pub bus_first: u8,
    pub bus_last: u8,
}

pub struct Acpi {
    pub ecam: Option<Ecam>,
    pub processors: [u32; CPUS_MAX],
    pub processor_count: usize,
    pub io_apic: Option<u64>,
    pub sleep_control: Option<Register>,
    pub pm1_control: Option<u16>,
    pub sleep_type: u8,
    pub reset: Option<(Register, u8)>,
    pub tables: u32,
    pub bad_checksums: u32,
}

impl Acpi {
    const fn none() -> Self {
        Self {
            ecam: None,
            processors: [0; CPUS_MAX],
            processor_count: 0,
            io_apic: None,
            sleep_control: None,
            pm1_control: None,
            sleep_type: 0,
            reset: None,
            tables: 0,
            bad_checksums: 0,
        }
    }

    /// Walks the tables from the root pointer. Broken tables are counted and left out.
    pub fn read(rsdp: u64) -> Self {
        let mut acpi = Self { sleep_type: 5, ..Self::none() };
        if rsdp == 0 || read64(rsdp) != u64::from_le_bytes(*b"RSD PTR ") {
            return acpi;
        }
        let revision = read8(rsdp + 15);
        if !sum_is_zero(rsdp, 20) || (revision >= 2 && !sum_is_zero(rsdp, 36)) {
            acpi.bad_checksums += 1;
            return acpi;
        }
        let (root, entry_bytes) =
            if revision >= 2 { (read64(rsdp + 24), 8) } else { (read32(rsdp + 16).into(), 4) };
        let Some(length) = acpi.checked_length(root) else { return acpi };
        for entry in (root + 36..root + length).step_by(entry_bytes) {
            let table = if entry_bytes == 8 { read64(entry) } else { read32(entry).into() };
            acpi.table(table);
        }
        acpi
    }

    fn table(&mut self, table: u64) {
        let Some(length) = self.checked_length(table) else { return };
        match &read32(table).to_le_bytes() {
            b"APIC" => self.madt(table, length),
            b"MCFG" if length >= 60 => {
                self.ecam = Some(Ecam {
                    base: read64(table + 44),
                    bus_first: read8(table + 54),
                    bus_last: read8(table + 55),
                });
            }
            b"FACP" => self.fadt(table, length),
            _ => {}
        }
    }

    fn checked_length(&mut self, table: u64) -> Option<u64> {
        self.tables += 1;
        let length = u64::from(read32(table + 4));
        if !(36..TABLE_BYTES_MAX).contains(&length) || !sum_is_zero(table, length) {
            self.bad_checksums += 1;
            return None;
        }
        Some(length)
    }

    fn madt(&mut self, table: u64, length: u64) {
        let mut entry = table + 44;
        while entry + 2 <= table + length {
            let bytes = u64::from(read8(entry + 1));
            match read8(entry) {
                0 if read32(entry + 4) & 1 != 0 => self.processor(read8(entry + 3).into()),
                9 if read32(entry + 8) & 1 != 0 => self.processor(read32(entry + 4)),
                1 => self.io_apic = Some(read32(entry + 4).into()),
                _ => {}
            }
            if bytes < 2 {
                return;
            }
            entry += bytes;
        }
    }

    fn processor(&mut self, apic_id: u32) {
        if self.processor_count < CPUS_MAX {
            self.processors[self.processor_count] = apic_id;
            self.processor_count += 1;
        }
    }

    fn fadt(&mut self, table: u64, length: u64) {
        const RESET_SUPPORTED: u32 = 1 << 10;
        const HARDWARE_REDUCED: u32 = 1 << 20;
        let flags = if length >= 116 { read32(table + 112) } else { 0 };
        if flags & RESET_SUPPORTED != 0 && length >= 129 {
            self.reset = Register::read(table + 116).map(|register| (register, read8(table + 128)));
        }
        if flags & HARDWARE_REDUCED != 0 && length >= 256 {
            self.sleep_control = Register::read(table + 244);
        } else if read32(table + 64) != 0 {
            self.pm1_control = Some(read32(table + 64) as u16);
        }
        let extended = if length >= 148 { read64(table + 140) } else { 0 };
        let dsdt = if extended != 0 { extended } else { read32(table + 40).into() };
        if dsdt != 0
            && let Some(length) = self.checked_length(dsdt)
        {
            self.sleep_type = sleep_type(dsdt, length).unwrap_or(self.sleep_type);
        }
    }

    pub fn processors(&self) -> &[u32] {
        &self.processors[..self.processor_count]
    }
}

/// First element of the package `_S5_`: the value that means "off".
fn sleep_type(dsdt: u64, length: u64) -> Option<u8> {
    const PACKAGE: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0a;
    let name = u32::from_le_bytes(*b"_S5_");
    let at = (dsdt + 36..dsdt + length.saturating_sub(12)).find(|at| read32(*at) == name)? + 4;
    if read8(at) != PACKAGE {
        return None;
    }
    // The package length takes 1 to 4 bytes, told by its first byte's top bits; a count follows.
    let element = at + 1 + 1 + u64::from(read8(at + 1) >> 6) + 1;
    match read8(element) {
        BYTE_PREFIX => Some(read8(element + 1)),
        value @ (0 | 1) => Some(value),
        _ => None,
    }
}

fn sum_is_zero(address: u64, length: u64) -> bool {
    (address..address + length).fold(0u8, |sum, at| sum.wrapping_add(read8(at))) == 0
}

/// Writes the PM1 control register: sleep type and sleep enable.
pub fn pm1_sleep(port: u16, sleep_type: u8) {
    cpu::out16(port, u16::from(sleep_type) << 10 | 1 << 13);
}
