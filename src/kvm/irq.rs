//! Interrupts into a VM: I/O APIC lines and MSI vectors, each raised through an eventfd. It knows no PCI;
//! `vmm` makes the device room's interrupts of these.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_IRQ_ROUTES, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use memory::layout::GSI_MSI_FIRST;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::failed;
use crate::{Error, Vm};

/// What an MSI writes where (PCI 3.0, section 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Address, in the local APICs' range for an interrupt.
    pub address: u64,
    /// Data: vector and delivery mode.
    pub data: u32,
}

/// The routes of MSI vectors by global system interrupt; `None` is taken but has no message yet.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    messages: BTreeMap<u32, Option<Message>>,
}

/// An edge-triggered line of the I/O APIC.
#[derive(Debug)]
pub struct Line {
    event: EventFd,
}

/// One MSI vector of one function.
#[derive(Debug)]
pub struct MsiVector {
    vm: Arc<Vm>,
    gsi: u32,
    event: EventFd,
    routed: Mutex<Option<Message>>,
}

impl Vm {
    /// Makes the line that raises `gsi`, a pin of the I/O APIC.
    pub fn line(&self, gsi: u32) -> Result<Line, Error> {
        let event = eventfd()?;
        self.fd.register_irqfd(&event, gsi).map_err(failed("KVM_IRQFD"))?;
        Ok(Line { event })
    }

    /// Takes a global system interrupt for an MSI vector, masked at first.
    pub fn msi_vector(self: &Arc<Vm>) -> Result<MsiVector, Error> {
        let gsi = self.routes().take()?;
        let event = eventfd().inspect_err(|_| self.routes().give_back(gsi))?;
        Ok(MsiVector { vm: Arc::clone(self), gsi, event, routed: Mutex::new(None) })
    }

    pub(crate) fn reset_routes(&self) -> Result<(), Error> {
        self.routes().apply(self)
    }

    fn routes(&self) -> MutexGuard<'_, Routing> {
        self.routing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Raises one edge.
    pub fn raise(&self) {
        // It fails only when the counter is full, and then KVM has an edge to deliver anyway.
        let _ = self.event.write(1);
    }
}

impl MsiVector {
    /// Gives the vector a message, or masks it. An interrupt raised while masked is delivered after the
    /// next message is set.
    pub fn route(&self, message: Option<Message>) -> Result<(), Error> {
        let mut routed = self.routed.lock().unwrap_or_else(PoisonError::into_inner);
        if *routed == message {
            return Ok(());
        }
        if let Some(message) = message {
            let mut routes = self.vm.routes();
            // A guest masks and unmasks far more often than it changes the message.
            let before = routes.set(self.gsi, message);
            if before != Some(message)
                && let Err(refused) = routes.apply(&self.vm)
            {
                // KVM takes the table whole, so a bad route left in it would silence every vector that comes after.
                routes.put_back(self.gsi, before);
                return Err(refused);
            }
            drop(routes);
            if routed.is_none() {
                self.vm.fd.register_irqfd(&self.event, self.gsi).map_err(failed("KVM_IRQFD"))?;
            }
        } else {
            self.vm.fd.unregister_irqfd(&self.event, self.gsi).map_err(failed("KVM_IRQFD"))?;
        }
        *routed = message;
        Ok(())
    }

    /// Raises the vector.
    pub fn raise(&self) {
        // As for a line: a full counter is an interrupt that is still to be delivered.
        let _ = self.event.write(1);
    }
}

impl Drop for MsiVector {
    fn drop(&mut self) {
        // The route itself stays in KVM until the next change; without its eventfd nothing uses it.
        let _ = self.route(None);
        self.vm.routes().give_back(self.gsi);
    }
}

impl Routing {
    fn take(&mut self) -> Result<u32, Error> {
        let last = GSI_MSI_FIRST + (KVM_MAX_IRQ_ROUTES as u32 - GSI_MSI_FIRST);
        let free = (GSI_MSI_FIRST..last).find(|gsi| !self.messages.contains_key(gsi));
        let gsi = free.ok_or(Error::RoutesUsedUp)?;
        self.messages.insert(gsi, None);
        Ok(gsi)
    }

    fn give_back(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
    }

    /// Answers with what the vector had before.
    fn set(&mut self, gsi: u32, message: Message) -> Option<Message> {
        self.messages.insert(gsi, Some(message)).flatten()
    }

    /// Undoes [`Routing::set`].
    fn put_back(&mut self, gsi: u32, before: Option<Message>) {
        self.messages.insert(gsi, before);
    }

    /// Every pin of the I/O APIC under its own number, then the MSI vectors. Nothing goes to the legacy
    /// controllers: the guest is told there are none.
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = (0..GSI_MSI_FIRST).map(|pin| {
            let mut entry =
                kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
            entry
        });
        let messages = self.messages.iter().filter_map(|(gsi, message)| {
            let message = (*message)?;
            let mut entry =
                kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
            Some(entry)
        });
        pins.chain(messages).collect()
    }

    fn apply(&self, vm: &Vm) -> Result<(), Error> {
        let table =
            KvmIrqRouting::from_entries(&self.entries()).map_err(|_| Error::TooLong("interrupt routing"))?;
        vm.fd.set_gsi_routing(&table).map_err(failed("KVM_SET_GSI_ROUTING"))
    }
}

fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK).map_err(|cause| Error::Call { call: "eventfd2", cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_that_kvm_refused_is_not_in_the_next_table() {
        let mut routes = Routing::default();
        let (good, bad) = (routes.take().unwrap(), routes.take().unwrap());
        let message = |data| Message { address: 0xFEE0_0000, data };
        let vectors = |routes: &Routing| -> Vec<(u32, u32)> {
            let msi = routes.entries().into_iter().filter(|entry| entry.type_ == KVM_IRQ_ROUTING_MSI);
            msi.map(|entry| (entry.gsi, routes.messages[&entry.gsi].unwrap().data)).collect()
        };
        assert_eq!(routes.set(good, message(1)), None);
        let before = routes.set(bad, message(2));
        assert_eq!(vectors(&routes), [(good, 1), (bad, 2)]);
        routes.put_back(bad, before);
        assert_eq!(vectors(&routes), [(good, 1)]);
        // A vector that had a route keeps that one.
        let before = routes.set(good, message(3));
        assert_eq!(before, Some(message(1)));
        routes.put_back(good, before);
        assert_eq!(vectors(&routes), [(good, 1)]);
    }
}
