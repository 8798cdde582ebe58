use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::bench::{Bench, EVENT_IDX, INDIRECT, NEXT, PATIENCE, Part, Ring, WRITE, write_descriptor};

fn one_ring(size: u16) -> (Bench, Ring) {
    let mut bench = Bench::new();
    let ring = bench.ring(size);
    (bench, ring)
}

#[test]
fn a_chain_is_taken_whole_and_handed_back_once() {
    let (mut bench, mut ring) = one_ring(8);
    let (header, data) = (bench.filled(b"header"), bench.buffer(16));
    let mut queue = ring.queue(0);
    let head = ring.chain(&[Part::Read(header, 6), Part::Write(data, 10), Part::Write(data + 10, 6)]);
    ring.offer(head);

    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable_bytes(), chain.writable_bytes()), (head, 6, 16));
    assert_eq!((chain.readable().len(), chain.writable().len(), queue.in_flight()), (1, 2, 1));
    let mut copy = [0; 4];
    chain.read(&bench.memory, 2, &mut copy).unwrap();
    assert_eq!(&copy, b"ader");
    chain.write(&bench.memory, 8, b"abcd").unwrap();
    assert_eq!(bench.bytes(data + 8, 4), b"abcd");
    assert!(queue.pop().unwrap().is_none());

    queue.complete(chain, 12).unwrap();
    assert_eq!(ring.take_used(), Some((u32::from(head), 12)));
    assert_eq!((ring.take_used(), queue.in_flight()), (None, 0));
}

#[test]
fn reads_and_writes_beyond_a_chain_are_refused() {
    let (mut bench, mut ring) = one_ring(8);
    let buffer = bench.buffer(8);
    let head = ring.chain(&[Part::Read(buffer, 8), Part::Write(u64::MAX - 3, 8)]);
    ring.offer(head);
    let chain = ring.queue(0).pop().unwrap().unwrap();
    for (offset, length) in [(0, 9), (8, 1), (u32::MAX, 1), (u32::MAX, 2)] {
        let refused = chain.read(&bench.memory, offset, &mut vec![0; length]);
        assert!(matches!(refused, Err(BufferError::Range { .. })), "{offset} {length}");
    }
    chain.read(&bench.memory, 8, &mut []).unwrap();
    assert!(matches!(chain.write(&bench.memory, 0, &[0; 8]), Err(BufferError::Memory(_))));
    assert!(matches!(chain.write(&bench.memory, 4, &[0; 4]), Err(BufferError::Memory(_))));
}

#[test]
fn parts_of_a_chain_are_cut_at_any_byte() {
    let (mut bench, mut ring) = one_ring(8);
    let buffer = bench.buffer(64);
    let head =
        ring.chain(&[Part::Read(buffer, 10), Part::Read(buffer + 20, 10), Part::Write(buffer + 40, 5)]);
    ring.offer(head);
    let chain = ring.queue(0).pop().unwrap().unwrap();
    let parts = |offset, length| {
        chain.readable_at(offset, length).map(|s| (s.address.0 - buffer, s.length)).collect::<Vec<_>>()
    };
    assert_eq!(parts(0, 20), [(0, 10), (20, 10)]);
    assert_eq!(parts(9, 2), [(9, 1), (20, 1)]);
    assert_eq!(parts(10, 100), [(20, 10)]);
    assert_eq!(parts(20, 1), []);
    assert_eq!(parts(u32::MAX, u32::MAX), []);
    assert_eq!(chain.writable_at(1, 2).count(), 1);
}

