//! The ring against the simplest oracle: a growing vector of everything ever written.
use proptest::prelude::*;

use super::*;

fn ring(capacity: u64) -> (Ring, Ring) {
    let file = tempfile::tempfile().unwrap();
    let writer = Ring::create(file.try_clone().unwrap(), capacity).unwrap();
    (writer, Ring::open(file).unwrap())
}

proptest! {
    #[test]
    fn readers_see_what_was_written_or_a_gap_at_the_old_end(
        writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6000), 1..20),
        step in 1usize..5000,
    ) {
        let (mut writer, mut reader) = ring(4096);
        let mut all = Vec::new();
        let mut position = 0;
        for data in writes {
            all.extend_from_slice(&data);
            prop_assert_eq!(writer.append(&data).unwrap(), all.len() as u64);
            let piece = reader.read(position, step).unwrap();
            let oldest = (all.len() as u64).saturating_sub(4096 - STEP);
            prop_assert_eq!(piece.start, position.max(oldest));
            prop_assert!(piece.data.len() <= step);
            prop_assert_eq!(&all[piece.start as usize..piece.end() as usize], &piece.data[..]);
            position = piece.end();
        }
    }
}

#[test]
fn bytes_that_are_being_overwritten_are_never_read_as_old_ones() {
    let (mut writer, mut reader) = ring(4096);
    writer.append(&[b'a'; 4096]).unwrap();
    // The writer has put down the next bytes and not yet counted them.
    writer.file.write_all_at(&[b'b'; STEP as usize], DATA).unwrap();
    let piece = reader.read(0, 4096).unwrap();
    assert_eq!(piece, Piece { start: STEP, data: vec![b'a'; 4096 - STEP as usize] });
}

#[test]
fn a_count_that_no_console_reaches_is_refused() {
    let (writer, _) = ring(4096);
    writer.file.write_all_at(&(u64::MAX - 10).to_le_bytes(), 16).unwrap();
    assert_eq!(Ring::open(writer.file).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn two_readers_of_one_ring_see_the_same_bytes() {
    let (mut writer, mut first) = ring(8192);
    let mut second = Ring::open(first.file.try_clone().unwrap()).unwrap();
    writer.append(b"login: ").unwrap();
    assert_eq!(first.read(0, 100).unwrap(), second.read(0, 100).unwrap());
}

#[test]
fn a_position_beyond_the_end_reads_nothing() {
    let (mut writer, mut reader) = ring(4096);
    writer.append(b"abc").unwrap();
    assert_eq!(reader.read(u64::MAX, 10).unwrap(), Piece { start: 3, data: vec![] });
}

#[test]
fn a_capacity_out_of_bounds_is_refused() {
    for capacity in [0, CONSOLE_RING_BYTES_MIN - 1, CONSOLE_RING_BYTES_MAX + 1, u64::MAX] {
        let refused = Ring::create(tempfile::tempfile().unwrap(), capacity).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{capacity}");
    }
}

#[test]
fn damaged_headers_are_refused() {
    for (at, bytes) in [(0, b"XXXXXXXX"), (8, b"\xff\xff\xff\xff\xff\xff\xff\xff"), (8, b"\0\0\0\0\0\0\0\0")]
    {
        let (writer, _) = ring(4096);
        writer.file.write_all_at(bytes, at).unwrap();
        assert_eq!(Ring::open(writer.file).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
    assert!(Ring::open(tempfile::tempfile().unwrap()).is_err());
}

#[test]
fn what_another_ring_held_goes_on_where_it_was() {
    let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut from = Ring::create(from, 4096).unwrap();
    let mut to = Ring::create(to, 4096).unwrap();
    from.append(&[b'x'; 6000]).unwrap();
    from.append(b"end").unwrap();
    let piece = from.read(0, 8192).unwrap();
    assert_eq!(to.adopt(piece.start, &piece.data).unwrap(), 6003);
    assert_eq!(to.read(5000, 8192).unwrap(), from.read(5000, 8192).unwrap());
    assert_eq!(to.adopt(6003, b"more").unwrap(), 6007);
    assert!(to.adopt(6003, b"again").is_err() && to.adopt(7000, b"gap").is_err());
    let mut other = Ring::create(tempfile::tempfile().unwrap(), 4096).unwrap();
    assert!(other.adopt(u64::MAX - 2, b"far").is_err());
    // Nor so far that what the guest writes next makes it a ring that nobody opens.
    assert!(other.adopt(WRITTEN_MAX - 3, b"far").is_err());
    assert_eq!(other.adopt(ADOPTED_MAX - 3, b"far").unwrap(), ADOPTED_MAX);
    other.append(b"more").unwrap();
    assert!(Ring::open(other.file).is_ok());
}
