use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::config::PAGE_BYTES;
use super::*;
use crate::limits::{BALLOON_PAGES_PER_REQUEST_MAX, BALLOON_RANGES_PER_REPORT_MAX};
use crate::virtio::bench::{Bench, Heard, INDIRECT, NEXT, Part, Ring, WRITE, write_descriptor};
use crate::virtio::hostile::CHAINS;

struct Rig {
    bench: Bench,
    /// Inflate, deflate, report.
    rings: [Ring; 3],
    heard: Arc<Heard>,
    stats: Arc<BalloonStats>,
    balloon: Balloon,
    control: BalloonControl,
    active: Box<dyn Active>,
}

fn rig(features: u64) -> Rig {
    rig_with(features, &[0, 1, 2])
}

fn rig_with(features: u64, indices: &[u16; 3]) -> Rig {
    let mut bench = Bench::new();
    let rings = [(); 3].map(|()| bench.ring(SMALL_QUEUE_SIZE));
    let stats = Arc::new(BalloonStats::default());
    let options = BalloonOptions { target_bytes: 3 << 20, stats: stats.clone() };
    let (mut balloon, control) = Balloon::new(options);
    let (mut wiring, heard) = bench.wiring(&rings.each_ref(), features);
    for (queue, index) in wiring.queues.iter_mut().zip(indices) {
        queue.index = *index;
    }
    let active = balloon.activate(wiring).unwrap();
    Rig { bench, rings, heard, stats, balloon, control, active }
}

impl Rig {
    /// Puts a request of page numbers into a ring and waits for the answer.
    fn numbers(&mut self, ring: usize, numbers: &[u32]) {
        let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let buffer = self.bench.filled(&data);
        self.request(ring, &[Part::Read(buffer, data.len() as u32)]);
    }

    fn request(&mut self, ring: usize, parts: &[Part]) {
        self.rings[ring].submit(parts);
        assert_eq!(self.rings[ring].wait_used(&self.heard).1, 0);
    }

    /// Pages filled with a pattern.
    fn pages(&mut self, count: u64) -> u64 {
        self.bench.filled(&vec![0xAA; (count * PAGE_BYTES) as usize])
    }

    /// For each page whether it still holds the pattern.
    fn kept(&self, start: u64, count: u64) -> Vec<bool> {
        let page = |at| self.bench.bytes(start + at * PAGE_BYTES, PAGE_BYTES as usize);
        (0..count)
            .map(|at| match page(at) {
                page if page.iter().all(|byte| *byte == 0xAA) => true,
                page if page.iter().all(|byte| *byte == 0) => false,
                _ => panic!("page {at} is half gone"),
            })
            .collect()
    }

    fn count(&self, counter: fn(&BalloonStats) -> &AtomicU64) -> u64 {
        counter(&self.stats).load(Ordering::Relaxed)
    }
}

#[test]
fn inflated_pages_return_to_the_host_and_others_stay() {
    let mut rig = rig(0);
    let start = rig.pages(6);
    let first = (start / PAGE_BYTES) as u32;
    rig.numbers(0, &[first + 4, first + 1, first + 2, first + 1]);
    assert_eq!(rig.kept(start, 6), [true, false, false, true, false, true]);
    assert_eq!(rig.count(|stats| &stats.inflated_bytes), 3 * PAGE_BYTES);
    rig.numbers(1, &[first + 4]);
    rig.bench.memory.write_slice(&[0xAA; 4096], GuestAddress(start + 4 * PAGE_BYTES)).unwrap();
    assert_eq!(rig.kept(start, 6), [true, false, false, true, true, true]);
    assert_eq!(rig.count(|stats| &stats.malformed), 0);
}

#[test]
fn reported_ranges_return_to_the_host_at_either_number_of_the_queue() {
    for index in REPORT {
        let mut rig = rig_with(REPORTING, &[0, 1, index]);
        let start = rig.pages(8);
        rig.request(
            2,
            &[
                Part::Write(start + PAGE_BYTES, 2 * PAGE_BYTES as u32),
                // Only page 5 is whole.
                Part::Write(start + 4 * PAGE_BYTES + 1, 2 * PAGE_BYTES as u32),
                Part::Write(start + 7 * PAGE_BYTES + 1, PAGE_BYTES as u32 - 1),
            ],
        );
        assert_eq!(rig.kept(start, 8), [true, false, false, true, true, false, true, true]);
        assert_eq!(rig.count(|stats| &stats.reported_bytes), 3 * PAGE_BYTES);
    }
}