#[test]
fn buffers_at_the_edges_of_memory_are_whole_or_refused() {
    use memory::layout::{RAM_ABOVE_4G_START, RAM_BELOW_4G_MAX};
    const ABOVE: u64 = 2 << 20;
    let memory = memory::new(RAM_BELOW_4G_MAX + ABOVE).unwrap();
    let (low_end, high, high_end) = (RAM_BELOW_4G_MAX, RAM_ABOVE_4G_START, RAM_ABOVE_4G_START + ABOVE);
    let cases = [
        (0, 8, true),
        (low_end - 8, 8, true),
        (low_end - 7, 8, false),
        (low_end, 8, false),
        (high - 8, 8, false),
        (high - 1, 2, false),
        (high, 8, true),
        (high_end - 8, 8, true),
        (high_end - 7, 8, false),
        (high_end, 1, false),
        (u64::MAX - 7, 8, false),
        (u64::MAX - 6, 8, false),
        (u64::MAX, 1, false),
    ];
    for (address, length, is_memory) in cases {
        let (_bench, mut ring) = one_ring(4);
        let head = ring.chain(&[Part::Read(address, length), Part::Write(address, length)]);
        ring.offer(head);
        let chain = ring.queue(0).pop().unwrap().unwrap();
        let mut data = vec![0; length as usize];
        assert_eq!(chain.read(&memory, 0, &mut data).is_ok(), is_memory, "{address:#x} {length}");
        assert_eq!(chain.write(&memory, 0, &data).is_ok(), is_memory, "{address:#x} {length}");
    }
}

