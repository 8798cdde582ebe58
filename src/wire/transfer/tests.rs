use super::*;

fn open(stream: u16, streams: u16) -> Order {
    Order::new(&Open::new(stream, streams, 64 << 20))
}

fn head(kind: Kind, length: u32, offset: u64) -> Head {
    Head { kind, length, offset }
}

#[test]
fn what_is_written_is_read() {
    let mut bytes = Vec::new();
    Open::new(1, 3, 7 << 21).write(&mut bytes).unwrap();
    Word::Round { number: 3, last: true }.write(&mut bytes).unwrap();
    Word::Refused { detail: "ü".repeat(5000) }.write(&mut bytes).unwrap();
    let mut rest = bytes.as_slice();
    let mut next = || {
        let head = Head::read(&mut rest).unwrap();
        (head.kind, head.read_body(&mut rest).unwrap())
    };
    let (kind, body) = next();
    assert_eq!((kind, Open::parse(&body).unwrap()), (Kind::Open, Open::new(1, 3, 7 << 21)));
    assert_eq!(Word::parse(&next().1).unwrap(), Word::Round { number: 3, last: true });
    assert_eq!(Word::parse(&next().1).unwrap(), Word::Refused { detail: "ü".repeat(1024) });
    assert!(rest.is_empty());
}

#[test]
fn heads_that_no_honest_end_writes_are_refused() {
    for (kind, length, offset) in [
        (Kind::Open, 0, 0),
        (Kind::Open, DOCUMENT_BYTES_MAX + 1, 0),
        (Kind::Word, 5, 1),
        (Kind::Part, 0, 0),
        (Kind::Part, 4095, 0),
        (Kind::Part, 4096, 1),
        (Kind::Part, 8192, SHARD_BYTES - 4096),
        (Kind::Part, SHARD_BYTES as u32 + 4096, 0),
        (Kind::Zero, 4096, u64::MAX),
        (Kind::Packed, 0, 0),
        (Kind::Packed, 4097, 0),
        (Kind::Packed, PACKED_BYTES_MAX + 4096, 0),
        (Kind::Packed, 8192, SHARD_BYTES - 4096),
        (Kind::Console, 1, u64::MAX),
        (Kind::Console, CONSOLE_PIECE_BYTES_MAX + 1, 0),
        (Kind::State, STATE_BYTES_MAX as u32 + 1, 0),
        (Kind::End, 1, 0),
        (Kind::Sync, 0, 1),
        (Kind::Block, 0, 0),
        (Kind::Block, 511, 0),
        (Kind::Block, 512, 1),
        (Kind::Block, BLOCK_BYTES_MAX + 512, 0),
        (Kind::Hole, HOLE_BYTES_MAX + 512, 0),
        (Kind::Owed, 0, 0),
        (Kind::Owed, 7, 0),
        (Kind::Owed, OWED_BYTES_MAX + 8, 0),
        (Kind::Owed, 8, 4096),
        (Kind::Ask, 0, 0),
        (Kind::Ask, 4095, 0),
        (Kind::Ask, ASK_BYTES_MAX + 4096, 0),
        (Kind::Ask, 8192, SHARD_BYTES - 4096),
    ] {
        let bytes = head(kind, length, offset).bytes();
        assert!(matches!(Head::parse(bytes), Err(FrameError::Bounds { .. })), "{kind:?} {length} {offset}");
    }
    assert!(matches!(Head::parse([0; HEAD_BYTES]), Err(FrameError::Kind(0))));
    assert!(matches!(Head::parse([0xFF; HEAD_BYTES]), Err(FrameError::Kind(_))));
}

