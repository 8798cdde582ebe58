//! Brings a vCPU thread out of KVM_RUN. What the thread does then is its own matter. `vmm::vcpu` kicks.
//!
//! The kicker sets `immediate_exit` first and sends the signal after. A thread inside KVM_RUN is interrupted
//! by the signal; one about to enter finds the flag. So no kick is lost, whenever it comes.
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::Error;

/// Bytes of the shared page that a kicker maps. The flag lies in the first page.
const MAPPED_BYTES: usize = 4096;

/// Kicks one vCPU; shared between its thread and those who kick.
#[derive(Debug)]
pub struct Kicker {
    page: NonNull<u8>,
}

// SAFETY: the page is only touched through an atomic, and the mapping does not belong to a thread.
unsafe impl Send for Kicker {}
// SAFETY: as above; every method takes `&self` and uses the atomic.
unsafe impl Sync for Kicker {}

impl Kicker {
    /// Maps the vCPU's shared page a second time, so that setting the flag from another thread does not
    /// touch the memory that the vCPU's own thread borrows.
    pub(crate) fn new(vcpu: &VcpuFd) -> Result<Kicker, Error> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice, of a descriptor that is open.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), MAPPED_BYTES, protection, flags, vcpu.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(Error::Call { call: "mmap of a vCPU", cause: io::Error::last_os_error() });
        }
        // Without MAP_FIXED the kernel maps nothing at address zero.
        let nowhere =
            || Error::Call { call: "mmap of a vCPU", cause: io::ErrorKind::AddrNotAvailable.into() };
        Ok(Kicker { page: NonNull::new(page.cast()).ok_or_else(nowhere)? })
    }

    /// Makes the vCPU leave KVM_RUN, at once or as soon as it enters. `thread` is the kernel's id of the
    /// thread that runs it.
    pub fn kick(&self, thread: i32) {
        self.flag().store(1, Ordering::SeqCst);
        let process = std::process::id();
        // SAFETY: tgkill takes three integers; the handler of the signal does nothing. A thread that has
        // ended is an error we need not know of.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
    }

    /// Lets the next KVM_RUN run. Called by the vCPU's thread before it looks at what was asked of it.
    pub(crate) fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the offset is inside the mapped page.
        let byte = unsafe { self.page.add(std::mem::offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: the byte is valid for reads and writes while `self` lives, and this mapping is only used
        // through this atomic.
        unsafe { AtomicU8::from_ptr(byte.as_ptr()) }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: exactly the range mapped in `new`; no reference to it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), MAPPED_BYTES) };
    }
}

/// Installs the signal handler that kicks need, once per process and before any vCPU runs.
pub fn install_handler() -> Result<(), Error> {
    // SAFETY: all zeroes is a valid `sigaction`: no flags (so calls are interrupted), an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the action is complete and its handler does nothing, which is safe in any signal context.
    match unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(Error::Call { call: "sigaction", cause: io::Error::last_os_error() }),
    }
}

/// A real-time signal, which no library and no terminal sends.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore(_: libc::c_int) {}
