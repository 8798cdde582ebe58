//! Machines that are saved and go on somewhere else.
use std::fs::File;
use std::os::unix::fs::FileExt;

use wire::control::Notice;
use wire::control::{Command, FaultCode, Reply};
use wire::machine::Access;
use wire::saved::{Counters, Digest, Identity, MemoryUse, Moment, SaveStatus, Then};

use crate::probe_guest::{self, numbers};
use crate::vmm_driver::{Machine, Saved, Vmm};

fn probe(words: &str) -> Machine {
    Machine::new(probe_guest::path(), words)
}

fn disk_file(mib: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(mib << 20).unwrap();
    file
}

#[test]
fn a_saved_machine_goes_on_in_another_process_and_its_clock_with_it() {
    let words = "dirty=16,200,300 ticks=100000";
    let mut vmm = Vmm::boot(probe(words));
    vmm.wait_for_console("tick 3 ");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    let before = numbers(&vmm.console(), "ns");
    let stats = vmm.stats();
    assert!(saved.report.memory_bytes >= 16 << 20 && saved.report.memory_bytes < 40 << 20);
    let ways = [MemoryUse::Private, MemoryUse::Copy];
    for (how, is_ready) in ways.into_iter().flat_map(|how| [(how, false), (how, true)]) {
        let mut next = Vmm::start();
        if is_ready {
            next.command(Command::Prepare(probe(words).spec.chassis())).unwrap();
        }
        next.try_restore(probe(words), &saved, |spec| spec.how = how).unwrap();
        // The first may be the rest of the line in which the machine was saved.
        next.wait_for_times("stopped=0", 2);
        let after = numbers(&next.console(), "ns");
        let gap = after[0].checked_sub(*before.last().unwrap()).expect("the clock does not go back");
        assert!(gap < 1_000_000_000, "the clock jumped by {gap} ns");
        let counted = next.stats();
        assert!(counted.running_ns > stats.running_ns && counted.vcpus[0].exits > stats.vcpus[0].exits);
    }
    // The first one was only paused.
    vmm.command(Command::Resume).unwrap();
    vmm.wait_for_console(&format!("tick {} ", before.len() + 2));
}

