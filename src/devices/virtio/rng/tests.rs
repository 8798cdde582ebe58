use super::*;
use crate::virtio::bench::{Bench, EVENT_IDX, Heard, Part, Ring};
use crate::virtio::hostile::CHAINS;

struct Rig {
    bench: Bench,
    ring: Ring,
    heard: Arc<Heard>,
    stats: Arc<RngStats>,
    active: Box<dyn Active>,
}

fn rig(features: u64) -> Rig {
    let mut bench = Bench::new();
    let ring = bench.ring(SMALL_QUEUE_SIZE);
    let stats = Arc::new(RngStats::default());
    let mut rng = Rng::new(stats.clone());
    assert_eq!(rng.queue_sizes(), [SMALL_QUEUE_SIZE]);
    let (wiring, heard) = bench.wiring(&[&ring], features);
    let active = rng.activate(wiring).unwrap();
    Rig { bench, ring, heard, stats, active }
}

// virtio 1.2: 2.7.8.2-2 5.4.6.2-1
#[test]
fn buffers_are_filled_with_what_differs_each_time() {
    for features in [0, EVENT_IDX] {
        let mut rig = rig(features);
        let buffer = rig.bench.buffer(0x3000);
        let mut seen = Vec::new();
        for round in 0..3 {
            rig.ring.submit(&[Part::Write(buffer, 16), Part::Write(buffer + 0x1000, 5000)]);
            let (_, written) = rig.ring.wait_used(&rig.heard);
            assert_eq!(written, 5016);
            seen.push([rig.bench.bytes(buffer, 16), rig.bench.bytes(buffer + 0x1000, 5000)].concat());
            assert!(seen[..round].iter().all(|other| *other != seen[round]));
            // A run of zeroes this long is a part that was not filled.
            assert!(seen[round].windows(16).all(|run| run != [0; 16]));
        }
        assert_eq!(rig.stats.bytes.load(Ordering::Relaxed), 3 * 5016);
        rig.active.stop();
    }
}

#[test]
fn one_chain_gets_no_more_than_the_bound() {
    let mut rig = rig(0);
    let buffer = rig.bench.buffer(u64::from(RNG_BYTES_MAX) * 2);
    rig.ring.submit(&[Part::Write(buffer, RNG_BYTES_MAX - 1), Part::Write(buffer + 0x1_0000, 0x1_0000)]);
    assert_eq!(rig.ring.wait_used(&rig.heard).1, RNG_BYTES_MAX);
    assert_eq!(rig.bench.bytes(buffer + 0x1_0001, 0xFFFF), vec![0; 0xFFFF]);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn chains_without_room_and_outside_memory_are_answered_empty() {
    let mut rig = rig(0);
    let buffer = rig.bench.buffer(0x1000);
    for part in
        [Part::Read(buffer, 16), Part::Write(u64::MAX - 7, 16), Part::Write(8 << 20, 1), Part::Write(0, 0)]
    {
        rig.ring.submit(&[part]);
        assert_eq!(rig.ring.wait_used(&rig.heard).1, 0, "{part:?}");
    }
    assert_eq!(rig.stats.malformed.load(Ordering::Relaxed), 2);
    assert_eq!(rig.bench.bytes(buffer, 16), [0; 16]);
    assert!(rig.heard.log().broken.is_empty());
}

#[test]
fn many_chains_at_once_are_all_answered() {
    let mut rig = rig(EVENT_IDX);
    let buffer = rig.bench.buffer(0x1000);
    for _ in 0..50 {
        for _ in 0..rig.ring.size {
            let head = rig.ring.chain(&[Part::Write(buffer, 8)]);
            rig.ring.offer(head);
        }
        rig.ring.kick.write(1).unwrap();
        for _ in 0..rig.ring.size {
            assert_eq!(rig.ring.wait_used(&rig.heard).1, 8);
        }
    }
    assert_eq!(rig.stats.bytes.load(Ordering::Relaxed), 50 * u64::from(SMALL_QUEUE_SIZE) * 8);
}

#[test]
fn a_broken_ring_stops_the_device() {
    let mut rig = rig(0);
    rig.ring.offer_index(SMALL_QUEUE_SIZE + 1);
    rig.ring.kick.write(1).unwrap();
    rig.heard.wait("fault", |log| log.broken.len() == 1);
}

#[test]
fn every_chain_that_no_driver_may_make_breaks_the_device_once() {
    for (what, offer) in CHAINS {
        let mut rig = rig(0);
        rig.bench.buffer(0x1000);
        offer(&mut rig.bench, &mut rig.ring);
        rig.ring.kick.write(1).unwrap();
        rig.heard.wait(what, |log| log.broken.len() == 1);
        // Whatever comes after is not looked at.
        rig.ring.kick.write(1).unwrap();
        rig.active.stop();
        assert_eq!((rig.ring.take_used(), rig.heard.log().broken.len()), (None, 1), "{what}");
        assert_eq!(rig.stats.bytes.load(Ordering::Relaxed), 0, "{what}");
    }
}
