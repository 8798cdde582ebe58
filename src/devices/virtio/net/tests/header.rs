//! Headers, without a device.
use super::super::header::{on_wire, to_guest, to_tap};

use super::*;

const ALL: u64 = u64::MAX;
const NONE: u64 = 0;
const FRAME: u32 = 1000;

/// flags, segmentation, header length, segment size, checksum start and offset, buffers.
fn header(bytes: [u8; 2], words: [u16; 5]) -> [u8; HEADER] {
    let words = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.into_iter().chain(words).collect::<Vec<_>>().try_into().unwrap()
}

// virtio 1.2: 5.1.6.2.2-1 5.1.6.2.2-2 5.1.6.2.2-3
#[test]
fn what_a_guest_may_send() {
    let without_checksum = !(1 << VIRTIO_NET_F_CSUM);
    let without_tso4 = !(1 << VIRTIO_NET_F_HOST_TSO4);
    let plain = header([0, 0], [0; 5]);
    let checksum = header([1, 0], [0, 0, 34, 16, 0]);
    let tcp4 = header([1, 1], [54, 1448, 34, 16, 0]);
    let table = [
        ("nothing special", plain, ALL, Some(plain)),
        ("nothing special, nothing agreed on", plain, NONE, Some(plain)),
        ("leftovers", header([0, 0], [7, 7, 7, 7, 7]), ALL, Some(plain)),
        ("unknown flags", header([0xfe, 0], [0; 5]), ALL, Some(plain)),
        ("a checksum", checksum, ALL, Some(checksum)),
        ("a checksum that was not agreed on", checksum, without_checksum, None),
        (
            "a checksum at the very end",
            header([1, 0], [0, 0, 998, 0, 0]),
            ALL,
            Some(header([1, 0], [0, 0, 998, 0, 0])),
        ),
        ("a checksum behind the end", header([1, 0], [0, 0, 998, 1, 0]), ALL, None),
        ("a checksum that wraps", header([1, 0], [0, 0, 0xffff, 0xffff, 0]), ALL, None),
        ("segments", tcp4, ALL, Some(tcp4)),
        ("segments that were not agreed on", tcp4, without_tso4, None),
        ("IPv6 segments", header([1, 4], [74, 1, 54, 16, 0]), ALL, Some(header([1, 4], [74, 1, 54, 16, 0]))),
        ("segments without a checksum", header([0, 1], [54, 1448, 0, 0, 0]), ALL, None),
        ("segments of no size", header([1, 1], [54, 0, 34, 16, 0]), ALL, None),
        (
            "a header longer than the frame",
            header([1, 1], [1001, 1448, 34, 16, 0]),
            ALL,
            Some(header([1, 1], [1000, 1448, 34, 16, 0])),
        ),
        ("UDP fragments", header([1, 3], [42, 1400, 34, 6, 0]), ALL, None),
        ("UDP segments", header([1, 5], [42, 1400, 34, 6, 0]), ALL, None),
        ("congestion marks", header([1, 0x81], [54, 1448, 34, 16, 0]), ALL, None),
        ("segments of the future", header([1, 0x7f], [54, 1448, 34, 16, 0]), ALL, None),
    ];
    for (what, given, features, expected) in table {
        assert_eq!(to_tap(given, FRAME, features), expected, "{what}");
    }
}

// virtio 1.2: 5.1.6.4.1-5 5.1.6.4.1-6 5.1.6.4.1-7 5.1.6.4.1-9 5.1.6.4.1-10
#[test]
fn what_a_guest_gets() {
    let checksum_alone = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let segments_alone = 1 << VIRTIO_NET_F_GUEST_TSO4;
    let tcp4 = [1, 1];
    let table = [
        ("nothing special", [0, 0], NONE, Some([0, 0])),
        ("a checksum to finish", [1, 0], ALL, Some([1, 0])),
        ("a checksum to finish, not agreed on", [1, 0], NONE, None),
        ("a checksum that is right", [2, 0], ALL, Some([2, 0])),
        ("a checksum that is right, not agreed on", [2, 0], NONE, Some([0, 0])),
        ("unknown flags", [0xfc, 0], ALL, Some([0, 0])),
        ("segments", tcp4, ALL, Some(tcp4)),
        ("segments without a checksum to finish", [0, 1], ALL, None),
        ("segments with a checksum that is right", [2, 1], ALL, None),
        ("segments left from another driver", tcp4, checksum_alone, None),
        ("segments agreed on without checksums", tcp4, segments_alone, None),
        ("IPv6 segments", [1, 4], ALL, Some([1, 4])),
        ("IPv6 segments that were not agreed on", [1, 4], !(1 << VIRTIO_NET_F_GUEST_TSO6), None),
        ("IPv4 segments that were not agreed on", tcp4, !(1 << VIRTIO_NET_F_GUEST_TSO4), None),
        ("UDP fragments", [1, 3], ALL, None),
        ("UDP segments", [1, 5], ALL, None),
        ("congestion marks", [1, 0x81], ALL, None),
    ];
    assert_eq!(to_guest(header([1, 1], [54, 0, 34, 16, 0]), 1, ALL), None, "segments of no size");
    for (what, given, features, expected) in table {
        let words = [54, 1448, 34, 16, 0];
        let expected = expected.map(|bytes| header(bytes, [54, 1448, 34, 16, 3]));
        assert_eq!(to_guest(header(given, words), 3, features), expected, "{what}");
    }
}

#[test]
fn a_packet_costs_what_it_is_on_a_wire() {
    let segmented = |kind, bytes| header([1, kind], [54, bytes, 34, 16, 0]);
    let table = [
        ("a frame", header([0, 0], [0; 5]), 1514, (1, 1514)),
        ("a checksum", header([1, 0], [0, 0, 34, 16, 0]), 60, (1, 60)),
        ("one segment", segmented(1, 1448), 54 + 1448, (1, 1502)),
        ("a byte more", segmented(1, 1448), 54 + 1449, (2, 1503 + 54)),
        ("IPv6", segmented(4, 1000), 74 + 2500, (3, 2574 + 2 * 74)),
        ("segments of a byte", segmented(1, 1), 54 + 65_000, (65_000, 65_054 + 64_999 * 54)),
        ("nothing but headers", segmented(1, 1448), 40, (1, 40)),
        ("segments of no size, which do not come so far", segmented(1, 0), 154, (100, 154 + 99 * 54)),
    ];
    for (what, given, frame, expected) in table {
        assert_eq!(on_wire(given, frame), expected, "{what}");
    }
}
