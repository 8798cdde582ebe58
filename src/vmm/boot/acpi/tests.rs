//! Walks the tables as a guest does. That the code in them is right is seen when Linux boots and the button works.
use vm_memory::{Bytes, GuestAddress};

use super::*;

fn read(ram: &Ram, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn table(ram: &Ram, address: u64) -> Vec<u8> {
    let length = ram.read_obj::<u32>(GuestAddress(address + 4)).unwrap();
    let table = read(ram, address, length as usize);
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    assert_eq!(sum, 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
    table
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn tables(vcpus: u8) -> Vec<Vec<u8>> {
    let ram = memory::new(32 << 20).unwrap();
    let at = write(&ram, vcpus).unwrap();
    let root = read(&ram, at, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!(root[..20].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    assert_eq!(root.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let xsdt = table(&ram, word(&root, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let mut all: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&ram, word(entry, 0))).collect();
    let fadt = all.iter().find(|table| table.starts_with(b"FACP")).unwrap();
    all.push(table(&ram, word(fadt, 140)));
    all
}

fn find<'a>(tables: &'a [Vec<u8>], signature: &[u8; 4]) -> &'a [u8] {
    tables.iter().find(|table| table.starts_with(signature)).expect("the table is there")
}

#[test]
fn every_table_is_found_and_sums_to_zero() {
    let tables = tables(1);
    let mut signatures: Vec<_> =
        tables.iter().map(|table| String::from_utf8_lossy(&table[..4]).into_owned()).collect();
    signatures.sort();
    assert_eq!(signatures, ["APIC", "DSDT", "FACP", "MCFG"]);
}

#[test]
fn the_fadt_describes_hardware_without_legacy_chips() {
    let tables = tables(1);
    let fadt = find(&tables, b"FACP");
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    // Address space 1 is ports; 8 bits wide.
    for (at, port) in [(116, 0x602), (244, 0x600), (256, 0x601)] {
        assert_eq!((fadt[at], fadt[at + 1], word(fadt, at + 4)), (1, 8, port));
    }
}

#[test]
fn the_madt_has_every_processor_and_no_legacy_controllers() {
    for vcpus in [1, 4, 32] {
        let tables = tables(vcpus);
        let madt = find(&tables, b"APIC");
        assert_eq!(madt[40..44], [0; 4], "no 8259");
        let mut processors = Vec::new();
        let (mut ioapics, mut rest) = (0, &madt[44..]);
        while let [kind, length, entry @ ..] = rest {
            match kind {
                0 => processors.push((entry[0], entry[1], entry[2])),
                1 => ioapics += 1,
                4 => assert_eq!(entry[..4], [0xFF, 0, 0, 1]),
                other => panic!("entry {other}"),
            }
            rest = &rest[usize::from(*length)..];
        }
        assert_eq!(processors, (0..vcpus).map(|id| (id, id, 1)).collect::<Vec<_>>());
        assert_eq!(ioapics, 1);
    }
}

#[test]
fn the_mcfg_covers_bus_zero_only() {
    let tables = tables(1);
    let mcfg = find(&tables, b"MCFG");
    assert_eq!(word(mcfg, 44), layout::PCI_ECAM_START);
    assert_eq!(mcfg[54..56], [0, 0]);
    assert_eq!(mcfg.len(), 60);
}
