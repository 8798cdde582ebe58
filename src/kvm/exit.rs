//! Why a vCPU came back from KVM_RUN, as data. What to do about it is decided in `vmm::vcpu`.
use std::io;

/// Why a vCPU came back.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port: fill `data`, `size` bytes at a time (more than one for a string instruction).
    IoIn {
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        size: usize,
        /// A multiple of `size` bytes.
        data: &'a mut [u8],
    },
    /// The guest writes to a port.
    IoOut {
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        size: usize,
        /// A multiple of `size` bytes.
        data: &'a [u8],
    },
    /// The guest reads memory that is not RAM: fill `data`.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes memory that is not RAM.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The vCPU halted and KVM does not emulate its interrupt controller.
    Hlt,
    /// A triple fault.
    Shutdown,
    /// The guest asked KVM for something that concerns the whole machine.
    SystemEvent(SystemEvent),
    /// A kick, or some other signal.
    Interrupted,
    /// The vCPU cannot run on.
    Broken(Broken),
}

/// `KVM_EXIT_SYSTEM_EVENT` (KVM API, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
    /// The guest crashed.
    Crash,
    /// A kind Toft does not ask for.
    Other(u32),
}

/// Why a vCPU cannot run on, in KVM's words.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// `KVM_EXIT_FAIL_ENTRY`.
    #[error("the processor refused to enter the guest (hardware reason {reason:#x}, host CPU {cpu})")]
    FailEntry {
        /// The hardware's code.
        reason: u64,
        /// On which host CPU.
        cpu: u32,
    },
    /// `KVM_EXIT_INTERNAL_ERROR` because an instruction cannot be emulated.
    #[error("KVM cannot emulate the instruction {} at {rip:#x}", hex(.instruction))]
    Emulation {
        /// The bytes KVM fetched, as far as it tells.
        instruction: Vec<u8>,
        /// Where the guest was.
        rip: u64,
    },
    /// Any other `KVM_EXIT_INTERNAL_ERROR`.
    #[error("KVM met an internal error (suberror {suberror}, data {data:x?})")]
    Internal {
        /// The kind.
        suberror: u32,
        /// KVM's data about it.
        data: Vec<u64>,
    },
    /// `KVM_EXIT_MEMORY_FAULT`.
    #[error("guest memory at {address:#x} cannot be reached: a page of the host is bad or gone")]
    MemoryFault {
        /// Guest physical address.
        address: u64,
    },
    /// An exit Toft does not ask KVM for.
    #[error("unexpected KVM exit {0}")]
    Unexpected(u32),
    /// KVM_RUN failed.
    #[error("KVM_RUN failed")]
    Run(#[source] io::Error),
}

fn hex(bytes: &[u8]) -> String {
    match bytes {
        [] => "(bytes unknown)".to_owned(),
        _ => bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "),
    }
}
