//! Every kind of thread a VMM has, and what each does first. A thread that is about to touch anything of the
//! guest's passes through [`enter`] before, which closes it.
use std::sync::Arc;

use devices::virtio::ThreadHook;

use crate::sandbox;

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ThreadKind {
    /// The main thread: control socket, building, pausing. A VMM closes it with the process.
    Control,
    /// Runs one vCPU.
    Vcpu(u8),
    /// Copies memory into a file.
    Save,
    /// Moves memory over a stream.
    Move,
    /// Moves memory into a file of its own.
    Settle,
    /// Copies disks into files.
    Copy,
    /// Serves a device; the name is the one the device room gave it.
    Device(&'static str),
}

/// Called first by every thread.
pub(crate) fn enter(kind: ThreadKind) {
    match kind {
        ThreadKind::Control => sys::thread::set_name("toft-vmm"),
        ThreadKind::Vcpu(index) => {
            sys::thread::set_name(&format!("vcpu{index}"));
            sandbox::close_vcpu();
        }
        ThreadKind::Save => {
            sys::thread::set_name("save");
            sandbox::close_save();
        }
        ThreadKind::Move => {
            sys::thread::set_name("move");
            sandbox::close_move();
        }
        ThreadKind::Settle => {
            sys::thread::set_name("settle");
            sandbox::close_settle();
        }
        ThreadKind::Copy => {
            sys::thread::set_name("copy");
            sandbox::close_copy();
        }
        ThreadKind::Device(name) => {
            sys::thread::set_name(name);
            sandbox::close_device(name);
        }
    }
}

/// The same for threads that the device room starts.
pub(crate) fn device_hook() -> ThreadHook {
    Arc::new(|name| enter(ThreadKind::Device(name)))
}
