//! Disks and interfaces of a whole machine: what a guest writes is there later, attacks stay inside, a pause
//! loses nothing. How a single device answers is tested beside it.
use std::fs::File;
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};
use sys::tap::Tap;
use wire::control::{Command, Notice};
use wire::machine::{Access, CacheMode};
use wire::will::Reason;

use crate::probe_guest;
use crate::vmm_driver::{Machine, PATIENCE, Vmm};

const DISK_BYTES: u64 = 16 << 20;

fn probe(words: &str) -> Machine {
    Machine::new(probe_guest::path(), words)
}

fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

/// Runs a machine to its power off; answers its console.
fn run(machine: Machine) -> String {
    let mut vmm = Vmm::boot(machine);
    let (_, will) = vmm.wait_for_end();
    assert_eq!(will.unwrap().reason, Reason::PoweredOff, "{}", vmm.told());
    vmm.console()
}

#[test]
fn disks_keep_every_promise_in_both_cache_modes_and_read_only() {
    let mut machine = probe("blk irq");
    machine.disk(disk_file(), |disk| disk.cache = CacheMode::Writeback);
    machine.disk(disk_file(), |disk| disk.cache = CacheMode::Writethrough);
    machine.disk(disk_file(), |disk| disk.access = Access::ReadOnly);
    let console = run(machine);
    assert!(console.contains("probe: blk ok disks=3"), "{console}");
    assert!(console.contains("probe: irq ok"), "{console}");
    for serial in ["disk-0", "disk-1", "disk-2"] {
        assert!(console.contains(serial), "{console}");
    }
}

#[test]
fn what_was_flushed_is_there_after_power_off_and_after_a_reset() {
    let disk = disk_file();
    let mut machine = probe("write=64,7,2048");
    machine.disk(disk.try_clone().unwrap(), |_| ());
    assert!(run(machine).contains("probe: write ok"));
    let mut machine = probe("verify=64,7,2048 write=8000,9,512 reset");
    machine.disk(disk.try_clone().unwrap(), |_| ());
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_notice("a second reset", |notice| *notice == Notice::Booted { resets: 2 });
    let console = vmm.console();
    assert!(!console.contains("FAILED") && console.contains("probe: verify ok"), "{console}");
    drop(vmm);
    let mut machine = probe("verify=8000,9,512");
    machine.disk(disk, |disk| disk.access = Access::ReadOnly);
    assert!(run(machine).contains("probe: verify ok"));
}

#[test]
fn attacks_on_rings_and_registers_end_in_the_device() {
    let mut machine = probe("evil-config evil-blk blk");
    machine.disk(disk_file(), |_| ());
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_notice(
        "a fault",
        |notice| matches!(notice, Notice::DeviceFault { device, .. } if device == "disk0"),
    );
    vmm.wait_for_end();
    let console = vmm.console();
    assert!(console.contains("probe: done failed=0"), "{}", vmm.told());
}

#[test]
fn a_disk_under_load_is_paused_and_resumed_without_loss() {
    let mut machine = probe("blkbench=16,4096,3000,write write=64,3,4096 verify=64,3,4096");
    machine.spec.vcpus = 2;
    machine.disk(disk_file(), |_| ());
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: hello");
    for _ in 0..20 {
        vmm.command(Command::Pause).unwrap();
        let paused = vmm.stats();
        assert_eq!(vmm.stats().disks, paused.disks, "a paused disk works");
        vmm.command(Command::Resume).unwrap();
        // The next pause is to meet a disk at work again.
        let deadline = Instant::now() + PATIENCE;
        while vmm.stats().disks[0].writes == paused.disks[0].writes {
            assert!(Instant::now() < deadline, "the disk stands still\n{}", vmm.told());
        }
    }
    let (_, will) = vmm.wait_for_end();
    let console = vmm.console();
    assert_eq!(will.unwrap().reason, Reason::PoweredOff, "{}", vmm.told());
    assert!(console.contains("probe: done failed=0"), "{console}");
}

#[test]
fn limits_change_while_a_disk_works() {
    let mut machine = probe("blkbench=4,4096,60000");
    machine.disk(disk_file(), |_| ());
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: hello");
    let bucket = wire::machine::TokenBucket { per_second: 50, burst: 10 };
    let limits = wire::machine::RateLimits { bandwidth: None, operations: Some(bucket) };
    vmm.command(Command::LimitDisk { disk: 0, limits }).unwrap();
    let start = (Instant::now(), vmm.stats().disks[0].reads);
    // Two seconds of a limited disk are what is measured here.
    while start.0.elapsed().as_millis() < 2000 {
        vmm.stats();
    }
    let reads = vmm.stats().disks[0].reads - start.1;
    let allowed = start.0.elapsed().as_secs_f64() * 50.0 + 10.0;
    assert!((20.0..=allowed + 8.0).contains(&(reads as f64)), "{reads} reads, {allowed} allowed");
    assert!(vmm.stats().disks[0].throttled > 0);
}

/// A tap in a network namespace of its own, which goes with the thread that made it.
pub(crate) fn tap() -> File {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("interfaces of a machine are tested as root");
        File::from(std::os::fd::OwnedFd::from(Tap::create("probe0").unwrap()))
    });
    made.join().unwrap()
}

#[test]
fn an_interface_comes_up_and_withstands_attacks() {
    let mut machine = probe("evil-net net");
    machine.nic(tap());
    machine.disk(disk_file(), |_| ());
    let console = run(machine);
    assert!(console.contains("probe: net ok mac=02:00:00:00:00:00"), "{console}");
    assert!(console.contains("probe: done failed=0"), "{console}");
}
