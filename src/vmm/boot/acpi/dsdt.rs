//! The differentiated system description table: devices that cannot be discovered, and the little code that
//! tells the guest a button was pressed. Compiled by `acpi_tables`; the comments give the ASL.
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use memory::layout;

use super::bytes;

const HEADER_BYTES: u32 = 36;
const DSDT_REVISION: u8 = 2;

/// A device is present, enabled, shown and works (section 6.3.7).
const PRESENT: u8 = 0x0F;

/// The generation id has changed (the specification of it asks for this number).
const GENERATION_CHANGED: u8 = 0x80;

/// A control-method power button was pressed (section 4.8.3.1).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn table(oem: [u8; 6], name: [u8; 8], revision: u32) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, oem, name, revision);
    for part in [power_off(), pci(), board(), button(), generation(), events(), serial(), panic_port()] {
        table.append_slice(&part);
    }
    table.as_slice().to_vec()
}

/// `Name (\_S5, Package () {5, 5, 0, 0})`
fn power_off() -> Vec<u8> {
    let s5 = layout::SLEEP_TYPE_S5;
    bytes(&Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &ZERO, &ZERO])))
}

/// The host bridge: bus 0, its configuration ports, and the window for memory BARs.
fn pci() -> Vec<u8> {
    let (first, bytes_long) = (layout::PCI_MMIO_START as u32, layout::PCI_MMIO_BYTES as u32);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        first,
        first + (bytes_long - 1),
        None,
    );
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
    bytes(&Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&bus, &ports, &window])),
        ],
    ))
}

/// What the board itself takes: the area for PCI configuration, and the power registers' ports.
fn board() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, layout::PCI_ECAM_START as u32, layout::PCI_ECAM_BYTES as u32);
    let power = IO::new(layout::SLEEP_CONTROL_PORT, layout::SLEEP_CONTROL_PORT, 1, 8);
    bytes(&Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &power])),
        ],
    ))
}

fn button() -> Vec<u8> {
    bytes(&Device::new(
        "_SB_.PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &PRESENT),
        ],
    ))
}

/// The generation id (Virtual Machine Generation ID, Microsoft): where it lies, as low and high half.
fn generation() -> Vec<u8> {
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    bytes(&Device::new(
        "_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"TOFT0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    ))
}

/// The generic event device (section 5.6.9):
/// ```text
/// OperationRegion (EREG, SystemIO, 0x604, 4)
/// Field (EREG, DWordAcc, NoLock, WriteAsZeros) { EVTS, 32 }
/// Method (_EVT, 1, Serialized) {
///     Local0 = EVTS                      // reading clears
///     If ((Local0 & 1) == 1) { Notify (\_SB.PWRB, 0x80) }
///     If ((Local0 & 2) == 2) { Notify (\_SB.VGEN, 0x80) }
/// }
/// ```
fn events() -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let (pressed, changed) = (layout::EVENT_POWER_BUTTON, layout::EVENT_GENERATION);
    bytes(&Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &layout::EVENT_PORT, &4u8),
            &Field::new(
                "EREG".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &And::new(&Local(1), &Local(0), &pressed),
                    &If::new(
                        &Equal::new(&Local(1), &pressed),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)],
                    ),
                    &And::new(&Local(1), &Local(0), &changed),
                    &If::new(
                        &Equal::new(&Local(1), &changed),
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &GENERATION_CHANGED)],
                    ),
                ],
            ),
        ],
    ))
}

fn serial() -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    bytes(&Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    ))
}

/// pvpanic (QEMU's docs/specs/pvpanic): one port, found by its id.
fn panic_port() -> Vec<u8> {
    let port = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1);
    bytes(&Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}
