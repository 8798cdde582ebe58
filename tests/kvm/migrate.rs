//! Machines that move from one jailed VMM to another while their guests run.
use std::collections::BTreeSet;
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use wire::control::{Command, FaultCode, MachineState, Reply};
use wire::migration::{MigrationStatus, Mode, Owner, Phase, SendLimits};

use crate::handover::handed_over;
use crate::probe_guest::{self, numbers};
use crate::vmm_driver::{Machine, Vmm};

pub(crate) fn probe(words: &str, mib: u64) -> Machine {
    let mut machine = Machine::new(probe_guest::path(), words);
    machine.spec.memory_bytes = mib << 20;
    machine
}

/// Both ends of connected streams.
pub(crate) fn pairs(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let pair = |_| UnixStream::pair().map(|(near, far)| (near.into(), far.into())).unwrap();
    (0..count).map(pair).unzip()
}

pub(crate) fn tcp_pairs(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = |_| {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).unwrap();
        (near.into(), far.into())
    };
    (0..count).map(pair).unzip()
}

/// Moves a machine into a new VMM; answers that, and what the source tells in the end.
fn moved(
    vmm: &mut Vmm,
    machine: Machine,
    (near, far): (Vec<OwnedFd>, Vec<OwnedFd>),
) -> (Vmm, MigrationStatus) {
    let mut next = Vmm::start();
    next.try_receive(machine, far).unwrap();
    vmm.try_send(near, SendLimits { downtime_ms: 300, bandwidth_bytes_per_s: None, ..SendLimits::default() })
        .unwrap();
    let status = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    let arrived = next.wait_for_move("arrival", |status| status.phase.is_end());
    assert!(
        status.phase == Phase::Moved && arrived.phase == Phase::Moved,
        "{status:?}\n{arrived:?}\n{}\n{}",
        vmm.told(),
        next.told()
    );
    (next, status)
}

pub(crate) fn state(vmm: &mut Vmm) -> MachineState {
    match vmm.command(Command::Hello { protocol: 1 }) {
        Ok(Reply::Hello { state, .. }) => state,
        other => panic!("{other:?}"),
    }
}

/// The guest's clock has gone on, and never far at once between two ticks. What a guest that writes tells is a second apart.
pub(crate) fn check_clock(console: &str) {
    assert!(numbers(console, "ns").is_sorted(), "the clock went back: {console}");
    let ticks: String =
        console.split_inclusive('\n').filter(|line| line.starts_with("probe: tick ")).collect();
    for pair in numbers(&ticks, "ns").windows(2) {
        let gap = pair[1] - pair[0];
        assert!(gap < 1_000_000_000, "the clock jumped by {gap} ns");
    }
}

/// A source whose machine has moved neither runs it nor lets itself be talked into it.
pub(crate) fn check_given_away(vmm: &mut Vmm) {
    assert_eq!(state(vmm), MachineState::Paused);
    for command in [Command::Resume, Command::Reset] {
        let fault = vmm.command(command).unwrap_err();
        assert!(fault.code == FaultCode::WrongState && fault.detail.contains("has moved"), "{fault}");
    }
}

#[test]
fn a_machine_moves_on_and_on_with_its_clock_console_and_counters() {
    let words = "dirty=16,100,300 ticks=100000";
    let mut vmm = Vmm::boot(probe(words, 64));
    vmm.wait_for_console("tick 3 ");
    let mut before = vmm.stats();
    for (hop, streams) in [pairs(1), tcp_pairs(3), pairs(4)].into_iter().enumerate() {
        let (mut next, status) = moved(&mut vmm, probe(words, 64), streams);
        println!("{status:?}");
        assert!(status.progress.sent_bytes >= 16 << 20 && status.progress.skipped_bytes >= 16 << 20);
        check_given_away(&mut vmm);
        let told = vmm.console();
        assert!(next.console().starts_with(&told), "the console goes on where it was");
        next.wait_for_times("tick ", told.matches("tick ").count() + 3);
        let after = next.stats();
        assert!(after.running_ns > before.running_ns && after.vcpus[0].exits > before.vcpus[0].exits);
        assert!(after.console_written > before.console_written);
        (vmm, before) = (next, after);
        println!("hop {hop} done");
    }
    check_clock(&vmm.console());
    assert!(vmm.console().starts_with("probe: hello"), "{}", vmm.console());
}

