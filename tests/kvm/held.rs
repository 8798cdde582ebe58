//! Moves that are held: neither end goes on from `ready` before somebody outside tells it, whatever the link does.
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use wire::control::{Command, MachineState, Reply};
use wire::migration::{Owner, Phase, SendLimits};

use crate::probe_guest::{self, numbers};
use crate::vmm_driver::{Machine, Vmm};

fn machine() -> Machine {
    Machine::new(probe_guest::path(), "ticks=100000")
}

/// A move whose ends are both at `ready`, and another descriptor for its stream.
fn held(standstill_ms: u32) -> (Vmm, Vmm, UnixStream) {
    let mut source = Vmm::boot(machine());
    source.wait_for_console("tick 3 ");
    let mut target = Vmm::start();
    (source.is_held, target.is_held) = (true, true);
    let (near, far) = UnixStream::pair().unwrap();
    let link = near.try_clone().unwrap();
    target.try_receive(machine(), vec![OwnedFd::from(far)]).unwrap();
    let limits = SendLimits { standstill_ms, ..SendLimits::default() };
    source.try_send(vec![OwnedFd::from(near)], limits).unwrap();
    target.wait_for_move("the target", |status| status.phase == Phase::Ready);
    source.wait_for_move("the source", |status| status.phase == Phase::Ready);
    (source, target, link)
}

fn state(vmm: &mut Vmm) -> MachineState {
    match vmm.command(Command::Hello { protocol: 1 }) {
        Ok(Reply::Hello { state, .. }) => state,
        other => panic!("{other:?}"),
    }
}

fn settle(vmm: &mut Vmm, owner: Owner) {
    vmm.command(Command::SettleMigration { owner }).unwrap();
}

#[test]
fn a_held_machine_is_given_up_and_run_only_when_that_is_said() {
    let (mut source, mut target, _link) = held(60_000);
    assert_eq!((state(&mut source), state(&mut target)), (MachineState::Paused, MachineState::Paused));
    for _ in 0..2 {
        source.command(Command::CommitMigration).unwrap();
    }
    assert_eq!((source.migration().phase, target.migration().phase), (Phase::Commit, Phase::Ready));
    let fault = source.command(Command::CancelMigration).unwrap_err();
    assert!(fault.detail.contains("handed over"), "{fault}");
    settle(&mut target, Owner::Here);
    source.wait_for_move("the end", |status| status.phase == Phase::Moved);
    let told = target.console().matches("tick ").count();
    target.wait_for_times("tick ", told + 2);
    assert_eq!(state(&mut source), MachineState::Paused);
}

#[test]
fn a_held_machine_returns_by_itself_until_it_is_given_up_and_not_after() {
    // The link breaks before: the source runs on, and cannot be told otherwise.
    let (mut source, mut target, link) = held(60_000);
    link.shutdown(Shutdown::Both).unwrap();
    source.wait_for_move("the end", |status| status.phase == Phase::Returned);
    assert!(source.command(Command::CommitMigration).is_err());
    assert_eq!((state(&mut source), state(&mut target)), (MachineState::Running, MachineState::Paused));
    settle(&mut target, Owner::There);
    assert_eq!(target.migration().phase, Phase::Dropped);
    // After: neither runs, and either can be told to.
    for here in [true, false] {
        let (mut source, mut target, link) = held(60_000);
        source.command(Command::CommitMigration).unwrap();
        link.shutdown(Shutdown::Both).unwrap();
        source.wait_for_move("the doubt", |status| status.in_doubt);
        assert_eq!((state(&mut source), state(&mut target)), (MachineState::Paused, MachineState::Paused));
        settle(&mut target, if here { Owner::There } else { Owner::Here });
        settle(&mut source, if here { Owner::Here } else { Owner::There });
        let survivor = if here { &mut source } else { &mut target };
        let told = survivor.console().matches("tick ").count();
        survivor.wait_for_times("tick ", told + 2);
    }
}

#[test]
fn a_target_that_refuses_what_was_promised_does_not_let_the_source_run() {
    let (mut source, mut target, _link) = held(60_000);
    source.command(Command::CommitMigration).unwrap();
    target.command(Command::CancelMigration).unwrap();
    source.wait_for_move("the doubt", |status| status.in_doubt);
    assert_eq!((source.migration().phase, state(&mut source)), (Phase::Commit, MachineState::Paused));
    settle(&mut source, Owner::Here);
    let told = source.console().matches("tick ").count();
    source.wait_for_times("tick ", told + 2);
}

#[test]
fn a_guest_that_stands_still_for_too_long_runs_on_where_it_was() {
    let (mut source, mut target, _link) = held(100);
    source.wait_for_move("the end", |status| status.phase == Phase::Returned);
    assert_eq!(state(&mut source), MachineState::Running);
    let ended = target.wait_for_move("the end there", |status| status.phase == Phase::Dropped);
    assert!(ended.detail.is_some(), "{ended:?}");
    assert!(source.command(Command::CommitMigration).is_err());
}

#[test]
fn a_standstill_has_passed_for_the_guest_wherever_it_goes_on() {
    const STANDSTILL: Duration = Duration::from_secs(2);
    for at_target in [true, false] {
        let began = Instant::now();
        let (mut source, mut target, _link) = held(60_000);
        let standing = Instant::now();
        // Time has to pass; nothing else is there to wait for.
        while standing.elapsed() < STANDSTILL {
            assert_eq!(target.migration().phase, Phase::Ready);
        }
        if at_target {
            source.command(Command::CommitMigration).unwrap();
            settle(&mut target, Owner::Here);
        } else {
            source.command(Command::CancelMigration).unwrap();
        }
        let survivor = if at_target { &mut target } else { &mut source };
        let told = survivor.console().matches("tick ").count();
        survivor.wait_for_times("tick ", told + 3);
        let ticks = numbers(&survivor.console(), "ns");
        let gaps = ticks.windows(2).map(|pair| pair[1].checked_sub(pair[0]).expect("never backwards"));
        let gap = Duration::from_nanos(gaps.max().unwrap());
        assert!(gap >= STANDSTILL, "only {gap:?} passed for the guest, at the target: {at_target}");
        assert!(gap < began.elapsed(), "{gap:?} passed for the guest in {:?}", began.elapsed());
    }
}
