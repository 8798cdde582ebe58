//! The device room's interrupts and doorbells, made of KVM's. Nothing is decided here.
use std::io;
use std::sync::Arc;

use devices::{Doorbells, EventFd, Interrupt, Msi, MsiMessage};
use kvm::{Line, Message, MsiVector, Vm};

use crate::log;

/// An I/O APIC line.
pub(super) struct Wire(pub(super) Line);

/// The vectors of one PCI function.
pub(super) struct Vectors(Vec<MsiVector>);

/// Doorbells of one machine.
pub(super) struct Bells(pub(super) Arc<Vm>);

impl Interrupt for Wire {
    fn raise(&self) {
        self.0.raise();
    }
}

impl Vectors {
    /// Takes `count` vectors.
    pub(super) fn new(vm: &Arc<Vm>, count: usize) -> Result<Vectors, kvm::Error> {
        Ok(Vectors((0..count).map(|_| vm.msi_vector()).collect::<Result<_, _>>()?))
    }
}

impl Msi for Vectors {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        let message = message.map(|MsiMessage { address, data }| Message { address, data });
        if let Some(Err(error)) = self.0.get(usize::from(vector)).map(|vector| vector.route(message)) {
            log::line(format_args!("MSI vector {vector}: {}", log::chain(&error)));
        }
    }

    fn raise(&self, vector: u16) {
        if let Some(vector) = self.0.get(usize::from(vector)) {
            vector.raise();
        }
    }
}

impl Doorbells for Bells {
    fn attach(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.0.attach_doorbell(address, kick).map_err(io::Error::other)
    }

    fn detach(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        self.0.detach_doorbell(address, kick).map_err(io::Error::other)
    }
}
