use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{Backing, discard, handle, layout, touched};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const BYTES: u64 = 3 * GIB + 20 * MIB;

/// A sparse file with a value in some pages, and memory that is mapped privately from it.
fn cloned(values: &[(u64, u8)]) -> (File, Arc<Ram>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    for (offset, value) in values {
        file.write_all_at(&[*value; 4096], *offset).unwrap();
    }
    let ram = ram::build(BYTES, Backing::Private(file.try_clone().unwrap())).unwrap();
    (file, ram)
}

fn byte(ram: &Ram, offset: u64) -> u8 {
    let mut byte = [0];
    extent::read(ram, offset, &mut byte).unwrap();
    byte[0]
}

fn copied(settling: &Settling) -> Piece {
    let piece = settling.next().unwrap().unwrap();
    let Extent { offset, bytes } = piece.extent();
    for offset in (offset..offset + bytes).step_by(MIB as usize) {
        let part = Extent { offset, bytes: MIB };
        let mut data = vec![0; MIB as usize];
        extent::read(settling.ram(), offset, &mut data).unwrap();
        if !extent::is_zero(&data) {
            piece.copy(part).unwrap();
        }
    }
    piece
}

fn turn_one(settling: &Settling) -> Extent {
    let piece = copied(settling);
    piece.turn().unwrap();
    piece.extent()
}

#[test]
fn what_is_settled_is_the_same_at_the_same_addresses_and_belongs_to_nobody_else() {
    let values = [(4096, 1), (17 * MIB, 2), (3 * GIB - 4096, 3), (3 * GIB, 4), (3 * GIB + 18 * MIB, 5)];
    let (file, ram) = cloned(&values);
    extent::fill(&ram, 17 * MIB + 4096, &[6; 4096]).unwrap();
    let places = |ram: &Ram| ram.iter().map(|region| region.as_ptr() as usize).collect::<Vec<_>>();
    let before = places(&ram);
    assert!(handle(&ram).unwrap().is_none());
    let settling = Settling::begin(&ram).unwrap();
    let (mut pieces, mut left) = (0, shared_bytes(&ram));
    assert_eq!(left, BYTES);
    while settling.next().unwrap().is_some() {
        let piece = turn_one(&settling);
        assert!(piece.bytes <= PIECE_BYTES_MIN);
        left -= piece.bytes;
        assert_eq!(shared_bytes(&ram), left);
        pieces += 1;
    }
    assert_eq!((pieces, left), (192 + 2, 0));
    drop(settling);
    assert_eq!(places(&ram), before);
    for (offset, value) in values.into_iter().chain([(17 * MIB + 4096, 6), (8192, 0)]) {
        assert_eq!(byte(&ram, offset), value, "{offset:#x}");
    }
    // What is written is in the file that others are handed, and in no other.
    extent::fill(&ram, 3 * GIB, &[9; 4096]).unwrap();
    let handed = handle(&ram).unwrap().unwrap();
    assert!(sys::memfd::is_sealed(&handed));
    let (mut theirs, mut ours) = ([0], [0]);
    file.read_exact_at(&mut theirs, 3 * GIB).unwrap();
    handed.read_exact_at(&mut ours, 3 * GIB).unwrap();
    assert_eq!((theirs, ours), ([4], [9]));
    assert!(handed.metadata().unwrap().blocks() * 512 < 16 * MIB, "holes stay holes");
    assert!(touched(&ram).unwrap().iter().map(|extent| extent.bytes).sum::<u64>() < 16 * MIB);
    let next = ram::build(BYTES, Backing::Adopted(handed)).unwrap();
    assert_eq!(byte(&next, 3 * GIB + 18 * MIB), 5);
}

#[test]
fn pages_are_given_back_on_both_sides_of_what_is_settled() {
    let (_file, ram) = cloned(&[(15 * MIB, 1), (16 * MIB, 2), (18 * MIB, 3)]);
    let settling = Settling::begin(&ram).unwrap();
    turn_one(&settling);
    assert_eq!(extent::first_touched(&ram, Extent { offset: 0, bytes: 15 * MIB }).unwrap(), None);
    let rest = Extent { offset: 15 * MIB + 4096, bytes: 8 * MIB };
    assert_eq!(extent::first_touched(&ram, rest).unwrap().map(|at| at / MIB), Some(15));
    discard(&ram, GuestAddress(14 * MIB), 5 * MIB).unwrap();
    for offset in [15 * MIB, 16 * MIB, 18 * MIB] {
        assert_eq!(byte(&ram, offset), 0, "{offset:#x}");
    }
    assert!(handle(&ram).unwrap().is_none());
    turn_one(&settling);
    assert_eq!(byte(&ram, 18 * MIB), 0);
    discard(&ram, GuestAddress(14 * MIB), 5 * MIB).unwrap();
    assert_eq!(extent::first_touched(&ram, Extent { offset: 0, bytes: 32 * MIB }).unwrap(), None);
}

