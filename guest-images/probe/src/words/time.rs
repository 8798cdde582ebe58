//! `ticks`, `clock`, `timer`, `pause`: what time looks like from inside, across pause and migration too.

use crate::clock::{self, GUEST_STOPPED, TSC_STABLE};
use crate::console::Line;
use crate::failure::Outcome;
use crate::words::note;
use crate::{apic, check, cpu, say};

/// Each line carries the TSC, the paravirtual clock, whether the host says it stopped us, and what it admits to have
/// stolen, in nanoseconds.
pub fn ticks(count: u64, interval_ms: u64) -> Outcome {
    let mut last_ns = 0;
    for index in 0..count {
        let tsc = cpu::tsc();
        match clock::kvmclock() {
            Some(reading) => {
                check!(
                    reading.system_ns >= last_ns,
                    "clock went back from {last_ns} to {}",
                    reading.system_ns
                );
                last_ns = reading.system_ns;
                let stopped = u8::from(reading.flags & GUEST_STOPPED != 0);
                let steal = clock::steal_ns().unwrap_or(0);
                say!("probe: tick {index} {tsc} ns={} stopped={stopped} steal={steal}", reading.system_ns);
                if stopped != 0 {
                    clock::clear_guest_stopped();
                }
            }
            None => say!("probe: tick {index} {tsc}"),
        }
        clock::pause_ms(interval_ms);
    }
    Ok(())
}

/// Compares 20 ms of the paravirtual clock with the TSC.
pub fn clock(report: &mut Line) -> Outcome {
    let Some(first) = clock::kvmclock() else { crate::fail!("no paravirtual clock offered") };
    let start = cpu::tsc();
    clock::pause_ms(20);
    let Some(second) = clock::kvmclock() else { crate::fail!("the paravirtual clock went away") };
    let by_tsc_us = clock::cycles_to_us(cpu::tsc() - start);
    let by_clock_us = second.system_ns.saturating_sub(first.system_ns) / 1000;
    let difference_us = by_tsc_us.abs_diff(by_clock_us);
    check!(difference_us < by_tsc_us / 20 + 2000, "{by_clock_us} us by clock, {by_tsc_us} us by TSC");
    note(report, format_args!("ns={} tsc_khz={}", second.system_ns, clock::tsc_khz()));
    note(report, format_args!("stable={}", u8::from(second.flags & TSC_STABLE != 0)));
    if let Some(seconds) = clock::boot_wall_clock_s() {
        note(report, format_args!("boot_wall_clock_s={seconds}"));
    }
    if let Some(ns) = clock::steal_ns() {
        note(report, format_args!("steal_ns={ns}"));
    }
    Ok(())
}

/// `timer=<n>`: sleeps in `hlt` until the local APIC's timer fires, n times, a millisecond each.
pub fn timer(count: u64, report: &mut Line) -> Outcome {
    const VECTOR: u8 = 0x7d;
    const INTERVAL_MS: u64 = 1;
    const COUNT_FALLBACK: u32 = 62_500;
    let (mut worst, start) = (0, cpu::tsc());
    for done in 0..count {
        let before = cpu::interrupt_count(VECTOR);
        let due = cpu::tsc() + INTERVAL_MS * clock::tsc_khz();
        apic::arm_timer(VECTOR, due, COUNT_FALLBACK);
        cpu::wait_for_interrupt(VECTOR, before);
        let now = cpu::tsc();
        check!(cpu::interrupt_count(VECTOR) == before + 1, "hlt ended without timer interrupt {done}");
        if apic::has_tsc_deadline() {
            check!(now >= due, "timer {done} fired {} cycles early", due - now);
            worst = now.saturating_sub(due).max(worst);
        }
    }
    let us = clock::cycles_to_us(cpu::tsc() - start);
    note(report, format_args!("fired={count} us={us} worst_late_us={}", clock::cycles_to_us(worst)));
    note(report, format_args!("tsc_deadline={}", u8::from(apic::has_tsc_deadline())));
    Ok(())
}

pub fn wait(ms: u64) -> Outcome {
    clock::pause_ms(ms);
    Ok(())
}
