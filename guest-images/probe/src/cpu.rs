//! The processor as ring 3 sees it: the gate to ring 0, MSRs, CPUID, the interrupt table, MMIO.
//! Knows no device. Every unsafe thing about boot.s's symbols is wrapped here.
//! Called by everything.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("boot.s"), options(raw));

pub const INTERRUPT_VECTOR_FIRST: u8 = 0x30;
pub const INTERRUPT_VECTORS: usize = 0x50;
pub const CPUS_MAX: usize = 64;

unsafe extern "C" {
    static mut idt: [[u64; 2]; 256];
    static mut gdt: [u64; 8 + 2 * CPUS_MAX];
    static mut tss: [[u8; 104]; CPUS_MAX];
    static interrupt_counts: [AtomicU64; INTERRUPT_VECTORS];
    static fault_record: [AtomicU64; 4];
    static exception_table: [u64; 32];
    static spurious_entry: u64;
    static interrupt_stubs: u8;
    static kernel_stacks: u8;
    static ap_index: AtomicU32;
    static x2apic: AtomicU8;
    static apic_base: AtomicU64;
    static entry_tsc: AtomicU64;
    static trampoline: u8;
    static trampoline_end: u8;
    static __image_start: u8;
    static __image_end: u8;
}

/// Tells the gate's `ud2` from an accidental one.
const GATE_MAGIC: u64 = 0x6574_6167;
const GATE_VECTOR: usize = 6;

/// Operations of boot.s's gate, in the order of its table.
#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Gate {
    Out8,
    Out16,
    Out32,
    In8,
    In32,
    OutString,
    ReadMsr,
    WriteMsr,
    InterruptsOn,
    Wait,
    Park,
    TripleFault,
}

/// The processor refused the operation (general protection fault).
#[derive(Debug)]
pub struct Fault;

/// Runs one operation in ring 0.
pub fn gate(operation: Gate, first: u64, second: u64, third: u64) -> Result<u64, Fault> {
    let (result, faulted): (u64, u64);
    // SAFETY: the gate clobbers only the registers named here and touches memory only for
    // `OutString` and `Wait`, whose wrappers below pass valid addresses.
    unsafe {
        asm!("ud2", inout("rax") operation as u64 => result, inout("rdi") first => _,
            inout("rsi") second => _, inout("rdx") third => _, out("rcx") _, out("r8") faulted, in("r9") GATE_MAGIC);
    }
    if faulted == 0 { Ok(result) } else { Err(Fault) }
}

pub fn out8(port: u16, value: u8) {
    let _ = gate(Gate::Out8, port.into(), value.into(), 0);
}

pub fn out16(port: u16, value: u16) {
    let _ = gate(Gate::Out16, port.into(), value.into(), 0);
}

pub fn out32(port: u16, value: u32) {
    let _ = gate(Gate::Out32, port.into(), value.into(), 0);
}

pub fn in8(port: u16) -> u8 {
    gate(Gate::In8, port.into(), 0, 0).unwrap_or(0xff) as u8
}

pub fn in32(port: u16) -> u32 {
    gate(Gate::In32, port.into(), 0, 0).unwrap_or(0xffff_ffff) as u32
}

/// Writes `bytes` to one port with a single string instruction.
pub fn out_string(port: u16, bytes: &[u8]) {
    let _ = gate(Gate::OutString, port.into(), bytes.as_ptr() as u64, bytes.len() as u64);
}

pub fn read_msr(msr: u32) -> Result<u64, Fault> {
    gate(Gate::ReadMsr, msr.into(), 0, 0)
}

pub fn write_msr(msr: u32, value: u64) -> Result<(), Fault> {
    gate(Gate::WriteMsr, msr.into(), value, 0).map(drop)
}

/// Stops this processor for ever, interrupts off.
pub fn park() -> ! {
    loop {
        let _ = gate(Gate::Park, 0, 0, 0);
    }
}

/// Loads an empty interrupt table and traps: a real processor shuts down.
pub fn triple_fault() -> ! {
    loop {
        let _ = gate(Gate::TripleFault, 0, 0, 0);
    }
}

/// eax, ebx, ecx, edx of one CPUID leaf.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, 0);
    [r.eax, r.ebx, r.ecx, r.edx]
}

pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter; CR4.TSD is clear, so ring 3 may execute it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The TSC at the very first instruction.
pub fn tsc_at_entry() -> u64 {
    // SAFETY: plain memory of boot.s, written once before this code runs.
    unsafe { entry_tsc.load(Ordering::Relaxed) }
}

