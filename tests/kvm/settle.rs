//! Machines whose memory is mapped from what others were saved in, and becomes their own while their guests run.
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use wire::control::{Command, FaultCode, MachineState, Reply};
use wire::migration::Phase;
use wire::saved::{Identity, MemoryUse};
use wire::settling::{MemoryStatus, SettleStage};

use crate::handover::handed_over;
use crate::migrate::{files, probe, state};
use crate::vmm_driver::{Machine, Saved, Vmm};

const MIB: u64 = 1 << 20;

fn memory(vmm: &mut Vmm) -> MemoryStatus {
    match vmm.command(Command::MemoryStatus) {
        Ok(Reply::Memory(status)) => *status,
        other => panic!("{other:?}"),
    }
}

/// Looks at whose its memory is until that is as wanted.
fn wait_for_memory(vmm: &mut Vmm, is_wanted: impl Fn(&MemoryStatus) -> bool) -> MemoryStatus {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let status = memory(vmm);
        if is_wanted(&status) {
            return status;
        }
        assert!(Instant::now() < until, "{status:?}\n{}", vmm.told());
        std::thread::yield_now();
    }
}

fn settled(vmm: &mut Vmm) -> MemoryStatus {
    vmm.command(Command::Settle).unwrap();
    let is_over = |status: &MemoryStatus| {
        status.settling.as_ref().is_none_or(|settling| settling.stage != SettleStage::UnderWay)
    };
    let status = wait_for_memory(vmm, is_over);
    let settling = status.settling.clone().unwrap();
    println!("{status:?}");
    assert_eq!((settling.stage, status.shared_bytes), (SettleStage::Settled, 0), "{}", vmm.told());
    status
}

/// Whether a VMM has a file open or mapped.
fn has(vmm: &Vmm, file: &File) -> bool {
    files(vmm, "/").contains(&file.metadata().unwrap().ino())
}

/// One of several machines that go on from what was saved.
fn clone(machine: Machine, saved: &Saved, is_ready: bool) -> Vmm {
    let mut vmm = Vmm::start();
    if is_ready {
        vmm.command(Command::Prepare(machine.spec.chassis())).unwrap();
    }
    vmm.try_restore(machine, saved, |spec| {
        (spec.how, spec.identity) = (MemoryUse::Private, Identity::New);
    })
    .unwrap();
    vmm
}

