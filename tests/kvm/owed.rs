//! Machines that run where they go to before all of their memory is there.
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use sys::pidfd::Signal;
use wire::control::{Command, FaultCode, MachineState};
use wire::migration::{MigrationStatus, Mode, Owner, Phase, SendLimits};

use crate::migrate::{check_clock, check_given_away, pairs, probe, state, tcp_pairs};
use crate::vmm_driver::{Machine, Vmm};

fn limits(mib_per_s: Option<u64>) -> SendLimits {
    let bandwidth_bytes_per_s = mib_per_s.map(|mib| mib << 20);
    SendLimits { downtime_ms: 300, bandwidth_bytes_per_s, ..SendLimits::default() }
}

/// Begins to move a machine in this mode; answers where to.
fn begin(
    vmm: &mut Vmm,
    (machine, mode): (Machine, Mode),
    (near, far): (Vec<OwnedFd>, Vec<OwnedFd>),
    limits: SendLimits,
) -> Vmm {
    let mut next = Vmm::start();
    (vmm.mode, next.mode) = (mode, mode);
    next.is_held = vmm.is_held;
    next.try_receive(machine, far).unwrap();
    vmm.try_send(near, limits).unwrap();
    next
}

/// Waits for the end of a move; answers how the source and the target see it.
fn end(vmm: &mut Vmm, next: &mut Vmm) -> (MigrationStatus, MigrationStatus) {
    let status = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    let arrived = next.wait_for_move("arrival", |status| status.phase.is_end());
    assert!(
        status.phase == Phase::Moved && arrived.phase == Phase::Moved,
        "{status:?}\n{arrived:?}\n{}\n{}",
        vmm.told(),
        next.told()
    );
    println!("{status:?}\n{arrived:?}");
    (status, arrived)
}

/// Every page of a machine that arrived is checked by the pass after the one that was moved.
fn check_passes(next: &mut Vmm) {
    let passes = next.console().matches("dirty pass").count();
    next.wait_for_times("dirty pass", passes + 2);
    assert!(!next.console().contains("FAILED"), "{}", next.console());
    check_clock(&next.console());
}

#[test]
fn a_guest_that_writes_faster_than_the_streams_take_runs_there_and_its_memory_follows() {
    let machine = || probe("dirty=96,400,6000000 spin", 256);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    for streams in [pairs(1), tcp_pairs(3)] {
        let mut next = begin(&mut vmm, (machine(), Mode::PostCopy), streams, limits(Some(100)));
        let (status, arrived) = end(&mut vmm, &mut next);
        assert!(status.owes && arrived.owes && !status.link_lost, "{status:?}");
        assert_eq!((status.progress.rounds, status.progress.throttle_percent), (2, 0), "{status:?}");
        assert!(status.progress.downtime_us < 300_000, "{status:?}");
        assert_eq!(arrived.progress.left_bytes, 0, "{arrived:?}");
        // Once all of it, and of what was written once more: not again and again.
        let sent_mib = status.progress.sent_bytes >> 20;
        assert!((97..97 + 97 + 20).contains(&sent_mib), "{sent_mib} MiB");
        check_given_away(&mut vmm);
        check_passes(&mut next);
        vmm = next;
    }
    // What came in this way is whole: it is paused, and moves on in any.
    vmm.command(Command::Pause).unwrap();
    vmm.command(Command::Resume).unwrap();
    let mut next = begin(&mut vmm, (machine(), Mode::PreCopy), pairs(2), limits(None));
    end(&mut vmm, &mut next);
    check_passes(&mut next);
}

