use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn memory_up_to_three_gibibytes_is_one_range() {
    assert_eq!(layout::ram_ranges(64 * MIB), [(0, 64 * MIB)]);
    assert_eq!(layout::ram_ranges(3 * GIB), [(0, 3 * GIB)]);
}

#[test]
fn memory_above_three_gibibytes_continues_at_four() {
    assert_eq!(layout::ram_ranges(3 * GIB + 2 * MIB), [(0, 3 * GIB), (4 * GIB, 2 * MIB)]);
}

#[test]
fn both_sides_of_the_hole_are_different_memory() {
    let ram = new(3 * GIB + 2 * MIB).unwrap();
    ram.write_obj(1u64, GuestAddress(3 * GIB - 8)).unwrap();
    ram.write_obj(2u64, GuestAddress(4 * GIB)).unwrap();
    assert_eq!(ram.read_obj::<u64>(GuestAddress(3 * GIB - 8)).unwrap(), 1);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(4 * GIB)).unwrap(), 2);
    assert!(ram.write_obj(3u64, GuestAddress(3 * GIB)).is_err());
}

#[test]
fn discarded_memory_reads_zero_and_its_neighbours_stay() {
    let ram = new(3 * GIB + 4 * MIB).unwrap();
    for address in [4 * GIB, 4 * GIB + 4096] {
        ram.write_obj(7u64, GuestAddress(address)).unwrap();
    }
    discard(&ram, GuestAddress(4 * GIB), 4096).unwrap();
    assert_eq!(ram.read_obj::<u64>(GuestAddress(4 * GIB)).unwrap(), 0);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(4 * GIB + 4096)).unwrap(), 7);
}

#[test]
fn a_range_that_is_not_all_ram_is_not_discarded() {
    let ram = new(64 * MIB).unwrap();
    let cases = [(64 * MIB, 4096), (64 * MIB - 4096, 8192), (0, 0), (u64::MAX, 1), (4096, u64::MAX)];
    for (start, bytes) in cases {
        assert!(
            matches!(discard(&ram, GuestAddress(start), bytes), Err(Error::Range { .. })),
            "{start:#x}+{bytes:#x}"
        );
    }
}

#[test]
fn memory_that_a_file_replaces_lies_where_it_lay_and_leaves_the_file_alone() {
    let bytes = 3 * GIB + 4 * MIB;
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    for (offset, value) in [(4096, 1u8), (3 * GIB - 4096, 2), (3 * GIB, 3), (3 * GIB + 2 * MIB, 4)] {
        file.write_all_at(&[value; 4096], offset).unwrap();
    }
    let places = |ram: &Ram| ram.iter().map(|region| region.as_ptr() as usize).collect::<Vec<_>>();
    let unused = new(bytes).unwrap();
    let before = places(&unused);
    let mapping = Arc::downgrade(&unused);
    let ram = replace(unused, file.try_clone().unwrap()).unwrap();
    assert_eq!(places(&ram), before);
    let cases = [(4096, 1), (3 * GIB - 4096, 2), (4 * GIB, 3), (4 * GIB + 2 * MIB, 4), (8192, 0)];
    for (address, value) in cases {
        assert_eq!(ram.read_obj::<u8>(GuestAddress(address)).unwrap(), value, "{address:#x}");
        ram.write_obj(9u8, GuestAddress(address)).unwrap();
    }
    discard(&ram, GuestAddress(4 * GIB + 2 * MIB), 2 * MIB).unwrap();
    assert_eq!(ram.read_obj::<u8>(GuestAddress(4 * GIB + 2 * MIB)).unwrap(), 0);
    let mut byte = [0];
    for (offset, value) in [(4096, 1), (3 * GIB, 3), (3 * GIB + 2 * MIB, 4)] {
        file.read_exact_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [value]);
    }
    // The mapping stays as long as any of it is used.
    assert!(mapping.upgrade().is_some());
    drop(ram);
    assert!(mapping.upgrade().is_none());
}

#[test]
fn a_file_of_another_length_replaces_nothing() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    assert!(matches!(replace(new(2 * MIB).unwrap(), file), Err(Error::Length { .. })));
}

/// The kernel's flags of the mapping that a place lies in (proc(5), smaps).
fn flags_of(place: usize) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines();
    let within = |line: &str| {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        let [from, to] = [from, to].map(|word| usize::from_str_radix(word, 16));
        Some((from.ok()?..to.ok()?).contains(&place))
    };
    lines.find(|line| within(line) == Some(true)).expect("it is mapped");
    lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap().to_owned()
}

#[test]
fn parts_of_other_files_are_laid_over_and_no_file_is_written() {
    let bytes = 3 * GIB + 4 * MIB;
    let files: Vec<_> = [1u8, 2]
        .into_iter()
        .map(|value| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            for offset in [MIB, 3 * GIB - MIB, 3 * GIB] {
                file.write_all_at(&[value; 8192], offset).unwrap();
            }
            file
        })
        .collect();
    let own = || files[0].try_clone().unwrap();
    for ram in [build(bytes, Backing::Private(own())).unwrap(), replace(new(bytes).unwrap(), own()).unwrap()]
    {
        // One page, and a part on both sides of the hole.
        lay_over(&ram, Extent { offset: MIB, bytes: 4096 }, &files[1]).unwrap();
        lay_over(&ram, Extent { offset: 3 * GIB - MIB, bytes: 2 * MIB }, &files[1]).unwrap();
        let cases = [(MIB, 2), (MIB + 4096, 1), (3 * GIB - MIB, 2), (4 * GIB, 2), (4 * GIB + MIB, 0)];
        for (address, value) in cases {
            assert_eq!(ram.read_obj::<u8>(GuestAddress(address)).unwrap(), value, "{address:#x}");
            ram.write_obj(9u8, GuestAddress(address)).unwrap();
        }
        for address in [0, MIB, 4 * GIB] {
            let place = ram.get_host_address(GuestAddress(address)).unwrap() as usize;
            assert!(flags_of(place).contains("dd"), "{address:#x} would be in a core file");
        }
        for (part, file) in [
            (Extent { offset: bytes - 4096, bytes: 8192 }, &files[1]),
            (Extent { offset: u64::MAX - 4095, bytes: 8192 }, &files[1]),
            (Extent { offset: 0, bytes: 4096 }, &tempfile::tempfile().unwrap()),
        ] {
            assert!(matches!(lay_over(&ram, part, file), Err(Error::Length { .. })), "{part:?}");
        }
    }
    for (file, value) in files.iter().zip([1, 2]) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, 3 * GIB).unwrap();
        assert_eq!(byte, [value]);
    }
    // Memory that others share is not taken from them.
    let shared = new(4 * MIB).unwrap();
    let refused = lay_over(&shared, Extent { offset: 0, bytes: 4096 }, &files[1]);
    assert!(matches!(refused, Err(Error::Range { .. })));
}
