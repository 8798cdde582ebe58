//! The local APIC of this processor, the way to start others, and one IO-APIC pin.
//! Works in whichever mode the VMM left it, xAPIC or x2APIC. Called by `main` and the words.

use crate::cpu::{self, mmio};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MSR_APIC_BASE: u32 = 0x1b;
const X2APIC_ON: u64 = 1 << 10;
const MSR_X2APIC: u32 = 0x800;

const ID: u32 = 0x20;
const SPURIOUS: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const MASKED: u32 = 1 << 16;
const DELIVERY_PENDING: u32 = 1 << 12;

const TIMER_INITIAL_COUNT: u32 = 0x380;
const TIMER_DIVIDER: u32 = 0x3e0;
const TIMER_DIVIDE_BY_16: u32 = 3;
const TIMER_TSC_DEADLINE: u32 = 2 << 17;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

static BASE: AtomicU64 = AtomicU64::new(0xfee0_0000);
static IS_X2APIC: AtomicBool = AtomicBool::new(false);

/// Masks the legacy controllers, switches the local APIC on and lets interrupts in.
pub fn set_up() {
    cpu::out8(0x21, 0xff);
    cpu::out8(0xa1, 0xff);
    let base = cpu::read_msr(MSR_APIC_BASE).unwrap_or(0xfee0_0000);
    adopt(base);
    write(LVT_LINT0, MASKED);
    write(SPURIOUS, 0x1ff);
    let _ = cpu::gate(cpu::Gate::InterruptsOn, 0, 0, 0);
}

/// Switches this processor to x2APIC mode; false when it has none.
pub fn switch_to_x2apic() -> bool {
    const CPUID_X2APIC: u32 = 1 << 21;
    if cpu::cpuid(1)[2] & CPUID_X2APIC == 0 {
        return false;
    }
    let base = cpu::read_msr(MSR_APIC_BASE).unwrap_or(0) | X2APIC_ON;
    if cpu::write_msr(MSR_APIC_BASE, base).is_err() {
        return false;
    }
    adopt(base);
    true
}

fn adopt(base: u64) {
    BASE.store(base & 0x000f_ffff_ffff_f000, Ordering::Relaxed);
    IS_X2APIC.store(base & X2APIC_ON != 0, Ordering::Relaxed);
    cpu::set_apic(base & 0x000f_ffff_ffff_f000, base & X2APIC_ON != 0);
}

pub fn is_x2apic() -> bool {
    IS_X2APIC.load(Ordering::Relaxed)
}

pub fn id() -> u32 {
    if is_x2apic() { read(ID) } else { read(ID) >> 24 }
}

fn read(register: u32) -> u32 {
    if is_x2apic() {
        cpu::read_msr(MSR_X2APIC + (register >> 4)).unwrap_or(0) as u32
    } else {
        mmio::read32(BASE.load(Ordering::Relaxed) + u64::from(register))
    }
}

fn write(register: u32, value: u32) {
    if is_x2apic() {
        let _ = cpu::write_msr(MSR_X2APIC + (register >> 4), value.into());
    } else {
        mmio::write32(BASE.load(Ordering::Relaxed) + u64::from(register), value);
    }
}

/// Sends INIT, then a start-up interrupt that makes processor `apic_id` run at `page`.
pub fn start_processor(apic_id: u32, page: u64) {
    const INIT_ASSERT: u32 = 0x4500;
    const STARTUP: u32 = 0x4600;
    command(apic_id, INIT_ASSERT);
    crate::clock::pause_ms(1);
    command(apic_id, STARTUP | (page >> 12) as u32);
}

fn command(apic_id: u32, command: u32) {
    if is_x2apic() {
        let _ = cpu::write_msr(MSR_X2APIC + (COMMAND >> 4), u64::from(apic_id) << 32 | u64::from(command));
        return;
    }
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND, command);
    crate::clock::spin_until(10, || read(COMMAND) & DELIVERY_PENDING == 0);
}

/// Whether the timer can be given a TSC value to fire at.
pub fn has_tsc_deadline() -> bool {
    cpu::cpuid(1)[2] & 1 << 24 != 0
}

/// Lets this processor's timer interrupt once at `vector`: at a TSC value where it can, else
/// after `count_fallback` sixteenths of its own clock.
pub fn arm_timer(vector: u8, deadline_tsc: u64, count_fallback: u32) {
    if has_tsc_deadline() {
        write(LVT_TIMER, TIMER_TSC_DEADLINE | u32::from(vector));
        let _ = cpu::write_msr(MSR_TSC_DEADLINE, deadline_tsc);
        return;
    }
    write(TIMER_DIVIDER, TIMER_DIVIDE_BY_16);
    write(LVT_TIMER, vector.into());
    write(TIMER_INITIAL_COUNT, count_fallback);
}

/// Address and data of a message that interrupts this processor at `vector`.
pub fn message(vector: u8) -> (u64, u32) {
    (0xfee0_0000 | u64::from(id() & 0xff) << 12, vector.into())
}

/// Routes an edge on IO-APIC pin `pin` to this processor.
pub fn route_pin(io_apic: u64, pin: u32, vector: u8) {
    let register = 0x10 + pin * 2;
    mmio::write32(io_apic, register + 1);
    mmio::write32(io_apic + 0x10, id() << 24);
    mmio::write32(io_apic, register);
    mmio::write32(io_apic + 0x10, vector.into());
}
