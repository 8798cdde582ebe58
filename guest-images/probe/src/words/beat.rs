//! `beat[=<ms>]`: counts on the console and sleeps in between, until the power button is pressed. What a server
//! does all day, at no cost to the host; the count says whether it was ever interrupted.

use crate::console::Line;
use crate::failure::Outcome;
use crate::words::{button, note};
use crate::{Machine, apic, clock, cpu, say};

const VECTOR: u8 = 0x7c;

/// Sixteenths of the local APIC's own clock in a millisecond, where it takes no deadlines.
const COUNT_PER_MS: u32 = 62_500;

pub fn run(machine: &Machine, interval_ms: u64, report: &mut Line) -> Outcome {
    let mut button = button::listen(machine)?;
    let mut count = 0u64;
    while !button.was_pressed() {
        say!("probe: beat {count}");
        count += 1;
        sleep(interval_ms);
    }
    button.take()?;
    note(report, format_args!("beats={count}"));
    Ok(())
}

/// Waits in `hlt` until the timer fires.
pub fn sleep(interval_ms: u64) {
    let before = cpu::interrupt_count(VECTOR);
    let due = cpu::tsc() + interval_ms * clock::tsc_khz();
    apic::arm_timer(VECTOR, due, COUNT_PER_MS.saturating_mul(interval_ms as u32));
    cpu::wait_for_interrupt(VECTOR, before);
}
