//! Machines that go from one jailed VMM to another on the same host with their memory, disks and taps where they are.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use sys::pidfd::Signal;
use wire::control::{Command, FaultCode, MachineState};
use wire::migration::{MigrationStatus, Phase, SendLimits};
use wire::saved::MemoryUse;

use crate::devices::tap;
use crate::migrate::{check_clock, check_given_away, probe, state};
use crate::vmm_driver::{Machine, Vmm};

const MIB: u64 = 1 << 20;

fn pair() -> (OwnedFd, OwnedFd) {
    UnixStream::pair().map(|(near, far)| (near.into(), far.into())).unwrap()
}

/// Hands a machine over; answers the VMM that has it, and what both tell in the end.
pub(crate) fn handed_over(vmm: &mut Vmm, machine: Machine) -> (Vmm, MigrationStatus, MigrationStatus) {
    let handles = vmm.handles().unwrap();
    let (near, far) = pair();
    let mut next = Vmm::start();
    next.is_paused = vmm.is_paused;
    next.try_take_over(machine, vmm, &handles, far).unwrap();
    vmm.try_hand_over(&near).unwrap();
    let sent = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    let came = next.wait_for_move("arrival", |status| status.phase.is_end());
    (next, sent, came)
}

#[test]
fn a_machine_goes_on_and_on_with_its_clock_console_and_counters() {
    let words = "dirty=16,100,300 ticks=100000";
    let mut vmm = Vmm::boot(probe(words, 64));
    vmm.wait_for_console("tick 3 ");
    for hop in 1..=4 {
        let before = vmm.stats();
        let (mut next, sent, came) = handed_over(&mut vmm, probe(words, 64));
        let (Phase::Moved, Phase::Moved) = (sent.phase, came.phase) else {
            panic!("{sent:?}\n{came:?}\n{}\n{}", vmm.told(), next.told())
        };
        println!("hop {hop}: stood still for {} us", sent.progress.downtime_us);
        assert_eq!(sent.progress.sent_bytes, 0, "nothing of its memory was sent: {sent:?}");
        check_given_away(&mut vmm);
        let seen = next.console().matches("tick ").count();
        next.wait_for_times("tick ", seen + 3);
        let after = next.stats();
        assert!(after.running_ns > before.running_ns && after.vcpus[0].exits > before.vcpus[0].exits);
        assert!(after.console_written > before.console_written);
        vmm = next;
    }
    let console = vmm.console();
    assert!(console.starts_with("probe: hello"), "{console}");
    assert_eq!(console.matches("probe: hello").count(), 1, "one boot in all: {console}");
    check_clock(&console);
    // The machine is wholly the last one's: a reset boots it there.
    vmm.command(Command::Reset).unwrap();
    vmm.wait_for_times("probe: hello", 2);
}

/// Every page is checked by the pass after the one that was handed over.
#[test]
fn memory_that_is_being_written_is_whole_on_both_sides_of_the_hole() {
    let machine = || {
        let mut machine = probe("cpus mem dirty=4000,60,3000000 spin", (3 << 10) + 512);
        machine.spec.vcpus = 4;
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("probe: mem ok");
    let (mut next, sent, came) = handed_over(&mut vmm, machine());
    println!("stood still for {} us", sent.progress.downtime_us);
    assert!(sent.phase == Phase::Moved && came.phase == Phase::Moved, "{sent:?}\n{came:?}");
    let passes = next.console().matches("dirty pass").count();
    next.wait_for_times("dirty pass", passes + 2);
    assert!(!next.console().contains("FAILED"), "{}", next.console());
}

/// As often as it changes hands: whoever has it waits with it, and it goes on as if nothing had been.
#[test]
fn a_machine_that_is_paused_stays_so_wherever_it_is() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * MIB).unwrap();
    let machine = || {
        let mut machine = probe("blk write=4096,7,16384 verify=4096,7,16384 loop", 64);
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("probe: verify ok");
    // Neither end goes by itself.
    let handles = vmm.handles().unwrap();
    for (runs, said) in [(true, "it cannot be sent as one that is paused"), (false, "is paused; resume it")] {
        if !runs {
            vmm.command(Command::Pause).unwrap();
        }
        vmm.is_paused = runs;
        let fault = vmm.try_hand_over(&pair().0).unwrap_err();
        assert!(fault.code == FaultCode::WrongState && fault.detail.contains(said), "{fault}");
    }
    let seen = vmm.console();
    // A target that fails leaves it as it was.
    vmm.is_paused = true;
    let (near, far) = pair();
    let mut next = Vmm::start();
    next.is_paused = true;
    let mut other = machine();
    other.spec.vcpus = 2;
    next.try_take_over(other, &vmm, &handles, far).unwrap();
    vmm.try_hand_over(&near).unwrap();
    let told = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    assert_eq!((told.phase, state(&mut vmm)), (Phase::Returned, MachineState::Paused), "{told:?}");
    for hop in 0..3 {
        // Handed over, and over streams.
        let (mut next, sent, came) = match hop % 2 {
            0 => handed_over(&mut vmm, machine()),
            _ => moved_paused(&mut vmm, machine()),
        };
        assert!(sent.phase == Phase::Moved && came.phase == Phase::Moved, "{sent:?}\n{came:?}");
        check_given_away(&mut vmm);
        assert_eq!((state(&mut next), next.console()), (MachineState::Paused, seen.clone()));
        vmm = next;
    }
    // It can be saved, too.
    vmm.save();
    vmm.command(Command::Resume).unwrap();
    let rounds = seen.matches("probe: verify ok").count();
    vmm.wait_for_times("probe: verify ok", rounds + 2);
    let console = vmm.console();
    assert!(console.starts_with(&seen) && !console.contains("FAILED"), "{console}");
}

