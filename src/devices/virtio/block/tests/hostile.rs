//! Drivers that break the rules, by mistake or on purpose.
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

use vm_memory::GuestMemoryBackend;

use super::*;
use crate::limits::{BLOCK_IN_FLIGHT_SEGMENTS_MAX, CHAIN_DESCRIPTORS_MAX};
use crate::virtio::bench::{INDIRECT, NEXT, PATIENCE, WRITE, write_descriptor};

const OUTSIDE: u64 = 1 << 40;

/// Sends a chain as it is given, waits for it, returns the length.
fn exchange(driver: &mut Driver, parts: &[Part]) -> u32 {
    let head = driver.ring.submit(parts);
    let (used, length) = driver.ring.wait_used(&driver.heard);
    assert_eq!(used, u32::from(head));
    length
}

// virtio 1.2: 2.7.4.1-1
#[test]
fn requests_may_be_cut_into_buffers_anyhow() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        let header = driver.header(VIRTIO_BLK_T_OUT, 2);
        // Directly behind the header, as the arena goes.
        driver.filled(&[8; 24]);
        let data = driver.filled(&[7; 1024]);
        let status = driver.filled(&[UNANSWERED]);
        // The header in three pieces, the last of which goes on with data; an empty buffer; odd lengths.
        let parts = [
            Part::Read(header, 1),
            Part::Read(header + 1, 7),
            Part::Read(header + 8, 8 + 24),
            Part::Read(data, 0),
            Part::Read(data, 999),
            Part::Read(data + 999, 1),
            Part::Write(status, 1),
        ];
        assert_eq!(exchange(&mut driver, &parts), 1);
        assert_eq!(driver.bench.bytes(status, 1), [OK]);
        assert_eq!(driver.on_disk(2, 1024), [vec![8; 24], vec![7; 1000]].concat());

        // The status at the end of the last data buffer.
        let header = driver.header(VIRTIO_BLK_T_IN, 2);
        let answer = driver.filled(&[UNANSWERED; 513]);
        let parts = [Part::Read(header, 16), Part::Write(answer, 100), Part::Write(answer + 100, 413)];
        assert_eq!(exchange(&mut driver, &parts), 513);
        assert_eq!(driver.bench.bytes(answer, 513), [vec![8; 24], vec![7; 488], vec![OK]].concat());
    });
}

#[test]
fn chains_that_cannot_be_served_are_answered_where_possible() {
    let mut driver = Driver::new(Setup::default());
    let header = driver.header(VIRTIO_BLK_T_IN, 0);
    let data = driver.buffer(512);
    let status = driver.filled(&[UNANSWERED]);
    let end = driver.bench.memory.last_addr().0;
    type Row = (&'static str, Vec<Part>, u32, u8);
    let table: Vec<Row> = vec![
        ("no header", vec![Part::Write(status, 1)], 1, IOERR),
        ("a short header", vec![Part::Read(header, 15), Part::Write(status, 1)], 1, IOERR),
        ("nothing to write", vec![Part::Read(header, 16)], 0, UNANSWERED),
        ("a header outside memory", vec![Part::Read(OUTSIDE, 16), Part::Write(status, 1)], 1, IOERR),
        ("a header across the end", vec![Part::Read(end - 8, 16), Part::Write(status, 1)], 1, IOERR),
        ("a header that wraps", vec![Part::Read(u64::MAX - 8, 16), Part::Write(status, 1)], 1, IOERR),
        (
            "data outside memory",
            vec![Part::Read(header, 16), Part::Write(OUTSIDE, 512), Part::Write(status, 1)],
            0,
            IOERR,
        ),
        (
            "data across the end",
            vec![Part::Read(header, 16), Part::Write(end - 510, 512), Part::Write(status, 1)],
            0,
            IOERR,
        ),
        (
            "data that wraps",
            vec![Part::Read(header, 16), Part::Write(u64::MAX - 255, 512), Part::Write(status, 1)],
            0,
            IOERR,
        ),
        (
            "a status outside memory",
            vec![Part::Read(header, 16), Part::Write(data, 512), Part::Write(OUTSIDE, 1)],
            0,
            UNANSWERED,
        ),
        (
            "four gibibytes",
            vec![Part::Read(header, 16), Part::Write(data, 0xffff_fe00), Part::Write(status, 1)],
            0,
            IOERR,
        ),
    ];
    for (what, parts, length, answer) in table {
        driver.bench.memory.write_obj(UNANSWERED, GuestAddress(status)).unwrap();
        assert_eq!(exchange(&mut driver, &parts), length, "{what}");
        assert_eq!(driver.bench.bytes(status, 1), [answer], "{what}");
    }
    assert_eq!(driver.read(1, 512), (OK, vec![1; 512]));
    assert!(driver.heard.log().broken.is_empty());
}

/// Two requests fill what may be in flight; the others wait in the queue, and none is forgotten there.
#[test]
fn more_bytes_than_may_be_in_flight_wait_their_turn() {
    each_engine(|engine| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[3; 512], (32 << 20) - 512).unwrap();
        let mut driver = Driver::over(file, Setup { engine, ..Setup::default() });
        let header = driver.header(VIRTIO_BLK_T_IN, 0);
        let status = driver.filled(&[UNANSWERED]);
        let mebibyte = driver.buffer(1 << 20);
        let pieces = std::iter::repeat_n(Part::Write(mebibyte, 1 << 20), 32);
        let parts: Vec<Part> =
            [Part::Read(header, 16)].into_iter().chain(pieces).chain([Part::Write(status, 1)]).collect();
        for _ in 0..7 {
            let head = driver.ring.chain(&parts);
            driver.ring.offer(head);
        }
        driver.ring.kick.write(1).unwrap();
        for _ in 0..7 {
            assert_eq!(driver.ring.wait_used(&driver.heard).1, (32 << 20) + 1);
        }
        assert_eq!(driver.bench.bytes(mebibyte + (1 << 20) - 512, 512), [3; 512]);
        assert_eq!(seen(&driver.stats.read_bytes), 7 * (32 << 20));
        // A sector more than one request may have.
        let parts = [&parts[..33], &[Part::Write(mebibyte, 512), Part::Write(status, 1)]].concat();
        assert_eq!(exchange(&mut driver, &parts), 0);
        assert_eq!(driver.bench.bytes(status, 1), [IOERR]);
    });
}

