//! A machine from Boot to its end, seen through the wire.
use std::time::Instant;

use sys::pidfd::{Ended, Signal};
use wire::control::{Command, FaultCode, MachineState, Notice, PROTOCOL, Reply};
use wire::machine::{CpuTemplate, FdIndex, OnReset};
use wire::will::Reason;

use crate::probe_guest::{self, numbers};
use crate::vmm_driver::{Machine, PATIENCE, Vmm};

fn probe(words: &str) -> Machine {
    Machine::new(probe_guest::path(), words)
}

#[test]
fn the_probe_says_hello_and_powers_off() {
    let mut vmm = Vmm::boot(probe(""));
    vmm.wait_for_notice("the end", |notice| *notice == Notice::Exiting(Reason::PoweredOff));
    let (ended, will) = vmm.wait_for_end();
    assert_eq!(ended, Ended::Code(0), "{}", vmm.told());
    assert_eq!(will.unwrap().reason, Reason::PoweredOff);
    let console = vmm.console();
    assert!(console.contains("probe: hello 1"), "{}", vmm.told());
    assert!(console.contains("probe: done failed=0"), "{}", vmm.told());
}

#[test]
fn four_vcpus_and_memory_on_both_sides_of_the_hole_work() {
    let mut machine = probe("cpus mem pci clock");
    machine.spec.vcpus = 4;
    machine.spec.memory_bytes = (3 << 30) + (512 << 20);
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_end();
    let console = vmm.console();
    assert!(console.contains("probe: cpus ok cpus=4"), "{console}");
    assert!(console.contains("probe: done failed=0"), "{}", vmm.told());
}

#[test]
fn hello_tells_what_the_machine_does() {
    let mut vmm = Vmm::start();
    match vmm.command(Command::Hello { protocol: PROTOCOL }) {
        Ok(Reply::Hello { protocol: PROTOCOL, state, console_written, .. }) => {
            assert_eq!((state, console_written), (MachineState::Shell, 0));
        }
        other => panic!("{other:?}"),
    }
    vmm.try_boot(probe("spin")).unwrap();
    vmm.wait_for_console("probe: hello");
    vmm.command(Command::Pause).unwrap();
    let written = vmm.console().len() as u64;
    match vmm.command(Command::Hello { protocol: PROTOCOL }) {
        Ok(Reply::Hello { state, console_written, .. }) => {
            assert_eq!((state, console_written), (MachineState::Paused, written));
        }
        other => panic!("{other:?}"),
    }
    vmm.command(Command::Resume).unwrap();
    vmm.command(Command::Quit).unwrap();
    let (ended, will) = vmm.wait_for_end();
    assert_eq!((ended, will.unwrap().reason), (Ended::Code(0), Reason::Asked));
}

#[test]
fn commands_before_boot_are_refused_with_the_way_out() {
    let mut vmm = Vmm::start();
    for command in [
        Command::Pause,
        Command::Resume,
        Command::Reset,
        Command::Stats,
        Command::PressPowerButton,
        Command::WatchConsole { seen: 0 },
    ] {
        let fault = vmm.command(command).unwrap_err();
        assert_eq!(fault.code, FaultCode::WrongState);
        assert!(fault.detail.contains("Boot"), "{fault}");
    }
}

#[test]
fn a_machine_that_cannot_be_built_leaves_a_shell_that_can() {
    let mut vmm = Vmm::start();
    let mut machine = probe("");
    machine.spec.boot.initrd = Some(FdIndex(40));
    let fault = vmm.try_boot(machine).unwrap_err();
    assert_eq!(fault.code, FaultCode::Invalid);
    assert!(fault.detail.starts_with("/boot/initrd"), "{fault}");

    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, &[b'x'; 4096]).unwrap();
    let fault = vmm.try_boot(Machine::new(file.path(), "")).unwrap_err();
    assert_eq!(fault.code, FaultCode::Invalid);
    assert!(fault.detail.contains("neither an ELF program nor a bzImage"), "{fault}");

    vmm.try_boot(probe("spin")).unwrap();
    vmm.wait_for_console("probe: hello");
    let fault = vmm.try_boot(probe("")).unwrap_err();
    assert_eq!(fault.code, FaultCode::WrongState);
}

