//! Every kind of thread a VMM has, and what each does first. A thread that is about to touch anything of the
//! guest's passes through [`enter`] before: that is the place for its seccomp filter.
use std::sync::Arc;

use devices::virtio::ThreadHook;

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ThreadKind {
    /// The main thread: control socket, building, pausing.
    Control,
    /// Runs one vCPU.
    Vcpu(u8),
    /// Serves a device; the name is the one the device room gave it.
    Device(&'static str),
}

/// Called first by every thread.
pub(crate) fn enter(kind: ThreadKind) {
    match kind {
        ThreadKind::Control => sys::thread::set_name("toft-vmm"),
        ThreadKind::Vcpu(index) => sys::thread::set_name(&format!("vcpu{index}")),
        ThreadKind::Device(name) => sys::thread::set_name(name),
    }
}

/// The same for threads that the device room starts.
pub(crate) fn device_hook() -> ThreadHook {
    Arc::new(|name| enter(ThreadKind::Device(name)))
}
