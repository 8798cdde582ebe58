//! Memory, VM and processors: what all machines of one size have in common, so that it can be there before anybody asks
//! for one. Nothing of a guest is in it, and no thread belongs to it.
use std::sync::Arc;

use kvm::{Host, Irqchip, Vcpu, Vm, cpuid};
use memory::Ram;
use wire::machine;

use super::{Error, translate};

/// Processors in a VM, before their first instruction.
pub(crate) struct Chassis {
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) vm: Arc<Vm>,
    pub(super) ram: Arc<Ram>,
    /// What CPU the guest sees.
    pub(super) shown: Vec<cpuid::Entry>,
    size: machine::Chassis,
}

impl Chassis {
    /// Builds one whose memory is all zeros. `size` has been checked.
    pub(crate) fn new(host: &Host, size: machine::Chassis) -> Result<Chassis, Error> {
        Chassis::around(host, size, memory::new(size.memory_bytes)?, Ok)
    }

    /// Builds one around memory that is there, and shows its guest what `admit` makes of the CPU that it could see here.
    pub(super) fn around(
        host: &Host,
        size: machine::Chassis,
        ram: Arc<Ram>,
        admit: impl FnOnce(Vec<cpuid::Entry>) -> Result<Vec<cpuid::Entry>, Error>,
    ) -> Result<Chassis, Error> {
        let vm = Vm::new(host, Arc::clone(&ram), Irqchip::Kernel)?;
        let shown = admit(offered(host, size)?)?;
        let mut vcpus = Vec::new();
        for index in 0..size.vcpus {
            let vcpu = Vcpu::new(&vm, index)?;
            vcpu.prepare(&cpuid::for_processor(&shown, index))?;
            vcpus.push(vcpu);
        }
        Ok(Chassis { vcpus, vm, ram, shown, size })
    }

    /// Whether a machine of this size can be built on it.
    pub(crate) fn fits(&self, size: machine::Chassis) -> bool {
        self.size == size
    }

    /// The guest's clock starts with its machine, however long this has waited.
    pub(super) fn begin(self) -> Result<Chassis, Error> {
        self.vm.set_clock_ns(0)?;
        Ok(self)
    }
}

/// What CPU a guest could see here.
fn offered(host: &Host, size: machine::Chassis) -> Result<Vec<cpuid::Entry>, Error> {
    if usize::from(size.vcpus) > host.vcpus_max() {
        let detail =
            format!("{} vCPUs; KVM on this host gives a machine at most {}", size.vcpus, host.vcpus_max());
        return Err(Error::Invalid { field: "/vcpus".to_owned(), detail });
    }
    let processors = cpuid::Processors { count: size.vcpus, tsc_deadline: host.has("TSC_DEADLINE_TIMER") };
    cpuid::shape(&host.supported_cpuid()?, translate::template(size.cpu), processors).map_err(Error::Cpu)
}