/// Every page is checked by the pass after the one in which it was moved, by four processors' guest on both sides of the
/// hole below 4 GiB. Then it does what only a machine with memory of its own can, and what it was made of is as it was.
#[test]
fn memory_that_is_being_written_is_settled_whole() {
    let machine = || {
        let mut machine = probe("cpus mem dirty=4000,0,3000000 spin", (3 << 10) + 512);
        machine.spec.vcpus = 4;
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("probe: mem ok");
    vmm.wait_for_console("dirty pass");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    drop(vmm);
    let mut vmm = clone(machine(), &saved, true);
    vmm.wait_for_console("dirty pass");
    assert_eq!(memory(&mut vmm).shared_bytes, machine().spec.memory_bytes);
    let fault = vmm.handles().unwrap_err();
    assert!(fault.code == FaultCode::WrongState && fault.detail.contains("settle it first"), "{fault}");
    let status = settled(&mut vmm);
    let settling = status.settling.unwrap();
    // One for each piece, and some that came to nothing; nine tenths of the time it runs.
    assert!((224..448).contains(&settling.pauses), "{settling:?}");
    assert!(settling.total_us >= 10 * settling.paused_us, "{settling:?}");
    let passes = vmm.console().matches("dirty pass").count();
    vmm.wait_for_times("dirty pass", passes + 2);
    let (mut next, sent, came) = handed_over(&mut vmm, machine());
    assert!(sent.phase == Phase::Moved && came.phase == Phase::Moved, "{sent:?}\n{came:?}");
    let passes = next.console().matches("dirty pass").count();
    next.wait_for_times("dirty pass", passes + 2);
    assert!(!next.console().contains("FAILED"), "{}", next.console());
    drop((vmm, next));
    let mut other = clone(machine(), &saved, false);
    other.wait_for_console("dirty pass");
    assert!(!other.console().contains("FAILED"), "{}", other.console());
}

#[test]
fn a_disk_in_use_writes_into_memory_that_is_settled() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * MIB).unwrap();
    let machine = |file: &File| {
        let mut machine = probe("blk write=4096,7,16384 verify=4096,7,16384 loop", 64);
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let mut vmm = Vmm::boot(machine(&file));
    vmm.wait_for_console("probe: blk ok");
    for round in 1..=6 {
        let until = Instant::now() + Duration::from_secs(60);
        while vmm.stats().disks[0].writes < 200 * round {
            assert!(Instant::now() < until, "{}", vmm.console());
        }
        vmm.command(Command::Pause).unwrap();
        let saved = vmm.save();
        drop(vmm);
        vmm = clone(machine(&file), &saved, round % 2 == 0);
        settled(&mut vmm);
    }
    let rounds = vmm.console().matches("probe: verify ok").count();
    vmm.wait_for_times("probe: verify ok", rounds + 2);
    let console = vmm.console();
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

/// Whatever comes in between, the machine runs on, and what was settled stays so.
#[test]
fn it_can_be_given_up_and_begun_again_and_is_in_nobodys_way() {
    let words = "dirty=200,0,3000000 spin";
    let mut vmm = Vmm::boot(probe(words, 512));
    vmm.wait_for_console("dirty pass");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    drop(vmm);
    let runs_on = |vmm: &mut Vmm| {
        assert_eq!(state(vmm), MachineState::Running);
        let passes = vmm.console().matches("dirty pass").count();
        vmm.wait_for_times("dirty pass", passes + 1);
        assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
    };
    let mut vmm = clone(probe(words, 512), &saved, false);
    // Nothing to give up, and nothing under way.
    vmm.command(Command::CancelSettle).unwrap();
    assert_eq!(memory(&mut vmm).settling, None);
    let begun = |vmm: &mut Vmm, before: u64| {
        vmm.command(Command::Settle).unwrap();
        vmm.command(Command::Settle).unwrap();
        wait_for_memory(vmm, |status| status.shared_bytes != before);
    };
    begun(&mut vmm, 512 * MIB);
    vmm.command(Command::CancelSettle).unwrap();
    let left = memory(&mut vmm);
    assert!(matches!(left.settling.unwrap().stage, SettleStage::Failed { .. }));
    assert!((1..512 * MIB).contains(&left.shared_bytes), "{}", left.shared_bytes);
    runs_on(&mut vmm);
    // A pause is none of its business.
    begun(&mut vmm, left.shared_bytes);
    vmm.command(Command::Pause).unwrap();
    let left = memory(&mut vmm).shared_bytes;
    // A save gives it up, and what is half settled is saved whole.
    let again = vmm.save();
    assert_eq!(memory(&mut vmm).shared_bytes, memory(&mut vmm).shared_bytes.min(left));
    runs_on(&mut clone(probe(words, 512), &again, true));
    // As it stands still it is settled, too.
    settled(&mut vmm);
    assert_eq!(state(&mut vmm), MachineState::Paused);
    vmm.command(Command::Resume).unwrap();
    runs_on(&mut vmm);
    // It is a machine like any other now: its guest does not stand still for a save.
    let again = vmm.save_live();
    assert!(again.report.memory_bytes >= 200 * MIB);
    runs_on(&mut vmm);
    drop(vmm);
    // The next memory of one that is reset is its own.
    let mut vmm = clone(probe(words, 512), &again, true);
    begun(&mut vmm, 512 * MIB);
    assert!(has(&vmm, &again.memory));
    vmm.command(Command::Reset).unwrap();
    assert!(!has(&vmm, &again.memory), "what it was made of is in use no longer");
    assert_eq!(memory(&mut vmm), MemoryStatus { total_bytes: 512 * MIB, ..MemoryStatus::default() });
    vmm.command(Command::Settle).unwrap();
    assert_eq!(memory(&mut vmm).settling, None);
    vmm.wait_for_console("probe: hello");
}
