//! Limits, pauses and random requests.
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::limiter::TokenBucket;
use crate::virtio::bench::Pauses;

/// Lets one request of any size pass, and the next only after as many seconds as it had bytes.
const ONE_AND_THEN_NONE: RateLimits =
    RateLimits { bandwidth: Some(TokenBucket { per_second: 1, burst: 1 }), operations: None };

#[test]
fn limits_hold_a_request_back_and_a_change_lets_it_go() {
    let mut driver = Driver::new(Setup { limits: ONE_AND_THEN_NONE, ..Setup::default() });
    assert_eq!(driver.read(0, 512).0, OK);
    driver.send(VIRTIO_BLK_T_IN, 0, &[], 512);
    driver.heard.wait("throttling", |_| seen(&driver.stats.throttled) == 1);
    assert_eq!(driver.ring.take_used(), None);
    driver.block.control().set_limits(RateLimits::default());
    driver.ring.wait_used(&driver.heard);
    for _ in 0..50 {
        assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    }
}

#[test]
fn bandwidth_is_what_the_limit_says() {
    // 64 KiB at once, then 1 MiB/s: 256 KiB more take a quarter of a second.
    let bandwidth = Some(TokenBucket { per_second: 1 << 20, burst: 64 << 10 });
    let mut driver =
        Driver::new(Setup { limits: RateLimits { bandwidth, operations: None }, ..Setup::default() });
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(driver.read(0, 32 << 10).0, OK);
        driver.tidy();
    }
    let took = start.elapsed().as_millis();
    assert!(took >= 250, "10 reads took only {took} ms");
    assert!(seen(&driver.stats.throttled) > 0);
}

#[test]
fn a_paused_disk_takes_nothing_and_loses_nothing() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        driver.active().pause().unwrap();
        let sent = driver.send(VIRTIO_BLK_T_OUT, 5, &[8; 512], 0);
        driver.active().pause().unwrap();
        assert_eq!(driver.ring.take_used(), None);
        assert_eq!(driver.on_disk(5, 512), [5; 512]);
        driver.active().resume();
        assert_eq!(driver.ring.wait_used(&driver.heard).0, u32::from(sent.head));
        assert_eq!(driver.on_disk(5, 512), [8; 512]);
    });
}

#[test]
fn a_throttled_request_waits_out_a_pause_in_the_queue() {
    let mut driver = Driver::new(Setup { limits: ONE_AND_THEN_NONE, ..Setup::default() });
    let control = driver.block.control();
    for round in 0..5_u8 {
        let sector = u64::from(round);
        assert_eq!(driver.read(0, 512).0, OK);
        let sent = driver.send(VIRTIO_BLK_T_OUT, sector, &[0xee; 512], 0);
        driver.heard.wait("throttling", |_| seen(&driver.stats.throttled) > 0);
        driver.active().pause().unwrap();
        // Tokens that come during the pause change nothing.
        control.set_limits(RateLimits::default());
        driver.active().pause().unwrap();
        assert_eq!(driver.ring.take_used(), None);
        assert_eq!(driver.bench.bytes(sent.status, 1), [UNANSWERED]);
        driver.active().resume();
        driver.ring.wait_used(&driver.heard);
        assert_eq!(driver.bench.bytes(sent.status, 1), [OK]);
        assert_eq!(driver.on_disk(sector, 512), [0xee; 512]);
        driver.stats.throttled.store(0, Ordering::Relaxed);
        control.set_limits(ONE_AND_THEN_NONE);
    }
}

