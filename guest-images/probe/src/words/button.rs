//! `button[=<ms>]`: waits for the power button, as our machine's ACPI event device tells it.
//! A bare guest runs no AML, so the register and the pin are known here, from src/devices/power.

use crate::console::Line;
use crate::failure::Outcome;
use crate::words::note;
use crate::{Machine, apic, check, clock, cpu, say};

const EVENT_PIN: u32 = 5;
const EVENT_PORT: u16 = 0x604;
const VECTOR: u8 = 0x7e;
/// The event of the button. Another says that the machine has become another one.
const BUTTON: u32 = 1 << 0;

/// The button, once this processor is told of it.
pub struct Button {
    seen: u64,
    events: u32,
}

/// Has the event device interrupt this processor.
pub fn listen(machine: &Machine) -> Outcome<Button> {
    let Some(io_apic) = machine.acpi.io_apic else { crate::fail!("no IO-APIC in the MADT") };
    let seen = cpu::interrupt_count(VECTOR);
    apic::route_pin(io_apic, EVENT_PIN, VECTOR);
    Ok(Button { seen, events: 0 })
}

impl Button {
    /// Whether it was pressed since.
    pub fn was_pressed(&mut self) -> bool {
        let count = cpu::interrupt_count(VECTOR);
        if count != self.seen {
            self.seen = count;
            self.events |= cpu::in32(EVENT_PORT);
        }
        self.events & BUTTON != 0
    }

    /// The events that were read, which must be there once.
    pub fn take(&self) -> Outcome<u32> {
        let left = cpu::in32(EVENT_PORT);
        check!(self.events != 0 && left == 0, "event register said {:#x}, then {left:#x}", self.events);
        Ok(self.events)
    }
}

pub fn run(machine: &Machine, timeout_ms: u64, report: &mut Line) -> Outcome {
    let mut button = listen(machine)?;
    say!("probe: button waiting");
    let came = clock::spin_until(timeout_ms, || button.was_pressed());
    check!(came, "no event interrupt after {timeout_ms} ms");
    note(report, format_args!("events={:#x}", button.take()?));
    Ok(())
}
