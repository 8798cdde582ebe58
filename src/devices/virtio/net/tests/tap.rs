//! A real tap, in a network namespace that ends with its thread. Needs root and iproute2, or says that it does.
use std::io::{Write, stderr};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;

const HOST: [u8; 4] = [10, 99, 0, 1];
const GUEST: [u8; 4] = [10, 99, 0, 2];

fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        let missing = match unshare(CloneFlags::CLONE_NEWNET) {
            Err(cause) => Some(format!("a network namespace of its own: {cause}")),
            Ok(()) if !Path::new("/dev/net/tun").exists() => Some("/dev/net/tun".to_owned()),
            Ok(()) if Command::new("ip").arg("-V").output().is_err() => Some("iproute2".to_owned()),
            Ok(()) => None,
        };
        if let Some(what) = missing {
            // Past the capture of the test harness, so that it is always seen.
            return writeln!(stderr(), "skipped: interfaces on a tap: this host does not give {what}")
                .unwrap();
        }
        // Nobody sends unasked then.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        test();
    };
    thread::spawn(run).join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A driver on a tap, whose host side has an address and knows the guest's.
fn connected(setup: Setup) -> (Driver, UdpSocket) {
    let tap = sys::tap::Tap::create("tap0").unwrap();
    let link = Link::new(File::from(OwnedFd::from(tap))).unwrap();
    let (far, _) = UnixDatagram::pair().unwrap();
    let driver = Driver::over(link, far, setup);
    ip("addr add 10.99.0.1/24 dev tap0");
    ip("link set tap0 address 02:00:00:00:00:01 up");
    ip("neigh add 10.99.0.2 lladdr 02:00:00:00:00:07 dev tap0");
    let socket = UdpSocket::bind(("10.99.0.1", 7000)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    (driver, socket)
}

fn sum(data: &[u8], start: u32) -> u16 {
    let words = data.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An IPv4 packet in a frame from the guest to the host.
fn ipv4_frame(protocol: u8, segment: &[u8]) -> Vec<u8> {
    let total = (20 + segment.len()) as u16;
    let mut header =
        [&[0x45, 0][..], &total.to_be_bytes(), &[0, 1, 0x40, 0, 64, protocol, 0, 0], &GUEST, &HOST].concat();
    let checksum = !sum(&header, 0);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&[2, 0, 0, 0, 0, 1][..], &MAC, &[8, 0], &header, segment].concat()
}

/// The sum over addresses, protocol and length, which an unfinished checksum field holds.
fn pseudo_sum(protocol: u8, length: usize) -> u16 {
    sum(&[&GUEST[..], &HOST, &[0, protocol]].concat(), length as u32)
}

fn udp_segment(payload: &[u8], checksum: u16) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let ports = [7001_u16.to_be_bytes(), 7000_u16.to_be_bytes()].concat();
    [&ports, &length.to_be_bytes()[..], &checksum.to_be_bytes(), payload].concat()
}

