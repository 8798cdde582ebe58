//! The probe's guest: a few instructions of 64-bit kernel mode, put together here by hand. One VM without
//! interrupt controllers per question, because an instruction that cannot be executed ends its vCPU.
use std::time::{Duration, Instant};

use kvm::{Exit, Host, Irqchip, Start, Vcpu, Vm};
use memory::layout;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::boot::write_page_tables;
use crate::limits::{PROBE_EXITS, PROBE_LOOPS_FIRST, PROBE_LOOPS_MAX, PROBE_NS_MIN};
use crate::log;

/// What was found.
#[derive(Debug, Clone)]
pub(super) struct Findings {
    /// Instructions of the counting loop per second.
    pub(super) loop_ips: u64,
    /// Median time from one exit to the next.
    pub(super) exit_ns: u64,
    /// Why the instruction cannot be executed; `None` when it can.
    pub(super) cmpxchg16b: Option<String>,
    /// How fast its time stamp counter runs.
    pub(super) tsc_khz: Option<u32>,
}

const MEMORY_BYTES: u64 = 2 << 20;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const COUNTER_AT: usize = 2;
/// The loop's two instructions.
const LOOP_INSTRUCTIONS: u64 = 2;

/// `2: mov rcx, <count>; 1: dec rcx; jnz 1b; hlt; jmp 2b`
const COUNT: [u8; 18] = [0x48, 0xB9, 0, 0, 0, 0, 0, 0, 0, 0, 0x48, 0xFF, 0xC9, 0x75, 0xFB, 0xF4, 0xEB, 0xEE];

/// `1: out 0x80, al; jmp 1b`
const EXITS: [u8; 4] = [0xE6, 0x80, 0xEB, 0xFC];

/// `mov esi, DATA; lock cmpxchg16b [rsi]; hlt`
const CMPXCHG16B: [u8; 11] = [0xBE, 0x00, 0x00, 0x02, 0x00, 0xF0, 0x48, 0x0F, 0xC7, 0x0E, 0xF4];

pub(super) fn try_out(host: &Host) -> Result<Findings, Error> {
    Ok(Findings {
        loop_ips: count(host)?,
        exit_ns: time_exits(host)?,
        cmpxchg16b: try_cmpxchg16b(host)?,
        tsc_khz: prepare(host, &EXITS)?.tsc_khz(),
    })
}

/// Doubles the loop until it takes long enough to be measured.
fn count(host: &Host) -> Result<u64, Error> {
    let mut loops = PROBE_LOOPS_FIRST;
    loop {
        let mut code = COUNT;
        code[COUNTER_AT..COUNTER_AT + 8].copy_from_slice(&loops.to_le_bytes());
        let mut vcpu = prepare(host, &code)?;
        // The first round pays for page faults and, on an emulated host, for translation.
        if run_to_halt(&mut vcpu).is_some() {
            return Ok(0);
        }
        let begin = Instant::now();
        if run_to_halt(&mut vcpu).is_some() {
            return Ok(0);
        }
        let took = begin.elapsed();
        if took >= Duration::from_nanos(PROBE_NS_MIN) || loops >= PROBE_LOOPS_MAX {
            let per_second = f64::from(u32::try_from(LOOP_INSTRUCTIONS).unwrap_or(1)) * loops as f64;
            return Ok((per_second / took.as_secs_f64()) as u64);
        }
        loops *= 4;
    }
}

fn time_exits(host: &Host) -> Result<u64, Error> {
    let mut vcpu = prepare(host, &EXITS)?;
    let mut times = Vec::with_capacity(PROBE_EXITS);
    for _ in 0..PROBE_EXITS {
        let begin = Instant::now();
        if !matches!(vcpu.run(), Exit::IoOut { .. }) {
            return Ok(0);
        }
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    let median = times.get(PROBE_EXITS / 2).copied().unwrap_or_default();
    Ok(u64::try_from(median.as_nanos()).unwrap_or(u64::MAX))
}

/// The kernel changes page tables and free lists with this instruction.
fn try_cmpxchg16b(host: &Host) -> Result<Option<String>, Error> {
    Ok(run_to_halt(&mut prepare(host, &CMPXCHG16B)?))
}

fn prepare(host: &Host, code: &[u8]) -> Result<Vcpu, Error> {
    let ram = memory::new(MEMORY_BYTES)?;
    write_page_tables(&ram).map_err(|_| Error::Prepare)?;
    let gdt = [0, 0, kvm::start::CODE64, kvm::start::DATA].map(u64::to_le_bytes).concat();
    for (address, bytes) in [(layout::BOOT_GDT, gdt.as_slice()), (CODE, code)] {
        ram.write_slice(bytes, GuestAddress(address)).map_err(|_| Error::Prepare)?;
    }
    let vm = Vm::new(host, ram, Irqchip::Absent)?;
    let vcpu = Vcpu::new(&vm, 0)?;
    vcpu.show(&host.supported_cpuid()?)?;
    vcpu.start(Start::Long {
        entry: CODE,
        zero_page: DATA,
        page_tables: layout::BOOT_PAGE_TABLES,
        stack: layout::BOOT_STACK,
        gdt: (layout::BOOT_GDT, gdt.len() as u16),
    })?;
    Ok(vcpu)
}

/// Runs until the guest halts; answers what came instead. There is no handler for exceptions, so each of them
/// is a triple fault.
fn run_to_halt(vcpu: &mut Vcpu) -> Option<String> {
    loop {
        return match vcpu.run() {
            Exit::Hlt => None,
            Exit::Interrupted => continue,
            Exit::Shutdown => Some("it raised an exception".to_owned()),
            Exit::Broken(broken) => Some(log::chain(&broken)),
            other => Some(format!("unexpected exit {other:?}")),
        };
    }
}