/// Fills the interrupt table. The gate's own entry was written by boot.s.
pub fn set_up_interrupt_table() {
    // SAFETY: the table and the symbols belong to boot.s; only the boot processor runs and
    // interrupts are off, so nobody reads an entry while it is half written.
    unsafe {
        for (vector, entry) in exception_table.iter().enumerate() {
            if vector != GATE_VECTOR {
                idt[vector] = idt_entry(*entry);
            }
        }
        let stubs = (&raw const interrupt_stubs) as u64;
        for index in 0..INTERRUPT_VECTORS {
            idt[usize::from(INTERRUPT_VECTOR_FIRST) + index] = idt_entry(stubs + index as u64 * 32);
        }
        idt[0xff] = idt_entry(spurious_entry);
    }
}

fn idt_entry(address: u64) -> [u64; 2] {
    let low = (address & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (address & 0xffff_0000) << 32;
    [low, address >> 32]
}

/// Gives an application processor its task state segment.
pub fn set_up_task_state(cpu: usize) {
    // SAFETY: the processor is not started yet, so its segment and descriptor are unused; the
    // arrays hold `CPUS_MAX` entries and indexing is checked.
    unsafe {
        let segment = &mut tss[cpu];
        let stack_top = (&raw const kernel_stacks) as u64 + 1024 * (cpu as u64 + 1);
        segment[4..12].copy_from_slice(&stack_top.to_le_bytes());
        segment[102..104].copy_from_slice(&104u16.to_le_bytes());
        let base = segment.as_ptr() as u64;
        gdt[8 + 2 * cpu] = 0x0000_8900_0000_0067 | (base & 0xff_ffff) << 16 | (base >> 24 & 0xff) << 56;
        gdt[9 + 2 * cpu] = base >> 32;
        ap_index.store(cpu as u32, Ordering::SeqCst);
    }
}

/// How many interrupts arrived on `vector` since boot.
pub fn interrupt_count(vector: u8) -> u64 {
    interrupt_counter(vector).load(Ordering::SeqCst)
}

fn interrupt_counter(vector: u8) -> &'static AtomicU64 {
    // SAFETY: boot.s only ever increments the counters; indexing is checked.
    unsafe { &interrupt_counts[usize::from(vector - INTERRUPT_VECTOR_FIRST)] }
}

/// Sleeps until `vector` has been counted more than `seen` times. Another interrupt also ends it.
pub fn wait_for_interrupt(vector: u8, seen: u64) {
    let _ = gate(Gate::Wait, interrupt_counter(vector).as_ptr() as u64, seen, 0);
}

/// Tells the interrupt stubs how to acknowledge.
pub fn set_apic(base: u64, is_x2apic: bool) {
    // SAFETY: plain memory of boot.s, read by interrupt stubs only.
    unsafe {
        apic_base.store(base, Ordering::SeqCst);
        x2apic.store(is_x2apic.into(), Ordering::SeqCst);
    }
}

/// The code to copy below 1 MiB for application processors.
pub fn trampoline_code() -> &'static [u8] {
    // SAFETY: both symbols delimit read-only code in boot.s.
    unsafe {
        let start = &raw const trampoline;
        let bytes = (&raw const trampoline_end) as usize - start as usize;
        core::slice::from_raw_parts(start, bytes)
    }
}

/// First address and end of the loaded image, stacks included.
pub fn image() -> (u64, u64) {
    ((&raw const __image_start) as u64, (&raw const __image_end) as u64)
}

/// Vector, error code, instruction and CR2 of the exception that brought us to `fault_report`.
pub fn fault() -> [u64; 4] {
    // SAFETY: boot.s wrote the record before it resumed us.
    unsafe { fault_record.each_ref().map(|word| word.load(Ordering::SeqCst)) }
}

/// Device registers: exactly one plain `mov` per access, which any emulator understands.
pub mod mmio {
    use core::arch::asm;

    macro_rules! access {
        ($read:ident, $write:ident, $type:ty, $class:ident, $form:literal, $mov:literal) => {
            pub fn $read(address: u64) -> $type {
                let value: $type;
                // SAFETY: the address is mapped device memory or RAM owned by the probe; a
                // mistake is an exception, which the probe reports.
                unsafe {
                    asm!(concat!("mov {", $form, "}, ", $mov, " ptr [{1}]"), out($class) value, in(reg) address, options(nostack));
                }
                value
            }
            pub fn $write(address: u64, value: $type) {
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("mov ", $mov, " ptr [{1}], {", $form, "}"), in($class) value, in(reg) address, options(nostack));
                }
            }
        };
    }
    access!(read8, write8, u8, reg_byte, "0", "byte");
    access!(read16, write16, u16, reg, "0:x", "word");
    access!(read32, write32, u32, reg, "0:e", "dword");
    access!(read64, write64, u64, reg, "0", "qword");
}
