//! Machines whose disk is an overlay over the file that it was made from.
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use wire::control::{Command, FaultCode, Reply};
use wire::migration::{Phase, SendLimits};
use wire::settling::{MemoryStatus, SettleStage};

use crate::handover::handed_over;
use crate::migrate::{pairs, probe};
use crate::vmm_driver::{Machine, Vmm};

const MIB: u64 = 1 << 20;

fn fresh(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn whole(file: &File) -> Vec<u8> {
    let mut data = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut data, 0).unwrap();
    data
}

/// A disk of 48 MiB on which a guest has left a pattern of 16 MiB, which begins within a block.
fn backing() -> File {
    let file = fresh(48 * MIB);
    let mut machine = probe("write=2049,7,32768", 64);
    machine.disk(file.try_clone().unwrap(), |_| {});
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: write ok");
    drop(vmm);
    file
}

fn over(own: &File, backing: &File, words: &str) -> Machine {
    let mut machine = probe(words, 64);
    let backing = machine.add(backing.try_clone().unwrap());
    machine.disk(own.try_clone().unwrap(), |disk| disk.backing = Some(backing));
    machine
}

fn alone(own: &File, words: &str) -> Machine {
    let mut machine = probe(words, 64);
    machine.disk(own.try_clone().unwrap(), |_| {});
    machine
}

fn status(vmm: &mut Vmm) -> MemoryStatus {
    match vmm.command(Command::MemoryStatus) {
        Ok(Reply::Memory(status)) => *status,
        other => panic!("{other:?}"),
    }
}

fn settled(vmm: &mut Vmm) -> MemoryStatus {
    vmm.command(Command::Settle).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let status = status(vmm);
        let settling = status.settling.clone().unwrap();
        if settling.stage != SettleStage::UnderWay {
            assert_eq!((settling.stage.clone(), status.disks_shared_bytes), (SettleStage::Settled, 0));
            return status;
        }
        assert!(Instant::now() < until, "{status:?}\n{}", vmm.told());
        std::thread::yield_now();
    }
}

