//! Drivers that break the rules, by mistake or on purpose.
use super::*;
use crate::virtio::bench::{NEXT, WRITE};

const OUTSIDE: u64 = 1 << 40;

// virtio 1.2: 2.7.4.1-1
#[test]
fn packets_that_cannot_be_sent_are_taken_and_counted() {
    let mut driver = Driver::new(Setup::default());
    let header = driver.bench.filled(&[0; HEADER]);
    let bad_header = driver.bench.filled(&[1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let data = driver.bench.filled(&frame(1, 60));
    let table = vec![
        ("half a header", vec![Part::Read(header, 6)]),
        ("nothing behind the header", vec![Part::Read(header, 12)]),
        ("less than a frame", vec![Part::Read(header, 12), Part::Read(data, 13)]),
        ("more than a frame", vec![Part::Read(header, 12), Part::Read(data, NET_FRAME_BYTES_MAX + 1)]),
        ("four gibibytes", vec![Part::Read(header, 12), Part::Read(data, u32::MAX - 12)]),
        ("only room to write", vec![Part::Write(data, 60)]),
        ("room to write", vec![Part::Read(header, 12), Part::Read(data, 60), Part::Write(data, 60)]),
        ("a header outside memory", vec![Part::Read(OUTSIDE, 12), Part::Read(data, 60)]),
        ("a frame outside memory", vec![Part::Read(header, 12), Part::Read(OUTSIDE, 60)]),
        ("a frame that wraps", vec![Part::Read(header, 12), Part::Read(u64::MAX - 30, 60)]),
        ("a header against the rules", vec![Part::Read(bad_header, 12), Part::Read(data, 60)]),
    ];
    let count = table.len() as u64;
    for (number, (what, parts)) in (1..).zip(table) {
        driver.transmit(&parts);
        assert_eq!(seen(&driver.stats.malformed), number, "{what}");
    }
    assert!(driver.hears_nothing());
    assert_eq!([&driver.stats.tx_packets, &driver.stats.tx_dropped].map(seen), [0, 0]);
    // In as many buffers as one likes, the header too.
    let parts: Vec<Part> = (0..12).map(|at| Part::Read(header + at, 1)).collect();
    let parts: Vec<Part> = parts.into_iter().chain((0..60).map(|at| Part::Read(data + at, 1))).collect();
    driver.transmit(&parts);
    assert_eq!(driver.hear(), frame(1, 60));
    assert_eq!(seen(&driver.stats.malformed), count);
    assert!(driver.heard.log().broken.is_empty());
}

#[test]
fn receive_buffers_outside_memory_cost_a_packet_and_no_more() {
    let mut driver = Driver::new(Setup::default());
    driver.rx.submit(&[Part::Write(OUTSIDE, 2000)]);
    driver.say(&frame(1, 60));
    assert_eq!(driver.rx.wait_used(&driver.heard).1, 0);
    // The second of two.
    let buffer = driver.bench.buffer(40);
    driver.rx.submit(&[Part::Write(buffer, 40)]);
    driver.rx.submit(&[Part::Write(u64::MAX - 8, 40)]);
    driver.say(&frame(1, 60));
    assert_eq!([0; 2].map(|_| driver.rx.wait_used(&driver.heard).1), [0, 0]);
    driver.post(2000);
    driver.say(&frame(1, 60));
    assert_eq!(driver.rx.wait_used(&driver.heard).1, 72);
    assert_eq!([&driver.stats.malformed, &driver.stats.rx_dropped].map(seen), [2, 2]);
}

#[test]
fn queues_beyond_repair_break_the_device_and_a_reset_mends_it() {
    type Case = (&'static str, fn(&mut Driver));
    let cases: [Case; 8] = [
        ("a receive buffer to read", |driver| {
            let data = driver.bench.buffer(60);
            driver.rx.submit(&[Part::Read(data, 60)]);
        }),
        ("a receive buffer of nothing", |driver| {
            driver.rx.submit(&[Part::Write(0x1000, 0)]);
        }),
        ("a receive loop", |driver| {
            driver.rx.descriptor(0, 0x1000, 60, NEXT | WRITE, 0);
            driver.rx.offer(0);
        }),
        ("a receive index that jumps", |driver| driver.rx.offer_index(300)),
        ("a transmit loop", |driver| {
            driver.tx.descriptor(0, 0x1000, 60, NEXT, 1);
            driver.tx.descriptor(1, 0x1000, 60, NEXT, 0);
            driver.tx.offer(0);
        }),
        ("a transmit head outside the table", |driver| driver.tx.offer(256)),
        ("a transmit read after a write", |driver| {
            driver.tx.descriptor(0, 0x1000, 60, NEXT | WRITE, 1);
            driver.tx.descriptor(1, 0x1000, 60, 0, 0);
            driver.tx.offer(0);
        }),
        ("a transmit index that jumps", |driver| driver.tx.offer_index(1000)),
    ];
    for (what, prepare) in cases {
        let mut driver = Driver::new(Setup::default());
        prepare(&mut driver);
        driver.say(&frame(1, 60));
        driver.rx.kick.write(1).unwrap();
        driver.tx.kick.write(1).unwrap();
        driver.heard.wait(what, |log| !log.broken.is_empty());
        restart(&mut driver);
        driver.send([0; HEADER], &frame(2, 60));
        assert_eq!(driver.hear(), frame(2, 60), "{what}");
    }
}

fn restart(driver: &mut Driver) {
    driver.active.take().unwrap().stop();
    (driver.rx, driver.tx) = (driver.bench.ring(256), driver.bench.ring(256));
    let (wiring, heard) = driver.bench.wiring(&[&driver.rx, &driver.tx], driver.net.features());
    (driver.active, driver.heard) = (Some(driver.net.activate(wiring).unwrap()), heard);
}

/// Another vCPU rewrites headers and descriptors while the device reads them.
#[test]
fn descriptors_rewritten_meanwhile_do_no_harm() {
    let mut driver = Driver::new(Setup::default());
    driver.far.set_nonblocking(true).unwrap();
    let [header, data, buffer] =
        [driver.bench.buffer(12), driver.bench.buffer(2000), driver.bench.buffer(2000)];
    for round in 0..20_u64 {
        let tables = [driver.rx.table, driver.tx.table];
        let memory = Arc::clone(&driver.bench.memory);
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let vandal = thread::spawn(move || {
            let mut random = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            while !over.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let pick = |list: &[u64]| list[(random >> 32) as usize % list.len()];
                let place = tables[random as usize % 2] + (random >> 8) % 16 * 16;
                match random % 4 {
                    0 => memory.write_obj(pick(&[data, OUTSIDE, u64::MAX, header]), GuestAddress(place)),
                    1 => {
                        let length = pick(&[0, 1, 12, 60, 1500, u64::from(u32::MAX)]) as u32;
                        memory.write_obj(length, GuestAddress(place + 8))
                    }
                    2 => memory.write_obj(pick(&[0, 1, 2, 3]) as u16, GuestAddress(place + 12)),
                    _ => memory.write_obj(random, GuestAddress(header)),
                }
                .unwrap();
            }
        });
        let mut is_broken = false;
        for _ in 0..100 {
            driver.rx.submit(&[Part::Write(buffer, 500)]);
            driver.tx.submit(&[Part::Read(header, 12), Part::Read(data, 60)]);
            // The wire may be full, or empty; neither matters.
            let _ = driver.far.send(&[7; 80]);
            let _ = driver.far.recv(&mut [0; 100]);
            // A thread that has died neither takes nor complains, and the wait fails.
            driver.heard.wait("a packet taken or a complaint", |log| {
                while driver.rx.take_used().is_some() {}
                is_broken = !log.broken.is_empty();
                is_broken || driver.tx.take_used().is_some()
            });
            if is_broken {
                break;
            }
        }
        is_over.store(true, Ordering::Relaxed);
        vandal.join().unwrap();
        restart(&mut driver);
    }
    while driver.far.recv(&mut [0; 1]).is_ok() {}
    driver.send([0; HEADER], &frame(2, 60));
    driver.far.set_nonblocking(false).unwrap();
    assert_eq!(driver.hear(), frame(2, 60));
}
