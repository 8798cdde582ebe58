//! What the log of written pages says of a small guest that writes where it is told, and the marks of what devices
//! write, on both sides of the hole below 4 GiB.
use std::sync::Arc;

use kvm::{DirtyLog, Exit, Host, Irqchip, Start, Vcpu, Vm};
use memory::{Extent, Pages, Ram, layout, marks};
use vm_memory::{Bytes, GuestAddress};

const BELOW: u64 = layout::RAM_BELOW_4G_MAX;
const ABOVE: u64 = layout::RAM_ABOVE_4G_START;
const BYTES: u64 = BELOW + (64 << 20);
const PAGES: u64 = BYTES / 4096;

const CODE: u64 = 0x1_0000;
const TABLES: u64 = 0x2_0000;
const LIST: u64 = 0x3_0000;

/// `1: lodsq; test rax, rax; jz 2f; mov [rax], rax; jmp 1b; 2: hlt; jmp 1b` with the list of addresses in rsi.
const WRITE: [u8; 15] =
    [0x48, 0xAD, 0x48, 0x85, 0xC0, 0x74, 0x05, 0x48, 0x89, 0x00, 0xEB, 0xF4, 0xF4, 0xEB, 0xF1];

struct Writer {
    ram: Arc<Ram>,
    vm: Arc<Vm>,
    vcpu: Vcpu,
}

impl Writer {
    fn new() -> Writer {
        let ram = memory::new(BYTES).unwrap();
        let put = |value: u64, at| ram.write_obj(value, GuestAddress(at)).unwrap();
        // The first 8 GiB where they are, in large pages.
        put(TABLES + 0x1003, TABLES);
        for gib in 0..8 {
            put((TABLES + 0x2000 + gib * 0x1000) | 3, TABLES + 0x1000 + gib * 8);
            (0..512).for_each(|at| put(gib << 30 | at << 21 | 0x83, TABLES + 0x2000 + gib * 0x1000 + at * 8));
        }
        let gdt = [0, 0, kvm::start::CODE64, kvm::start::DATA].map(u64::to_le_bytes).concat();
        ram.write_slice(&gdt, GuestAddress(layout::BOOT_GDT)).unwrap();
        ram.write_slice(&WRITE, GuestAddress(CODE)).unwrap();
        let host = Host::open("/dev/kvm").unwrap();
        let vm = Vm::new(&host, Arc::clone(&ram), Irqchip::Absent).unwrap();
        let vcpu = Vcpu::new(&vm, 0).unwrap();
        vcpu.show(&host.supported_cpuid().unwrap()).unwrap();
        let start = Start::Long {
            entry: CODE,
            zero_page: LIST,
            page_tables: TABLES,
            stack: layout::BOOT_STACK,
            gdt: (layout::BOOT_GDT, gdt.len() as u16),
        };
        vcpu.start(start).unwrap();
        Writer { ram, vm, vcpu }
    }

    /// Lets the guest write eight bytes to each address. `nth` lists were written before.
    fn write(&mut self, at: &mut u64, addresses: &[u64]) {
        for address in addresses.iter().chain([&0]) {
            self.ram.write_obj(*address, GuestAddress(LIST + *at * 8)).unwrap();
            *at += 1;
        }
        match self.vcpu.run() {
            Exit::Hlt => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Those pages that lie where the tests write: the guest's own accessed and dirty bits are not looked at.
fn found(pages: &Pages) -> Vec<u64> {
    (0x100..PAGES).filter(|page| pages.has(*page)).collect()
}

fn page_of(address: u64) -> u64 {
    if address < BELOW { address / 4096 } else { (address - ABOVE + BELOW) / 4096 }
}

const LISTED: [u64; 6] =
    [0x20_0000, BELOW - 4096, BELOW - 8, ABOVE, ABOVE + 0x123_4560, ABOVE + (64 << 20) - 8];

#[test]
fn what_a_vcpu_writes_is_logged_on_both_sides_of_the_hole() {
    let (mut writer, mut at) = (Writer::new(), 0);
    writer.write(&mut at, &[0x30_0000, ABOVE + 0x5000]);
    let log = DirtyLog::start(&writer.vm).unwrap();
    let mut first = Pages::all(PAGES);
    log.collect(&mut first).unwrap();
    log.clear(Extent { offset: 0, bytes: BYTES }, &first).unwrap();
    let mut pages = Pages::of(PAGES);
    log.collect(&mut pages).unwrap();
    assert!(found(&pages).is_empty(), "everything was cleared: {:x?}", found(&pages));
    for _ in 0..3 {
        writer.write(&mut at, &LISTED);
        let mut pages = Pages::of(PAGES);
        log.collect(&mut pages).unwrap();
        let wanted = [page_of(LISTED[0]), BELOW / 4096 - 1, BELOW / 4096, page_of(LISTED[4]), PAGES - 1];
        assert_eq!(found(&pages), wanted);
        // Piece by piece: what is in no cleared piece stays.
        let piece = 2 << 20;
        log.clear(Extent { offset: BELOW, bytes: piece }, &pages).unwrap();
        let mut left = Pages::of(PAGES);
        log.collect(&mut left).unwrap();
        let gone = |page: &u64| !(BELOW / 4096..(BELOW + piece) / 4096).contains(page);
        assert_eq!(found(&left), wanted.into_iter().filter(gone).collect::<Vec<_>>());
        log.clear(Extent { offset: 0, bytes: BYTES }, &pages).unwrap();
    }
}

/// The vCPU's log knows nothing of devices, the marks nothing of vCPUs; together they know all.
#[test]
fn what_devices_write_is_marked_and_joins_what_vcpus_write() {
    let (mut writer, mut at) = (Writer::new(), 0);
    let log = DirtyLog::start(&writer.vm).unwrap();
    log.clear(Extent { offset: 0, bytes: BYTES }, &Pages::all(PAGES)).unwrap();
    marks::start(&writer.ram);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 10).unwrap();
    let mut ring = memory::ring::Ring::new(Arc::new(file), 4).unwrap();
    let (low, high) = (GuestAddress(BELOW - 8192), GuestAddress(ABOVE + 0x20_0000));
    ring.read(1, 0, &writer.ram, [(low, 8192), (high, 4096)]).unwrap();
    let mut done = Vec::new();
    assert!(ring.drain(std::time::Duration::from_secs(60), &mut done) && done[0].result.is_ok());
    writer.ram.write_obj(1_u32, GuestAddress(ABOVE + 0x30_0000)).unwrap();
    writer.write(&mut at, &[0x40_0000, ABOVE + 0x40_0000]);
    let mut pages = Pages::of(PAGES);
    log.collect(&mut pages).unwrap();
    assert_eq!(found(&pages), [page_of(0x40_0000), page_of(ABOVE + 0x40_0000)]);
    pages.add(&marks::take(&writer.ram));
    let edge = BELOW / 4096;
    let above = |offset: u64| page_of(ABOVE + offset);
    let wanted = [0x400, edge - 2, edge - 1, above(0x20_0000), above(0x30_0000), above(0x40_0000)];
    assert_eq!(found(&pages), wanted);
}
