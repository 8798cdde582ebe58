//! An open `/dev/kvm`: what this kernel offers. It makes VMs but is none. `vmm` gets the descriptor from
//! its starter; only people's `probe` opens the path.
use std::ffi::CString;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{self as b, CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::Error;
use crate::error::failed;

/// The only version of the interface there is (KVM API, section 4.1).
const API_VERSION: i32 = 12;

/// An extension of KVM's interface that Toft looks at.
#[derive(Debug, Clone, Copy)]
pub struct Extension {
    /// The kernel's name, without `KVM_CAP_`.
    pub name: &'static str,
    /// Whether no machine can be built without it.
    pub required: bool,
    number: u32,
}

const fn needs(name: &'static str, number: u32) -> Extension {
    Extension { name, required: true, number }
}

const fn likes(name: &'static str, number: u32) -> Extension {
    Extension { name, required: false, number }
}

/// Every extension Toft looks at.
pub const EXTENSIONS: &[Extension] = &[
    needs("IRQCHIP", b::KVM_CAP_IRQCHIP),
    needs("USER_MEMORY", b::KVM_CAP_USER_MEMORY),
    needs("SET_TSS_ADDR", b::KVM_CAP_SET_TSS_ADDR),
    needs("SET_IDENTITY_MAP_ADDR", b::KVM_CAP_SET_IDENTITY_MAP_ADDR),
    needs("EXT_CPUID", b::KVM_CAP_EXT_CPUID),
    needs("MP_STATE", b::KVM_CAP_MP_STATE),
    needs("PIT2", b::KVM_CAP_PIT2),
    needs("IRQ_ROUTING", b::KVM_CAP_IRQ_ROUTING),
    needs("IRQFD", b::KVM_CAP_IRQFD),
    needs("IOEVENTFD", b::KVM_CAP_IOEVENTFD),
    needs("IOEVENTFD_ANY_LENGTH", b::KVM_CAP_IOEVENTFD_ANY_LENGTH),
    needs("IMMEDIATE_EXIT", b::KVM_CAP_IMMEDIATE_EXIT),
    needs("ADJUST_CLOCK", b::KVM_CAP_ADJUST_CLOCK),
    likes("KVMCLOCK_CTRL", b::KVM_CAP_KVMCLOCK_CTRL),
    likes("TSC_DEADLINE_TIMER", b::KVM_CAP_TSC_DEADLINE_TIMER),
    likes("GET_TSC_KHZ", b::KVM_CAP_GET_TSC_KHZ),
    likes("TSC_CONTROL", b::KVM_CAP_TSC_CONTROL),
    likes("X2APIC_API", b::KVM_CAP_X2APIC_API),
    likes("STEAL_TIME", b::KVM_CAP_STEAL_TIME),
    likes("ASYNC_PF", b::KVM_CAP_ASYNC_PF),
    likes("MSI_DEVID", b::KVM_CAP_MSI_DEVID),
    likes("NR_VCPUS", b::KVM_CAP_NR_VCPUS),
    likes("MAX_VCPUS", b::KVM_CAP_MAX_VCPUS),
    likes("NR_MEMSLOTS", b::KVM_CAP_NR_MEMSLOTS),
    likes("XSAVE2", b::KVM_CAP_XSAVE2),
    likes("VCPU_EVENTS", b::KVM_CAP_VCPU_EVENTS),
    likes("DEBUGREGS", b::KVM_CAP_DEBUGREGS),
    likes("SPLIT_IRQCHIP", b::KVM_CAP_SPLIT_IRQCHIP),
    likes("MANUAL_DIRTY_LOG_PROTECT2", b::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
    likes("DIRTY_LOG_RING_ACQ_REL", b::KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
    likes("X86_MSR_FILTER", b::KVM_CAP_X86_MSR_FILTER),
    likes("EXIT_ON_EMULATION_FAILURE", b::KVM_CAP_EXIT_ON_EMULATION_FAILURE),
    likes("MEMORY_FAULT_INFO", b::KVM_CAP_MEMORY_FAULT_INFO),
    likes("GUEST_MEMFD", b::KVM_CAP_GUEST_MEMFD),
    likes("PRE_FAULT_MEMORY", b::KVM_CAP_PRE_FAULT_MEMORY),
    likes("NESTED_STATE", b::KVM_CAP_NESTED_STATE),
];

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct Host {
    pub(crate) fd: Kvm,
    /// What somebody else was told that it offers.
    offer: Option<Vec<kvm_cpuid_entry2>>,
}

impl Host {
    /// Takes over an inherited descriptor. Fails with [`Error::NotKvm`] when it is something else.
    pub fn from_fd(fd: OwnedFd) -> Result<Host, Error> {
        // SAFETY: `into_raw_fd` gives up the only owner of an open descriptor, which `Kvm` then closes.
        let fd = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        match fd.get_api_version() {
            API_VERSION => Ok(Host { fd, offer: None }),
            other => Err(Error::NotKvm(other)),
        }
    }

    /// The same, which is not asked again for [`Host::supported_cpuid`]: somebody on this host was told this.
    pub fn offering(self, offer: Vec<kvm_cpuid_entry2>) -> Host {
        Host { offer: Some(offer), ..self }
    }

    /// Opens the device, for people at a terminal.
    pub fn open(path: &str) -> Result<Host, Error> {
        let open = |cause: std::io::Error| Error::Open { path: path.to_owned(), cause };
        let text = CString::new(path).map_err(|cause| open(cause.into()))?;
        let fd = Kvm::new_with_path(&text).map_err(|cause| open(cause.into()))?;
        match fd.get_api_version() {
            API_VERSION => Ok(Host { fd, offer: None }),
            other => Err(Error::NotKvm(other)),
        }
    }

    /// `KVM_GET_API_VERSION`.
    pub fn api_version(&self) -> i32 {
        self.fd.get_api_version()
    }

    /// Every extension of [`EXTENSIONS`] with its value, 0 when absent.
    pub fn extensions(&self) -> Vec<(Extension, i32)> {
        EXTENSIONS.iter().map(|extension| (*extension, self.value(*extension))).collect()
    }

    /// Fails with the names of what is required and absent.
    pub fn check(&self) -> Result<(), Error> {
        let absent = |extension: &&Extension| extension.required && self.value(**extension) <= 0;
        let missing: Vec<_> = EXTENSIONS.iter().filter(absent).map(|extension| extension.name).collect();
        if missing.is_empty() { Ok(()) } else { Err(Error::Missing(missing)) }
    }

    /// Whether the extension of this name is there.
    pub fn has(&self, name: &str) -> bool {
        EXTENSIONS.iter().any(|extension| extension.name == name && self.value(*extension) > 0)
    }

    /// Most vCPUs of one VM (KVM API, section 4.7).
    pub fn vcpus_max(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    /// What CPUID KVM can virtualise on this host (KVM API, section 4.46).
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        if let Some(offer) = &self.offer {
            return Ok(offer.clone());
        }
        let list: CpuId =
            self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(list.as_slice().to_vec())
    }

    fn value(&self, extension: Extension) -> i32 {
        self.fd.check_extension_raw(extension.number.into()).max(0)
    }
}
