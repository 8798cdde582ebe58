use vm_memory::Bytes;

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
