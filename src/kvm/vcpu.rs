//! A virtual processor: its set-up and its way in and out of the guest. Threads and buses are `vmm`'s.
use std::io;
use std::sync::Arc;

use kvm_bindings::{self as b, CpuId, Msrs, kvm_cpuid_entry2, kvm_mp_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::failed;
use crate::{Broken, Error, Exit, Kicker, Start, SystemEvent, Vm, start};

const MSR_IA32_MISC_ENABLE: u32 = 0x1A0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;

/// Fast string instructions on; everything else that this register governs is hidden.
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Memory type ranges on, with write-back as the type of everything: RAM is cached, and where devices are,
/// KVM decides.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local interrupt pins in the register page (Intel SDM volume 3, table 11-1), and delivery
/// modes (section 11.5.1).
const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_MODE_SHIFT: u32 = 8;
const DELIVERY_NMI: u32 = 4;
const DELIVERY_EXTINT: u32 = 7;

/// A virtual processor. Dropped, it leaves its VM; the VM lives at least as long.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) fd: VcpuFd,
    kicker: Arc<Kicker>,
    _vm: Arc<Vm>,
}

impl Vcpu {
    /// Makes vCPU `index`, which is also its APIC id.
    pub fn new(vm: &Arc<Vm>, index: u8) -> Result<Vcpu, Error> {
        let fd = vm.fd.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let kicker = Arc::new(Kicker::new(&fd)?);
        Ok(Vcpu { fd, kicker, _vm: Arc::clone(vm) })
    }

    /// What brings this vCPU out of [`Vcpu::run`].
    pub fn kicker(&self) -> Arc<Kicker> {
        Arc::clone(&self.kicker)
    }

    /// Shows the guest this CPUID, and brings model-specific registers and the local APIC into the state
    /// firmware would leave them in.
    pub fn prepare(&self, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        self.show(cpuid)?;
        self.set_msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING)?;
        self.set_msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)?;
        self.set_local_interrupts()
    }

    /// Shows the guest this CPUID and changes nothing else.
    pub fn show(&self, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        let list = CpuId::from_entries(cpuid).map_err(|_| Error::TooLong("CPUID"))?;
        self.fd.set_cpuid2(&list).map_err(failed("KVM_SET_CPUID2"))
    }

    /// Puts the boot processor at the entry of a kernel.
    pub fn start(&self, start: Start) -> Result<(), Error> {
        self.fd.set_fpu(&start::fpu()).map_err(failed("KVM_SET_FPU"))?;
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        start.apply(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        self.fd.set_regs(&start.regs()).map_err(failed("KVM_SET_REGS"))?;
        let runnable = kvm_mp_state { mp_state: b::KVM_MP_STATE_RUNNABLE };
        // Without an interrupt controller there is no such state, and the vCPU is runnable anyway.
        match self.fd.set_mp_state(runnable) {
            Err(cause) if cause.errno() != libc::EINVAL => Err(failed("KVM_SET_MP_STATE")(cause)),
            _ => Ok(()),
        }
    }

    /// Tells the guest's watchdogs that the time to come did not pass for it (KVM API, section 4.67). A
    /// guest without the paravirtual clock has nothing to be told.
    pub fn mark_paused(&self) -> Result<(), Error> {
        match self.fd.kvmclock_ctrl() {
            Err(cause) if cause.errno() != libc::EINVAL => Err(failed("KVM_KVMCLOCK_CTRL")(cause)),
            _ => Ok(()),
        }
    }

    /// Runs the guest until it needs something. The data of a read must be filled in before the next call.
    pub fn run(&mut self) -> Exit<'_> {
        match self.fd.run() {
            Ok(_) => self.exit(),
            Err(cause) => match cause.errno() {
                libc::EINTR => {
                    self.kicker.clear();
                    Exit::Interrupted
                }
                // An application processor that received its start-up interrupt: enter once more.
                libc::EAGAIN => Exit::Interrupted,
                _ => Exit::Broken(Broken::Run(io::Error::from(cause))),
            },
        }
    }

    /// Reads the shared page after a successful KVM_RUN. `kvm_ioctls` tells neither the size of the elements
    /// of a string instruction nor the details of an internal error, so the page is read here.
    fn exit(&mut self) -> Exit<'_> {
        let rip = match self.fd.get_kvm_run().exit_reason {
            b::KVM_EXIT_INTERNAL_ERROR => self.fd.get_regs().map(|regs| regs.rip).unwrap_or_default(),
            _ => 0,
        };
        let run = self.fd.get_kvm_run();
        match run.exit_reason {
            b::KVM_EXIT_IO => io_exit(run),
            b::KVM_EXIT_MMIO => {
                // SAFETY: KVM_EXIT_MMIO says that this member of the union was written.
                let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                let length = (mmio.len as usize).min(mmio.data.len());
                let (address, data) = (mmio.phys_addr, mmio.data.get_mut(..length).unwrap_or_default());
                if mmio.is_write == 0 {
                    Exit::MmioRead { address, data }
                } else {
                    Exit::MmioWrite { address, data }
                }
            }
            b::KVM_EXIT_HLT => Exit::Hlt,
            b::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            b::KVM_EXIT_INTR => Exit::Interrupted,
            b::KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: KVM_EXIT_SYSTEM_EVENT says that this member of the union was written.
                let event = unsafe { run.__bindgen_anon_1.system_event };
                Exit::SystemEvent(match event.type_ {
                    b::KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown,
                    b::KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
                    b::KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
                    other => SystemEvent::Other(other),
                })
            }
            b::KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: KVM_EXIT_FAIL_ENTRY says that this member of the union was written.
                let entry = unsafe { run.__bindgen_anon_1.fail_entry };
                Exit::Broken(Broken::FailEntry {
                    reason: entry.hardware_entry_failure_reason,
                    cpu: entry.cpu,
                })
            }
            b::KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: KVM_EXIT_INTERNAL_ERROR says that this member of the union was written.
                let internal = unsafe { run.__bindgen_anon_1.internal };
                Exit::Broken(internal_error(&internal, rip))
            }
            b::KVM_EXIT_MEMORY_FAULT => {
                // SAFETY: KVM_EXIT_MEMORY_FAULT says that this member of the union was written.
                let fault = unsafe { run.__bindgen_anon_1.memory_fault };
                Exit::Broken(Broken::MemoryFault { address: fault.gpa })
            }
            other => Exit::Broken(Broken::Unexpected(other)),
        }
    }

    fn set_msr(&self, index: u32, data: u64) -> Result<(), Error> {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let list = Msrs::from_entries(&[entry]).map_err(|_| Error::TooLong("MSR list"))?;
        match self.fd.set_msrs(&list) {
            Ok(1) => Ok(()),
            // The answer is how many were taken; the reason is only in the kernel's log.
            Ok(_) => Err(Error::Call { call: "KVM_SET_MSRS", cause: io::ErrorKind::InvalidInput.into() }),
            Err(cause) => Err(failed("KVM_SET_MSRS")(cause)),
        }
    }

    /// Pin 0 takes what a legacy controller would send, pin 1 is the non-maskable interrupt: what the
    /// multiprocessor specification (section 3.6.2) leaves to firmware and the MADT tells.
    fn set_local_interrupts(&self) -> Result<(), Error> {
        let mut lapic = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        for (offset, mode) in [(LAPIC_LINT0, DELIVERY_EXTINT), (LAPIC_LINT1, DELIVERY_NMI)] {
            let bytes = (mode << DELIVERY_MODE_SHIFT).to_le_bytes();
            for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(bytes) {
                *register = byte as libc::c_char;
            }
        }
        self.fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
    }
}

