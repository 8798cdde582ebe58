//! The words of the command line, done in order, each reported on one line.
//! A word that fails does not stop those after it. Called by `main`.

mod balloon;
mod beat;
mod bench;
mod blk;
mod button;
mod changed;
mod cpus;
mod dirty;
mod evil;
mod forge;
mod irq;
mod ledger;
mod mem;
mod net;
mod pci_list;
mod power;
mod race;
mod rng;
mod serial;
mod siege;
mod time;
mod traffic;

use crate::acpi::Ecam;
use crate::console::Line;
use crate::failure::{Failure, Outcome};
use crate::{Machine, apic, check, clock, cpu, memory, pci, say};
use core::fmt::Write;

pub const VERSION: u32 = 1;

/// Settings other words refer to: `disk=`, `nic=`, `ip=`, `gw=`.
#[derive(Default)]
pub struct Settings {
    pub disk: usize,
    pub nic: usize,
    pub ip: [u8; 4],
    pub gateway: [u8; 4],
}

/// Does every word, says `done` and powers off.
pub fn run(machine: &Machine) -> ! {
    hello(machine);
    let mut settings = Settings::default();
    let line = machine.start.command_line.as_str();
    let mut position = 0;
    let mut repeats_done = 0;
    let mut failed = 0u32;
    while let Some((word, end)) = word_at(line, position) {
        position = end;
        let (name, argument) = word.split_once('=').unwrap_or((word, ""));
        if name == "loop" {
            repeats_done += 1;
            if argument.is_empty() || number(argument) > Some(repeats_done) {
                position = 0;
            }
            continue;
        }
        let mut report = Line::new();
        match one(machine, &mut settings, name, argument, &mut report) {
            Ok(Answer::Done) => say!("probe: {name} ok{}", report.as_str()),
            Ok(Answer::Silent) => {}
            Err(Failure(reason)) => {
                failed += 1;
                say!("probe: {name} FAILED {}", reason.as_str());
            }
        }
        memory::release_all();
    }
    say!("probe: done failed={failed}");
    power::off(machine)
}

fn hello(machine: &Machine) {
    // Each byte is an exit. Whoever waits for the first has no use for those after it.
    if word_at(machine.start.command_line.as_str(), 0).is_some_and(|(word, _)| word == "brief") {
        return say!("probe: hello {VERSION}");
    }
    let hypervisor = clock::hypervisor();
    let name = core::str::from_utf8(&hypervisor).unwrap_or("?").trim_end_matches('\0');
    say!(
        "probe: hello {VERSION} tsc={} boot_us={} tsc_khz={} hypervisor={} cpus={} ram_mib={} apic={} tables={} bad_checksums={}",
        cpu::tsc(),
        clock::cycles_to_us(cpu::tsc().wrapping_sub(cpu::tsc_at_entry())),
        clock::tsc_khz(),
        if name.is_empty() { "none" } else { name },
        machine.acpi.processors().len().max(1),
        machine.start.ram_bytes() >> 20,
        if apic::is_x2apic() { "x2apic" } else { "xapic" },
        machine.acpi.tables,
        machine.acpi.bad_checksums,
    );
}

enum Answer {
    Done,
    Silent,
}

fn one(
    machine: &Machine,
    settings: &mut Settings,
    name: &str,
    argument: &str,
    report: &mut Line,
) -> Outcome<Answer> {
    match name {
        "brief" => {}
        "disk" => settings.disk = number(argument).unwrap_or(0) as usize,
        "nic" => settings.nic = number(argument).unwrap_or(0) as usize,
        "ecam" => match number(argument) {
            Some(base) => pci::set_up(Some(Ecam { base, bus_first: 0, bus_last: 255 })),
            None => crate::fail!("give the address of ECAM"),
        },
        "ip" => settings.ip = address(argument),
        "gw" => settings.gateway = address(argument),
        _ => return test(machine, settings, name, argument, report).map(|()| Answer::Done),
    }
    Ok(Answer::Silent)
}

