//! What a device asks of the machine around it: interrupts in, doorbells out, faults told. These are traits
//! only; `vmm` implements them with irqfds and ioeventfds, tests with counters.
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line.
pub trait Interrupt: Send + Sync {
    /// Pulses the line. Never blocks.
    fn raise(&self);
}

/// What a message-signalled interrupt writes where (PCI 3.0, section 6.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address the message goes to; selects the target CPU on x86.
    pub address: u64,
    /// Data of the message; holds the vector on x86.
    pub data: u32,
}

/// The message-signalled interrupts of one PCI function.
pub trait Msi: Send + Sync {
    /// Tells where `vector` goes from here on; `None` after MSI-X was disabled. A masked vector keeps its route:
    /// the function itself holds back what is raised meanwhile, so nothing under way is lost.
    fn route(&self, vector: u16, message: Option<MsiMessage>);
    /// Sends the message of `vector`. Never blocks; called from any thread.
    fn raise(&self, vector: u16);
}

/// Addresses whose writes signal an eventfd without leaving the kernel.
pub trait Doorbells: Send + Sync {
    /// From here on a write of any width at exactly `address` signals `kick`.
    fn attach(&self, address: u64, kick: &EventFd) -> io::Result<()>;
    /// Undoes [`Doorbells::attach`] with the same arguments.
    fn detach(&self, address: u64, kick: &EventFd) -> io::Result<()>;
}

/// Where faults of the guest are told. The implementer bounds what it keeps: a guest can cause these at will.
pub trait Notices: Send + Sync {
    /// The guest broke the rules of `device`, which stands still until its driver resets it.
    fn device_fault(&self, device: &str, detail: String);
}
