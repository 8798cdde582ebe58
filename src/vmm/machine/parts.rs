//! What a machine consists of between two resets. Dropped, it stops: vCPUs first, then devices.
use std::sync::Arc;

use devices::pci::Root;
use devices::power::Power;
use devices::serial::Serial;
use devices::virtio::balloon::BalloonControl;
use devices::virtio::block::BlockControl;
use devices::virtio::net::NetControl;
use devices::virtio::transport::pci::VirtioPci;
use kvm::{Vm, cpuid};
use memory::Ram;

use crate::vcpu::Crew;

/// The live parts.
pub(super) struct Parts {
    // Fields are dropped in this order: nothing enters the guest any more when the rest goes.
    pub(super) crew: Crew,
    pub(super) root: Root,
    pub(super) serial: Arc<Serial>,
    pub(super) power: Power,
    pub(super) balloon: BalloonControl,
    pub(super) disks: Vec<BlockControl>,
    pub(super) nics: Vec<NetControl>,
    /// What is on the bus, by slot.
    pub(super) functions: Vec<Arc<VirtioPci>>,
    pub(super) ram: Arc<Ram>,
    pub(super) vm: Arc<Vm>,
    /// What is kept of a vCPU's registers, and what CPU the guest sees.
    pub(super) msrs: Vec<u32>,
    pub(super) cpuid: Vec<cpuid::Saved>,
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.crew.leave();
        self.root.stop();
    }
}