/// How a guest may get a chain wrong, and the fault it is.
type Case = (&'static str, fn(&mut Bench, &mut Ring) -> u16, fn(&Fault) -> bool);

#[test]
fn every_malformed_chain_is_a_fault() {
    let cases: &[Case] = &[
        ("points to itself", |_, ring| self_next(ring), |fault| matches!(fault, Fault::Chain { .. })),
        (
            "loops over three descriptors",
            |_, ring| {
                for index in 0..3 {
                    ring.descriptor(index, 0x1000, 16, NEXT, (index + 1) % 3);
                }
                0
            },
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "goes on outside the table",
            |_, ring| {
                ring.descriptor(0, 0x1000, 16, NEXT, ring.size);
                0
            },
            |fault| matches!(fault, Fault::Chain { descriptors: 1, .. }),
        ),
        ("starts outside the table", |_, ring| ring.size, |fault| matches!(fault, Fault::HeadRange { .. })),
        ("starts far outside the table", |_, _| u16::MAX, |fault| matches!(fault, Fault::HeadRange { .. })),
        (
            "adds up to more than 32 bits",
            |_, ring| ring.chain(&[Part::Write(0x1000, u32::MAX), Part::Write(0x1000, 1)]),
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "reads after it writes",
            |_, ring| ring.chain(&[Part::Write(0x1000, 1), Part::Read(0x1000, 1)]),
            |fault| matches!(fault, Fault::Order { .. }),
        ),
        (
            "reads after an empty write",
            |_, ring| ring.chain(&[Part::Write(0x1000, 1), Part::Write(0, 0), Part::Read(0x1000, 1)]),
            |fault| matches!(fault, Fault::Order { .. }),
        ),
        (
            "nests indirect tables",
            |bench, ring| indirect(bench, ring, &[(INDIRECT, 0), (0, 0)], 32),
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "has an indirect table of odd length",
            |bench, ring| indirect(bench, ring, &[(0, 0)], 17),
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "has an empty indirect table",
            |bench, ring| indirect(bench, ring, &[(0, 0)], 0),
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "has an indirect table that loops",
            |bench, ring| indirect(bench, ring, &[(NEXT, 1), (NEXT, 0)], 32),
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "has an indirect table that goes on outside itself",
            |bench, ring| indirect(bench, ring, &[(NEXT, 1), (NEXT, 2)], 32),
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "has an indirect table outside memory",
            |_, ring| {
                ring.descriptor(0, u64::MAX - 15, 16, INDIRECT, 0);
                0
            },
            |fault| matches!(fault, Fault::Chain { .. }),
        ),
        (
            "has more descriptors than any driver makes",
            |bench, ring| {
                let entries: Vec<(u16, u16)> = (1..=2000).map(|next| (NEXT, next)).collect();
                indirect(bench, ring, &entries, 2000 * 16)
            },
            |fault| matches!(fault, Fault::ChainTooLong { .. }),
        ),
    ];
    for (what, build, expected) in cases {
        let (mut bench, mut ring) = one_ring(8);
        bench.buffer(0x1000);
        let head = build(&mut bench, &mut ring);
        ring.offer(head);
        let fault = ring.queue(0).pop().unwrap_err();
        assert!(expected(&fault), "a chain that {what}: {fault:?}");
    }
}

fn self_next(ring: &mut Ring) -> u16 {
    ring.descriptor(3, 0x1000, 16, NEXT, 3);
    3
}

/// A head that points to an indirect table with `entries` of (flags, next), said to be `bytes` long.
fn indirect(bench: &mut Bench, ring: &mut Ring, entries: &[(u16, u16)], bytes: u32) -> u16 {
    let table = bench.buffer(entries.len() as u64 * 16);
    for (at, (flags, next)) in entries.iter().enumerate() {
        write_descriptor(&bench.memory, table + at as u64 * 16, 0x1000, 16, *flags, *next);
    }
    ring.descriptor(0, table, bytes, INDIRECT, 0);
    0
}

#[test]
fn indirect_chains_are_taken_and_empty_buffers_left_out() {
    let (mut bench, mut ring) = one_ring(2);
    let table = bench.buffer(64);
    write_descriptor(&bench.memory, table, 0x1000, 0, NEXT, 1);
    write_descriptor(&bench.memory, table + 16, 0x1000, 5, NEXT, 2);
    write_descriptor(&bench.memory, table + 32, 0x2000, 7, NEXT | WRITE, 3);
    write_descriptor(&bench.memory, table + 48, 0x2000, 0, WRITE, 0);
    ring.descriptor(1, table, 64, INDIRECT, 0);
    ring.offer(1);
    let chain = ring.queue(0).pop().unwrap().unwrap();
    assert_eq!(chain.readable(), [Segment { address: GuestAddress(0x1000), length: 5 }]);
    assert_eq!(chain.writable(), [Segment { address: GuestAddress(0x2000), length: 7 }]);
}

#[test]
fn an_indirect_table_that_was_not_negotiated_breaks_the_device() {
    // As the only descriptor, and behind others.
    for before in 0..3 {
        let (mut bench, mut ring) = one_ring(4);
        let table = bench.buffer(16);
        write_descriptor(&bench.memory, table, 0x2000, 7, WRITE, 0);
        for at in 0..before {
            ring.descriptor(at, 0x1000, 5, NEXT, at + 1);
        }
        ring.descriptor(before, table, 16, INDIRECT, 0);
        ring.offer(0);
        assert!(ring.queue(0).pop().unwrap().is_some());
        let fault = ring.queue(0).without_indirect().pop().unwrap_err();
        assert!(matches!(fault, Fault::Indirect { head: 0 }), "{fault}");
    }
}

#[test]
fn without_indirect_tables_plain_chains_are_taken_and_loops_are_still_found() {
    let (_bench, mut ring) = one_ring(4);
    let head = ring.chain(&[Part::Read(0x1000, 4), Part::Write(0x2000, 4)]);
    ring.offer(head);
    let chain = ring.queue(0).without_indirect().pop().unwrap().unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (4, 4));
    let (_bench, mut ring) = one_ring(4);
    let head = self_next(&mut ring);
    ring.offer(head);
    let fault = ring.queue(0).without_indirect().pop().unwrap_err();
    assert!(matches!(fault, Fault::Chain { .. } | Fault::ChainTooLong { .. }), "{fault}");
}

// virtio 1.2: 2.7.5.3.2-1 2.7.5.3.2-2
#[test]
fn a_chain_may_end_in_an_indirect_table_whatever_its_write_flag_says() {
    for flag in [0, WRITE] {
        let (mut bench, mut ring) = one_ring(4);
        let table = bench.buffer(32);
        write_descriptor(&bench.memory, table, 0x2000, 7, NEXT, 1);
        write_descriptor(&bench.memory, table + 16, 0x3000, 9, WRITE, 0);
        ring.descriptor(0, 0x1000, 5, NEXT, 1);
        ring.descriptor(1, table, 32, INDIRECT | flag, 0);
        ring.offer(0);
        let chain = ring.queue(0).pop().unwrap().unwrap();
        let parts =
            |segments: &[Segment]| segments.iter().map(|s| (s.address.0, s.length)).collect::<Vec<_>>();
        assert_eq!(parts(chain.readable()), [(0x1000, 5), (0x2000, 7)]);
        assert_eq!(parts(chain.writable()), [(0x3000, 9)]);
    }
}

