//! A VM: memory slots, interrupt controllers, doorbells and the paravirtual clock. Interrupt routes are in
//! `irq`, processors in `vcpu`. `vmm::machine` owns one per machine.
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use memory::{Ram, layout};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::error::failed;
use crate::irq::Routing;
use crate::{Error, Host};

/// A VM and the memory it runs in.
#[derive(Debug)]
pub struct Vm {
    // Dropped before the memory its slots point to.
    pub(crate) fd: VmFd,
    pub(crate) routing: Mutex<Routing>,
    pub(crate) memory: Arc<Ram>,
}

/// Whether KVM emulates the interrupt controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    /// Local APICs, I/O APIC and the timer chip in the kernel; a halted vCPU waits there.
    Kernel,
    /// None at all; a halted vCPU exits. For trying instructions out.
    Absent,
}

impl Vm {
    /// Makes a VM whose physical memory is `memory`, one slot per region. Slots come before the interrupt
    /// controllers, because making those in a VM without slots waits for a grace period of the kernel.
    pub fn new(host: &Host, memory: Arc<Ram>, irqchip: Irqchip) -> Result<Arc<Vm>, Error> {
        let fd = host.fd.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let vm = Vm { fd, routing: Mutex::new(Routing::default()), memory };
        vm.set_slots(0)?;
        let tss = layout::KVM_TSS as usize;
        vm.fd.set_tss_address(tss).map_err(failed("KVM_SET_TSS_ADDR"))?;
        vm.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        if irqchip == Irqchip::Kernel {
            vm.fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
            // Port 0x61 comes with the timer, so that a guest can calibrate by its second channel.
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.fd.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
            vm.reset_routes()?;
        }
        Ok(Arc::new(vm))
    }

    /// Gives KVM one slot for each region of memory, or the same slots other flags.
    pub(crate) fn set_slots(&self, flags: u32) -> Result<(), Error> {
        for (slot, region) in (0u32..).zip(self.memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one whole mapping, which lives until `memory` is dropped, after `fd` by
            // the order of fields; vCPUs hold an `Arc` of this VM. Regions of a `Ram` do not overlap.
            let set = unsafe { self.fd.set_user_memory_region(slot) };
            set.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Signals `kick` whenever the guest writes to `address`, whatever it writes, without an exit.
    pub fn attach_doorbell(&self, address: u64, kick: &EventFd) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        self.fd.register_ioevent(kick, &address, NoDatamatch).map_err(failed("KVM_IOEVENTFD"))
    }

    /// Takes a doorbell away again.
    pub fn detach_doorbell(&self, address: u64, kick: &EventFd) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        self.fd.unregister_ioevent(kick, &address, NoDatamatch).map_err(failed("KVM_IOEVENTFD"))
    }

    /// The guest's paravirtual clock in nanoseconds since the VM was made (KVM API, section 4.29).
    pub fn clock_ns(&self) -> Result<u64, Error> {
        Ok(self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock)
    }

    /// Sets the paravirtual clock. Called while no vCPU runs, so that the guest does not live through the
    /// time it was paused (KVM API, section 4.30).
    pub fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error> {
        let clock = kvm_clock_data { clock: clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}