// virtio 1.2: 5.5.6.7.2-1
#[test]
fn pages_with_a_pattern_are_not_discarded() {
    for (features, poison, kept) in [
        (REPORTING | PAGE_POISON, 0xAAAA_AAAA, true),
        (REPORTING | PAGE_POISON, 0, false),
        (REPORTING, 0xAAAA_AAAA, false),
    ] {
        let mut rig = rig(features);
        rig.balloon.write_config(12, &u32::to_le_bytes(poison));
        let start = rig.pages(1);
        rig.request(2, &[Part::Write(start, PAGE_BYTES as u32)]);
        assert_eq!(rig.kept(start, 1), [kept]);
    }
}

#[test]
fn reports_without_the_feature_and_on_a_queue_without_meaning_change_nothing() {
    for (features, index) in [(0, 2), (REPORTING, 3)] {
        let mut rig = rig_with(features, &[0, 1, index]);
        let start = rig.pages(1);
        rig.request(2, &[Part::Write(start, PAGE_BYTES as u32)]);
        assert_eq!((rig.kept(start, 1), rig.count(|stats| &stats.malformed)), (vec![true], 1));
    }
}

#[test]
fn requests_that_break_the_protocol_are_counted_and_answered() {
    let mut rig = rig(REPORTING);
    let start = rig.pages(1);
    let first = (start / PAGE_BYTES) as u32;
    let outside = (8 << 20) / PAGE_BYTES as u32;
    rig.numbers(0, &[outside, first, u32::MAX, outside - 1]);
    // The last page is memory, but its range reaches beyond: it is refused whole.
    assert_eq!((rig.kept(start, 1), rig.count(|stats| &stats.malformed)), (vec![false], 2));
    let long = (BALLOON_PAGES_PER_REQUEST_MAX + 1) * 4;
    for parts in [
        [Part::Read(start, 3)],
        [Part::Read(u64::MAX - 3, 8)],
        [Part::Read(start, long)],
        [Part::Read(start, u32::MAX)],
    ] {
        let before = rig.count(|stats| &stats.malformed);
        rig.request(0, &parts);
        assert_eq!(rig.count(|stats| &stats.malformed), before + 1, "{parts:?}");
    }
    for (address, length) in [(8 << 20, 0x1000), ((8 << 20) - 0x1000, 0x2000), (0x10_0000_0000, u32::MAX)] {
        let before = rig.count(|stats| &stats.malformed);
        rig.request(2, &[Part::Write(address, length)]);
        assert_eq!(rig.count(|stats| &stats.malformed), before + 1, "{address:#x}");
    }
    // Ranges that hold no whole page, or wrap, are nothing to give back.
    rig.request(
        2,
        &[Part::Write(u64::MAX - 0x1FFF, 0x2000), Part::Write(u64::MAX, 1), Part::Write(start + 1, 4095)],
    );
    assert!(rig.heard.log().broken.is_empty());
    assert_eq!(rig.count(|stats| &stats.failed), 0);
}

#[test]
fn each_request_is_a_turn_of_its_own_so_that_a_stop_waits_for_one_at_most() {
    let mut rig = rig(0);
    let start = rig.pages(1);
    let number = rig.bench.filled(&((start / PAGE_BYTES) as u32).to_le_bytes());
    for _ in 0..8 {
        let head = rig.rings[0].chain(&[Part::Read(number, 4)]);
        rig.rings[0].offer(head);
    }
    rig.rings[0].kick.write(1).unwrap();
    for _ in 0..8 {
        rig.rings[0].wait_used(&rig.heard);
    }
    // A turn that completes something ends with a signal.
    rig.heard.wait("signal for each request", |log| log.used.len() == 8);
}

#[test]
fn a_report_of_more_ranges_than_a_queue_holds_is_cut() {
    const RANGES: u64 = 500;
    let mut rig = rig(REPORTING);
    let start = rig.pages(RANGES);
    let table = rig.bench.buffer(RANGES * 16);
    for at in 0..RANGES {
        let more = if at + 1 < RANGES { NEXT } else { 0 };
        let range = start + at * PAGE_BYTES;
        let next = (at + 1) as u16;
        write_descriptor(&rig.bench.memory, table + at * 16, range, PAGE_BYTES as u32, WRITE | more, next);
    }
    rig.rings[2].descriptor(0, table, RANGES as u32 * 16, INDIRECT, 0);
    rig.rings[2].offer(0);
    rig.rings[2].kick.write(1).unwrap();
    rig.rings[2].wait_used(&rig.heard);
    let most = BALLOON_RANGES_PER_REPORT_MAX as u64;
    assert_eq!(rig.count(|stats| &stats.reported_bytes), most * PAGE_BYTES);
    assert_eq!(rig.count(|stats| &stats.malformed), 1);
    assert!(rig.kept(start, RANGES).iter().skip(most as usize).all(|kept| *kept));
}