fn check(console: &str) {
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

/// What was there is read from below, what the guest writes in between, by sectors, is kept, as it is settled and handed over.
#[test]
fn a_disk_in_use_is_settled_and_goes_to_another_vmm() {
    let (backing, own) = (backing(), fresh(64 * MIB));
    let before = whole(&backing);
    // The first and the last sectors of the pattern are left alone, a hole and what is behind the backing file written too.
    let words = "verify=2049,7,8 write=4001,9,1000 verify=4001,9,1000 write=90001,5,300 verify=90001,5,300 \
                 write=120003,3,50 verify=120003,3,50 loop";
    let mut vmm = Vmm::boot(over(&own, &backing, words));
    vmm.wait_for_times("probe: verify ok", 12);
    let shared = status(&mut vmm);
    assert_eq!((shared.shared_bytes, shared.disks_shared_bytes), (0, 48 * MIB));
    let fault = vmm.handles().unwrap_err();
    assert!(
        fault.code == FaultCode::WrongState && fault.detail.contains("settle the machine first"),
        "{fault}"
    );
    assert!(own.metadata().unwrap().blocks() * 512 < 4 * MIB, "only what was written lies in its own file");
    let status = settled(&mut vmm);
    println!("{status:?}");
    let seen = vmm.console().matches("probe: verify ok").count();
    vmm.wait_for_times("probe: verify ok", seen + 8);
    let (mut next, sent, came) = handed_over(&mut vmm, alone(&own, words));
    assert!(sent.phase == Phase::Moved && came.phase == Phase::Moved, "{sent:?}\n{came:?}");
    let seen = next.console().matches("probe: verify ok").count();
    next.wait_for_times("probe: verify ok", seen + 8);
    check(&next.console());
    drop((vmm, next));
    // As its guest leaves it: all that is not written is as it was.
    let mut last = Vmm::boot(alone(&own, "verify=2049,7,8 verify=4001,9,1000 verify=90001,5,300 beat"));
    last.wait_for_console("beat 1");
    check(&last.console());
    drop(last);
    let (found, mut expected) = (whole(&own), before.clone());
    expected.resize(64 * MIB as usize, 0);
    for (sector, sectors) in [(4001, 1000), (90001, 300), (120003, 50)] {
        let place = sector * 512..(sector + sectors) * 512;
        expected[place.clone()].copy_from_slice(&found[place]);
    }
    assert!(found == expected);
    assert!(whole(&backing) == before, "nobody writes to a backing file");
}

/// All that a disk must do it does over another as well, and whoever opens both again finds what was left.
#[test]
fn an_overlay_is_a_disk_like_any_other() {
    let (backing, own) = (backing(), fresh(64 * MIB));
    let before = whole(&backing);
    let mut vmm = Vmm::boot(over(&own, &backing, "verify=2049,7,32768 blk evil-blk beat"));
    vmm.wait_for_console("probe: evil-blk ok");
    assert!(vmm.console().contains("probe: verify ok") && vmm.console().contains("probe: blk ok"));
    drop(vmm);
    let mut vmm = Vmm::boot(over(&own, &backing, "write=81,4,9000 beat"));
    vmm.wait_for_console("beat 1");
    drop(vmm);
    let mut vmm = Vmm::boot(over(&own, &backing, "verify=81,4,9000 beat"));
    vmm.wait_for_console("beat 1");
    // Half way, it is given up, and goes on in the next machine.
    vmm.command(Command::Settle).unwrap();
    vmm.command(Command::CancelSettle).unwrap();
    vmm.command(Command::Reset).unwrap();
    vmm.wait_for_console("beat 1");
    settled(&mut vmm);
    check(&vmm.console());
    vmm.command(Command::Pause).unwrap();
    assert_eq!(status(&mut vmm).disks_shared_bytes, 0);
    let mut own_data = whole(&own);
    own_data.truncate(before.len());
    // Neither the first megabyte nor what was just written.
    let behind = 9081 * 512;
    assert!(own_data[behind..] == before[behind..]);
    assert!(whole(&backing) == before);
}

/// Another host gets all of it.
#[test]
fn an_overlay_arrives_whole_at_another_vmm() {
    let (backing, own) = (backing(), fresh(64 * MIB));
    let words = "verify=2049,7,8 write=4001,9,1000 verify=4001,9,1000 loop";
    let mut vmm = Vmm::boot(over(&own, &backing, words));
    vmm.wait_for_times("probe: verify ok", 2);
    let onto = fresh(64 * MIB);
    let ((near, far), (disk_near, disk_far)) = (pairs(1), pairs(1));
    let mut next = Vmm::start();
    next.try_receive_with_disks(alone(&onto, words), far, disk_far).unwrap();
    let limits = SendLimits { downtime_ms: 300, bandwidth_bytes_per_s: None, ..SendLimits::default() };
    let fault = vmm.try_send(pairs(1).0, limits).unwrap_err();
    assert!(fault.detail.contains("settle the machine first"), "the other end would not know: {fault}");
    vmm.try_send_with_disks(near, disk_near, limits).unwrap();
    let sent = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    assert_eq!(sent.phase, Phase::Moved, "{sent:?}\n{}\n{}", vmm.told(), next.told());
    let seen = next.console().matches("probe: verify ok").count();
    next.wait_for_times("probe: verify ok", seen + 4);
    check(&next.console());
    drop((vmm, next));
    let (found, mut expected) = (whole(&onto), whole(&backing));
    expected.resize(64 * MIB as usize, 0);
    expected[4001 * 512..5001 * 512].copy_from_slice(&found[4001 * 512..5001 * 512]);
    assert!(found == expected);
}

#[test]
fn what_cannot_be_an_overlay_is_refused() {
    let mut vmm = Vmm::start();
    let fault = vmm.try_boot(over(&fresh(MIB), &fresh(2 * MIB), "beat")).unwrap_err();
    assert!(fault.detail.contains("the backing file has 2097152 bytes"), "{fault}");
    let mut vmm = Vmm::start();
    let (_near, far) = pairs(1);
    let fault = vmm.try_receive(over(&fresh(2 * MIB), &fresh(MIB), "beat"), far).unwrap_err();
    assert!(fault.detail.contains("what comes is all of a disk"), "{fault}");
}