#[test]
fn what_is_owed_comes_on_both_sides_of_the_hole_to_several_processors() {
    let machine = || {
        let mut machine = probe("cpus mem dirty=3300,0,3000000 spin", (3 << 10) + 512);
        machine.spec.vcpus = 4;
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    let mut next = begin(&mut vmm, (machine(), Mode::PostCopy), tcp_pairs(2), limits(None));
    let (status, _) = end(&mut vmm, &mut next);
    assert!(status.owes, "{status:?}");
    check_passes(&mut next);
}

#[test]
fn a_guest_that_cannot_be_held_back_enough_gets_the_rest_later() {
    let machine = || probe("dirty=48,0,6000000 spin", 128);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    let mut next = begin(&mut vmm, (machine(), Mode::Auto), pairs(1), limits(Some(16)));
    let (status, _) = end(&mut vmm, &mut next);
    assert!(status.owes && status.progress.throttle_percent == 99, "{status:?}");
    check_passes(&mut next);
    // One that can owes nothing, though it might.
    let machine = || probe("dirty=16,4,6000000 spin", 128);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    let mut next = begin(&mut vmm, (machine(), Mode::Auto), pairs(2), limits(None));
    let (status, arrived) = end(&mut vmm, &mut next);
    assert!(!status.owes && !arrived.owes, "{status:?}");
    check_passes(&mut next);
    // And its memory is as any other's: nothing keeps the kernel from making huge pages of it.
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", next.pid())).unwrap();
    let flags: Vec<&str> = smaps
        .lines()
        .skip_while(|line| !line.contains("guest-ram"))
        .filter_map(|line| line.strip_prefix("VmFlags:"))
        .take(1)
        .collect();
    assert!(!flags.is_empty() && !flags[0].split(' ').any(|flag| flag == "nh"), "{flags:?}");
}

/// What the disk reads and writes is in pages that have yet to come: the kernel waits for them as the guest does.
#[test]
fn a_disk_goes_along_and_is_in_use_before_all_of_memory_is_there() {
    let machine = |file: &File| {
        let words = "blk write=4096,7,16384 verify=4096,7,16384 loop";
        let mut machine = probe(words, 64);
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let fresh = |byte: u8| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&vec![byte; 8 << 20], 4 << 20).unwrap();
        file
    };
    let mut vmm = Vmm::boot(machine(&fresh(0)));
    vmm.wait_for_console("probe: verify ok");
    for hop in 1..=3 {
        while vmm.stats().disks[0].writes < 200 * hop {}
        let ((near, far), (disk_near, disk_far)) = (pairs(2), pairs(1));
        let mut next = Vmm::start();
        (vmm.mode, next.mode) = (Mode::PostCopy, Mode::PostCopy);
        next.try_receive_with_disks(machine(&fresh(hop as u8)), far, disk_far).unwrap();
        vmm.try_send_with_disks(near, disk_near, limits(None)).unwrap();
        let (status, _) = end(&mut vmm, &mut next);
        assert!(status.owes, "{status:?}");
        let verified = next.console().matches("probe: verify ok").count();
        next.wait_for_times("probe: verify ok", verified + 2);
        vmm = next;
    }
    let console = vmm.console();
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

/// Streams, and copies of them that cut them.
struct Link {
    near: Vec<OwnedFd>,
    far: Vec<OwnedFd>,
    scissors: Vec<UnixStream>,
}

impl Link {
    fn new(count: usize) -> Link {
        let (near, far) = pairs(count);
        let scissors = near.iter().map(|stream| stream.try_clone().unwrap().into()).collect();
        Link { near, far, scissors }
    }
}

fn cut(scissors: &[UnixStream]) {
    scissors.iter().for_each(|stream| stream.shutdown(Shutdown::Both).unwrap());
}

/// Begins a move that takes long, and waits until memory is owed.
fn owing(vmm: &mut Vmm, machine: Machine) -> (Vmm, Vec<UnixStream>) {
    let Link { near, far, scissors } = Link::new(2);
    let mut next = begin(vmm, (machine, Mode::PostCopy), (near, far), limits(None));
    // As slow as the test needs it from here on.
    vmm.wait_for_move("the rounds", |status| status.phase != Phase::Greet);
    vmm.command(Command::LimitMigration { limits: limits(Some(4)) }).unwrap();
    for end in [&mut *vmm, &mut next] {
        end.wait_for_move("what is owed", |status| status.phase == Phase::Owing);
    }
    (next, scissors)
}

#[test]
fn a_link_that_breaks_holds_the_guest_up_until_there_is_another() {
    let machine = || probe("dirty=48,0,6000000 spin", 128);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    let (mut next, mut scissors) = owing(&mut vmm, machine());
    for broken in 0..3 {
        // The first one breaks by itself, the others take each other with them.
        cut(&scissors[..1 + broken % 2]);
        for end in [&mut vmm, &mut next] {
            let status = end.wait_for_move("a broken link", |status| status.link_lost);
            assert_eq!(status.phase, Phase::Owing, "{status:?}");
        }
        let left = next.migration().progress.left_bytes;
        assert!(left > 0, "{:?}", next.migration());
        // It is the target's for good, and nothing may be done to it yet for which all of it is needed.
        assert_eq!((state(&mut vmm), state(&mut next)), (MachineState::Paused, MachineState::Running));
        check_given_away(&mut vmm);
        for command in [Command::Pause, Command::Reset, Command::Handles] {
            let fault = next.command(command).unwrap_err();
            assert!(
                fault.code == FaultCode::WrongState && fault.detail.contains("still on its way"),
                "{fault}"
            );
        }
        let (streams, _other) = pairs(1);
        let fault = next.try_send(streams, limits(None)).unwrap_err();
        assert!(fault.detail.contains("still on its way"), "{fault}");
        // It goes on, as whoever lets it run says again.
        next.command(Command::Resume).unwrap();
        for end in [&mut vmm, &mut next] {
            assert!(end.command(Command::CancelMigration).is_err());
        }
        vmm.command(Command::SettleMigration { owner: Owner::There }).unwrap();
        next.command(Command::SettleMigration { owner: Owner::Here }).unwrap();
        assert!(vmm.command(Command::SettleMigration { owner: Owner::Here }).is_err());
        let (one, _other) = pairs(1);
        assert!(next.try_reconnect(&one).unwrap_err().detail.contains("must be 2"));
        let link = Link::new(2);
        scissors = link.scissors;
        vmm.try_reconnect(&link.near).unwrap();
        next.try_reconnect(&link.far).unwrap();
        drop((link.near, link.far));
        next.wait_for_move("more of it", |status| status.progress.left_bytes < left);
    }
    vmm.command(Command::LimitMigration { limits: limits(None) }).unwrap();
    end(&mut vmm, &mut next);
    check_passes(&mut next);
    let link = Link::new(2);
    assert!(next.try_reconnect(&link.far).unwrap_err().detail.contains("is owed"));
}

#[test]
fn a_guest_whose_source_dies_waits_and_its_vmm_still_ends() {
    let machine = || probe("dirty=48,0,6000000 spin", 128);
    for is_killed in [false, true] {
        let mut vmm = Vmm::boot(machine());
        vmm.wait_for_console("dirty pass");
        let (mut next, _scissors) = owing(&mut vmm, machine());
        match is_killed {
            true => vmm.signal(Signal::SIGKILL),
            false => drop(vmm.command(Command::Quit)),
        }
        let status = next.wait_for_move("a broken link", |status| status.link_lost);
        assert!(status.phase == Phase::Owing && status.progress.left_bytes > 0, "{status:?}");
        assert_eq!(state(&mut next), MachineState::Running);
        let _ = next.command(Command::Quit);
        next.wait_for_end();
    }
}

/// Whoever builds a machine that is dropped may wait for memory that never comes.
#[test]
fn a_move_that_breaks_before_the_target_runs_leaves_the_source_as_it_was() {
    let machine = || probe("dirty=48,400,6000000 spin", 128);
    let mut vmm = Vmm::boot(machine());
    vmm.is_held = true;
    vmm.wait_for_console("dirty pass");
    let Link { near, far, scissors } = Link::new(2);
    let mut next = begin(&mut vmm, (machine(), Mode::PostCopy), (near, far), limits(None));
    vmm.wait_for_move("ready", |status| status.phase == Phase::Ready);
    next.wait_for_move("ready there", |status| status.phase == Phase::Ready);
    cut(&scissors);
    let status = vmm.wait_for_move("the end", |status| status.phase.is_end());
    assert_eq!(status.phase, Phase::Returned, "{status:?}");
    next.command(Command::SettleMigration { owner: Owner::There }).unwrap();
    assert_eq!(next.wait_for_move("the end", |status| status.phase.is_end()).phase, Phase::Dropped);
    check_passes(&mut vmm);

    // Given away with the link broken, it runs there as far as it comes, and on when there is a link.
    let Link { near, far, scissors } = Link::new(2);
    let mut next = begin(&mut vmm, (machine(), Mode::PostCopy), (near, far), limits(None));
    vmm.wait_for_move("ready", |status| status.phase == Phase::Ready);
    next.wait_for_move("ready there", |status| status.phase == Phase::Ready);
    vmm.command(Command::CommitMigration).unwrap();
    cut(&scissors);
    let is_in_doubt = |status: &MigrationStatus| status.in_doubt || status.progress.left_bytes == 0;
    vmm.wait_for_move("doubt", |status| status.in_doubt);
    next.wait_for_move("doubt there", is_in_doubt);
    next.command(Command::SettleMigration { owner: Owner::Here }).unwrap();
    vmm.command(Command::SettleMigration { owner: Owner::There }).unwrap();
    let status =
        next.wait_for_move("it to run", |status| matches!(status.phase, Phase::Owing | Phase::Moved));
    if status.phase == Phase::Owing {
        let link = Link::new(2);
        vmm.try_reconnect(&link.near).unwrap();
        next.try_reconnect(&link.far).unwrap();
        next.wait_for_move("the end", |status| status.phase.is_end());
    }
    check_passes(&mut next);
}

#[test]
fn a_target_that_cannot_be_owed_anything_says_so_before_anything_goes() {
    let machine = || probe("ticks=100000", 64);
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("tick 3 ");
    let mut next = Vmm::start();
    let (near, far) = pairs(1);
    next.try_receive(machine(), far).unwrap();
    vmm.mode = Mode::Auto;
    vmm.try_send(near, SendLimits::default()).unwrap();
    let ended = vmm.wait_for_move("the end", |status| status.phase.is_end());
    assert_eq!((ended.phase, ended.progress.sent_bytes), (Phase::Returned, 0), "{ended:?}");
    let ended = next.wait_for_move("the end there", |status| status.phase.is_end());
    assert!(ended.detail.as_deref().is_some_and(|detail| detail.contains("stream 0")), "{ended:?}");
    let told = vmm.console().matches("tick ").count();
    vmm.wait_for_times("tick ", told + 2);
}