#[test]
fn a_template_the_host_cannot_show_is_refused_by_name_or_boots() {
    for cpu in [CpuTemplate::X86_64V2, CpuTemplate::X86_64V3] {
        let mut machine = probe("");
        machine.spec.cpu = cpu;
        let mut vmm = Vmm::start();
        match vmm.try_boot(machine) {
            Ok(()) => assert_eq!(vmm.wait_for_end().1.unwrap().reason, Reason::PoweredOff),
            Err(fault) => {
                assert_eq!(fault.code, FaultCode::Invalid);
                assert!(fault.detail.starts_with("/cpu: ") && fault.detail.contains("lacks"), "{fault}");
            }
        }
    }
}

#[test]
fn a_guest_clock_goes_on_while_it_is_parked_until_somebody_pauses_it() {
    let mut vmm = Vmm::boot(probe("ticks=1000 clock"));
    vmm.wait_for_console("tick 3 ");
    let stand = |vmm: &mut Vmm, command: Command| {
        vmm.command(command).unwrap();
        let (before, began) = (vmm.stats(), std::time::Instant::now());
        while began.elapsed() < std::time::Duration::from_secs(1) {
            assert_eq!(vmm.stats().console_written, before.console_written);
        }
        began.elapsed().as_nanos() as u64
    };
    // One that is paused stays as it is when it is parked.
    for (words, of_guest) in
        [(&[Command::Park, Command::Pause][..], true), (&[Command::Pause, Command::Park], false)]
    {
        let stood: Vec<u64> = words.iter().map(|command| stand(&mut vmm, command.clone())).collect();
        let ticks = vmm.console().matches("tick ").count();
        vmm.command(Command::Resume).unwrap();
        vmm.wait_for_times("tick ", ticks + 3);
        let console = vmm.console();
        // From the last tick before the standstill on.
        let gap = numbers(&console, "ns")[ticks - 1..]
            .windows(2)
            .map(|pair| pair[1].checked_sub(pair[0]).expect("never backwards"))
            .max()
            .unwrap();
        let least = if of_guest { stood[0] } else { 0 };
        assert!(
            gap >= least && gap < least + 900_000_000,
            "{gap} ns passed for the guest, after {words:?} of {stood:?} ns"
        );
    }
}

#[test]
fn a_guest_clock_does_not_live_through_a_pause() {
    let mut vmm = Vmm::boot(probe("ticks=1000 clock"));
    vmm.wait_for_console("tick 3 ");
    for _ in 0..2 {
        vmm.command(Command::Pause).unwrap();
        vmm.command(Command::Pause).unwrap();
        let (before, began) = (vmm.stats(), std::time::Instant::now());
        // Time has to pass while the machine is paused; nothing else is there to wait for.
        while began.elapsed() < std::time::Duration::from_millis(1500) {
            assert_eq!(vmm.stats().running_ns, before.running_ns);
            assert_eq!(vmm.stats().console_written, before.console_written);
        }
        vmm.command(Command::Resume).unwrap();
        vmm.command(Command::Resume).unwrap();
        let console = vmm.console();
        let last = console.matches("tick ").count();
        vmm.wait_for_console(&format!("tick {} ", last + 2));
    }
    let console = vmm.console();
    // The pause is neither time that passed nor time that somebody stole.
    for field in ["ns", "steal"] {
        let longest = numbers(&console, field)
            .windows(2)
            .map(|pair| pair[1].checked_sub(pair[0]).expect("never backwards"))
            .max();
        assert!(longest.unwrap() < 1_000_000_000, "{field} jumped by {longest:?}\n{console}");
    }
    assert!(console.contains("stopped=1"), "the guest was not told of the pause\n{console}");
}

#[test]
fn the_power_button_reaches_the_guest() {
    let mut vmm = Vmm::boot(probe("button spin"));
    vmm.wait_for_console("button waiting");
    vmm.command(Command::PressPowerButton).unwrap();
    vmm.wait_for_console("probe: button ok events=0x1");
}

#[test]
fn what_is_typed_is_read() {
    let mut vmm = Vmm::boot(probe("serial spin"));
    vmm.wait_for_console("serial waiting");
    vmm.type_line("a line that is longer than the sixteen bytes of a FIFO");
    vmm.wait_for_console("serial got a line that is longer than the sixteen bytes of a FIFO");
}