/// KVM puts the data of a port access into the pages it shares, at an offset from their start.
fn io_exit(run: &mut b::kvm_run) -> Exit<'_> {
    // SAFETY: KVM_EXIT_IO says that this member of the union was written.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let length = size.saturating_mul(io.count as usize);
    let start: *mut u8 = (run as *mut b::kvm_run).cast();
    // SAFETY: KVM places the data inside the pages mapped with `run` (KVM API, section 5); the whole of
    // them is mapped by `VcpuFd` and outlives the borrow of it.
    let data = unsafe { start.add(io.data_offset as usize) };
    // SAFETY: as above, for `length` bytes; the vCPU is borrowed mutably, so nothing else touches them
    // before the next KVM_RUN.
    let data = unsafe { std::slice::from_raw_parts_mut(data, length) };
    match u32::from(io.direction) {
        b::KVM_EXIT_IO_IN => Exit::IoIn { port: io.port, size, data },
        _ => Exit::IoOut { port: io.port, size, data },
    }
}

fn internal_error(internal: &b::kvm_run__bindgen_ty_1__bindgen_ty_13, rip: u64) -> Broken {
    let length = (internal.ndata as usize).min(internal.data.len());
    let data = internal.data.get(..length).unwrap_or_default();
    if internal.suberror != b::KVM_INTERNAL_ERROR_EMULATION {
        return Broken::Internal { suberror: internal.suberror, data: data.to_vec() };
    }
    // The first word says what follows: a length byte and up to fifteen bytes of the instruction.
    let flag = u64::from(b::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    let instruction = match data {
        [flags, words @ ..] if flags & flag != 0 => {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let length = bytes.first().copied().unwrap_or_default().min(15);
            bytes.into_iter().skip(1).take(length.into()).collect()
        }
        _ => Vec::new(),
    };
    Broken::Emulation { instruction, rip }
}

#[cfg(test)]
mod tests;