#[test]
fn four_vcpus_and_patterns_on_both_sides_of_the_hole_survive() {
    let machine = || {
        let mut machine = probe("cpus mem dirty=4000,0,2000000 spin");
        machine.spec.vcpus = 4;
        machine.spec.memory_bytes = (3 << 30) + (512 << 20);
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("probe: mem ok");
    let wanted = std::time::Instant::now() + std::time::Duration::from_millis(300);
    while std::time::Instant::now() < wanted {
        vmm.stats();
    }
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    drop(vmm);
    for (how, is_ready) in [(MemoryUse::Copy, false), (MemoryUse::Private, true)] {
        let mut next = Vmm::start();
        if is_ready {
            next.command(Command::Prepare(machine().spec.chassis())).unwrap();
        }
        next.try_restore(machine(), &saved, |spec| spec.how = how).unwrap();
        let stats = next.stats();
        next.wait_for_console("dirty pass");
        assert!(!next.console().contains("FAILED"), "{}", next.console());
        assert_eq!(stats.vcpus.len(), 4);
    }
}

#[test]
fn a_disk_in_use_goes_through_a_loop_of_saves_with_nothing_lost_or_done_twice() {
    let file = disk_file(64);
    let machine = || {
        let mut machine = probe("blk write=4096,7,16384 verify=4096,7,16384 loop");
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("probe: blk ok");
    for round in 0..12_u64 {
        // Wherever it happens to be.
        while vmm.stats().disks[0].writes < 200 * (round + 1) {}
        vmm.command(Command::Pause).unwrap();
        let saved = vmm.save();
        drop(vmm);
        vmm = Vmm::restore(machine(), &saved, |_| {});
    }
    vmm.wait_for_console("probe: verify ok");
    vmm.wait_for_console("probe: blk ok");
    let console = vmm.console();
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{console}");
}

#[test]
fn a_save_needs_a_paused_machine_which_then_stays_paused() {
    let mut vmm = Vmm::boot(probe("dirty=32,0,200 spin"));
    vmm.wait_for_console("probe: dirty ok");
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let fault = vmm.begin_save(&state, &memory).unwrap_err();
    assert_eq!(fault.code, FaultCode::WrongState);
    assert!(fault.detail.contains("pause it first"), "{fault}");
    vmm.command(Command::Pause).unwrap();
    vmm.begin_save(&state, &memory).unwrap();
    // Either the save is still under way, or it has just ended.
    match vmm.command(Command::Resume) {
        Err(fault) => assert!(fault.detail.contains("cancel"), "{fault}"),
        Ok(_) => vmm.command(Command::Pause).map(drop).unwrap(),
    }
    vmm.command(Command::CancelSave).unwrap();
    vmm.command(Command::CancelSave).unwrap();
    let _ = vmm.end_of_save();
    vmm.save();
    vmm.command(Command::Resume).unwrap();
}

#[test]
fn files_that_cannot_be_written_fail_the_save_and_not_the_machine() {
    let mut vmm = Vmm::boot(probe("ticks=100000"));
    vmm.wait_for_console("tick 3 ");
    vmm.command(Command::Pause).unwrap();
    let readable = tempfile::NamedTempFile::new().unwrap();
    let readable = File::open(readable.path()).unwrap();
    let detail = vmm.save_into(&tempfile::tempfile().unwrap(), &readable).unwrap_err();
    assert!(detail.contains("cannot write the memory file"), "{detail}");
    let detail = vmm.save_into(&readable, &tempfile::tempfile().unwrap()).unwrap_err();
    assert!(detail.contains("cannot write the state file"), "{detail}");
    vmm.command(Command::Resume).unwrap();
    let last = numbers(&vmm.console(), "ns").len();
    vmm.wait_for_console(&format!("tick {} ", last + 2));
}

#[test]
fn what_is_not_what_was_saved_is_refused_and_leaves_a_shell() {
    let mut vmm = Vmm::boot(probe("dirty=8,0,100 spin"));
    vmm.wait_for_console("probe: dirty ok");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    let mut shell = Vmm::start();
    let fault = shell.try_restore(probe("spin"), &saved, |spec| spec.root = Digest([7; 32])).unwrap_err();
    assert_eq!(fault.code, FaultCode::Invalid);
    assert!(fault.detail.contains("not the one that was named"), "{fault}");
    let mut bigger = probe("spin");
    bigger.spec.memory_bytes = 128 << 20;
    let fault = shell.try_restore(bigger, &saved, |_| {}).unwrap_err();
    assert!(fault.detail.contains("bytes of memory"), "{fault}");
    let mut more = probe("spin");
    more.spec.vcpus = 2;
    let fault = shell.try_restore(more, &saved, |_| {}).unwrap_err();
    assert!(fault.detail.contains("1 vCPUs"), "{fault}");

    // A flipped bit of the state file.
    let mut byte = [0];
    saved.state.read_exact_at(&mut byte, 300).unwrap();
    saved.state.write_all_at(&[byte[0] ^ 1], 300).unwrap();
    let fault = shell.try_restore(probe("spin"), &saved, |_| {}).unwrap_err();
    assert!(fault.detail.contains("not the one that was named"), "{fault}");
    saved.state.write_all_at(&byte, 300).unwrap();

    // A flipped bit of memory: seen where all of it is read.
    let image = 2 << 20;
    saved.memory.read_exact_at(&mut byte, image).unwrap();
    saved.memory.write_all_at(&[byte[0] ^ 1], image).unwrap();
    let fault = shell.try_restore(probe("spin"), &saved, |spec| spec.how = MemoryUse::Copy).unwrap_err();
    assert!(fault.detail.contains("is not what was saved there"), "{fault}");
    saved.memory.write_all_at(&byte, image).unwrap();

    let short = tempfile::tempfile().unwrap();
    short.set_len(32 << 20).unwrap();
    let saved = Saved { memory: short, ..saved };
    let fault = shell.try_restore(probe("spin"), &saved, |_| {}).unwrap_err();
    assert!(fault.detail.contains("the memory file has 33554432 bytes"), "{fault}");
}

#[test]
fn a_restored_machine_may_stay_paused_and_begin_its_counters() {
    let mut vmm = Vmm::boot(probe("ticks=100000"));
    vmm.wait_for_console("tick 3 ");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    let mut next = Vmm::restore(probe("ticks=100000"), &saved, |spec| {
        spec.then = Then::Stay;
        spec.counters = Counters::Fresh;
    });
    assert_eq!(next.stats().running_ns, 0);
    assert_eq!(next.console(), "");
    next.command(Command::Resume).unwrap();
    next.wait_for_console("tick ");
    match next.command(Command::SaveStatus) {
        Ok(Reply::Save(wire::saved::SaveStatus::None)) => {}
        other => panic!("{other:?}"),
    }
    // A restored machine is saved like any other, and a reset boots it.
    next.command(Command::Pause).unwrap();
    let again = next.save();
    let mut third = Vmm::restore(probe("ticks=100000"), &again, |_| {});
    third.wait_for_console("tick ");
    third.command(Command::Reset).unwrap();
    third.wait_for_console("probe: hello");
}

/// Every page of a restored machine is checked by the pass after the one that was saved.
#[test]
fn a_machine_that_rewrites_its_memory_is_saved_as_it_runs() {
    let words = "dirty=96,400,6000000 spin";
    let machine = || {
        let mut machine = probe(words);
        machine.spec.memory_bytes = 256 << 20;
        machine
    };
    let mut vmm = Vmm::boot(machine());
    // A line comes each second, however far the guest has got.
    let written = |console: &str| -> Option<u64> {
        console.rsplit_once("written_mib=")?.1.split_whitespace().next()?.parse().ok()
    };
    let mut lines = 1;
    while written(&vmm.wait_for_times("dirty pass", lines)) < Some(96) {
        lines += 1;
    }
    let mut waits = 0;
    for round in 0..3 {
        let saved = vmm.save_live();
        println!("round {round}: {:?}", saved.report);
        assert!(saved.report.memory_bytes >= 96 << 20);
        waits += saved.report.waits;
        let delay = saved.report.delay.expect("it was saved as it ran");
        assert!(delay.us_max <= delay.us_sum && delay.us_max <= saved.report.total_us, "{delay:?}");
        let mut next = Vmm::restore(machine(), &saved, |spec| spec.how = MemoryUse::Copy);
        next.wait_for_times("dirty pass", 2);
        assert!(!next.console().contains("FAILED"), "{}", next.console());
        let passes = vmm.console().matches("dirty pass").count();
        vmm.wait_for_times("dirty pass", passes + 1);
        assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
    }
    assert!(waits > 0, "nobody wrote while memory was copied");
}

#[test]
fn the_moment_may_be_a_pause_in_which_disks_are_kept_too() {
    let file = disk_file(64);
    let machine = |file: &File| {
        let mut machine = probe("blk write=4096,7,16384 verify=4096,7,16384 loop");
        machine.disk(file.try_clone().unwrap(), |_| {});
        machine
    };
    let mut vmm = Vmm::boot(machine(&file));
    vmm.wait_for_console("probe: blk ok");
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    vmm.begin_live(&state, &memory, Moment::Pause).unwrap();
    vmm.wait_for_notice("armed", |notice| *notice == Notice::Save(SaveStatus::Armed));
    let before = vmm.stats().disks[0].writes;
    while vmm.stats().disks[0].writes < before + 50 {}
    vmm.command(Command::Pause).unwrap();
    let copy = tempfile::tempfile().unwrap();
    let mut bytes = vec![0; 64 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    copy.write_all_at(&bytes, 0).unwrap();
    vmm.command(Command::Resume).unwrap();
    let report = vmm.end_of_save().unwrap();
    let before = vmm.stats().disks[0].writes;
    while vmm.stats().disks[0].writes < before + 200 {}
    let saved = Saved { state, memory, report };
    let mut next = Vmm::restore(machine(&copy), &saved, |_| {});
    next.wait_for_console("probe: verify ok");
    next.wait_for_console("probe: blk ok");
    assert!(!next.console().contains("FAILED"), "{}", next.console());
    assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
}

#[test]
fn a_live_save_is_cancelled_at_any_time_and_the_machine_runs_on() {
    let mut vmm = Vmm::boot(probe("dirty=24,0,6000000 spin"));
    vmm.wait_for_console("dirty pass");
    for moment in [Moment::Soon, Moment::Pause, Moment::Soon, Moment::Pause] {
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        vmm.begin_live(&state, &memory, moment).unwrap();
        if moment == Moment::Pause {
            vmm.wait_for_notice("armed", |notice| *notice == Notice::Save(SaveStatus::Armed));
        }
        let fault = vmm.begin_live(&state, &memory, moment).unwrap_err();
        assert!(fault.detail.contains("under way"), "{fault}");
        vmm.command(Command::CancelSave).unwrap();
        let ended = vmm.end_of_save();
        assert!(moment == Moment::Soon || ended.unwrap_err().contains("cancelled"));
    }
    // A reset takes the memory away that is being protected.
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    vmm.begin_live(&state, &memory, Moment::Pause).unwrap();
    vmm.command(Command::Reset).unwrap();
    assert!(vmm.end_of_save().unwrap_err().contains("cancelled"));
    let passes = vmm.console().matches("dirty pass").count();
    vmm.wait_for_times("dirty pass", passes + 2);
    assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
}

#[test]
fn a_machine_that_becomes_another_gets_a_generation_id_of_its_own_and_is_told() {
    let mut vmm = Vmm::boot(probe("button=60000 spin"));
    vmm.wait_for_console("button waiting");
    vmm.command(Command::Pause).unwrap();
    let saved = vmm.save();
    let id = |memory: &File| {
        let mut id = [0; 16];
        memory.read_exact_at(&mut id, 0xF_0000).unwrap();
        id
    };
    let mut ids = vec![id(&saved.memory)];
    for (identity, how) in [
        (Identity::Same, MemoryUse::Private),
        (Identity::New, MemoryUse::Private),
        (Identity::New, MemoryUse::Copy),
    ] {
        let mut next = Vmm::restore(probe("button=60000 spin"), &saved, |spec| {
            (spec.identity, spec.how, spec.then) = (identity, how, Then::Stay);
        });
        ids.push(id(&next.save().memory));
    }
    assert!(ids[0] != [0; 16] && ids[0] == ids[1], "{ids:x?}");
    assert!(ids[2] != ids[0] && ids[3] != ids[0] && ids[2] != ids[3], "{ids:x?}");
}

#[test]
fn a_machine_that_becomes_another_sees_the_disk_that_is_its_own_now() {
    let disk = |sectors: u64, first: u8| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(sectors * 512).unwrap();
        file.write_all_at(&[first; 512], 0).unwrap();
        file
    };
    let machine = |access, sectors, first| {
        let mut machine = probe("changed");
        machine.disk(disk(sectors, first), |disk| disk.access = access);
        machine
    };
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let mut vmm = Vmm::boot(machine(access, 8, 0x11));
        vmm.wait_for_console("changed waiting sectors=8 first=0x1111111111111111");
        vmm.command(Command::Pause).unwrap();
        let saved = vmm.save();
        drop(vmm);
        // What a guest has written belongs to what it knows of it, so its disk cannot become another.
        let mut next = Vmm::start();
        let restored =
            next.try_restore(machine(access, 24, 0x22), &saved, |spec| spec.identity = Identity::New);
        match access {
            Access::ReadOnly => {
                restored.unwrap();
                // It powers off then, and whoever is still asking hears nothing.
                next.wait_for_end();
                let console = next.console();
                assert!(console.contains("changed ok sectors=24 first=0x2222222222222222"), "{console}");
            }
            Access::ReadWrite => assert!(restored.unwrap_err().detail.contains("it had 8 sectors")),
        }
    }
}
