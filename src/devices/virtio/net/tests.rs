use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use virtio_bindings::bindings::virtio_net::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::limiter::TokenBucket;
use crate::limits::NET_FRAME_BYTES_MAX;
use crate::virtio::bench::{Bench, EVENT_IDX, Heard, PATIENCE, Part, Pauses, Ring};
use crate::virtio::{Active, VirtioDevice};

mod buffers;
mod header;
mod hostile;
mod tap;

const HEADER: usize = 12;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const MTU: u64 = 1 << VIRTIO_NET_F_MTU;

struct Setup {
    without: u64,
    rx_limits: RateLimits,
    tx_limits: RateLimits,
    event_idx: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        let (rx_limits, tx_limits) = (RateLimits::default(), RateLimits::default());
        Setup { without: 0, rx_limits, tx_limits, event_idx: false }
    }
}

/// A driver with its device; `far` is the other end of the wire.
struct Driver {
    bench: Bench,
    rx: Ring,
    tx: Ring,
    heard: Arc<Heard>,
    far: UnixDatagram,
    net: Net,
    active: Option<Box<dyn Active>>,
    stats: Arc<NetStats>,
    /// The device's thread.
    thread: Arc<Mutex<Option<nix::unistd::Pid>>>,
}

impl Driver {
    fn new(setup: Setup) -> Driver {
        let (near, far) = UnixDatagram::pair().unwrap();
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        Driver::over(Link::socket(File::from(OwnedFd::from(near))).unwrap(), far, setup)
    }

    fn over(link: Link, far: UnixDatagram, setup: Setup) -> Driver {
        let Setup { without, rx_limits, tx_limits, event_idx } = setup;
        let stats = Arc::new(NetStats::default());
        let name = "nic0".to_owned();
        let options =
            NetOptions { name, link, mac: MAC, mtu: 1500, rx_limits, tx_limits, stats: Arc::clone(&stats) };
        let mut net = Net::new(options).unwrap();
        let mut bench = Bench::new();
        let (rx, tx) = (bench.ring(256), bench.ring(256));
        let features = net.features() & !without | if event_idx { EVENT_IDX } else { 0 };
        let (mut wiring, heard) = bench.wiring(&[&rx, &tx], features);
        let thread = Arc::new(Mutex::new(None));
        let noted = Arc::clone(&thread);
        wiring.threads = Arc::new(move |_| *noted.lock().unwrap() = Some(nix::unistd::gettid()));
        let active = Some(net.activate(wiring).unwrap());
        Driver { bench, rx, tx, heard, far, net, active, stats, thread }
    }

    /// Gives the device a receive buffer.
    fn post(&mut self, bytes: u32) -> u64 {
        let buffer = self.bench.buffer(bytes.into());
        self.rx.submit(&[Part::Write(buffer, bytes)]);
        buffer
    }

    /// Sends a packet of header and frame in two buffers and waits until it is taken.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let (header, data) = (self.bench.filled(&header), self.bench.filled(frame));
        self.transmit(&[Part::Read(header, HEADER as u32), Part::Read(data, frame.len() as u32)]);
    }

    fn transmit(&mut self, parts: &[Part]) {
        let head = self.tx.submit(parts);
        assert_eq!(self.tx.wait_used(&self.heard), (u32::from(head), 0));
    }

    /// The next packet on the wire, without its header.
    fn hear(&self) -> Vec<u8> {
        let mut packet = vec![0; 70_000];
        let length = self.far.recv(&mut packet).unwrap();
        packet[HEADER..length].to_vec()
    }

    /// Puts a packet with an empty header on the wire.
    fn say(&self, frame: &[u8]) {
        self.far.send(&[&[0; HEADER], frame].concat()).unwrap();
    }

    fn hears_nothing(&self) -> bool {
        self.far.set_nonblocking(true).unwrap();
        let nothing = self.far.recv(&mut [0; 1]).is_err();
        self.far.set_nonblocking(false).unwrap();
        nothing
    }

    /// CPU time of the device's thread in nanoseconds; it has started when it has served something.
    fn thread_ns(&self) -> u64 {
        let thread = self.thread.lock().unwrap().unwrap();
        let path = format!("/proc/self/task/{thread}/schedstat");
        let text = std::fs::read_to_string(path).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until the thread has run for more than `since` and has stopped.
    fn wait_idle(&self, since: u64) -> u64 {
        let mut last = u64::MAX;
        self.heard.wait("an idle thread", |_| {
            let before = std::mem::replace(&mut last, self.thread_ns());
            before == last && last > since
        });
        last
    }
}

