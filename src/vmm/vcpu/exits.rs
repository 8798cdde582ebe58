//! The loop of one vCPU thread: enter the guest, answer what it wants, again. Addresses and data are the
//! guest's and go to the buses as they are.
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::Claim;
use kvm::{Exit, SystemEvent, Vcpu};

use super::gate::{Gate, Wish};
use super::{Buses, Counters};
use crate::bell::Ending;
use crate::log;
use crate::threads::{self, ThreadKind};

/// Everything one thread needs.
pub(super) struct Runner {
    pub(super) vcpu: Arc<Mutex<Vcpu>>,
    pub(super) index: usize,
    pub(super) gate: Arc<Gate>,
    pub(super) buses: Arc<Buses>,
    pub(super) counters: Arc<Counters>,
}

/// What a thread does after an exit.
enum Next {
    Enter,
    Look,
    End(Ending),
}

impl Runner {
    pub(super) fn run(mut self) {
        threads::enter(ThreadKind::Vcpu(self.index as u8));
        let thread = sys::thread::id();
        self.gate.name(self.index, Some(thread));
        self.serve();
        let used = sys::thread::cpu_time_ns(thread).unwrap_or_default();
        self.counters.ended_cpu_ns.store(used, Ordering::Relaxed);
        self.gate.name(self.index, None);
    }

    fn serve(&mut self) {
        if self.gate.pass() == Wish::Leave {
            return;
        }
        // Whoever takes a parked vCPU's state holds it meanwhile.
        let shared = Arc::clone(&self.vcpu);
        let hold = || -> MutexGuard<'_, Vcpu> { shared.lock().unwrap_or_else(PoisonError::into_inner) };
        let mut vcpu = hold();
        loop {
            let next = answer(vcpu.run(), self.index, &self.buses);
            self.counters.exits.fetch_add(1, Ordering::Relaxed);
            match next {
                // Always through KVM_RUN again: it completes the access that was just answered, and a kick
                // makes it return at once.
                Next::Enter => (),
                Next::Look => match self.gate.look(self.index) {
                    Wish::Run => (),
                    Wish::Leave => return,
                    Wish::Park => {
                        drop(vcpu);
                        if self.gate.pass() == Wish::Leave {
                            return;
                        }
                        vcpu = hold();
                        self.wake(&vcpu);
                    }
                },
                Next::End(ending) => {
                    self.buses.bell.end(ending);
                    drop(vcpu);
                    return self.gate.rest();
                }
            }
        }
    }

    /// The guest is told that it was stopped, so that its watchdogs do not count the pause.
    fn wake(&self, vcpu: &Vcpu) {
        if let Err(error) = vcpu.mark_paused() {
            log::line(format_args!("vcpu{}: {}", self.index, log::chain(&error)));
        }
    }
}

fn answer(exit: Exit<'_>, index: usize, buses: &Buses) -> Next {
    let claim = match exit {
        Exit::IoIn { port, size, data } => {
            each(data.chunks_mut(size.max(1)), |part| buses.ports.read(port.into(), part))
        }
        Exit::IoOut { port, size, data } => {
            each(data.chunks(size.max(1)), |part| buses.ports.write(port.into(), part))
        }
        Exit::MmioRead { address, data } => buses.memory.read(address, data),
        Exit::MmioWrite { address, data } => buses.memory.write(address, data),
        Exit::Interrupted => return Next::Look,
        Exit::Shutdown => return Next::End(Ending::TripleFault),
        Exit::SystemEvent(SystemEvent::Shutdown) => return Next::End(Ending::PoweredOff),
        Exit::SystemEvent(SystemEvent::Reset) => return Next::End(Ending::ResetAsked),
        Exit::SystemEvent(SystemEvent::Crash) => return Next::End(Ending::GuestPanicked),
        Exit::SystemEvent(SystemEvent::Other(kind)) => {
            return Next::End(Ending::Kvm(format!("vCPU {index}: unexpected system event {kind}")));
        }
        Exit::Hlt => {
            return Next::End(Ending::Kvm(format!("vCPU {index} halted outside KVM's interrupt controller")));
        }
        Exit::Broken(broken) => {
            return Next::End(Ending::Kvm(format!("vCPU {index}: {}", log::chain(&broken))));
        }
    };
    if claim == Claim::Unclaimed {
        buses.unclaimed.fetch_add(1, Ordering::Relaxed);
    }
    Next::Enter
}

/// A string instruction moves several elements through one port.
fn each<T>(parts: impl Iterator<Item = T>, mut access: impl FnMut(T) -> Claim) -> Claim {
    parts.map(&mut access).fold(Claim::Claimed, |all, one| if one == Claim::Unclaimed { one } else { all })
}