#[test]
fn packets_reach_the_host_with_the_checksum_left_to_it() {
    in_own_network(|| {
        let (mut driver, socket) = connected(Setup::default());
        let payload = b"from the guest";
        let segment = udp_segment(payload, pseudo_sum(17, 8 + payload.len()));
        // NEEDS_CSUM, at 34 + 6.
        driver.send([1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &ipv4_frame(17, &segment));
        let mut heard = [0; 100];
        let (length, from) = socket.recv_from(&mut heard).unwrap();
        assert_eq!((&heard[..length], from), (&payload[..], "10.99.0.2:7001".parse().unwrap()));
        assert_eq!([&driver.stats.tx_packets, &driver.stats.tx_dropped].map(seen), [1, 0]);
    });
}

// virtio 1.2: 5.1.6.4.1-8
#[test]
fn offloads_follow_what_each_driver_agreed_to() {
    in_own_network(|| {
        let all = Setup { without: MERGE, ..Setup::default() };
        let (mut driver, socket) = connected(all);
        for checksum_is_guests in [true, false, true] {
            let buffer = driver.post(2000);
            socket.send_to(b"to the guest", "10.99.0.2:7001").unwrap();
            let (_, length) = driver.rx.wait_used(&driver.heard);
            let packet = driver.bench.bytes(buffer, length as usize);
            assert_eq!(packet[packet.len() - 12..], *b"to the guest");
            assert_eq!(packet[0] & 1, u8::from(checksum_is_guests), "NEEDS_CSUM");
            assert_eq!(packet[10..12], [1, 0]);
            if !checksum_is_guests {
                let segment = &packet[HEADER + 34..];
                let start = u32::from(pseudo_sum(17, segment.len()));
                assert_eq!(sum(segment, start), 0xffff, "the kernel has finished the checksum");
            }
            // The next driver agrees to the opposite.
            driver.active.take().unwrap().stop();
            (driver.rx, driver.tx) = (driver.bench.ring(256), driver.bench.ring(256));
            let features = if checksum_is_guests { 0 } else { driver.net.features() & !MERGE };
            let (wiring, heard) = driver.bench.wiring(&[&driver.rx, &driver.tx], features);
            (driver.active, driver.heard) = (Some(driver.net.activate(wiring).unwrap()), heard);
        }
    });
}

#[test]
fn the_kernel_takes_segments_of_64_kibibytes_and_refuses_nonsense() {
    in_own_network(|| {
        let (mut driver, _socket) = connected(Setup::default());
        let payload = vec![7; 60_000];
        let length = 20 + payload.len();
        let ports = [9000_u16.to_be_bytes(), 9001_u16.to_be_bytes()].concat();
        let tcp = [
            &ports[..],
            &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff],
            &pseudo_sum(6, length).to_be_bytes(),
            &[0, 0],
            &payload,
        ]
        .concat();
        // NEEDS_CSUM, TCPv4, headers of 54, segments of 1448, checksum at 34 + 16.
        driver.send([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], &ipv4_frame(6, &tcp));
        assert_eq!([&driver.stats.tx_packets, &driver.stats.tx_dropped].map(seen), [1, 0]);
        // Within the header's rules, but TCP segments of a UDP packet make no sense to the kernel.
        driver.send([1, 1, 54, 0, 0xa8, 5, 34, 0, 6, 0, 0, 0], &frame(0, 100));
        let counted = [&driver.stats.tx_packets, &driver.stats.tx_dropped, &driver.stats.malformed].map(seen);
        assert_eq!(counted.iter().sum::<u64>(), 2);
        // Down, the tap takes nothing; that is no fault of the guest's.
        ip("link set tap0 down");
        let dropped = counted[1];
        driver.send([0; HEADER], &frame(0, 100));
        assert_eq!(seen(&driver.stats.tx_dropped), dropped + 1);
        assert!(driver.heard.log().broken.is_empty());
    });
}

// virtio 1.2: 5.1.6.4.1-2
#[test]
fn large_packets_arrive_whole_or_cut_as_the_driver_agreed() {
    in_own_network(|| {
        // The device was made for 1500 bytes, which this driver does not know.
        let (mut driver, socket) = connected(Setup { without: MTU, ..Setup::default() });
        ip("link set tap0 mtu 9000");
        let buffers: Vec<u64> = (0..8).map(|_| driver.post(1500)).collect();
        let payload: Vec<u8> = (0..8000).map(|at| (at / 5) as u8).collect();
        socket.send_to(&payload, "10.99.0.2:7001").unwrap();
        let mut packet = Vec::new();
        for buffer in buffers.iter().take(6) {
            let (_, length) = driver.rx.wait_used(&driver.heard);
            packet.extend(driver.bench.bytes(*buffer, length as usize));
        }
        assert_eq!(packet[10..12], [6, 0]);
        assert_eq!(packet[HEADER + 14 + 20 + 8..], payload);
    });
}

#[test]
fn a_tap_that_is_taken_away_is_told_once_and_does_not_spin() {
    in_own_network(|| {
        let (mut driver, _socket) = connected(Setup::default());
        driver.send([0; HEADER], &frame(0, 100));
        ip("link del tap0");
        driver.heard.wait("a complaint", |log| !log.broken.is_empty());
        assert!(driver.heard.log().broken[0].contains("taken away"));
        let before = driver.wait_idle(0);
        driver.active.as_mut().unwrap().pause().unwrap();
        driver.active.as_mut().unwrap().resume();
        driver.wait_idle(before);
        assert_eq!(driver.heard.log().broken.len(), 1);
    });
}

#[test]
fn what_is_no_proper_tap_is_refused() {
    let file = File::open("/dev/null").unwrap();
    assert!(matches!(Link::new(file), Err(LinkError::Tap(_))));
    in_own_network(|| {
        let tap = sys::tap::Tap::create("tap0").unwrap();
        let copy = File::from(tap.as_fd().try_clone_to_owned().unwrap());
        Link::new(copy).unwrap();
    });
}
