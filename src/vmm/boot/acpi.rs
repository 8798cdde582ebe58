//! The ACPI tables that describe the machine (ACPI 6.5): hardware-reduced, no legacy timer chips, everything
//! at the addresses of `memory::layout`. Tables with code are in `dsdt`; `boot` writes them before the start.
//!
//! ```text
//! RSDP ─▶ XSDT ─┬▶ FADT ─▶ DSDT      MADT tells processors and interrupts, MCFG the PCI configuration area
//!               ├▶ MADT
//!               └▶ MCFG
//! ```
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use memory::{Ram, layout};

use super::{Error, put};

mod dsdt;

const OEM: [u8; 6] = *b"TOFT  ";
const TABLE: [u8; 8] = *b"MACHINE ";
const REVISION: u32 = 1;

/// IA-PC boot architecture (table 5.12): there is a serial port on the board; neither VGA nor a CMOS clock is,
/// and no keyboard controller.
const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 5;
const RESET_VALUE: u8 = 1;

/// Revision of the MADT, and where its own fields lie.
const MADT_REVISION: u8 = 5;
const MADT_BYTES: u32 = 44;
const MADT_LAPIC_AT: usize = 36;

/// Writes the tables; answers the address of the root pointer.
pub(super) fn write(ram: &Ram, vcpus: u8) -> Result<u64, Error> {
    let mut area = Area { next: layout::ACPI_TABLES + Rsdp::len() as u64, ram };
    let dsdt = area.put(&dsdt::table(OEM, TABLE, REVISION))?;
    let tables = [area.put(&fadt(dsdt))?, area.put(&madt(vcpus))?, area.put(&mcfg())?];
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    tables.into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = area.put(&bytes(&xsdt))?;
    put(ram, layout::ACPI_TABLES, &bytes(&Rsdp::new(OEM, xsdt)), "ACPI root pointer")?;
    Ok(layout::ACPI_TABLES)
}

struct Area<'a> {
    next: u64,
    ram: &'a Ram,
}

impl Area<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, Error> {
        let at = self.next.next_multiple_of(16);
        self.next = at + table.len() as u64;
        if self.next > layout::ACPI_TABLES_END {
            return Err(Error::Write("ACPI tables"));
        }
        put(self.ram, at, table, "ACPI tables")?;
        Ok(at)
    }
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Both mean that there is no such button in fixed hardware; the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    bytes(&fadt.finalize())
}

/// Processors by APIC id, one I/O APIC, and the non-maskable interrupt on pin 1 of every local APIC. The flag
/// for legacy controllers stays clear: nothing is routed to them.
fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", MADT_BYTES, MADT_REVISION, OEM, TABLE, REVISION);
    madt.write_u32(MADT_LAPIC_AT, layout::LAPIC as u32);
    for id in 0..vcpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, layout::IOAPIC as u32, 0)));
    // Section 5.2.12.7: type 4, 6 bytes, all processors, polarity and trigger of the bus, pin 1.
    madt.append_slice(&[4, 6, 0xFF, 0, 0, 1]);
    madt.as_slice().to_vec()
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::PCI_ECAM_START, 0, 0, 0);
    bytes(&mcfg)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
