use super::*;
use crate::layout::RAM_BELOW_4G_MAX;
use crate::{Backing, build, discard, new};

const BYTES: u64 = RAM_BELOW_4G_MAX + (64 << 20);

#[test]
fn only_what_was_touched_is_told_on_both_sides_of_the_hole() {
    let ram = new(BYTES).unwrap();
    assert_eq!(touched(&ram).unwrap(), []);
    fill(&ram, 0x5000, &[7; 10]).unwrap();
    fill(&ram, RAM_BELOW_4G_MAX - 2, b"abcd").unwrap();
    let page = |offset, pages: u64| Extent { offset, bytes: pages * 4096 };
    // What crosses the end of a region is told in two parts.
    let edge = RAM_BELOW_4G_MAX;
    assert_eq!(touched(&ram).unwrap(), [page(0x5000, 1), page(edge - 4096, 1), page(edge, 1)]);
    let mut data = [0; 4];
    read(&ram, RAM_BELOW_4G_MAX - 2, &mut data).unwrap();
    assert_eq!(&data, b"abcd");
    ram.read_slice(&mut data[..2], GuestAddress(4 << 30)).unwrap();
    assert_eq!(&data, b"cdcd");
}

#[test]
fn beyond_the_end_nothing_is_read_or_written() {
    let ram = new(1 << 20).unwrap();
    for offset in [(1 << 20) - 3, 1 << 20, u64::MAX - 8] {
        assert!(matches!(fill(&ram, offset, &[1; 4]), Err(Error::Range { .. })), "{offset:#x}");
        assert!(matches!(read(&ram, offset, &mut [1; 4]), Err(Error::Range { .. })), "{offset:#x}");
    }
}

#[test]
fn a_private_mapping_leaves_its_file_alone_and_an_adopted_one_shares_it() {
    let file = sys::memfd::create("parent", 8 << 20).unwrap();
    let parent = build(8 << 20, Backing::Adopted(file.try_clone().unwrap())).unwrap();
    fill(&parent, 0, &[1; 4 << 20]).unwrap();
    let child = build(8 << 20, Backing::Private(file.try_clone().unwrap())).unwrap();
    fill(&child, 4096, &[2; 4096]).unwrap();
    discard(&child, GuestAddress(2 << 20), 2 << 20).unwrap();
    assert!(matches!(discard(&child, GuestAddress(0), 4096), Err(Error::Discard(_))));
    let mut page = [9; 4096];
    for (ram, offset, wanted) in
        [(&parent, 4096, 1), (&child, 4096, 2), (&child, 0, 1), (&parent, 2 << 20, 1), (&child, 2 << 20, 0)]
    {
        read(ram, offset, &mut page).unwrap();
        assert_eq!(page, [wanted; 4096]);
    }
    assert_eq!(touched(&child).unwrap(), [Extent { offset: 0, bytes: 8 << 20 }]);
}

#[test]
fn files_that_are_no_memory_of_this_size_are_refused() {
    let file = sys::memfd::create("parent", 4 << 20).unwrap();
    let refused = build(8 << 20, Backing::Private(file.try_clone().unwrap()));
    assert!(matches!(refused, Err(Error::Length { found: 0x40_0000, wanted: 0x80_0000 })));
    assert!(matches!(build(8 << 20, Backing::Adopted(file)), Err(Error::Length { .. })));
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(8 << 20).unwrap();
    assert!(matches!(build(8 << 20, Backing::Adopted(plain)), Err(Error::NotSealed)));
}

#[test]
fn zeroes_are_known_from_anything_else() {
    for length in [0, 1, 15, 16, 17, 4096] {
        let mut data = vec![0; length];
        assert!(is_zero(&data));
        for at in [0, length / 2, length.saturating_sub(1)] {
            if let Some(byte) = data.get_mut(at) {
                *byte = 1;
                assert!(!is_zero(&data));
                data[at] = 0;
            }
        }
    }
}

#[test]
fn a_part_is_sent_and_received_across_the_hole() {
    let (from, to) = (new(BYTES).unwrap(), new(BYTES).unwrap());
    let part = Extent { offset: RAM_BELOW_4G_MAX - 8192, bytes: 16384 };
    fill(&from, part.offset + 4090, &[9; 8000]).unwrap();
    let mut sent = Vec::new();
    send(&from, part, &mut sent).unwrap();
    assert_eq!(sent.len(), 16384);
    receive(&to, part, &mut sent.as_slice()).unwrap();
    let mut data = [0; 16384];
    read(&to, part.offset, &mut data).unwrap();
    assert!(data == sent.as_slice());
    assert!(receive(&to, part, &mut &sent[..100]).is_err(), "it ends too early");
    let beyond = Extent { offset: BYTES - 4096, bytes: 8192 };
    assert!(matches!(send(&from, beyond, &mut Vec::new()), Err(Error::Range { .. })));
}

#[test]
fn the_first_touched_page_of_a_part_is_found_and_looking_makes_none() {
    let ram = new(BYTES).unwrap();
    let edge = RAM_BELOW_4G_MAX;
    for at in [0x5000, 0x9000, edge + 4096] {
        fill(&ram, at, &[1]).unwrap();
    }
    for (offset, bytes, wanted) in [
        (0, BYTES, Some(0x5000)),
        (0x5000, 0x1000, Some(0x5000)),
        (0x6000, 0x3000, None),
        (0x6000, 0x4000, Some(0x9000)),
        (edge - 4096, 0x2000, None),
        (edge - 4096, 0x3000, Some(edge + 4096)),
        (edge + 8192, BYTES - edge - 8192, None),
    ] {
        assert_eq!(first_touched(&ram, Extent { offset, bytes }).unwrap(), wanted, "{offset:#x} {bytes:#x}");
    }
    assert_eq!(touched(&ram).unwrap().len(), 3);
}
