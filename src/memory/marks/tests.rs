use vm_memory::{Bytes, GuestAddress};

use super::*;

const SIZE: u64 = (3 << 30) + (64 << 20);

fn pages(taken: &[Vec<u64>]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (region, words) in taken.iter().enumerate() {
        for page in 0..words.len() * 64 {
            if words[page / 64] >> (page % 64) & 1 == 1 {
                found.push((region, page));
            }
        }
    }
    found
}

#[test]
fn writes_of_devices_are_marked_on_both_sides_of_the_hole() {
    let ram = crate::new(SIZE).unwrap();
    ram.write_slice(&[1; 5000], GuestAddress(0x1000)).unwrap();
    start(&ram);
    assert_eq!(pages(&take(&ram)), []);
    ram.write_slice(&[1; 4097], GuestAddress(0x5000)).unwrap();
    ram.write_slice(&[1; 2], GuestAddress((3 << 30) - 2)).unwrap();
    ram.write_obj(7_u64, GuestAddress((4 << 30) + 0x3FF_FFF8)).unwrap();
    ram.store(7_u16, GuestAddress((4 << 30) + 2), Ordering::SeqCst).unwrap();
    let wanted = [(0, 5), (0, 6), (0, (3 << 18) - 1), (1, 0), (1, 0x3FFF)];
    assert_eq!(pages(&take(&ram)), wanted);
    assert_eq!(pages(&take(&ram)), []);
    stop(&ram);
    ram.write_slice(&[1; 5000], GuestAddress(0x1000)).unwrap();
    assert_eq!(pages(&take(&ram)), []);
}

#[test]
fn reading_marks_nothing() {
    let ram = crate::new(1 << 20).unwrap();
    start(&ram);
    let mut data = [0; 64];
    ram.read_slice(&mut data, GuestAddress(0x1000)).unwrap();
    assert_eq!(pages(&take(&ram)), []);
}

#[test]
fn what_is_given_back_has_changed() {
    let ram = crate::new(1 << 20).unwrap();
    ram.write_slice(&[1; 4096], GuestAddress(0x3000)).unwrap();
    start(&ram);
    crate::discard(&ram, GuestAddress(0x3000), 8192).unwrap();
    assert_eq!(pages(&take(&ram)), [(0, 3), (0, 4)]);
}

#[test]
fn the_marks_of_a_part_are_taken_and_no_others() {
    let ram = crate::new(SIZE).unwrap();
    start(&ram);
    let (piece, above) = (16 << 20, 4 << 30);
    for address in [0x5000, piece, piece + 0x3_F000, 2 * piece - 1, 2 * piece, above, above + piece] {
        ram.write_slice(&[1], GuestAddress(address)).unwrap();
    }
    let mut pages = Pages::of(SIZE / PAGE_BYTES);
    pages.set(3);
    take_part(&ram, Extent { offset: piece, bytes: piece }, &mut pages);
    take_part(&ram, Extent { offset: 3 << 30, bytes: piece }, &mut pages);
    let found: Vec<_> = (0..SIZE / PAGE_BYTES).filter(|page| pages.has(*page)).collect();
    assert_eq!(found, [3, 4096, 4096 + 63, 8191, 3 << 18]);
    assert_eq!(super::tests::pages(&take(&ram)), [(0, 5), (0, 8192), (1, 4096)]);
}