fn frame(byte: u8, bytes: usize) -> Vec<u8> {
    [&[0xff; 6][..], &MAC, &[8, 0], &vec![byte; bytes - 14]].concat()
}

fn seen(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

// virtio 1.2: 2.7.8.2-2 5.1.6.4.1-1
#[test]
fn packets_go_both_ways_and_lengths_are_exact() {
    for (without, event_idx) in [(0, false), (MERGE, false), (0, true)] {
        let mut driver = Driver::new(Setup { without, event_idx, ..Setup::default() });
        for round in 0..300_usize {
            let (out, back) = (frame(round as u8, 60 + round), frame(!(round as u8), 1500 - round));
            driver.tx.used_event(round as u16);
            driver.rx.used_event(round as u16);
            let [header, data, buffer] = if round == 0 {
                [driver.bench.buffer(12), driver.bench.buffer(2000), driver.bench.buffer(2000)]
            } else {
                [0x10_0000 - 0x3000, 0x10_0000 - 0x2000, 0x10_0000 - 0x1000]
            };
            driver.bench.memory.write_slice(&[0; HEADER], GuestAddress(header)).unwrap();
            driver.bench.memory.write_slice(&out, GuestAddress(data)).unwrap();
            driver.transmit(&[Part::Read(header, 12), Part::Read(data, out.len() as u32)]);
            assert_eq!(driver.hear(), out);
            driver.rx.submit(&[Part::Write(buffer, 2000)]);
            driver.say(&back);
            let (_, length) = driver.rx.wait_used(&driver.heard);
            assert_eq!(length as usize, HEADER + back.len());
            let packet = driver.bench.bytes(buffer, length as usize);
            assert_eq!(packet[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(packet[HEADER..], back);
        }
        let stats = &driver.stats;
        let packets = [&stats.rx_packets, &stats.tx_packets].map(seen);
        assert_eq!(packets, [300, 300]);
        let sent: u64 = (60..360).sum();
        assert_eq!([&stats.rx_bytes, &stats.tx_bytes].map(seen), [300 * 1500 - (0..300).sum::<u64>(), sent]);
        let bad = [&stats.rx_dropped, &stats.tx_dropped, &stats.malformed, &stats.throttled];
        assert_eq!(bad.map(seen), [0; 4]);
    }
}

// virtio 1.2: 5.1.6.3.2-1 5.1.6.4.1-2 5.1.6.4.1-3
#[test]
fn a_packet_larger_than_a_buffer_takes_as_many_as_it_needs() {
    let mut driver = Driver::new(Setup { without: MTU, ..Setup::default() });
    let buffers: Vec<u64> = (0..8).map(|_| driver.post(1024)).collect();
    let large: Vec<u8> = (0..3500).map(|at| at as u8).collect();
    driver.say(&large);
    let lengths: Vec<u32> = (0..4).map(|_| driver.rx.wait_used(&driver.heard).1).collect();
    assert_eq!(lengths, [1024, 1024, 1024, 3500 + 12 - 3 * 1024]);
    let parts = buffers.iter().zip(&lengths).map(|(at, length)| driver.bench.bytes(*at, *length as usize));
    let packet = parts.collect::<Vec<_>>().concat();
    assert_eq!(packet[10..12], 4_u16.to_le_bytes());
    assert_eq!(packet[HEADER..], large);
    driver.say(&frame(1, 60));
    assert_eq!(driver.rx.wait_used(&driver.heard).1, 72);
}

#[test]
fn the_largest_packet_passes_both_ways_and_a_larger_one_does_not() {
    let mut driver = Driver::new(Setup { without: MTU, ..Setup::default() });
    let most = NET_FRAME_BYTES_MAX as usize;
    let largest: Vec<u8> = (0..most).map(|at| (at / 7) as u8).collect();
    driver.send([0; HEADER], &largest);
    assert_eq!(driver.hear(), largest);
    driver.send([0; HEADER], &vec![0; most + 1]);
    assert_eq!(seen(&driver.stats.malformed), 1);
    assert!(driver.hears_nothing());
    let buffer = driver.post(HEADER as u32 + NET_FRAME_BYTES_MAX + 100);
    driver.say(&vec![1; most + 1]);
    driver.say(&largest);
    assert_eq!(driver.rx.wait_used(&driver.heard).1 as usize, HEADER + most);
    assert_eq!(driver.bench.bytes(buffer + HEADER as u64, most), largest);
    assert_eq!(seen(&driver.stats.rx_dropped), 1);
}

// virtio 1.2: 5.1.6.3.2-2
#[test]
fn a_frame_larger_than_what_there_is_for_it_is_dropped_and_the_next_one_passes() {
    // Without merging the one buffer has to do.
    let mut driver = Driver::new(Setup { without: MERGE, ..Setup::default() });
    driver.post(200);
    driver.post(200);
    driver.say(&frame(1, 500));
    driver.say(&frame(2, 100));
    assert_eq!(driver.rx.wait_used(&driver.heard).1, 112);
    assert_eq!(seen(&driver.stats.rx_dropped), 1);

    // With it the whole queue has to do.
    let mut driver = Driver::new(Setup { without: MTU, ..Setup::default() });
    let buffer = driver.bench.buffer(16);
    for _ in 0..256 {
        driver.rx.submit(&[Part::Write(buffer, 16)]);
    }
    driver.say(&frame(1, 5000));
    driver.say(&frame(2, 20));
    let lengths = [0; 2].map(|_| driver.rx.wait_used(&driver.heard).1);
    assert_eq!(lengths, [16, 16]);
    assert_eq!(seen(&driver.stats.rx_dropped), 1);
}

// virtio 1.2: 2.2.2-1
#[test]
fn every_offered_feature_comes_with_those_it_needs() {
    let offered = Driver::new(Setup::default()).net.features();
    let has = |feature: u32| offered & 1 << feature != 0;
    let needs = [
        (VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_RSS, VIRTIO_NET_F_CTRL_VQ),
    ];
    for (feature, needed) in needs {
        assert!(!has(feature) || has(needed), "{feature} needs {needed}");
    }
    // The host's segments, without which the two rows above would say nothing.
    assert!(has(VIRTIO_NET_F_GUEST_TSO4) && has(VIRTIO_NET_F_HOST_TSO4));
}

/// What is longer than the MTU in one piece is dropped when the driver has been told the MTU; what the driver takes for
/// several packets is not.
// virtio 1.2: 5.1.4.1-4 5.1.4.1-5
#[test]
fn a_driver_that_knows_the_mtu_is_passed_no_longer_frame() {
    let tagged = |bytes: usize| {
        let mut frame = frame(4, bytes);
        frame[12..14].copy_from_slice(&[0x81, 0]);
        frame
    };
    let segments = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let whole = [0; HEADER];
    let table = [
        (0, whole, frame(1, 1514), true),
        (0, whole, frame(2, 1515), false),
        (0, whole, tagged(1518), true),
        (0, whole, tagged(1519), false),
        (0, segments, frame(3, 5000), true),
        (MTU, whole, frame(2, 1515), true),
    ];
    for (without, header, sent, passes) in table {
        let mut driver = Driver::new(Setup { without, ..Setup::default() });
        let buffer = driver.post(6000);
        driver.far.send(&[&header[..], &sent].concat()).unwrap();
        let marker = frame(9, 60);
        driver.say(&marker);
        let first = if passes { &sent } else { &marker };
        let (_, length) = driver.rx.wait_used(&driver.heard);
        assert_eq!(length as usize, HEADER + first.len(), "{without:#x} {}", sent.len());
        assert_eq!(driver.bench.bytes(buffer + 12, first.len()), *first);
        assert_eq!(seen(&driver.stats.rx_dropped), u64::from(!passes));
        // The other way all of it goes out whole.
        driver.send(whole, &frame(5, 1514));
        assert_eq!(driver.hear(), frame(5, 1514));
    }
}

#[test]
fn a_flood_without_buffers_neither_freezes_nor_spins() {
    for event_idx in [false, true] {
        let mut driver = Driver::new(Setup { event_idx, ..Setup::default() });
        driver.send([0; HEADER], &frame(1, 60));
        assert_eq!(driver.hear(), frame(1, 60));
        let at_rest = driver.wait_idle(0);
        driver.far.set_nonblocking(true).unwrap();
        let packet = [&[0; HEADER][..], &frame(9, 1000)].concat();
        let flood = |driver: &Driver| (0..1000).filter(|_| driver.far.send(&packet).is_ok()).count();
        let mut accepted = flood(&driver);
        let before = driver.wait_idle(at_rest);
        accepted += flood(&driver);
        assert_eq!(driver.thread_ns(), before, "the thread ran though it could do nothing");
        assert!(accepted > 0);
        // Transmission goes on meanwhile.
        driver.far.set_nonblocking(false).unwrap();
        driver.send([0; HEADER], &frame(1, 60));
        assert_eq!(driver.hear(), frame(1, 60));
        // A packet that needs two buffers waits for the second.
        let at_rest = driver.wait_idle(before);
        driver.post(600);
        driver.wait_idle(at_rest);
        assert_eq!(driver.rx.take_used(), None);
        driver.post(600);
        let lengths = [0; 2].map(|_| driver.rx.wait_used(&driver.heard).1);
        assert_eq!(lengths, [600, 412]);
        for _ in 1..accepted {
            driver.rx.submit(&[Part::Write(0x8000, 1012)]);
        }
        for _ in 1..accepted {
            assert_eq!(driver.rx.wait_used(&driver.heard).1, 1012);
        }
        assert_eq!(seen(&driver.stats.rx_packets), accepted as u64);
    }
}

#[test]
fn limits_hold_each_direction_back_and_a_change_lets_it_go() {
    // One packet of any size passes, and the next only after as many seconds as it had bytes.
    let bandwidth = Some(TokenBucket { per_second: 1, burst: 1 });
    let slow = RateLimits { bandwidth, operations: None };
    let mut driver = Driver::new(Setup { rx_limits: slow, tx_limits: slow, ..Setup::default() });
    driver.post(2000);
    driver.post(2000);
    driver.send([0; HEADER], &frame(1, 60));
    driver.say(&frame(2, 60));
    driver.rx.wait_used(&driver.heard);
    driver.say(&frame(3, 60));
    let (header, data) = (driver.bench.filled(&[0; HEADER]), driver.bench.filled(&frame(4, 60)));
    driver.tx.submit(&[Part::Read(header, 12), Part::Read(data, 60)]);
    driver.heard.wait("throttling", |_| seen(&driver.stats.throttled) == 2);
    assert_eq!((driver.rx.take_used(), driver.tx.take_used()), (None, None));
    driver.net.control().set_limits(RateLimits::default(), RateLimits::default());
    driver.rx.wait_used(&driver.heard);
    driver.tx.wait_used(&driver.heard);
    assert_eq!((driver.hear(), driver.hear()), (frame(1, 60), frame(4, 60)));
}

#[test]
fn bandwidth_is_what_the_limit_says() {
    let bandwidth = Some(TokenBucket { per_second: 100_000, burst: 10_000 });
    let limits = RateLimits { bandwidth, operations: None };
    let mut driver = Driver::new(Setup { rx_limits: limits, tx_limits: limits, ..Setup::default() });
    let start = Instant::now();
    for round in 0..30 {
        driver.send([0; HEADER], &frame(round, 1000));
        assert_eq!(driver.hear(), frame(round, 1000));
    }
    let sent_ms = start.elapsed().as_millis();
    assert!(sent_ms >= 190, "sending took only {sent_ms} ms");
    for round in 0..30 {
        driver.post(2000);
        driver.say(&frame(round, 1000));
        driver.rx.wait_used(&driver.heard);
    }
    let received_ms = start.elapsed().as_millis() - sent_ms;
    assert!(received_ms >= 190, "receiving took only {received_ms} ms");
}

// virtio 1.2: 5.1.4.1-3
#[test]
fn the_configuration_is_read_only_and_ends_where_it_ends() {
    let driver = Driver::new(Setup::default());
    let mut space = [0xff; 20];
    driver.net.read_config(0, &mut space);
    assert_eq!(space[..6], MAC);
    assert_eq!(space[6..12], [1, 0, 1, 0, 0xdc, 5]);
    assert_eq!(space[12..], [0; 8]);
    for (offset, data) in [(0, &[9; 6][..]), (6, &[0]), (u64::MAX, &[1])] {
        driver.net.write_config(offset, data);
    }
    let mut again = [0xff; 20];
    driver.net.read_config(0, &mut again);
    assert_eq!(again, space);
    let mut byte = [0xff];
    driver.net.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_missing_queue_is_told() {
    let mut driver = Driver::new(Setup::default());
    driver.active.take().unwrap().stop();
    let ring = driver.bench.ring(4);
    let (wiring, _) = driver.bench.wiring(&[&ring], 0);
    assert!(driver.net.activate(wiring).err().unwrap().to_string().contains("queue 1"));
}

/// Numbered packets both ways while the device is paused again and again: each arrives once, in order.
#[test]
fn nothing_is_lost_or_doubled_across_pauses_under_load() {
    for event_idx in [false, true] {
        let Driver { mut bench, mut rx, mut tx, heard, far, net: _net, active, stats, .. } =
            Driver::new(Setup { event_idx, ..Setup::default() });
        let pauses = Pauses::start(active.unwrap());
        let echo = thread::spawn(move || {
            for expected in 0.. {
                let mut packet = [0; 200];
                let length = far.recv(&mut packet).unwrap();
                if length < HEADER + 60 {
                    break;
                }
                let number = u32::from_le_bytes(packet[HEADER + 14..HEADER + 18].try_into().unwrap());
                assert_eq!((length, number), (HEADER + 60, expected));
                far.send(&packet[..length]).unwrap();
            }
        });
        let header = bench.filled(&[0; HEADER]);
        let places: Vec<u64> = (0..16).map(|_| bench.filled(&frame(0, 60))).collect();
        // Half of a packet each, so that held buffers are given back now and then.
        let buffers: Vec<u64> = (0..64).map(|_| bench.buffer(48)).collect();
        for buffer in &buffers {
            rx.submit(&[Part::Write(*buffer, 48)]);
        }
        let (mut sent, mut taken, mut received) = (0_u32, 0_u32, 0_u32);
        let mut half = Vec::new();
        let mut next_buffer = 0;
        loop {
            let goes_on = received < 3000 || pauses.count() < 10;
            // No more at once than a socket of the smallest backlog takes: what it does not take is dropped.
            while goes_on && sent - received < 8 && sent - taken < 16 {
                let place = places[sent as usize % 16];
                bench.memory.write_obj(sent, GuestAddress(place + 14)).unwrap();
                tx.used_event(taken as u16);
                tx.submit(&[Part::Read(header, 12), Part::Read(place, 60)]);
                sent += 1;
            }
            if received == sent {
                break;
            }
            heard.wait("traffic", |_| {
                let mut moved = false;
                while tx.take_used().is_some() {
                    taken += 1;
                    moved = true;
                }
                while let Some((_, length)) = rx.take_used() {
                    let buffer = buffers[next_buffer % 64];
                    next_buffer += 1;
                    half.extend(bench.bytes(buffer, length as usize));
                    rx.used_event(next_buffer as u16);
                    rx.submit(&[Part::Write(buffer, 48)]);
                    if half.len() == HEADER + 60 {
                        let number = u32::from_le_bytes(half[HEADER + 14..HEADER + 18].try_into().unwrap());
                        assert_eq!(number, received);
                        received += 1;
                        half.clear();
                    }
                    moved = true;
                }
                moved
            });
        }
        // A short packet ends the echo.
        let parts = [Part::Read(header, 12), Part::Read(places[0], 20)];
        tx.submit(&parts);
        echo.join().unwrap();
        pauses.end();
        assert_eq!([&stats.rx_packets, &stats.tx_packets].map(seen), [sent.into(), u64::from(sent) + 1]);
        assert_eq!([&stats.rx_dropped, &stats.tx_dropped, &stats.malformed].map(seen), [0; 3]);
        assert!(heard.log().broken.is_empty());
    }
}