/// Every page of a machine that arrived is checked by the pass after the one that was moved.
#[test]
fn memory_that_is_written_meanwhile_arrives_on_both_sides_of_the_hole() {
    let machine = || {
        let mut machine = probe("cpus mem dirty=4000,60,3000000 spin", (3 << 10) + 512);
        machine.spec.vcpus = 4;
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("probe: mem ok");
    let (mut next, status) = moved(&mut vmm, machine(), tcp_pairs(2));
    println!("{status:?}");
    let passes = next.console().matches("dirty pass").count();
    next.wait_for_times("dirty pass", passes + 2);
    assert!(!next.console().contains("FAILED"), "{}", next.console());
    assert!(status.progress.rounds >= 2, "{status:?}");
}

#[test]
fn a_disk_in_use_is_moved_along_with_nothing_lost_or_done_twice() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let machine = |file: &File| {
        let mut machine = probe("blk write=4096,7,16384 verify=4096,7,16384 loop", 64);
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let mut vmm = Vmm::boot(machine(&file));
    vmm.wait_for_console("probe: blk ok");
    for hop in 1..=6 {
        while vmm.stats().disks[0].writes < 200 * hop {}
        let (next, _) = moved(&mut vmm, machine(&file), pairs(2));
        vmm = next;
    }
    let rounds = vmm.console().matches("probe: verify ok").count();
    vmm.wait_for_times("probe: verify ok", rounds + 2);
    let console = vmm.console();
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

/// The guest writes a pattern over and over and expects it; each time it moves onto a disk of which nothing is true.
#[test]
fn a_disk_goes_along_onto_files_that_held_something_else() {
    const BYTES: u64 = (32 << 20) + 512;
    let fresh = |byte: u8| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        file.write_all_at(&vec![byte; 8 << 20], 4 << 20).unwrap();
        file
    };
    // The first is in use all the time, at the target as soon as it is there. Of the second each end's file is looked at.
    let machine = |used: &File, left_alone: &File| {
        let mut machine = probe("blk=0 write=4096,7,16384 verify=4096,7,16384 loop", 64);
        machine.disk(used.try_clone().unwrap(), |_| {});
        machine.disk(left_alone.try_clone().unwrap(), |_| {});
        machine
    };
    let whole = |file: &File| {
        let mut bytes = vec![0; BYTES as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let files = [fresh(0), fresh(99)];
    files[1].write_all_at(&[98; 700], BYTES - 700).unwrap();
    let expected = whole(&files[1]);
    let mut vmm = Vmm::boot(machine(&files[0], &files[1]));
    vmm.wait_for_console("probe: verify ok");
    for hop in 1..=4 {
        while vmm.stats().disks[0].writes < 200 * hop {}
        let onto = [fresh(hop as u8), fresh(hop as u8)];
        let (near, far) = pairs(2);
        let (disk_near, disk_far) = pairs(2);
        let mut next = Vmm::start();
        next.try_receive_with_disks(machine(&onto[0], &onto[1]), far, disk_far).unwrap();
        let limits = SendLimits { downtime_ms: 300, bandwidth_bytes_per_s: None, ..SendLimits::default() };
        vmm.try_send_with_disks(near, disk_near, limits).unwrap();
        let status = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
        assert_eq!(status.phase, Phase::Moved, "{status:?}\n{}\n{}", vmm.told(), next.told());
        assert!(status.progress.sent_bytes > 16 << 20, "{status:?}");
        assert!(whole(&onto[1]) == expected, "hop {hop}");
        let verified = next.console().matches("probe: verify ok").count();
        next.wait_for_times("probe: verify ok", verified + 2);
        vmm = next;
    }
    let console = vmm.console();
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

#[test]
fn a_disk_of_another_length_is_refused() {
    let file = |bytes| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    };
    let machine = |bytes| {
        let mut machine = probe("ticks=100000", 64);
        machine.disk(file(bytes), |_| {});
        machine
    };
    let mut vmm = Vmm::boot(machine(1 << 20));
    let mut next = Vmm::start();
    let ((near, far), (disk_near, disk_far)) = (pairs(1), pairs(1));
    next.try_receive_with_disks(machine(2 << 20), far, disk_far).unwrap();
    vmm.try_send_with_disks(near, disk_near, SendLimits::default()).unwrap();
    let ended = vmm.wait_for_move("the end", |status| status.phase.is_end());
    assert_eq!(ended.phase, Phase::Returned);
    let ended = next.wait_for_move("the end there", |status| status.phase.is_end());
    assert!(ended.detail.as_deref().is_some_and(|detail| detail.contains("stream 1")), "{ended:?}");
    vmm.wait_for_times("tick ", 3);
}

#[test]
fn a_guest_that_outruns_its_streams_is_held_back_and_arrives() {
    let machine = || probe("dirty=96,400,6000000 spin", 256);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    let mut next = Vmm::start();
    let (near, far) = pairs(1);
    next.try_receive(machine(), far).unwrap();
    let limits =
        SendLimits { downtime_ms: 100, bandwidth_bytes_per_s: Some(100 << 20), ..SendLimits::default() };
    vmm.try_send(near, limits).unwrap();
    let status = vmm.wait_for_move("the end", |status| status.phase.is_end());
    println!("{status:?}");
    assert_eq!(status.phase, Phase::Moved, "{status:?}");
    assert!(status.progress.throttle_percent > 0, "{status:?}");
    next.wait_for_times("dirty pass", vmm.console().matches("dirty pass").count() + 2);
    assert!(!next.console().contains("FAILED"), "{}", next.console());
}

#[test]
fn a_move_is_cancelled_at_either_end_and_the_machine_runs_on() {
    let machine = || probe("dirty=64,100,6000000 spin", 256);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    for target_cancels in [false, true] {
        let mut next = Vmm::start();
        let (near, far) = pairs(2);
        next.try_receive(machine(), far).unwrap();
        vmm.try_send(
            near,
            SendLimits { downtime_ms: 1, bandwidth_bytes_per_s: Some(1 << 20), ..SendLimits::default() },
        )
        .unwrap();
        vmm.wait_for_move("the rounds", |status| status.phase == Phase::Rounds);
        for command in [Command::Pause, Command::Resume] {
            let fault = vmm.command(command).unwrap_err();
            assert!(fault.detail.contains("being moved"), "{fault}");
        }
        let (near, _far) = pairs(1);
        assert!(vmm.try_send(near, SendLimits::default()).unwrap_err().detail.contains("being moved"));
        let fault = vmm.command(Command::SettleMigration { owner: Owner::There }).unwrap_err();
        assert!(fault.detail.contains("not in doubt"), "{fault}");
        let faster =
            SendLimits { downtime_ms: 1, bandwidth_bytes_per_s: Some(2 << 20), ..SendLimits::default() };
        vmm.command(Command::LimitMigration { limits: faster }).unwrap();
        let canceller = if target_cancels { &mut next } else { &mut vmm };
        canceller.command(Command::CancelMigration).unwrap();
        canceller.command(Command::CancelMigration).unwrap();
        let ended = vmm.wait_for_move("the end", |status| status.phase.is_end());
        assert_eq!(ended.phase, Phase::Returned, "{ended:?}");
        let ended = next.wait_for_move("the end there", |status| status.phase.is_end());
        assert_eq!(ended.phase, Phase::Dropped, "{ended:?}");
        assert_eq!(state(&mut vmm), MachineState::Running);
        let fault = next.command(Command::Resume).unwrap_err();
        assert!(fault.detail.contains("did not come"), "{fault}");
        let passes = vmm.console().matches("dirty pass").count();
        vmm.wait_for_times("dirty pass", passes + 1);
    }
    assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
    // And still moves.
    let (mut next, _) = moved(&mut vmm, machine(), pairs(2));
    next.wait_for_times("dirty pass", vmm.console().matches("dirty pass").count() + 2);
    assert!(!next.console().contains("FAILED"), "{}", next.console());
}

#[test]
fn a_reset_in_the_middle_of_a_move_ends_it() {
    let machine = || probe("dirty=64,100,6000000 spin", 256);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    let mut next = Vmm::start();
    let (near, far) = pairs(2);
    next.try_receive(machine(), far).unwrap();
    vmm.try_send(
        near,
        SendLimits { downtime_ms: 1, bandwidth_bytes_per_s: Some(1 << 20), ..SendLimits::default() },
    )
    .unwrap();
    vmm.wait_for_move("the rounds", |status| status.phase == Phase::Rounds);
    vmm.command(Command::Reset).unwrap();
    let ended = vmm.wait_for_move("the end", |status| status.phase.is_end());
    assert_eq!(ended.detail.as_deref(), Some("the machine was reset"));
    assert_eq!(next.wait_for_move("the end there", |status| status.phase.is_end()).phase, Phase::Dropped);
    vmm.wait_for_times("probe: hello", 2);
}

/// Files of which a VMM has the descriptor or a mapping, and whose names begin so.
pub(crate) fn files(vmm: &Vmm, name: &str) -> BTreeSet<u64> {
    let process = Path::new("/proc").join(vmm.pid().to_string());
    let maps = std::fs::read_to_string(process.join("maps")).unwrap();
    let mapped =
        maps.lines().filter(|line| line.split_whitespace().nth(5).is_some_and(|path| path.starts_with(name)));
    let mut inodes: BTreeSet<u64> =
        mapped.map(|line| line.split_whitespace().nth(4).unwrap().parse().unwrap()).collect();
    for fd in std::fs::read_dir(process.join("fd")).unwrap().map(|fd| fd.unwrap().path()) {
        // Threads that end have closed one or another meanwhile.
        let Ok(path) = std::fs::read_link(&fd) else { continue };
        if path.to_string_lossy().starts_with(name) {
            inodes.extend(std::fs::metadata(&fd).map(|file| file.ino()));
        }
    }
    inodes
}

/// There is never twice of its memory, wherever it has been and whatever else was tried.
#[test]
fn a_machine_that_is_reset_has_one_memory_whatever_became_of_its_moves() {
    let machine = || probe("dirty=64,100,6000000 spin", 256);
    let reset = |vmm: &mut Vmm| {
        let (before, boots) = (files(vmm, "/memfd:guest-ram"), vmm.console().matches("probe: hello").count());
        vmm.command(Command::Reset).unwrap();
        let after = files(vmm, "/memfd:guest-ram");
        assert!(before.len() == 1 && after.len() == 1 && before != after, "{before:?}, {after:?}");
        assert!(vmm.migration().phase.is_end(), "how the move stands is told still");
        vmm.wait_for_times("probe: hello", boots + 1);
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    // One that was given up, and one that is under way.
    for is_cancelled in [true, false] {
        let mut next = Vmm::start();
        let (near, far) = pairs(2);
        next.try_receive(machine(), far).unwrap();
        let limits =
            SendLimits { downtime_ms: 1, bandwidth_bytes_per_s: Some(1 << 20), ..SendLimits::default() };
        vmm.try_send(near, limits).unwrap();
        vmm.wait_for_move("the rounds", |status| status.phase == Phase::Rounds);
        if is_cancelled {
            vmm.command(Command::CancelMigration).unwrap();
        }
        reset(&mut vmm);
    }
    // Over streams, with all of it there and with some owed, and handed over.
    let (mut vmm, _) = moved(&mut vmm, machine(), pairs(2));
    reset(&mut vmm);
    vmm.wait_for_console("dirty pass");
    vmm.mode = Mode::PostCopy;
    let mut next = Vmm::start();
    next.mode = Mode::PostCopy;
    let (near, far) = pairs(2);
    next.try_receive(machine(), far).unwrap();
    vmm.try_send(near, SendLimits::default()).unwrap();
    next.wait_for_move("arrival", |status| status.phase == Phase::Moved);
    reset(&mut next);
    let (mut next, ..) = handed_over(&mut next, machine());
    reset(&mut next);
}

#[test]
fn a_target_of_another_shape_refuses_and_says_why() {
    let mut vmm = Vmm::boot(probe("ticks=100000", 64));
    vmm.wait_for_console("tick 3 ");
    let mut two = probe("spin", 64);
    two.spec.vcpus = 2;
    for (machine, why) in [(probe("spin", 128), "stream 0"), (two, "1 vCPUs")] {
        let mut next = Vmm::start();
        let (near, far) = pairs(1);
        next.try_receive(machine, far).unwrap();
        vmm.try_send(near, SendLimits::default()).unwrap();
        let ended = vmm.wait_for_move("the end", |status| status.phase.is_end());
        assert_eq!(ended.phase, Phase::Returned);
        let ended = next.wait_for_move("the end there", |status| status.phase.is_end());
        assert!(ended.detail.as_deref().is_some_and(|detail| detail.contains(why)), "{ended:?}");
    }
    let told = vmm.console().matches("tick ").count();
    vmm.wait_for_times("tick ", told + 2);
}
