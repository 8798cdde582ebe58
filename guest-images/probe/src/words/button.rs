//! `button[=<ms>]`: waits for the power button, as our machine's ACPI event device tells it.
//! A bare guest runs no AML, so the register and the pin are known here, from src/devices/power.

use crate::console::Line;
use crate::failure::Outcome;
use crate::words::note;
use crate::{Machine, apic, check, clock, cpu, say};

const EVENT_PIN: u32 = 5;
const EVENT_PORT: u16 = 0x604;
const VECTOR: u8 = 0x7e;

/// The button, once this processor is told of it.
pub struct Button {
    before: u64,
}

/// Has the event device interrupt this processor.
pub fn listen(machine: &Machine) -> Outcome<Button> {
    let Some(io_apic) = machine.acpi.io_apic else { crate::fail!("no IO-APIC in the MADT") };
    let before = cpu::interrupt_count(VECTOR);
    apic::route_pin(io_apic, EVENT_PIN, VECTOR);
    Ok(Button { before })
}

impl Button {
    /// Whether it was pressed since.
    pub fn was_pressed(&self) -> bool {
        cpu::interrupt_count(VECTOR) != self.before
    }

    /// Reads the events, which must be there once.
    pub fn take(&self) -> Outcome<u32> {
        let events = cpu::in32(EVENT_PORT);
        let left = cpu::in32(EVENT_PORT);
        check!(events != 0 && left == 0, "event register said {events:#x}, then {left:#x}");
        Ok(events)
    }
}

pub fn run(machine: &Machine, timeout_ms: u64, report: &mut Line) -> Outcome {
    let button = listen(machine)?;
    say!("probe: button waiting");
    let came = clock::spin_until(timeout_ms, || button.was_pressed());
    check!(came, "no event interrupt after {timeout_ms} ms");
    note(report, format_args!("events={:#x}", button.take()?));
    Ok(())
}
