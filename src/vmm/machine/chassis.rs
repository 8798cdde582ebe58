//! Memory, VM and processors: what all machines of one size have in common, so that it can be there before anybody asks
//! for one. Nothing of a guest is in it, and no thread belongs to it.
use std::sync::Arc;

use kvm::{Host, Irqchip, Vcpu, Vm, cpuid};
use memory::Ram;
use wire::machine;

use super::{Error, translate};
use crate::limits::MAPPED_RUNS_MAX;
use crate::snapshot::MemoryFiles;

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
        let ram = memory::new(size.memory_bytes)?;
        Chassis::around(host, size, ram)
    }

    /// Builds one around memory that is there.
    pub(super) fn around(host: &Host, size: machine::Chassis, ram: Arc<Ram>) -> Result<Chassis, Error> {
        let vm = Vm::new(host, Arc::clone(&ram), Irqchip::Kernel)?;
        let shown = offered(host, &size)?;
        let mut vcpus = Vec::new();
        for index in 0..size.vcpus {
            let vcpu = Vcpu::new(&vm, index)?;
            vcpu.prepare(&cpuid::for_processor(&shown, index))?;
            vcpus.push(vcpu);
        }
        Ok(Chassis { vcpus, vm, ram, shown, size })
    }

    /// Puts memory that is in files in the place of its own, at the same addresses, and keeps what is written to it to itself.
    pub(super) fn over(self, files: &MemoryFiles) -> Result<Chassis, Error> {
        let Chassis { vcpus, vm, ram, shown, size } = self;
        let own = files.own.try_clone();
        let own = own.map_err(|cause| Error::File { field: "/memory".to_owned(), cause })?;
        let ram = memory::replace(ram, own)?;
        files.lay_over(&ram, MAPPED_RUNS_MAX)?;
        Ok(Chassis { vcpus, vm, ram, shown, size })
    }

    /// Shows its guest what `admit` makes of the CPU that it could see here.
    pub(super) fn admitted(
        mut self,
        admit: impl FnOnce(&[cpuid::Entry]) -> Result<Vec<cpuid::Entry>, Error>,
    ) -> Result<Chassis, Error> {
        let admitted = admit(&self.shown)?;
        if admitted != self.shown {
            for (index, vcpu) in (0u8..).zip(&self.vcpus) {
                vcpu.show(&cpuid::for_processor(&admitted, index))?;
            }
            self.shown = admitted;
        }
        Ok(self)
    }

    /// Whether a machine of this size can be built on it.
    pub(crate) fn fits(&self, size: &machine::Chassis) -> bool {
        self.size == *size
    }

    /// The guest's clock starts with its machine, however long this has waited.
    pub(super) fn begin(self) -> Result<Chassis, Error> {
        self.vm.set_clock_ns(0)?;
        Ok(self)
    }
}

/// What CPU a guest could see here.
fn offered(host: &Host, size: &machine::Chassis) -> Result<Vec<cpuid::Entry>, Error> {
    if usize::from(size.vcpus) > host.vcpus_max() {
        let detail =
            format!("{} vCPUs; KVM on this host gives a machine at most {}", size.vcpus, host.vcpus_max());
        return Err(Error::Invalid { field: "/vcpus".to_owned(), detail });
    }
    let processors = cpuid::Processors { count: size.vcpus, tsc_deadline: host.has("TSC_DEADLINE_TIMER") };
    cpuid::shape(&host.supported_cpuid()?, &translate::template(&size.cpu), processors).map_err(Error::Cpu)
}