#[test]
fn a_queue_beyond_repair_breaks_the_device_and_a_reset_mends_it() {
    // The chain classics. Each is given a ring and heads to offer.
    type Case = (&'static str, fn(&mut Driver) -> Vec<u16>);
    let cases: [Case; 9] = [
        ("a loop", |driver| {
            let [header, data] = [driver.header(VIRTIO_BLK_T_IN, 0), driver.buffer(512)];
            driver.ring.descriptor(0, header, 16, NEXT, 1);
            driver.ring.descriptor(1, data, 512, NEXT | WRITE, 1);
            vec![0]
        }),
        ("itself as next", |driver| {
            let header = driver.header(VIRTIO_BLK_T_IN, 0);
            driver.ring.descriptor(0, header, 16, NEXT, 0);
            vec![0]
        }),
        ("a next outside the table", |driver| {
            let header = driver.header(VIRTIO_BLK_T_IN, 0);
            driver.ring.descriptor(0, header, 16, NEXT, 256);
            vec![0]
        }),
        ("a read after a write", |driver| {
            let [header, data] = [driver.header(VIRTIO_BLK_T_IN, 0), driver.buffer(512)];
            driver.ring.descriptor(0, data, 512, NEXT | WRITE, 1);
            driver.ring.descriptor(1, header, 16, 0, 0);
            vec![0]
        }),
        ("more than four gibibytes", |driver| {
            let data = driver.buffer(512);
            driver.ring.descriptor(0, data, u32::MAX, NEXT | WRITE, 1);
            driver.ring.descriptor(1, data, u32::MAX, WRITE, 0);
            vec![0]
        }),
        ("indirect in indirect", |driver| {
            let [outer, inner] = [driver.buffer(16), driver.buffer(16)];
            write_descriptor(&driver.bench.memory, outer, inner, 16, INDIRECT, 0);
            driver.ring.descriptor(0, outer, 16, INDIRECT, 0);
            vec![0]
        }),
        ("an indirect table outside memory", |driver| {
            driver.ring.descriptor(0, OUTSIDE, 16, INDIRECT, 0);
            vec![0]
        }),
        ("a head outside the table", |_| vec![256]),
        ("a head that is in flight", |driver| {
            let head = {
                let [header, data, status] =
                    [driver.header(VIRTIO_BLK_T_IN, 0), driver.buffer(512), driver.filled(&[UNANSWERED])];
                driver.ring.chain(&[Part::Read(header, 16), Part::Write(data, 512), Part::Write(status, 1)])
            };
            vec![head, head]
        }),
    ];
    for (what, prepare) in cases {
        let mut driver = Driver::new(Setup::default());
        for head in prepare(&mut driver) {
            driver.ring.offer(head);
        }
        driver.ring.kick.write(1).unwrap();
        driver.heard.wait(what, |log| !log.broken.is_empty());
        driver.active().pause().unwrap();
        restart(&mut driver);
        assert_eq!(driver.read(1, 512), (OK, vec![1; 512]), "{what}");
    }

    let mut driver = Driver::new(Setup::default());
    driver.ring.offer_index(300);
    driver.ring.kick.write(1).unwrap();
    driver.heard.wait("an index that jumps", |log| !log.broken.is_empty());
}

fn restart(driver: &mut Driver) {
    driver.active.take().unwrap().stop();
    driver.ring = driver.bench.ring(256);
    let (wiring, heard) = driver.bench.wiring(&[&driver.ring], driver.block.features());
    (driver.active, driver.heard) = (Some(driver.block.activate(wiring).unwrap()), heard);
}

/// Another vCPU rewrites header and descriptors while the device reads them. Whatever it sees, it stays within
/// memory and disk, and it goes on after a reset.
#[test]
fn descriptors_rewritten_meanwhile_do_no_harm() {
    for engine in [Engine::Plain, Engine::IoUring] {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        let mut breaks = 0;
        for round in 0..40_u64 {
            driver.tidy();
            let header = driver.header(VIRTIO_BLK_T_IN, 0);
            let [data, status] = [driver.buffer(4096), driver.filled(&[UNANSWERED])];
            let (table, memory) = (driver.ring.table, Arc::clone(&driver.bench.memory));
            let is_over = Arc::new(AtomicBool::new(false));
            let over = Arc::clone(&is_over);
            let vandal = thread::spawn(move || {
                let mut random = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                while !over.load(Ordering::Relaxed) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let pick = |list: &[u64]| list[(random >> 32) as usize % list.len()];
                    let place = table + random % 48 * 16;
                    match random % 5 {
                        0 => memory.write_obj(pick(&[data, OUTSIDE, u64::MAX, header]), GuestAddress(place)),
                        1 => {
                            let length = pick(&[0, 1, 16, 512, 4096, u64::from(u32::MAX)]) as u32;
                            memory.write_obj(length, GuestAddress(place + 8))
                        }
                        2 => memory.write_obj(pick(&[0, 1, 2, 3]) as u16, GuestAddress(place + 12)),
                        3 => memory.write_obj(pick(&[0, 1, 4, 8, 11, 13]) as u32, GuestAddress(header)),
                        _ => memory.write_obj(pick(&[0, 1, SECTORS, u64::MAX]), GuestAddress(header + 8)),
                    }
                    .unwrap();
                }
            });
            let mut is_broken = false;
            for _ in 0..100 {
                let parts = [Part::Read(header, 16), Part::Write(data, 512), Part::Write(status, 1)];
                driver.ring.submit(&parts);
                let mut is_used = false;
                // A thread that has died neither answers nor complains, and the wait fails.
                driver.heard.wait("an answer or a complaint", |log| {
                    is_broken = !log.broken.is_empty();
                    is_used = driver.ring.take_used().is_some();
                    is_used || is_broken
                });
                if is_broken {
                    breaks += 1;
                    break;
                }
            }
            is_over.store(true, Ordering::Relaxed);
            vandal.join().unwrap();
            if is_broken {
                restart(&mut driver);
            }
            assert_eq!(driver.file.metadata().unwrap().len(), SECTORS * 512);
        }
        eprintln!("{engine:?}: {breaks} of 40 rounds broke the device");
        assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    }
}

