//! A hostile guest and its whole machine: every device is attacked by a driver that breaks each rule, by another
//! processor that rewrites what the device reads, and by floods. The VMM goes on, tells of it, and holds no more memory
//! than before. What each device answers is tested beside it, on the host by `tests/daemon`.
use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::process::Command as Program;

use nix::sched::{CloneFlags, unshare};
use sys::tap::Tap;
use wire::control::Notice;

use crate::probe_guest;
use crate::vmm_driver::{Machine, Vmm};

/// More than a VMM comes to hold in any of this, in KiB; one chain of an attack asks for as much as 240 KiB.
const GROWTH_KIB_MAX: u64 = 2048;

fn probe(words: &str) -> Machine {
    Machine::new(probe_guest::path(), words)
}

fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 << 20).unwrap();
    file
}

/// The VMM's own memory in KiB: the guest's is a shared file and not in it.
fn anonymous_kib(vmm: &Vmm) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A tap in a network namespace of its own, whose host side is `10.99.0.1`, and a socket there. The guest behind it is
/// `10.99.0.2`.
fn connected_tap() -> (File, UdpSocket) {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("interfaces of a machine are tested as root");
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        let tap = File::from(OwnedFd::from(Tap::create("probe0").unwrap()));
        for arguments in [
            "addr add 10.99.0.1/24 dev probe0",
            "link set probe0 up",
            "neigh add 10.99.0.2 lladdr 02:00:00:00:00:00 dev probe0",
        ] {
            assert!(Program::new("ip").args(arguments.split(' ')).status().unwrap().success(), "{arguments}");
        }
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.connect("10.99.0.2:9").unwrap();
        (tap, socket)
    });
    made.join().unwrap()
}

#[test]
fn every_device_is_attacked_counts_it_tells_of_it_and_serves_on() {
    let mut machine =
        probe("evil-rng evil-balloon evil-blk evil-net evil-config evil-registers rng balloon blk net spin");
    machine.disk(disk_file(), |_| ());
    machine.nic(connected_tap().0);
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: hello");
    let before = anonymous_kib(&vmm);
    for device in ["rng", "balloon", "disk0", "nic0"] {
        let is_it =
            |notice: &Notice| matches!(notice, Notice::DeviceFault { device: one, .. } if one == device);
        vmm.wait_for_notice(device, is_it);
    }
    let console = vmm.wait_for_console("probe: net ");
    assert!(!console.contains("FAILED"), "{}", vmm.told());
    let stats = vmm.stats();
    let counted = [
        ("rng", stats.rng_malformed),
        ("balloon", stats.balloon.malformed),
        ("disk", stats.disks[0].malformed),
        ("nic", stats.nics[0].malformed),
    ];
    assert!(counted.iter().all(|(_, count)| *count > 0), "{counted:?}");
    let growth = anonymous_kib(&vmm).saturating_sub(before);
    assert!(growth < GROWTH_KIB_MAX, "the VMM grew by {growth} KiB");
    eprintln!("counted {counted:?}, grew by {growth} KiB");
}

#[test]
fn output_that_nobody_reads_costs_the_vmm_nothing() {
    const KIB: u64 = 128;
    let mut machine = probe(&format!("evil-serial=1 pause=10 evil-serial={KIB} serial spin"));
    // Eight times over.
    machine.console_bytes = KIB << 7;
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: evil-serial ok accesses=1000 kib=1");
    let before = (anonymous_kib(&vmm), vmm.stats().console_written);
    vmm.wait_for_console("serial waiting");
    let after = (anonymous_kib(&vmm), vmm.stats().console_written);
    assert!(after.1 - before.1 >= KIB << 10, "{before:?} {after:?}");
    let growth = after.0.saturating_sub(before.0);
    assert!(growth < KIB / 2, "the VMM grew by {growth} KiB for {KIB} KiB of output");
    eprintln!("grew by {growth} KiB for {KIB} KiB of output");
    // The port still works both ways.
    vmm.type_line("still here");
    vmm.wait_for_console("serial got still here");
}

#[test]
fn descriptors_that_another_processor_rewrites_do_no_harm() {
    let mut machine = probe("evil-race blk rng net spin");
    machine.spec.vcpus = 2;
    machine.disk(disk_file(), |_| ());
    machine.nic(connected_tap().0);
    let mut vmm = Vmm::boot(machine);
    let console = vmm.wait_for_console("probe: net ");
    assert!(console.contains("probe: evil-race ok devices=4"), "{}", vmm.told());
    assert!(!console.contains("FAILED"), "{}", vmm.told());
    let line = console.lines().find(|line| line.contains("evil-race ok")).unwrap_or_default();
    eprintln!("{line}");
}

#[test]
fn a_flood_without_buffers_waits_outside_and_passes_when_there_are_some() {
    const DATAGRAMS: usize = 5000;
    let (tap, socket) = connected_tap();
    let mut machine = probe("netstall clock spin");
    machine.nic(tap);
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("netstall empty");
    let before = (anonymous_kib(&vmm), vmm.stats());
    // What neither tap nor socket takes is lost, as on any wire.
    let flood = |what: u8| (0..DATAGRAMS).filter(|_| socket.send(&[what; 1400]).is_ok()).count();
    assert!(flood(1) > 0);
    let after = (anonymous_kib(&vmm), vmm.stats());
    assert_eq!(after.1.nics[0].rx_packets, before.1.nics[0].rx_packets);
    let growth = after.0.saturating_sub(before.0);
    assert!(growth < GROWTH_KIB_MAX, "the VMM grew by {growth} KiB");
    vmm.type_line("");
    vmm.wait_for_console("netstall received");
    flood(2);
    vmm.type_line("");
    // The line is whole when the next word begins.
    let console = vmm.wait_for_console("probe: clock");
    let frames = console.split("netstall ok frames=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(frames.parse::<u64>().unwrap() > 1, "{console}");
    assert_eq!(vmm.stats().nics[0].rx_dropped, 0, "{console}");
    eprintln!("{frames} of {} frames", 2 * DATAGRAMS);
}
