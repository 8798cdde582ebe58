use proptest::prelude::*;
use std::path::Path;

use devices::serial::SerialState;
use devices::virtio::transport::pci::{CommonState, FunctionState, QueueState, SignalsState};
use kvm::{CpuState, VmState};

use super::contents::MachineState;
use super::*;
use wire::saved::table::Part;

/// One of everything, with numbers that are easy to tell apart.
fn contents() -> Contents {
    let function = FunctionState {
        device: "disk0".to_owned(),
        device_type: 2,
        config: vec![0, 0, 0, 0, 6],
        msix: devices::pci::msix::MsixState { entries: vec![[3; 16]; 2], pending: vec![1] },
        common: CommonState {
            features: 1 << 32 | 1 << 29,
            unknown_features: false,
            device_select: 1,
            driver_select: 1,
            status: 15,
            queue_select: 0,
            queues: vec![QueueState { size: 256, enabled: true, addresses: [0x1000, 0x2000, 0x3000] }],
        },
        signals: SignalsState {
            config_vector: 0,
            queue_vectors: vec![1],
            isr: 0,
            generation: 7,
            broken: false,
        },
        stand: Some(devices::virtio::Stand {
            queues: vec![(0, devices::virtio::Position { next: 517, signalled: 516 })],
            limits: vec![devices::limiter::LimiterState {
                bandwidth: Some(devices::limiter::LevelState { tokens: -4096, nano_tokens: 5 }),
                operations: None,
            }],
        }),
        own: devices::state::Numbers::of([("sectors", 131_072), ("writeback", 1)]),
    };
    let cpu = CpuState {
        mp_state: 0,
        regs: vec![1; 144],
        sregs: vec![2; 312],
        xsave: vec![3; 576],
        xcrs: vec![1, 0, 0, 0],
        debugregs: vec![4; 128],
        lapic: vec![5; 1024],
        events: vec![6; 64],
        msrs: vec![(0x10, 1 << 40), (0x4B56_4D01, 0x5001)],
        tsc_khz: 2_400_000,
    };
    Contents {
        shape: Shape { memory_bytes: 64 << 20, vcpus: 1, disks: 1, nics: 0 },
        machine: MachineState {
            cpuid: vec![(0, 0, false, [13, 1, 2, 3]), (7, 1, true, [4, 5, 6, 7])],
            cpus: vec![cpu],
            vm: VmState { irqchips: [vec![1; 8], vec![2; 8], vec![3; 200]], pit: vec![9; 112] },
            clock_ns: 12_345_678_901,
            wall_ns: 1_790_000_000_000_000_000,
            pci_address: 0x8000_1000,
            functions: vec![function],
            serial: SerialState {
                divisor: [12, 0],
                interrupt_enable: 1,
                interrupt_identification: 1,
                line_control: 3,
                line_status: 0x61,
                modem_control: 8,
                modem_status: 0xB0,
                scratch: 0,
                received: b"ls".to_vec(),
            },
            events: 1,
        },
        counted: Counted::default(),
    }
}

fn table() -> Table {
    let part = |offset, bytes, fill| Part { offset, bytes, digest: Digest([fill; 32]) };
    Table { memory_bytes: 64 << 20, parts: vec![part(0, 4096, 1), part(1 << 20, 1 << 20, 2)] }
}

fn written() -> (File, Digest, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    let (root, length) = write(&file, &contents(), &table()).unwrap();
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    (file, root, bytes)
}

#[test]
fn what_is_written_is_read() {
    let (file, root, _) = written();
    assert_eq!(read(&file, root, 64 << 20).unwrap(), (contents(), table()));
}

/// Files of every released version, kept for ever. A new version adds a file and changes none. To make it, delete
/// nothing and run this test with TOFT_GOLDEN=<name>.
#[test]
fn golden_files_still_open() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshot/golden");
    if let Some(name) = std::env::var_os("TOFT_GOLDEN") {
        std::fs::write(folder.join(name), written().2).unwrap();
    }
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let opened = parse(&std::fs::read(&path).unwrap());
        assert_eq!(opened.unwrap(), (contents(), table()), "{}", path.display());
        count += 1;
    }
    assert!(count >= 1);
}

#[test]
fn another_file_than_the_one_that_was_named_is_not_looked_at() {
    let (file, root, bytes) = written();
    let refused = |changed: &[u8]| {
        let other = tempfile::tempfile().unwrap();
        other.write_all_at(changed, 0).unwrap();
        read(&other, root, 64 << 20).unwrap_err()
    };
    for at in (0..bytes.len()).step_by(97) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x20;
        assert!(matches!(refused(&flipped), Error::Root { .. }), "a bit of byte {at}");
    }
    assert!(matches!(refused(&bytes[..bytes.len() - 1]), Error::Root { .. }));
    assert!(matches!(refused(&[&bytes[..], &[0]].concat()), Error::Root { .. }));
    // An older one of the same machine.
    let (older, _) = write(&file, &contents(), &Table { parts: Vec::new(), ..table() }).unwrap();
    assert_ne!(older, root);
    assert!(matches!(read(&file, root, 64 << 20), Err(Error::Root { .. })));
}

#[test]
fn a_file_that_is_too_long_is_not_read() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(matches!(read(&file, Digest([0; 32]), 1 << 30), Err(Error::TooLong { .. })));
}

/// Whoever holds the root might have written anything: a right digest says nothing of the form.
#[test]
fn memory_that_was_not_saved_is_not_used() {
    let ram = memory::new(8 << 20).unwrap();
    memory::fill(&ram, 3 << 20, &[5; 10_000]).unwrap();
    memory::fill(&ram, 1 << 20, &[0; 4096]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let extents = memory::touched(&ram).unwrap();
    let take = |part: memory::Extent, data: &mut [u8]| memory::read(&ram, part.offset, data);
    let parts = || Parts::new(&extents);
    let (table, written) =
        copy_out(parts(), 8 << 20, (&file, None), take, || Some(3 << 20), |_| true).unwrap();
    // Zeroes are not written.
    assert_eq!((table.parts.len(), table.parts[0].offset, table.bytes()), (1, 3 << 20, 12_288));
    assert_eq!(written, 12_288);
    let file = MemoryFiles::one(file);
    let copy = memory::new(8 << 20).unwrap();
    copy_in(&copy, &table, &file).unwrap();
    let mut data = [0; 10_000];
    memory::read(&copy, 3 << 20, &mut data).unwrap();
    assert_eq!(data, [5; 10_000]);
    file.own.write_all_at(&[6], (3 << 20) + 5000).unwrap();
    let refused = copy_in(&memory::new(8 << 20).unwrap(), &table, &file);
    assert!(matches!(refused, Err(Error::Chunk { offset: 0x30_0000 })));
    file.own.set_len(3 << 20).unwrap();
    assert!(matches!(copy_in(&copy, &table, &file), Err(Error::File { .. })));
    let cancelled = copy_out(parts(), 8 << 20, (&file.own, None), take, || None, |_| false);
    assert!(matches!(cancelled, Err(Error::Cancelled)));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        cut in any::<prop::sample::Index>(),
    ) {
        let (_, _, mut bytes) = written();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = parse(&bytes);
        let _ = parse(&bytes[..cut.index(bytes.len())]);
    }
}