/// Every request carries its number; whatever the pauses do, each is done exactly once.
#[test]
fn nothing_is_lost_or_done_twice_across_pauses_under_load() {
    for (engine, event_idx) in [(Engine::Plain, false), (Engine::IoUring, false), (Engine::IoUring, true)] {
        let Driver { mut bench, mut ring, heard, file, active, stats, block: _block, .. } =
            Driver::new(Setup { engine, event_idx, ..Setup::default() });
        let pauses = Pauses::start(active.unwrap());
        // 32 places, each with its header, data and status; place n always writes sector n.
        let places: Vec<[u64; 3]> = (0..32_u64)
            .map(|sector| {
                let header = [&1_u32.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
                [bench.filled(&header), bench.filled(&[0; 512]), bench.filled(&[UNANSWERED])]
            })
            .collect();
        let (mut sequence, mut in_flight) = (0_u64, std::collections::HashMap::new());
        let mut done = 0;
        let mut idle: Vec<usize> = (0..places.len()).collect();
        let mut last = vec![0_u64; places.len()];
        loop {
            let goes_on = done < 3000 || pauses.count() < 10;
            while goes_on && let Some(place) = idle.pop() {
                let [header, data, status] = places[place];
                sequence += 1;
                bench.memory.write_obj(sequence, GuestAddress(data)).unwrap();
                bench.memory.write_obj(UNANSWERED, GuestAddress(status)).unwrap();
                ring.used_event(done as u16);
                let parts = [Part::Read(header, 16), Part::Read(data, 512), Part::Write(status, 1)];
                let head = u32::from(ring.submit(&parts));
                assert!(in_flight.insert(head, (place, sequence)).is_none());
            }
            if in_flight.is_empty() {
                break;
            }
            let (head, length) = ring.wait_used(&heard);
            let (place, number) = in_flight.remove(&head).expect("completed twice or never asked");
            assert_eq!((bench.bytes(places[place][2], 1)[0], length), (OK, 1));
            last[place] = number;
            idle.push(place);
            done += 1;
        }
        assert_eq!(ring.take_used(), None);
        pauses.end();
        assert_eq!(seen(&stats.writes), done);
        assert_eq!(seen(&stats.written_bytes), done * 512);
        for (place, number) in last.into_iter().enumerate() {
            let mut data = [0; 8];
            file.read_exact_at(&mut data, place as u64 * 512).unwrap();
            assert_eq!(u64::from_le_bytes(data), number, "sector {place}");
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Read { sector: u64, sectors: u32 },
    Write { sector: u64, sectors: u32, byte: u8 },
    Zeroes { sector: u64, sectors: u32, unmap: u32 },
    Flush,
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Some reach beyond the end.
    let sector = 0..SECTORS + 4;
    let sectors = 1..12_u32;
    let step = prop_oneof![
        (sector.clone(), sectors.clone()).prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        (sector.clone(), sectors.clone(), any::<u8>()).prop_map(|(sector, sectors, byte)| Step::Write {
            sector,
            sectors,
            byte
        }),
        (sector, sectors, 0..2_u32).prop_map(|(sector, sectors, unmap)| Step::Zeroes {
            sector,
            sectors,
            unmap
        }),
        Just(Step::Flush),
        Just(Step::Pause),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_disk_does_what_a_vector_of_bytes_does(steps in steps(), is_plain in any::<bool>()) {
        let engine = if is_plain { Engine::Plain } else { Engine::IoUring };
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        let mut oracle = driver.on_disk(0, SECTORS as usize * 512);
        for step in steps {
            driver.tidy();
            match step {
                Step::Read { sector, sectors } => {
                    let place = sector as usize * 512..(sector as usize + sectors as usize) * 512;
                    let (status, data) = driver.read(sector, sectors * 512);
                    match oracle.get(place) {
                        Some(expected) => prop_assert_eq!((status, &data[..]), (OK, expected)),
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Write { sector, sectors, byte } => {
                    let place = sector as usize * 512..(sector as usize + sectors as usize) * 512;
                    let status = driver.write(sector, &vec![byte; sectors as usize * 512]);
                    match oracle.get_mut(place) {
                        Some(bytes) => {
                            prop_assert_eq!(status, OK);
                            bytes.fill(byte);
                        }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Zeroes { sector, sectors, unmap } => {
                    let place = sector as usize * 512..(sector as usize + sectors as usize) * 512;
                    let ranges = range(sector, sectors, unmap);
                    let (status, ..) = driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &ranges, 0);
                    match oracle.get_mut(place) {
                        Some(bytes) => {
                            prop_assert_eq!(status, OK);
                            bytes.fill(0);
                        }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Flush => prop_assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK),
                Step::Pause => {
                    driver.active().pause().unwrap();
                    driver.active().resume();
                }
            }
        }
        prop_assert_eq!(driver.on_disk(0, SECTORS as usize * 512), oracle);
    }
}
