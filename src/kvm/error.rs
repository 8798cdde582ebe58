//! What can go wrong with KVM. One enum for the room; `vmm` turns it into a fault for the daemon.
use std::io;

use vmm_sys_util::errno;

use crate::cpuid;

/// Why KVM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor is not an open `/dev/kvm`, or speaks another version of its interface.
    #[error("not a usable /dev/kvm: it answers interface version {0}, not 12")]
    NotKvm(i32),
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open {path}; is the kvm module loaded, and may this user open it?")]
    Open {
        /// Which path.
        path: String,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The kernel lacks what every machine needs.
    #[error("this kernel's KVM lacks {}", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// One call failed.
    #[error("{call} failed")]
    Call {
        /// The kernel's name of the call.
        call: &'static str,
        /// Its answer.
        #[source]
        cause: io::Error,
    },
    /// The CPU asked for cannot be shown on this host.
    #[error(transparent)]
    Cpuid(#[from] cpuid::Lacking),
    /// More interrupt routes than KVM takes.
    #[error("no global system interrupt is left for another MSI vector")]
    RoutesUsedUp,
    /// A saved state does not hold.
    #[error("{0}")]
    State(String),
    /// A list for KVM is longer than its interface allows.
    #[error("{0} does not fit KVM's interface")]
    TooLong(&'static str),
}

/// For `map_err`: names the call that failed.
pub(crate) fn failed(call: &'static str) -> impl FnOnce(errno::Error) -> Error {
    move |cause| Error::Call { call, cause: cause.into() }
}
