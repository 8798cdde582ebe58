//! The ends: power off, reset, triple fault, guest panic, halt, spin. None returns.

use crate::failure::Outcome;
use crate::{Machine, acpi, clock, cpu, fail};

const PVPANIC_PORT: u16 = 0x505;
const PVPANIC_PANICKED: u8 = 1;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
const SLEEP_ENABLE: u8 = 1 << 5;
/// QEMU's isa-debug-exit, for machines without ACPI.
const DEBUG_EXIT_PORT: u16 = 0xf4;
const EFFECT_MS: u64 = 500;

/// Powers off through ACPI; halts for ever where that does nothing.
pub fn off(machine: &Machine) -> ! {
    if let Some(register) = machine.acpi.sleep_control {
        register.write8(machine.acpi.sleep_type << 2 | SLEEP_ENABLE);
        clock::pause_ms(EFFECT_MS);
    }
    if let Some(port) = machine.acpi.pm1_control {
        acpi::pm1_sleep(port, machine.acpi.sleep_type);
        clock::pause_ms(EFFECT_MS);
    }
    cpu::out8(DEBUG_EXIT_PORT, 0);
    cpu::park()
}

/// `reset` and `reset=i8042`: the FADT's reset register, or the keyboard controller.
pub fn reset(machine: &Machine, argument: &str) -> Outcome {
    match machine.acpi.reset {
        Some((register, value)) if argument != "i8042" => register.write8(value),
        _ => cpu::out8(KEYBOARD_CONTROLLER, PULSE_RESET),
    }
    clock::pause_ms(EFFECT_MS);
    fail!("still running {EFFECT_MS} ms after the reset")
}

/// `panic`: tells the VMM that the guest's kernel panicked.
pub fn panic() -> Outcome {
    let supported = cpu::in8(PVPANIC_PORT);
    if supported & PVPANIC_PANICKED == 0 || supported == 0xff {
        fail!("no pvpanic device at {PVPANIC_PORT:#x}");
    }
    cpu::out8(PVPANIC_PORT, PVPANIC_PANICKED);
    Ok(())
}

pub fn triple() -> ! {
    cpu::triple_fault()
}

pub fn halt() -> ! {
    cpu::park()
}

pub fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
