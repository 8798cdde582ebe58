//! `net`: datagrams out of and into one virtio interface over a tap, in full-size and in small frames. The host's end is
//! a socket of this program on the tap itself, no bridge. QEMU's is virtio-pci on q35 over the same kind of tap.
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use sys::tap::Tap;

use crate::disk::q35;
use crate::ground::Ground;
use crate::guest::{Counts, Figures, Guest, on_command};
use crate::rows::{Report, Series};
use crate::vmm_driver::Machine;

/// A case: the probe's word and what is sent meanwhile.
struct Case {
    name: &'static str,
    word: &'static str,
    direction: Direction,
    figure: &'static str,
    unit: &'static str,
    /// What the figure is divided by to be in its unit.
    per: f64,
}

#[derive(Clone, Copy)]
enum Direction {
    Out,
    /// Datagrams with so many bytes of payload are sent to the guest.
    In(usize),
}

/// The probe's `netsink` measures so long from the first frame on.
const SINK: &str = "netsink=1000";

const CASES: [Case; 4] = [
    Case {
        name: "out 1514 B",
        word: "netsend=1472,1000",
        direction: Direction::Out,
        figure: "mbit_per_s",
        unit: "Gb/s",
        per: 1e3,
    },
    Case {
        name: "out 60 B",
        word: "netsend=18,1000",
        direction: Direction::Out,
        figure: "frames_per_s",
        unit: "1/s",
        per: 1.0,
    },
    Case {
        name: "in 1514 B",
        word: SINK,
        direction: Direction::In(1472),
        figure: "mbit_per_s",
        unit: "Gb/s",
        per: 1e3,
    },
    Case {
        name: "in 60 B",
        word: SINK,
        direction: Direction::In(18),
        figure: "frames_per_s",
        unit: "1/s",
        per: 1.0,
    },
];

/// One that Toft is compared with.
struct Peer {
    who: &'static str,
    tap: &'static str,
    network: u8,
    vhost: &'static str,
}

const QEMU: Peer = Peer { who: "qemu", tap: "bench-qemu", network: 2, vhost: "off" };
/// With the host's kernel in place of QEMU between guest and tap.
const QEMU_VHOST: Peer = Peer { who: "qemu-vhost", tap: "bench-vhost", network: 3, vhost: "on" };

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let words = CASES.map(|case| case.word);
    let mut ends = vec![End::toft(ground, &words), End::qemu(ground, &words, &QEMU)];
    if Path::new("/dev/vhost-net").exists() {
        ends.push(End::qemu(ground, &words, &QEMU_VHOST));
    } else {
        report.note("absent: this host has no vhost-net for QEMU".to_owned());
    }
    let mut samples = CASES.map(|_| vec![Vec::new(); ends.len()]);
    for _ in 0..ground.samples(9, 1) {
        for (case, samples) in CASES.iter().zip(&mut samples) {
            for (end, samples) in ends.iter_mut().zip(samples) {
                samples.push(end.measure(case).get(case.figure) / case.per);
            }
        }
    }
    for (case, samples) in CASES.iter().zip(&samples) {
        assert!(samples.iter().flatten().all(|sample| *sample > 0.0), "no frame came: {}", case.name);
        let series = |who| Series { bench: "net", case: case.name, who, unit: case.unit };
        let medians: Vec<(&str, f64)> = ends
            .iter()
            .zip(samples)
            .map(|(end, samples)| (end.guest.who, report.add(series(end.guest.who), samples)))
            .collect();
        let toft = medians[0].1;
        for (who, theirs) in &medians[1..] {
            let (name, ratio) = (case.name, toft / theirs);
            report.bar(&format!("net {name}: {ratio:.2} x {who} (wanted: 1)"), ratio >= 1.0);
        }
    }
    for case in &CASES {
        for end in &mut ends {
            let (figures, counts) = end.count(case);
            report.counts("net", case.name, end.guest.who, &counts, figures.get("frames"));
        }
    }
}

/// A guest and the host's end of its tap.
struct End {
    guest: Guest,
    /// Bound to the port the guest sends to; nobody reads what comes.
    socket: UdpSocket,
    guest_address: String,
}

impl End {
    fn toft(ground: &Ground, words: &[&str]) -> End {
        let tap = Tap::create("bench-toft").unwrap();
        let (host, address) = configure("bench-toft", 1, "02:00:00:00:00:00");
        let mut machine = Machine::new(&ground.probe(), &command_line(&host, &address, words));
        machine.spec.memory_bytes = 128 << 20;
        machine.nic(std::os::fd::OwnedFd::from(tap).into());
        End::new(Guest::toft(machine), &host, address)
    }

    fn qemu(ground: &Ground, words: &[&str], Peer { who, tap, network, vhost }: &Peer) -> End {
        ip(&format!("tuntap add dev {tap} mode tap vnet_hdr"));
        let mac = format!("02:00:00:00:00:{network:02x}");
        let (host, address) = configure(tap, *network, &mac);
        let more = [
            "-netdev".to_owned(),
            format!("tap,id=n,ifname={tap},script=no,downscript=no,vhost={vhost}"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=n,mac={mac},disable-legacy=on,romfile="),
        ];
        let arguments = q35(ground, &command_line(&host, &address, words), &more);
        let mut guest = Guest::qemu(&ground.qemu(), &arguments);
        guest.who = who;
        End::new(guest, &host, address)
    }

    fn new(guest: Guest, host: &str, guest_address: String) -> End {
        End { guest, socket: UdpSocket::bind((host, 9)).unwrap(), guest_address }
    }

    fn measure(&mut self, case: &Case) -> Figures {
        self.with_traffic(case, |guest, ready, act| guest.measure_while(case.word, ready, act))
    }

    fn count(&mut self, case: &Case) -> (Figures, Counts) {
        self.with_traffic(case, |guest, ready, act| guest.count_while(case.word, ready, act))
    }

    /// Measures while a thread sends for as long as the guest counts.
    fn with_traffic<T>(
        &mut self,
        case: &Case,
        measure: impl FnOnce(&mut Guest, &str, &mut dyn FnMut()) -> T,
    ) -> T {
        let Direction::In(bytes) = case.direction else {
            return measure(&mut self.guest, "probe: serial waiting", &mut || ());
        };
        let ended = AtomicBool::new(false);
        let End { guest, socket, guest_address } = self;
        std::thread::scope(|scope| {
            let send = || {
                let payload = vec![0; bytes];
                while !ended.load(Ordering::Relaxed) {
                    // A full queue drops; what was refused is sent again.
                    let _ = socket.send_to(&payload, (guest_address.as_str(), 9));
                }
            };
            let result = measure(guest, "probe: netsink ready", &mut || drop(scope.spawn(send)));
            ended.store(true, Ordering::Relaxed);
            result
        })
    }
}

fn command_line(host: &str, guest: &str, words: &[&str]) -> String {
    on_command(&format!("ip={guest} gw={host}"), words)
}

/// Gives the tap an address in a network of its own, and the guest's without asking for it. Answers both. The networks are
/// those for benchmarks (RFC 2544), which no daemon of another group has chosen for a bridge.
fn configure(tap: &str, network: u8, mac: &str) -> (String, String) {
    let (host, guest) = (format!("198.18.{network}.1"), format!("198.18.{network}.2"));
    ip(&format!("address add {host}/24 dev {tap}"));
    ip(&format!("link set {tap} up"));
    ip(&format!("neighbour replace {guest} lladdr {mac} dev {tap} nud permanent"));
    (host, guest)
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip is installed");
    assert!(status.success(), "ip {arguments}");
}