fn moved_paused(vmm: &mut Vmm, machine: Machine) -> (Vmm, MigrationStatus, MigrationStatus) {
    let (near, far) = pair();
    let mut next = Vmm::start();
    next.is_paused = true;
    next.try_receive(machine, vec![far]).unwrap();
    vmm.try_send(vec![near], SendLimits::default()).unwrap();
    let sent = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    let came = next.wait_for_move("arrival", |status| status.phase.is_end());
    (next, sent, came)
}

#[test]
fn a_disk_and_an_interface_in_use_go_along() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * MIB).unwrap();
    let machine = |file: &File| {
        let mut machine = probe("blk write=4096,7,16384 verify=4096,7,16384 loop", 64);
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let mut first = machine(&file);
    first.nic(tap());
    let mut vmm = Vmm::boot(first);
    vmm.wait_for_console("probe: blk ok");
    for hop in 1..=6 {
        while vmm.stats().disks[0].writes < 200 * hop {}
        let (next, sent, came) = handed_over(&mut vmm, machine(&file));
        assert!(sent.phase == Phase::Moved && came.phase == Phase::Moved, "{sent:?}\n{came:?}");
        vmm = next;
    }
    assert_eq!(vmm.stats().nics.len(), 1);
    let rounds = vmm.console().matches("probe: verify ok").count();
    vmm.wait_for_times("probe: verify ok", rounds + 2);
    let console = vmm.console();
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

/// Whatever becomes of the new VMM before it has the machine: the old one goes on with it, and can be tried again.
#[test]
fn a_vmm_that_fails_leaves_the_machine_where_it_was() {
    let words = "dirty=16,100,300 ticks=100000";
    let mut vmm = Vmm::boot(probe(words, 64));
    vmm.wait_for_console("tick 3 ");
    let runs_on = |vmm: &mut Vmm| {
        let seen = vmm.console().matches("tick ").count();
        vmm.wait_for_times("tick ", seen + 3);
        assert_eq!(state(vmm), MachineState::Running);
    };

    // It dies before it says a word.
    let handles = vmm.handles().unwrap();
    let (near, far) = pair();
    let mut next = Vmm::start();
    next.try_take_over(probe(words, 64), &vmm, &handles, far).unwrap();
    next.signal(Signal::SIGKILL);
    next.wait_for_end();
    let begun = vmm.try_hand_over(&near);
    if begun.is_ok() {
        let told = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
        assert_eq!(told.phase, Phase::Returned, "{told:?}");
    }
    runs_on(&mut vmm);

    // It has another machine in mind.
    let (near, far) = pair();
    let mut next = Vmm::start();
    let mut other = probe(words, 64);
    other.spec.vcpus = 2;
    next.try_take_over(other, &vmm, &handles, far).unwrap();
    vmm.try_hand_over(&near).unwrap();
    let told = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    assert!(told.phase == Phase::Returned && told.detail.is_some(), "{told:?}");
    runs_on(&mut vmm);

    // Only one of the two knows that memory is there already.
    let (near, far) = pair();
    let mut next = Vmm::start();
    next.try_receive(probe(words, 64), vec![far]).unwrap();
    vmm.try_hand_over(&near).unwrap();
    let told = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    assert_eq!(told.phase, Phase::Returned, "{told:?}");
    runs_on(&mut vmm);

    // The guest starts afresh, in memory of its own, after the handles were given out.
    vmm.command(Command::Reset).unwrap();
    vmm.wait_for_times("probe: hello", 2);
    let (near, far) = pair();
    let mut next = Vmm::start();
    next.try_take_over(probe(words, 64), &vmm, &handles, far).unwrap();
    vmm.try_hand_over(&near).unwrap();
    let told = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    assert_eq!(told.phase, Phase::Returned, "{told:?}");
    runs_on(&mut vmm);

    let (mut next, sent, _) = handed_over(&mut vmm, probe(words, 64));
    assert_eq!(sent.phase, Phase::Moved, "{sent:?}");
    runs_on(&mut next);
}

/// Its memory is somebody else's file in part, which no descriptor can stand for.
#[test]
fn a_machine_whose_memory_is_private_is_not_handed_over() {
    let words = "dirty=16,100,300 ticks=100000";
    let mut vmm = Vmm::boot(probe(words, 64));
    vmm.wait_for_console("tick 3 ");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    let mut restored = Vmm::restore(probe(words, 64), &saved, |spec| spec.how = MemoryUse::Private);
    let fault = restored.handles().unwrap_err();
    assert!(fault.code == FaultCode::WrongState && fault.detail.contains("over streams"), "{fault}");
    let (near, _far) = pair();
    let fault = restored.try_hand_over(&near).unwrap_err();
    assert!(fault.code == FaultCode::WrongState && fault.detail.contains("over streams"), "{fault}");
    restored.wait_for_times("tick ", 3);

    // Nor is a file taken for memory that others could cut short.
    let unsealed = tempfile::tempfile().unwrap();
    unsealed.set_len(64 * MIB).unwrap();
    let (_near, far) = pair();
    let fault = Vmm::start().try_take_over(probe(words, 64), &restored, &[unsealed], far).unwrap_err();
    assert!(fault.detail.contains("not sealed"), "{fault}");
}