#[test]
fn whoever_begins_again_goes_on_and_finds_nothing_of_the_last_try() {
    let (_file, ram) = cloned(&[(4096, 1), (17 * MIB, 2)]);
    let settling = Settling::begin(&ram).unwrap();
    turn_one(&settling);
    let piece = copied(&settling);
    drop((settling, piece));
    extent::fill(&ram, 17 * MIB, &[0; 4096]).unwrap();
    let settling = Settling::begin(&ram).unwrap();
    assert_eq!(settling.next().unwrap().unwrap().extent().offset, PIECE_BYTES_MIN);
    turn_one(&settling);
    assert_eq!((byte(&ram, 4096), byte(&ram, 17 * MIB)), (1, 0));
}

#[test]
fn memory_of_its_own_has_nothing_left_to_settle() {
    let ram = ram::new(64 * MIB).unwrap();
    let settling = Settling::begin(&ram).unwrap();
    assert!(settling.next().unwrap().is_none() && shared_bytes(&ram) == 0);
    assert_eq!(layout::ram_ranges(64 * MIB).len(), 1);
}

/// Many pieces of private memory may have been given back before: each is a mapping of its own.
#[test]
fn pieces_with_holes_of_the_guest_are_turned_whole() {
    let (_file, ram) = cloned(&[(2 * MIB, 1), (6 * MIB, 2)]);
    discard(&ram, GuestAddress(2 * MIB), 2 * MIB).unwrap();
    discard(&ram, GuestAddress(10 * MIB), 2 * MIB).unwrap();
    let settling = Settling::begin(&ram).unwrap();
    turn_one(&settling);
    assert_eq!((byte(&ram, 2 * MIB), byte(&ram, 6 * MIB)), (0, 2));
    ram.write_obj(7u8, GuestAddress(2 * MIB)).unwrap();
    turn_all(&settling);
    let own = ram::build(BYTES, Backing::Adopted(handle(&ram).unwrap().unwrap())).unwrap();
    assert_eq!(byte(&own, 2 * MIB), 7);
}

fn turn_all(settling: &Settling) {
    while settling.next().unwrap().is_some() {
        turn_one(settling);
    }
}

#[test]
fn what_is_zero_again_after_it_was_copied_is_so_behind_the_turn() {
    let (_file, ram) = cloned(&[(MIB, 1), (MIB + 4096, 2), (17 * MIB, 3)]);
    let settling = Settling::begin(&ram).unwrap();
    let piece = copied(&settling);
    extent::fill(&ram, MIB, &[0; 4096]).unwrap();
    piece.clear(Extent { offset: MIB, bytes: 4096 }).unwrap();
    piece.turn().unwrap();
    assert_eq!([MIB, MIB + 4096, 17 * MIB].map(|offset| byte(&ram, offset)), [0, 2, 3]);
    // Nothing of it can be done twice, or to what it does not hold.
    assert!(piece.turn().is_err());
    for part in [(17 * MIB, 4096), (15 * MIB, 2 * MIB), (0, u64::MAX)] {
        let part = Extent { offset: part.0, bytes: part.1 };
        assert!(piece.copy(part).is_err() && piece.clear(part).is_err(), "{part:?}");
    }
    assert_eq!(byte(&ram, 17 * MIB), 3);
}

/// A machine stands still for each piece, and each is held twice for a moment.
#[test]
fn pieces_grow_with_memory_up_to_what_may_be_held_twice() {
    for (gib, mib) in [(1, 16), (8, 16), (16, 32), (17, 34), (32, 64), (64, 64), (1024, 64)] {
        assert_eq!(piece_bytes(gib << 30), mib << 20, "{gib} GiB");
    }
    assert_eq!(piece_bytes((20 << 30) + 4096), 42 << 20);
}