fn test(machine: &Machine, settings: &Settings, name: &str, argument: &str, report: &mut Line) -> Outcome {
    let all = if matches!(name, "blkbench" | "reset") { [None; 4] } else { numbers(argument)? };
    let [first, second, third, _] = all;
    match name {
        "cpus" => cpus::run(machine, report),
        "x2apic" => cpus::switch(report),
        "mem" => mem::run(machine, first.unwrap_or(16), report),
        "pci" => pci_list::run(report),
        "blk" => blk::run(first.map(|n| n as usize), report),
        "write" => blk::write_pattern(settings.disk, first, second, third, report),
        "verify" => blk::verify_pattern(settings.disk, first, second, third, report),
        "blkbench" => bench::run(settings.disk, argument, report),
        "blkappend" => bench::append(
            settings.disk,
            first.unwrap_or(4096),
            second.unwrap_or(1000),
            third.unwrap_or(16),
            report,
        ),
        "irq" => irq::run(settings.disk, report),
        "changed" => changed::run(settings.disk, first.unwrap_or(60_000), report),
        "net" => net::run(settings, report),
        "netecho" => net::echo(settings, first.unwrap_or(1), second.unwrap_or(30_000), report),
        "netsend" => traffic::send(settings, first.unwrap_or(1472), second.unwrap_or(1000), report),
        "netsink" => traffic::sink(settings, first.unwrap_or(1000), report),
        "rng" => rng::run(report),
        "balloon" => balloon::run(machine, first, report),
        "report" => balloon::report_free(machine, first.unwrap_or(16), report),
        "serial" => serial::run(first.unwrap_or(30_000), report),
        "ticks" => time::ticks(first.unwrap_or(10), second.unwrap_or(10)),
        "clock" => time::clock(report),
        "timer" => time::timer(first.unwrap_or(100), report),
        "pause" => time::wait(first.unwrap_or(1000)),
        "dirty" => dirty::run(machine, all, report),
        "ledger" => ledger::run(machine, settings.disk, first.unwrap_or(100), second.unwrap_or(0), report),
        "beat" => beat::run(machine, first.unwrap_or(500), report),
        "button" => button::run(machine, first.unwrap_or(30_000), report),
        "evil-blk" => evil::block(settings.disk, report),
        "evil-net" => evil::net(settings.nic, report),
        "evil-rng" => siege::entropy(report),
        "evil-balloon" => siege::balloon(report),
        "evil-serial" => siege::serial(first.unwrap_or(256), report),
        "evil-registers" => siege::registers(report),
        "evil-race" => race::run(machine, report),
        "forge" => forge::run(settings, report),
        "netwatch" => forge::watch(settings, first.unwrap_or(60_000), report),
        "netstall" => forge::stall(settings, report),
        "evil-config" => evil::configuration(report),
        "poweroff" => power::off(machine),
        "halt" => power::halt(),
        "spin" => power::spin(),
        "triple" => power::triple(),
        "panic" => power::panic(),
        "reset" => power::reset(machine, argument),
        _ => crate::fail!("unknown word"),
    }
}

/// The word that starts at or after `position`, and where it ends.
fn word_at(line: &str, position: usize) -> Option<(&str, usize)> {
    let rest = line.get(position..)?;
    let start = position + (rest.len() - rest.trim_start().len());
    let word = line.get(start..)?.split_whitespace().next()?;
    Some((word, start + word.len()))
}

/// A decimal number, or a hexadecimal one after `0x`.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Up to four numbers; one left empty is None.
fn numbers(argument: &str) -> Outcome<[Option<u64>; 4]> {
    let mut found = [None; 4];
    for (index, part) in argument.split(',').enumerate() {
        let value = number(part);
        check!(part.is_empty() || value.is_some(), "{part} is not a number");
        match found.get_mut(index) {
            Some(slot) => *slot = value,
            None => crate::fail!("at most four numbers"),
        }
    }
    Ok(found)
}

/// A dotted address; a prefix length behind it is ignored.
fn address(text: &str) -> [u8; 4] {
    let mut parts = text.split(['.', '/']).map(|part| part.parse().unwrap_or(0));
    core::array::from_fn(|_| parts.next().unwrap_or(0))
}

/// Adds ` key=value` pairs to a report.
fn note(report: &mut Line, arguments: core::fmt::Arguments) {
    let _ = report.write_char(' ');
    let _ = report.write_fmt(arguments);
}