#[test]
fn a_reset_builds_the_same_machine_again_and_counters_go_on() {
    let mut vmm = Vmm::boot(probe("mem reset"));
    vmm.wait_for_notice("the start", |notice| *notice == Notice::Booted { resets: 0 });
    vmm.wait_for_notice("the third start", |notice| *notice == Notice::Booted { resets: 3 });
    let before = vmm.stats();
    assert!(before.resets >= 3 && before.vcpus[0].exits > 0 && before.vcpus[0].cpu_ns > 0);
    vmm.command(Command::Reset).unwrap();
    let after = vmm.stats();
    assert!(after.resets > before.resets);
    assert!(after.vcpus[0].exits >= before.vcpus[0].exits && after.vcpus[0].cpu_ns >= before.vcpus[0].cpu_ns);
    assert!(after.running_ns > before.running_ns && after.console_written >= before.console_written);
}

#[test]
fn the_keyboard_controller_resets_too_and_a_reset_may_end_the_machine() {
    let mut machine = probe("reset=i8042");
    machine.spec.on_reset = OnReset::Exit;
    let mut vmm = Vmm::boot(machine);
    assert_eq!(vmm.wait_for_end().1.unwrap().reason, Reason::Reset, "{}", vmm.told());
}

#[test]
fn a_triple_fault_and_a_panic_leave_their_reasons() {
    let mut vmm = Vmm::boot(probe("triple"));
    assert_eq!(vmm.wait_for_end().1.unwrap().reason, Reason::TripleFault, "{}", vmm.told());
    let mut vmm = Vmm::boot(probe("panic"));
    vmm.wait_for_notice("the panic", |notice| *notice == Notice::GuestPanicked);
    assert_eq!(vmm.wait_for_end().1.unwrap().reason, Reason::GuestPanicked, "{}", vmm.told());
}

#[test]
fn a_killed_vmm_leaves_an_empty_will() {
    let mut vmm = Vmm::boot(probe("spin"));
    vmm.wait_for_console("probe: hello");
    vmm.signal(Signal::SIGKILL);
    assert_eq!(vmm.wait_for_end(), (Ended::Signal(9), None));
}

#[test]
fn entropy_and_the_balloon_serve_the_guest_and_are_counted() {
    let mut vmm = Vmm::boot(probe("rng balloon=20000 report=4 spin"));
    vmm.wait_for_console("probe: rng ok");
    vmm.command(Command::SetBalloon { target_bytes: 8 << 20 }).unwrap();
    vmm.wait_for_console("balloon at pages=2048");
    let stats = vmm.stats();
    assert_eq!((stats.balloon.target_bytes, stats.balloon.actual_bytes), (8 << 20, 8 << 20));
    assert!(stats.rng_bytes >= 65536);
    let fault = vmm.command(Command::SetBalloon { target_bytes: 4097 }).unwrap_err();
    assert_eq!(fault.code, FaultCode::Invalid);
    let fault = vmm.command(Command::LimitDisk { disk: 0, limits: Default::default() }).unwrap_err();
    assert!(fault.detail.contains("there is no disk 0"), "{fault}");
}

/// KiB of the VMM's own program, its code and constants, that are resident.
fn program_kb(vmm: &Vmm) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).unwrap();
    let (mut kb, mut is_program) = (0, false);
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Rss:") {
            let rss_kb: u64 = rest.trim().trim_end_matches(" kB").parse().unwrap();
            kb += if is_program { rss_kb } else { 0 };
        } else if !line.starts_with(|first: char| first.is_ascii_uppercase()) {
            // The line that a mapping begins with: its addresses.
            is_program = line.ends_with("/toft-vmm");
        }
    }
    kb
}

#[test]
fn what_only_building_needed_is_given_back_when_the_guest_rests() {
    // One that has only said what it is, and has built nothing.
    let mut other = Vmm::start();
    other.command(Command::Hello { protocol: PROTOCOL }).unwrap();
    let least_kb = program_kb(&other);
    let mut vmm = Vmm::boot(probe("halt"));
    vmm.wait_for_times("probe:", 1);
    let deadline = Instant::now() + PATIENCE;
    while program_kb(&vmm) >= least_kb {
        assert!(Instant::now() < deadline, "{} kB, {least_kb} before it built anything", program_kb(&vmm));
        std::thread::yield_now();
    }
}
