//! How a machine ends and learns that it should: ACPI sleep and reset registers, the event register behind the
//! power button, pvpanic, and the reset line of a keyboard controller. It ends nothing itself; it tells.
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memory::layout::{EVENT_GENERATION, EVENT_POWER_BUTTON, SLEEP_TYPE_S5};

use crate::bus::Region;
use crate::interrupt::Interrupt;
use crate::state::Refused;

/// Ports of [`Power::registers`], from [`memory::layout::SLEEP_CONTROL_PORT`].
pub const REGISTER_PORTS: u64 = 8;

/// Offsets in the registers, as [`memory::layout`] places them.
const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
const EVENT: u64 = 4;

/// Sleep control register (ACPI 6.5, section 4.8.3.7): the type in bits 2 to 4, and the bit that starts it.
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What is written to the reset register, as the FADT says.
const RESET_VALUE: u8 = 1;

/// The one event of pvpanic that is known here: the guest's kernel has panicked.
const PANICKED: u8 = 1;

/// Keyboard controller command that pulses the reset line.
const PULSE_RESET: u8 = 0xFE;

/// What the guest asks of the machine's owner. Called on the vCPU's thread, any number of times; must not block.
pub trait PowerEvents: Send + Sync {
    /// The guest has switched its machine off.
    fn powered_off(&self);
    /// The guest wants to start again.
    fn reset_asked(&self);
    /// The guest's kernel has panicked.
    fn panicked(&self);
}

/// The registers. Clones share them.
#[derive(Clone)]
pub struct Power {
    shared: Arc<Shared>,
}

struct Shared {
    interrupt: Arc<dyn Interrupt>,
    events: Arc<dyn PowerEvents>,
    /// The event register: what has happened since the guest last read it.
    pending: AtomicU32,
}

impl Power {
    /// Registers that raise `interrupt` for the event register and tell `events`.
    pub fn new(interrupt: Arc<dyn Interrupt>, events: Arc<dyn PowerEvents>) -> Power {
        Power { shared: Arc::new(Shared { interrupt, events, pending: AtomicU32::new(0) }) }
    }

    /// Asks the guest to shut down, as a person at the case would. Guests without ACPI do not hear it.
    pub fn press_power_button(&self) {
        self.shared.pending.fetch_or(EVENT_POWER_BUTTON, Ordering::SeqCst);
        self.shared.interrupt.raise();
    }

    /// Tells the guest that its generation id has changed. Whoever changes it has done so.
    pub fn tell_generation(&self) {
        self.shared.pending.fetch_or(EVENT_GENERATION, Ordering::SeqCst);
        self.shared.interrupt.raise();
    }

    /// The event register: what the guest has not read.
    pub fn save(&self) -> u32 {
        self.shared.pending.load(Ordering::SeqCst)
    }

    /// Takes over an event register. The interrupt is raised again when there is something in it: the first may have
    /// been on its way.
    pub fn restore(&self, pending: u32) -> Result<(), Refused> {
        if pending & !(EVENT_POWER_BUTTON | EVENT_GENERATION) != 0 {
            return Err(Refused::new("power", format!("events {pending:#x} are not known")));
        }
        self.shared.pending.store(pending, Ordering::SeqCst);
        if pending != 0 {
            self.shared.interrupt.raise();
        }
        Ok(())
    }

    /// Sleep, reset and event registers: [`REGISTER_PORTS`] ports.
    pub fn registers(&self) -> Arc<dyn Region> {
        Arc::new(Registers(self.clone()))
    }

    /// The port of pvpanic.
    pub fn panic_port(&self) -> Arc<dyn Region> {
        Arc::new(PanicPort(self.clone()))
    }

    /// The command port of the keyboard controller.
    pub fn keyboard_port(&self) -> Arc<dyn Region> {
        Arc::new(KeyboardPort(self.clone()))
    }
}

struct Registers(Power);

impl Region for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Only the whole event register: a narrow read would lose the events in the rest.
        if let (EVENT, Ok(bytes)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *bytes = self.0.shared.pending.swap(0, Ordering::SeqCst).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let events = &self.0.shared.events;
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type(value) == SLEEP_TYPE_S5 => {
                events.powered_off()
            }
            RESET if value == RESET_VALUE => events.reset_asked(),
            _ => {}
        }
    }
}

fn sleep_type(value: u8) -> u8 {
    value.wrapping_shr(SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK
}

struct PanicPort(Power);

impl Region for PanicPort {
    /// Reads the events that are understood, by which a driver knows what to send.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|event| event & PANICKED != 0) {
            self.0.shared.events.panicked();
        }
    }
}

struct KeyboardPort(Power);

impl Region for KeyboardPort {
    /// A controller that is always ready for a command and has nothing to say: Linux waits for that before it
    /// pulses the reset line.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&PULSE_RESET) {
            self.0.shared.events.reset_asked();
        }
    }
}

/// Ports whose writes go nowhere and which read all ones, such as those of firmware progress codes.
pub struct Nowhere;

impl Region for Nowhere {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests;