#[test]
fn the_longest_chains_wait_for_each_other_and_leave_no_storage_behind() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        driver.active.take().unwrap().stop();
        let features = driver.block.features();
        let (wiring, signals) = (driver.ring.wiring(0, features), driver.heard.clone());
        let mut service = driver.block.service(wiring, signals, features, None).unwrap();
        // One table, to which every head of the queue leads: a header, two sectors in the smallest pieces, a status.
        let (header, status) = (driver.header(VIRTIO_BLK_T_IN, 0), driver.filled(&[UNANSWERED]));
        let (table, data) = (driver.buffer(1024 * 16), driver.buffer(1024));
        let place = |at: u16| table + u64::from(at) * 16;
        let memory = &driver.bench.memory;
        write_descriptor(memory, place(0), header, 16, NEXT, 1);
        for at in 1..1023 {
            let length = if at == 1022 { 3 } else { 1 };
            write_descriptor(memory, place(at), data, length, NEXT | WRITE, at + 1);
        }
        write_descriptor(memory, place(1023), status, 1, WRITE, 0);
        for head in 0..256 {
            driver.ring.descriptor(head, table, 1024 * 16, INDIRECT, 0);
            driver.ring.offer(head);
        }
        let (mut most, mut done) = (0, 0);
        let start = Instant::now();
        while done < 256 {
            service.take_requests().unwrap();
            most = most.max(service.in_flight.segments);
            service.serve().unwrap();
            done += std::iter::from_fn(|| driver.ring.take_used()).count();
            assert!(start.elapsed() < PATIENCE, "{engine:?}: {done} of 256 requests were answered");
        }
        assert!(most < BLOCK_IN_FLIGHT_SEGMENTS_MAX + CHAIN_DESCRIPTORS_MAX, "{engine:?}: {most} in flight");
        assert_eq!((seen(&driver.stats.reads), seen(&driver.stats.malformed)), (256, 0));
        assert_eq!(service.in_flight.segments, 0);
        assert_eq!(service.queue.spare_segments(), 0);
    });
}
