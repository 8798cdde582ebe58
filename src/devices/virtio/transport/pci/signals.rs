//! The way from a device to its driver: vectors, interrupt status and the flags that every thread may set. No
//! locks, because a device signals while the transport, lock in hand, waits for it to stop.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use super::super::super::device::Signals;
use super::common::{Live, NO_VECTOR};
use super::state::SignalsState;
use crate::interrupt::Notices;
use crate::pci::msix::Msix;
use crate::state::Refused;

/// Interrupt status (virtio 1.2, section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

pub(super) struct PciSignals {
    name: String,
    msix: Msix,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    /// DRIVER_OK is set.
    running: AtomicBool,
    /// DEVICE_NEEDS_RESET is set.
    broken: AtomicBool,
    notices: Arc<dyn Notices>,
}

impl PciSignals {
    pub(super) fn new(name: String, queues: u16, msix: Msix, notices: Arc<dyn Notices>) -> PciSignals {
        PciSignals {
            name,
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            running: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            notices,
        }
    }

    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    pub(super) fn live(&self) -> Live {
        Live {
            config_vector: self.config_vector.load(Ordering::SeqCst),
            queue_vectors: self.queue_vectors.iter().map(|vector| vector.load(Ordering::SeqCst)).collect(),
            generation: self.generation.load(Ordering::SeqCst),
            broken: self.is_broken(),
        }
    }

    pub(super) fn save(&self) -> SignalsState {
        let live = self.live();
        SignalsState {
            config_vector: live.config_vector,
            queue_vectors: live.queue_vectors,
            isr: self.isr.load(Ordering::SeqCst),
            generation: live.generation,
            broken: live.broken,
        }
    }

    pub(super) fn restore(&self, state: &SignalsState) -> Result<(), Refused> {
        let refuse = |detail: String| Err(Refused::new(&self.name, detail));
        if state.queue_vectors.len() != self.queue_vectors.len() {
            return refuse(format!("{} queues have vectors", state.queue_vectors.len()));
        }
        let vectors = state.queue_vectors.iter().chain([&state.config_vector]);
        if let Some(vector) = vectors.copied().find(|vector| self.mapped(*vector) != *vector) {
            return refuse(format!("vector {vector} does not exist"));
        }
        if state.isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return refuse(format!("an interrupt status of {:#x} cannot be", state.isr));
        }
        self.config_vector.store(state.config_vector, Ordering::SeqCst);
        for (entry, vector) in self.queue_vectors.iter().zip(&state.queue_vectors) {
            entry.store(*vector, Ordering::SeqCst);
        }
        self.isr.store(state.isr, Ordering::SeqCst);
        self.generation.store(state.generation, Ordering::SeqCst);
        self.broken.store(state.broken, Ordering::SeqCst);
        Ok(())
    }

    /// The driver has read a configuration that has changed since it last read it.
    pub(super) fn count_change(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    pub(super) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.mapped(vector), Ordering::SeqCst);
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(entry) = self.queue_vectors.get(usize::from(queue)) {
            entry.store(self.mapped(vector), Ordering::SeqCst);
        }
    }

    /// Whether an interrupt line, if there were one, would be raised (PCI 3.0, section 6.2.3).
    pub(super) fn has_line_interrupt(&self) -> bool {
        !self.msix.is_enabled() && self.isr.load(Ordering::SeqCst) != 0
    }

    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// Back to what a driver finds first. MSI-X belongs to the function, not to the device, and stays.
    pub(super) fn reset(&self) {
        self.running.store(false, Ordering::SeqCst);
        self.broken.store(false, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }

    /// A vector that does not exist reads back as none, which is how a driver learns of it (section 4.1.5.1.2).
    fn mapped(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    /// The status bit is set with MSI-X too, unlike that of the queues (section 4.1.4.5.1).
    fn interrupt_config(&self) {
        if self.running.load(Ordering::SeqCst) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
            self.msix.raise(self.config_vector.load(Ordering::SeqCst));
        }
    }
}

impl Signals for PciSignals {
    fn queue_used(&self, index: u16) {
        let Some(vector) = self.queue_vectors.get(usize::from(index)) else { return };
        // For drivers that poll: there is no interrupt line.
        if !self.msix.is_enabled() {
            self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        }
        self.msix.raise(vector.load(Ordering::SeqCst));
    }

    fn config_changed(&self) {
        self.interrupt_config();
    }

    fn broken(&self, detail: String) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            self.notices.device_fault(&self.name, detail);
            self.interrupt_config();
        }
    }
}
