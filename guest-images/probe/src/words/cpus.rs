//! `cpus`: starts every processor and lets all of them count in ring 3 at once. Also starts them for `evil-race`.

use crate::console::Line;
use crate::cpu::{self, CPUS_MAX};
use crate::failure::Outcome;
use crate::words::note;
use crate::{Machine, apic, check, clock, memory};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const COUNT_EACH: u64 = 100_000;
const START_MS: u64 = 3000;
/// Free in every PC's memory map; where the trampoline goes.
const TRAMPOLINE_PAGE: u64 = 0x8000;

/// What the other processors do once all are up.
#[derive(Clone, Copy, PartialEq)]
pub enum Job {
    /// Count, and stop.
    Count,
    /// Rewrite descriptors until the machine ends.
    Vandal,
}

static IS_VANDAL: AtomicBool = AtomicBool::new(false);
static ONLINE: [AtomicBool; CPUS_MAX] = [const { AtomicBool::new(false) }; CPUS_MAX];
static GO: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
static FINISHED: AtomicU64 = AtomicU64::new(0);

pub fn run(machine: &Machine, report: &mut Line) -> Outcome {
    let start_at = cpu::tsc();
    let online = start(machine, Job::Count)?;
    let started = cpu::tsc();
    count();
    let finished = clock::spin_until(START_MS, || FINISHED.load(Ordering::SeqCst) == online);
    let total = COUNT.load(Ordering::SeqCst);
    check!(finished && total == online * COUNT_EACH, "{online} processors counted {total}");
    note(
        report,
        format_args!("cpus={online} count={total} start_us={}", clock::cycles_to_us(started - start_at)),
    );
    Ok(())
}

/// Starts the other processors, once per boot; how many are up with this one.
pub fn start(machine: &Machine, job: Job) -> Outcome<u64> {
    let own = apic::id();
    let is_low_ram =
        machine.start.ram().iter().any(|region| {
            region.start <= TRAMPOLINE_PAGE && TRAMPOLINE_PAGE + memory::PAGE_BYTES <= region.end
        });
    check!(is_low_ram, "no RAM at {TRAMPOLINE_PAGE:#x} for the trampoline");
    check!(!GO.load(Ordering::SeqCst), "the processors are already started");
    let code = cpu::trampoline_code();
    memory::bytes_mut(TRAMPOLINE_PAGE, code.len() as u64).copy_from_slice(code);
    IS_VANDAL.store(job == Job::Vandal, Ordering::SeqCst);
    let mut online = 1u64;
    for apic_id in machine.acpi.processors().iter().filter(|id| **id != own) {
        let cpu = online as usize;
        cpu::set_up_task_state(cpu);
        apic::start_processor(*apic_id, TRAMPOLINE_PAGE);
        let is_up = clock::spin_until(START_MS, || ONLINE[cpu].load(Ordering::SeqCst));
        check!(is_up, "processor with APIC id {apic_id} not up after {START_MS} ms, {online} are");
        online += 1;
    }
    GO.store(true, Ordering::SeqCst);
    Ok(online)
}

fn count() {
    for _ in 0..COUNT_EACH {
        COUNT.fetch_add(1, Ordering::SeqCst);
    }
    FINISHED.fetch_add(1, Ordering::SeqCst);
}

/// Entered by boot.s on each application processor, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn application_processor(cpu: u32) -> ! {
    if let Some(flag) = ONLINE.get(cpu as usize) {
        flag.store(true, Ordering::SeqCst);
    }
    while !GO.load(Ordering::SeqCst) {
        core::hint::spin_loop();
    }
    if IS_VANDAL.load(Ordering::SeqCst) {
        super::race::vandal();
    }
    count();
    cpu::park()
}

/// `x2apic`: switches the boot processor's APIC mode; later words interrupt through it.
pub fn switch(report: &mut Line) -> Outcome {
    check!(apic::switch_to_x2apic(), "the processor offers no x2APIC");
    note(report, format_args!("id={}", apic::id()));
    Ok(())
}