// virtio 1.2: 2.7.10.2-1 2.7.10.2-2 2.7.10.2-3
#[test]
fn a_device_silences_kicks_by_flag_or_by_index_as_agreed() {
    let flags = |ring: &Ring, bench: &Bench| bench.bytes(ring.used, 2)[0];
    let (bench, ring) = one_ring(8);
    let mut queue = ring.queue(0);
    queue.silence_kicks().unwrap();
    assert_eq!(flags(&ring, &bench), 1);
    queue.ask_for_kicks().unwrap();
    assert_eq!(flags(&ring, &bench), 0);
    let (bench, mut ring) = one_ring(8);
    let mut queue = ring.queue(EVENT_IDX);
    for asked in 1..=3 {
        queue.silence_kicks().unwrap();
        ring.submit(&[Part::Write(0x1000, 1)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.complete(chain, 0).unwrap();
        assert!(!queue.ask_for_kicks().unwrap());
        assert_eq!((flags(&ring, &bench), ring.avail_event()), (0, asked));
    }
    // A kick for nothing.
    assert!(queue.pop().unwrap().is_none());
}

// virtio 1.2: 2.7.10.2-1
#[test]
fn a_kick_that_was_asked_for_can_be_taken_back() {
    for next in [0, 1, 0x7FFF, 0xFFFF] {
        let (_bench, ring) = one_ring(8);
        let mut queue = ring.queue(EVENT_IDX);
        queue.ring.set_next_avail(next);
        for asks in [false, true] {
            queue.silence_kicks().unwrap();
            if asks {
                queue.ask_for_kicks().unwrap();
            }
            // What a driver that makes one buffer available finds.
            let is_passed = |new: u16| new.wrapping_sub(ring.avail_event()).wrapping_sub(1) < 1;
            assert_eq!(is_passed(next.wrapping_add(1)), asks, "{next}");
        }
    }
}

// virtio 1.2: 2.7.7.2-1
#[test]
fn without_the_event_index_its_place_is_not_looked_at() {
    let (_bench, mut ring) = one_ring(8);
    let mut queue = ring.queue(0);
    for event in [0, 5, 0xFFFF] {
        ring.used_event(event);
        ring.submit(&[Part::Write(0x1000, 1)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.complete(chain, 0).unwrap();
        assert!(queue.wants_signal().unwrap(), "{event}");
    }
}

#[test]
fn a_head_in_flight_cannot_be_taken_again() {
    let (_bench, mut ring) = one_ring(4);
    let mut queue = ring.queue(0);
    let head = ring.chain(&[Part::Write(0x1000, 1)]);
    ring.offer(head);
    ring.offer(head);
    let chain = queue.pop().unwrap().unwrap();
    assert!(matches!(queue.pop(), Err(Fault::HeadInFlight { head: again }) if again == head));
    queue.complete(chain, 0).unwrap();

    ring.offer(head);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.head(), head);
}

#[test]
fn an_available_index_that_jumps_is_a_fault() {
    for (size, jump) in [(4, 5), (4, u16::MAX), (256, 257)] {
        let (_bench, mut ring) = one_ring(size);
        ring.offer_index(jump);
        assert!(matches!(ring.queue(0).pop(), Err(Fault::Ring(_))), "{size} {jump}");
    }
}

#[test]
fn chains_given_back_come_again_in_the_same_order() {
    let (_bench, mut ring) = one_ring(4);
    let mut queue = ring.queue(0);
    let heads = [(); 3].map(|()| {
        let head = ring.chain(&[Part::Write(0x1000, 1)]);
        ring.offer(head);
        head
    });
    let chains = [(); 3].map(|()| queue.pop().unwrap().unwrap());
    assert_eq!(chains.each_ref().map(Chain::head), heads);
    let [first, second, third] = chains;
    queue.give_back(third);
    queue.give_back(second);
    queue.complete(first, 0).unwrap();
    assert_eq!([(); 2].map(|()| queue.pop().unwrap().unwrap().head()), heads[1..]);
}

// virtio 1.2: 2.7.8.2-2
#[test]
fn a_used_length_is_never_more_than_the_driver_gave() {
    let (_bench, mut ring) = one_ring(4);
    let mut queue = ring.queue(0);
    ring.submit(&[Part::Read(0x1000, 100), Part::Write(0x1000, 5)]);
    let chain = queue.pop().unwrap().unwrap();
    queue.complete(chain, u32::MAX).unwrap();
    assert_eq!(ring.take_used(), Some((0, 5)));
}

/// A driver that looks all the time sees the chains of a packet together, each with its length.
// virtio 1.2: 2.7.8.2-1 5.1.6.4.1-4
#[test]
fn several_chains_are_handed_back_whole_and_at_once() {
    const TOGETHER: u16 = 3;
    const ROUNDS: u16 = 2000;
    let (bench, mut ring) = one_ring(8);
    let mut queue = ring.queue(0);
    let (memory, used) = (Arc::clone(&bench.memory), ring.used);
    std::thread::scope(|scope| {
        let driver = scope.spawn(move || {
            let (mut seen, deadline) = (0_u16, std::time::Instant::now() + PATIENCE);
            while seen < ROUNDS * TOGETHER {
                assert!(std::time::Instant::now() < deadline, "{seen} seen");
                let index: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
                assert_eq!(index % TOGETHER, 0, "a part of a packet");
                if index == seen {
                    continue;
                }
                // The round that a length belongs to is in it; the ring holds no more than the last eight.
                let at = index.wrapping_sub(1);
                let element: u64 = memory.read_obj(GuestAddress(used + 4 + u64::from(at % 8) * 8)).unwrap();
                let written = (element >> 32) as u16;
                assert!(written >= index / TOGETHER, "{written} in round {}", index / TOGETHER);
                seen = index;
            }
        });
        for round in 1..=ROUNDS {
            let chains = [(); TOGETHER as usize].map(|()| {
                ring.submit(&[Part::Write(0x1000, 4096)]);
                (queue.pop().unwrap().unwrap(), u32::from(round))
            });
            queue.complete_all(chains).unwrap();
        }
        driver.join().unwrap();
    });
}

// virtio 1.2: 2.7.7.2-2 2.7.7.2-3 2.7.7.2-4
#[test]
fn signals_follow_the_flag_without_event_index_and_the_index_with_it() {
    let (_bench, mut ring) = one_ring(8);
    let serve = |ring: &mut Ring, queue: &mut Queue, count: u16| {
        for _ in 0..count {
            ring.submit(&[Part::Write(0x1000, 1)]);
            let chain = queue.pop().unwrap().unwrap();
            queue.complete(chain, 0).unwrap();
        }
        queue.wants_signal().unwrap()
    };
    let mut queue = ring.queue(0);
    assert!(!serve(&mut ring, &mut queue, 0), "nothing new is nothing to tell");
    assert!(serve(&mut ring, &mut queue, 1));
    ring.avail_flags(AVAIL_NO_INTERRUPT);
    assert!(!serve(&mut ring, &mut queue, 1));

    let (_bench, mut ring) = one_ring(8);
    let mut queue = ring.queue(EVENT_IDX);
    ring.avail_flags(AVAIL_NO_INTERRUPT);
    ring.used_event(2);
    assert!(!serve(&mut ring, &mut queue, 2));
    assert!(serve(&mut ring, &mut queue, 1));
    assert!(!serve(&mut ring, &mut queue, 1));
    assert!(!queue.ask_for_kicks().unwrap());
    assert_eq!(ring.avail_event(), 4);
}

#[test]
fn asking_for_kicks_tells_of_what_came_before() {
    let (_bench, mut ring) = one_ring(8);
    let mut queue = ring.queue(0);
    queue.silence_kicks().unwrap();
    assert!(!queue.ask_for_kicks().unwrap());
    queue.silence_kicks().unwrap();
    ring.submit(&[Part::Write(0x1000, 1)]);
    assert!(queue.ask_for_kicks().unwrap());
}

#[test]
fn descriptors_that_change_while_they_are_read_are_read_once() {
    use std::sync::atomic::AtomicBool;
    let (bench, mut ring) = one_ring(8);
    let mut queue = ring.queue(0);
    let done = AtomicBool::new(false);
    let deadline = std::time::Instant::now() + PATIENCE;
    std::thread::scope(|scope| {
        let (memory, table, done_too) = (&bench.memory, ring.table, &done);
        scope.spawn(move || {
            for round in 0_u32.. {
                if done_too.load(Ordering::Relaxed) || std::time::Instant::now() > deadline {
                    break;
                }
                for index in 0..8_u64 {
                    let (length, flags) =
                        ([0, 16, u32::MAX][round as usize % 3], (round as u16 ^ index as u16) & 7);
                    let next = (round.wrapping_mul(7) % 9) as u16;
                    write_descriptor(memory, table + index * 16, table, length, flags, next);
                }
            }
        });
        let (mut taken, mut faults) = (0, 0);
        let mut rounds = (0..8_u16).cycle();
        while taken < 10_000 || faults == 0 {
            assert!(std::time::Instant::now() < deadline, "{taken} taken, {faults} faults");
            ring.offer(rounds.next().unwrap());
            match queue.pop() {
                Ok(Some(chain)) => {
                    let sum = |segments: &[Segment]| {
                        segments.iter().map(|segment| u64::from(segment.length)).sum::<u64>()
                    };
                    assert_eq!(sum(chain.readable()), u64::from(chain.readable_bytes()));
                    assert_eq!(sum(chain.writable()), u64::from(chain.writable_bytes()));
                    assert!(chain.readable_bytes().checked_add(chain.writable_bytes()).is_some());
                    queue.complete(chain, 0).unwrap();
                    taken += 1;
                }
                Ok(None) => panic!("a chain was offered"),
                Err(_) => {
                    faults += 1;
                    // A device stops here; this one starts again.
                    ring.offer_index(0);
                    queue = ring.queue(0);
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

proptest! {
    /// Whatever is in the rings, taking and completing neither panics nor goes on for ever, and nothing is taken
    /// twice at once.
    #[test]
    fn random_rings_never_confuse_a_queue(
        table in proptest::collection::vec(any::<u8>(), 8 * 16),
        flags in proptest::collection::vec(0_u16..8, 8),
        avail in proptest::collection::vec(0_u16..10, 8),
        index in 0_u16..12,
        near in any::<bool>(),
    ) {
        let (bench, mut ring) = one_ring(8);
        bench.memory.write_slice(&table, GuestAddress(ring.table)).unwrap();
        for (at, flag) in (0_u64..).zip(&flags) {
            let next = u16::from(table[at as usize * 16 + 14]) % 9;
            bench.memory.write_obj(*flag, GuestAddress(ring.table + at * 16 + 12)).unwrap();
            bench.memory.write_obj(next, GuestAddress(ring.table + at * 16 + 14)).unwrap();
            if near {
                // Indirect tables then lie in memory, over the table itself.
                bench.memory.write_obj(ring.table, GuestAddress(ring.table + at * 16)).unwrap();
                bench.memory.write_obj(48_u32, GuestAddress(ring.table + at * 16 + 8)).unwrap();
            }
        }
        for (at, head) in (0_u64..).zip(&avail) {
            bench.memory.write_obj(*head, GuestAddress(ring.avail + 4 + at * 2)).unwrap();
        }
        ring.offer_index(index);
        let mut queue = ring.queue(0);
        let mut taken: Vec<Chain> = Vec::new();
        for _ in 0..=index {
            match queue.pop() {
                Ok(Some(chain)) => {
                    prop_assert!(chain.readable().len() + chain.writable().len() <= CHAIN_DESCRIPTORS_MAX);
                    prop_assert!(taken.iter().all(|other| other.head() != chain.head()));
                    let _ = chain.read(&bench.memory, 0, &mut [0; 32]);
                    taken.push(chain);
                }
                Ok(None) | Err(_) => break,
            }
        }
        prop_assert!(taken.len() <= 8);
        for chain in taken {
            queue.complete(chain, 1).unwrap();
        }
    }
}
