//! The probe: a bare guest that does what its command line's words say, one line per word.
//! Not an operating system: no scheduler, no heap, no Linux. See README.md for the words.
//! Entered by boot.s in ring 3, where it stays.

#![no_std]
#![no_main]
// There is no heap to box a reason in, and a failure ends its word, so its size costs nothing.
#![allow(clippy::result_large_err)]

mod acpi;
mod apic;
mod clock;
mod console;
mod cpu;
mod failure;
mod memory;
mod paging;
mod pci;
mod start;
mod virtio;
mod words;

use acpi::Acpi;
use memory::Free;
use start::Start;

/// What was found at boot; the words borrow it.
pub struct Machine {
    pub start: Start,
    pub acpi: Acpi,
    pub free: Free,
}

/// Called by boot.s on the boot processor with the address of the VMM's start info.
#[unsafe(no_mangle)]
extern "C" fn probe_main(start_info: u64) -> ! {
    cpu::set_up_interrupt_table();
    console::set_up();
    let start = Start::read(start_info);
    let free = Free::set_up(&start);
    let acpi = Acpi::read(start.rsdp);
    pci::set_up(acpi.ecam);
    apic::set_up();
    clock::set_up();
    words::run(&Machine { start, acpi, free })
}

/// Called by boot.s after an exception in ring 3.
#[unsafe(no_mangle)]
extern "C" fn fault_report() -> ! {
    let [vector, code, instruction, address] = cpu::fault();
    say!("probe: exception {vector} code={code:#x} rip={instruction:#x} cr2={address:#x}");
    cpu::park()
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo) -> ! {
    match info.location() {
        Some(place) => say!("probe: broken {} at {}:{}", info.message(), place.file(), place.line()),
        None => say!("probe: broken {}", info.message()),
    }
    cpu::park()
}