#[test]
fn every_chain_that_no_driver_may_make_breaks_the_device_once_in_each_queue() {
    for (what, offer) in CHAINS {
        for at in 0..3 {
            let mut rig = rig(REPORTING);
            let start = rig.pages(2);
            offer(&mut rig.bench, &mut rig.rings[at]);
            rig.rings[at].kick.write(1).unwrap();
            rig.heard.wait(what, |log| log.broken.len() == 1);
            // Neither this queue nor another is looked at before a reset.
            let other = (at + 1) % 3;
            rig.rings[other].submit(&[Part::Read(start, 4)]);
            rig.active.pause().unwrap();
            assert_eq!(rig.heard.log().broken.len(), 1, "{what}");
            assert!(rig.rings.iter_mut().all(|ring| ring.take_used().is_none()), "{what}");
            assert_eq!(rig.kept(start, 2), [true, true], "{what}");
        }
    }
}

#[test]
fn the_target_is_configuration_and_a_change_is_told() {
    let rig = rig(0);
    let read = |offset| {
        let mut data = [0xFF; 4];
        rig.balloon.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!((read(0), read(4), read(8), read(12), read(16)), (768, 0, 0, 0, 0));
    rig.control.set_target_bytes(3 << 20);
    assert_eq!(rig.heard.log().config_changes, 0);
    rig.control.set_target_bytes((2 << 20) + 4095);
    assert_eq!((rig.heard.log().config_changes, read(0), rig.control.target_bytes()), (1, 512, 2 << 20));
    rig.control.set_target_bytes(u64::MAX);
    assert_eq!(read(0), u32::MAX);
    rig.balloon.write_config(4, &7_u32.to_le_bytes());
    for (offset, length) in [(0, 4), (8, 4), (4, 2), (4, 8), (5, 4), (16, 4)] {
        rig.balloon.write_config(offset, &vec![1; length]);
    }
    assert_eq!((read(0), read(4), read(8), read(12)), (u32::MAX, 7, 0, 0));
    assert_eq!(rig.control.actual_bytes(), 7 * PAGE_BYTES);
}

#[test]
fn a_handle_outlives_its_driver() {
    let rig = rig(0);
    let control = rig.control.clone();
    drop(rig);
    control.set_target_bytes(4096);
    assert_eq!(control.target_bytes(), 4096);
}

#[test]
fn a_driver_without_its_queues_is_refused() {
    let mut bench = Bench::new();
    let ring = bench.ring(4);
    let (mut balloon, _) = Balloon::new(BalloonOptions::default());
    let (wiring, _) = bench.wiring(&[&ring], 0);
    assert!(matches!(balloon.activate(wiring), Err(ActivateError::QueueMissing { index: 1 })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any page numbers: exactly the named pages of memory are gone, in whatever order they came.
    #[test]
    fn exactly_the_named_pages_are_returned(numbers in proptest::collection::vec(0_u32..16, 0..40)) {
        let mut bench = Bench::new();
        let start = bench.filled(&vec![0xAA; 16 * PAGE_BYTES as usize]);
        let first = (start / PAGE_BYTES) as u32;
        let data: Vec<u8> = numbers.iter().flat_map(|number| (first + number).to_le_bytes()).collect();
        let buffer = bench.filled(&data);
        let mut ring = bench.ring(4);
        ring.submit(&[Part::Read(buffer, data.len() as u32)]);
        let chain = ring.queue(0).pop().unwrap().unwrap();
        let ranges = request::numbered(&bench.memory, &chain).unwrap();
        prop_assert!(ranges.windows(2).all(|pair| pair[0].start + pair[0].bytes < pair[1].start));
        for pages in ranges {
            prop_assert!(matches!(backend::discard(&bench.memory, pages), Outcome::Returned(_)));
        }
        for page in 0..16 {
            let byte = bench.bytes(start + u64::from(page) * PAGE_BYTES, 1)[0];
            prop_assert_eq!(byte == 0, numbers.contains(&page));
        }
    }
}