#[test]
fn memory_comes_over_its_own_stream_and_lies_inside() {
    let mut order = open(1, 2);
    assert!(order.admit(&head(Kind::Part, 4096, SHARD_BYTES)).is_ok());
    assert!(order.admit(&head(Kind::Part, 4096, 0)).is_err());
    assert!(order.admit(&head(Kind::Zero, 4096, 2 * SHARD_BYTES)).is_err());
    assert!(order.admit(&head(Kind::Part, 4096, (64 << 20) + SHARD_BYTES)).is_err());
    assert!(order.admit(&head(Kind::Part, 4096, (64 << 20) - 4096)).is_ok());
    for kind in [Kind::Word, Kind::State, Kind::Console, Kind::Open] {
        assert!(matches!(order.admit(&head(kind, 4, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
    assert!(order.admit(&head(Kind::End, 0, 4096)).is_err(), "it carried two pages");
    assert!(order.admit(&head(Kind::End, 0, 8192)).is_ok());
    assert!(order.admit(&head(Kind::End, 0, 8192)).is_err());
    assert!(order.admit(&head(Kind::Part, 4096, SHARD_BYTES)).is_err());
}

#[test]
fn the_state_comes_once_and_after_memory() {
    let mut order = open(0, 1);
    assert!(order.admit(&head(Kind::State, 4, 0)).is_err());
    assert!(order.admit(&head(Kind::Console, 10, 5)).is_ok());
    assert!(order.admit(&head(Kind::Console, 10, 5)).is_err(), "what came comes again");
    assert!(order.admit(&head(Kind::End, 0, 0)).is_ok());
    assert!(order.admit(&head(Kind::Console, 10, 15)).is_ok());
    assert!(order.admit(&head(Kind::State, 4, 0)).is_ok());
    assert!(order.admit(&head(Kind::State, 4, 0)).is_err());
    assert!(order.admit(&head(Kind::Console, 10, 25)).is_err());
    assert!(order.admit(&head(Kind::Word, 4, 0)).is_ok());
}

#[test]
fn a_length_is_not_believed_before_as_much_has_come() {
    let head = head(Kind::State, STATE_BYTES_MAX as u32, 0);
    let error = head.read_body(&mut [1, 2, 3].as_slice()).unwrap_err();
    assert!(matches!(error, FrameError::Link(_)), "{error}");
}

#[test]
fn another_version_is_told_apart_from_nonsense() {
    let other = br#"{"magic":"toft-move","version":2,"stream":0,"streams":1,"memory_bytes":1}"#;
    assert!(matches!(Open::parse(other), Err(FrameError::Version(_))));
    let out = br#"{"magic":"toft-move","version":1,"stream":1,"streams":1,"memory_bytes":1}"#;
    assert!(matches!(Open::parse(out), Err(FrameError::Document(_))));
    assert!(matches!(Open::parse(b"{}"), Err(FrameError::Document(_))));
}

#[test]
fn a_disk_has_a_stream_of_its_own_and_nothing_beyond_its_end() {
    let bytes = (1 << 20) + 512;
    let mut order = Order::new(&Open::of_disk(2, bytes));
    assert!(order.admit(&head(Kind::Block, 512, 1 << 20)).is_ok());
    assert!(order.admit(&head(Kind::Hole, 1 << 20, 0)).is_ok());
    assert!(order.admit(&head(Kind::Sync, 0, 0)).is_ok());
    for (kind, length, offset) in
        [(Kind::Block, 1024, 1 << 20), (Kind::Hole, 512, bytes), (Kind::Block, 512, u64::MAX - 511)]
    {
        assert!(matches!(order.admit(&head(kind, length, offset)), Err(FrameError::Bounds { .. })));
    }
    for kind in [Kind::Part, Kind::Zero, Kind::State, Kind::Console, Kind::Word, Kind::Open] {
        assert!(matches!(order.admit(&head(kind, 4096, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
    assert!(order.admit(&head(Kind::End, 0, 511)).is_err(), "it carried 512 bytes");
    assert!(order.admit(&head(Kind::End, 0, 512)).is_ok() && order.has_ended());
    assert!(order.admit(&head(Kind::Block, 512, 0)).is_err());
    let mut memory = open(0, 1);
    for kind in [Kind::Block, Kind::Hole, Kind::Sync] {
        assert!(matches!(memory.admit(&head(kind, 512, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
}

/// It is the guest's, which runs on at the source: whatever wrote to it here would write under the guest's hands.
#[test]
fn no_memory_comes_where_it_was_handed_over() {
    let (one, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let of = |file: &File| Open::of_handed(64 << 20, Handed::of(file).unwrap());
    assert!(of(&one) == of(&one.try_clone().unwrap()) && of(&one) != of(&other));
    let mut order = Order::new(&of(&one));
    for kind in [Kind::Part, Kind::Zero, Kind::Console] {
        assert!(matches!(order.admit(&head(kind, 4096, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
    order.admit(&head(Kind::Word, 10, 0)).unwrap();
    order.admit(&head(Kind::End, 0, 0)).unwrap();
    order.admit(&head(Kind::State, 10, 0)).unwrap();
}

#[test]
fn packed_memory_comes_only_where_it_may_and_is_shorter_than_what_it_is() {
    let mut order = open(0, 1);
    assert!(matches!(order.admit(&head(Kind::Packed, 4096, 0)), Err(FrameError::Order(_))));
    let mut order = Order::new(&Open::packing(0, 1, 64 << 20));
    assert!(order.admit(&head(Kind::Packed, 8192, 4096)).is_ok());
    assert!(order.admit(&head(Kind::Packed, 4096, 64 << 20)).is_err());
    assert_eq!(order.carried_bytes(), 8192);
    assert!(Open::packing(0, 1, 4096).is_for(&Open::new(0, 1, 4096)));
    assert!(!Open::packing(0, 1, 4096).is_for(&Open::new(0, 1, 8192)));

    let mut bytes = Vec::new();
    write_packed(&mut bytes, 4096, 8192, &[7; 100]).unwrap();
    let mut rest = bytes.as_slice();
    let read = Head::read(&mut rest).unwrap();
    assert_eq!((read, read.read_packed(&mut rest).unwrap()), (head(Kind::Packed, 8192, 4096), vec![7; 100]));
    assert!(write_packed(&mut bytes, 0, 4096, &[7; 4096]).is_err());
    for count in [0_u32, 4096, u32::MAX] {
        let body = [&count.to_le_bytes()[..], &[7; 8192]].concat();
        let refused = head(Kind::Packed, 4096, 0).read_packed(&mut body.as_slice());
        assert!(matches!(refused, Err(FrameError::Document(Kind::Packed))), "{count}");
    }
    let cut = [&100_u32.to_le_bytes()[..], &[7; 99]].concat();
    assert!(matches!(head(Kind::Packed, 4096, 0).read_packed(&mut cut.as_slice()), Err(FrameError::Link(_))));
}

#[test]
fn what_is_owed_comes_behind_the_end_and_only_where_that_was_agreed() {
    const ALL: u64 = 64 << 20;
    for kind in [Kind::Owed, Kind::Sync, Kind::Ask] {
        assert!(matches!(open(0, 1).admit(&head(kind, 64, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
    let mut order = Order::new(&Open::owing(1, 2, ALL));
    assert!(order.admit(&head(Kind::Owed, 64, SHARD_BYTES)).is_ok());
    assert!(order.admit(&head(Kind::Owed, 64, 0)).is_err(), "another stream's");
    assert!(order.admit(&head(Kind::Owed, 64, ALL + SHARD_BYTES)).is_err());
    assert!(order.clone().admit(&head(Kind::End, 0, 0)).is_err(), "nobody waited until it was gone");
    assert!(order.admit(&head(Kind::Sync, 0, 0)).is_ok());
    assert!(order.clone().admit(&head(Kind::End, 0, 0)).is_ok());
    assert!(order.admit(&head(Kind::Part, SHARD_BYTES as u32, SHARD_BYTES)).is_ok());
    assert!(order.admit(&head(Kind::End, 0, SHARD_BYTES)).is_ok());
    for kind in [Kind::Owed, Kind::Sync, Kind::Ask, Kind::Word] {
        assert!(matches!(order.admit(&head(kind, 64, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
    assert!(order.admit(&head(Kind::Part, 4096, SHARD_BYTES)).is_ok());
    assert!(order.admit(&head(Kind::Part, ASK_BYTES_MAX + 4096, SHARD_BYTES)).is_err());
    assert!(order.admit(&head(Kind::Packed, 4096, 0)).is_err());
    assert!(order.admit(&head(Kind::Zero, 4096, ALL + SHARD_BYTES)).is_err());

    assert!(order.admit_ask(&head(Kind::Ask, 4096, SHARD_BYTES)).is_ok());
    assert!(order.admit_ask(&head(Kind::Ask, 4096, 0)).is_err());
    assert!(order.admit_ask(&head(Kind::Ask, 4096, ALL + SHARD_BYTES)).is_err());
    assert!(order.admit_ask(&head(Kind::Part, 4096, SHARD_BYTES)).is_err());

    let mut order = Order::new(&Open::resuming(0, 1, ALL));
    assert!(order.has_ended() && order.admit(&head(Kind::Part, 4096, 0)).is_ok());
    for kind in [Kind::End, Kind::State, Kind::Owed, Kind::Console] {
        assert!(matches!(order.admit(&head(kind, 64, 0)), Err(FrameError::Order(_))), "{kind:?}");
    }
    assert!(Open::owing(0, 1, ALL).is_for(&Open::owing(0, 1, ALL)));
    assert!(Open::packing(0, 1, ALL).is_for(&Open::owing(0, 1, ALL)), "it need not");
    assert!(!Open::owing(0, 1, ALL).is_for(&Open::new(0, 1, ALL)), "it must not");
    assert!(!Open::resuming(0, 1, ALL).is_for(&Open::owing(0, 1, ALL)));
}
