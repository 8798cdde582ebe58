//! The threads that run vCPUs: a gate that starts, parks and ends them together, and the loop that answers
//! exits on the buses. KVM's side of a vCPU is in `kvm`. `machine` holds the crew.
//!
//! ```text
//!            open                      kick
//! parked ───────────▶ running ─────────────────────▶ parked        leave: out of either
//!                        └── triple fault, KVM error ─▶ ended (counts as parked, never runs again)
//! ```
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::Bus;
use kvm::{CpuState, Kicker, Vcpu};

use crate::bell::Bell;
use crate::limits::PARK_MS_MAX;

mod exits;
mod gate;
mod turn;

use gate::Gate;
pub(crate) use turn::Slot;
use turn::Turn;

/// What exits are answered with.
pub(crate) struct Buses {
    pub(crate) memory: Bus,
    pub(crate) ports: Bus,
    /// Accesses to nothing.
    pub(crate) unclaimed: Arc<AtomicU64>,
    /// Where the end of the guest's run is told.
    pub(crate) bell: Arc<Bell>,
}

/// Counters of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) exits: AtomicU64,
    /// CPU time of the thread when it ended, in nanoseconds.
    ended_cpu_ns: AtomicU64,
}

/// All vCPU threads of one machine.
pub(crate) struct Crew {
    gate: Arc<Gate>,
    members: Vec<Member>,
}

struct Member {
    /// Held by its thread except while that is parked.
    vcpu: Arc<Mutex<Vcpu>>,
    thread: Option<JoinHandle<()>>,
    kicker: Arc<Kicker>,
    counters: Arc<Counters>,
    index: usize,
}

/// Holds vCPUs back that write to memory faster than it is copied, each by itself.
pub(crate) struct Brake {
    gate: Arc<Gate>,
    vcpus: Vec<(usize, Arc<Kicker>, Turn)>,
}

/// Not every vCPU parked in time.
#[derive(Debug, thiserror::Error)]
#[error("{running} of {all} vCPUs did not stop in time")]
pub(crate) struct NotParked {
    running: usize,
    all: usize,
}

impl Crew {
    /// Starts one thread per vCPU, all parked.
    pub(crate) fn start(vcpus: Vec<Vcpu>, buses: &Arc<Buses>) -> io::Result<Crew> {
        let mut crew = Crew { gate: Arc::new(Gate::new(vcpus.len())), members: Vec::new() };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let counters = Arc::new(Counters::default());
            let kicker = vcpu.kicker();
            let vcpu = Arc::new(Mutex::new(vcpu));
            let runner = exits::Runner {
                vcpu: Arc::clone(&vcpu),
                index,
                gate: Arc::clone(&crew.gate),
                buses: Arc::clone(buses),
                counters: Arc::clone(&counters),
            };
            let thread =
                std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || runner.run())?;
            crew.members.push(Member { vcpu, thread: Some(thread), kicker, counters, index });
        }
        Ok(crew)
    }

    /// Lets every vCPU run.
    pub(crate) fn open(&self) {
        self.gate.open();
    }

    /// Brings every vCPU out of the guest, with no access of the guest half done. When one does not come, all
    /// run on.
    pub(crate) fn park(&self) -> Result<(), NotParked> {
        self.park_within(Duration::from_millis(PARK_MS_MAX))
    }

    /// The same for whoever can come again.
    pub(crate) fn park_within(&self, patience: Duration) -> Result<(), NotParked> {
        self.gate.close();
        self.kick();
        let deadline = Instant::now() + patience;
        match self.gate.wait_until_parked(deadline) {
            0 => Ok(()),
            running => {
                self.gate.open();
                Err(NotParked { running, all: self.members.len() })
            }
        }
    }

    /// Every vCPU as it stands. All are parked.
    pub(crate) fn save(&self, msrs: &[u32]) -> Result<Vec<CpuState>, kvm::Error> {
        let save = |member: &Member| member.vcpu.lock().unwrap_or_else(PoisonError::into_inner).save(msrs);
        self.members.iter().map(save).collect()
    }

    /// Exits and CPU time in nanoseconds by vCPU.
    pub(crate) fn counters(&self) -> impl Iterator<Item = (u64, u64)> {
        self.members.iter().map(|member| {
            let live = self.gate.thread(member.index).and_then(|id| sys::thread::cpu_time_ns(id).ok());
            // After it: a thread that has gone in between has left it before.
            let ended = member.counters.ended_cpu_ns.load(Ordering::Relaxed);
            (member.counters.exits.load(Ordering::Relaxed), live.unwrap_or(ended))
        })
    }

    /// What holds the vCPUs back for moments.
    pub(crate) fn brake(&self) -> Brake {
        let now = Instant::now();
        let vcpu = |member: &Member| (member.index, Arc::clone(&member.kicker), Turn::new(now));
        Brake { gate: Arc::clone(&self.gate), vcpus: self.members.iter().map(vcpu).collect() }
    }

    /// Ends and joins the threads.
    pub(crate) fn leave(&mut self) {
        self.gate.dismiss();
        self.kick();
        for member in &mut self.members {
            if let Some(thread) = member.thread.take() {
                // A panic has aborted the process before it could get here.
                let _ = thread.join();
            }
        }
    }

    fn kick(&self) {
        for member in &self.members {
            if let Some(thread) = self.gate.thread(member.index) {
                member.kicker.kick(thread);
            }
        }
    }
}

impl Brake {
    /// Brings every vCPU out of the guest that has had its share of a slot, and keeps it out for the rest, unless it is wanted
    /// elsewhere before. Answers when to look again.
    pub(crate) fn hold(&mut self, slot: &Slot) -> Duration {
        let now = Instant::now();
        let mut again = slot.length();
        for (index, kicker, turn) in &mut self.vcpus {
            let Some(thread) = self.gate.thread(*index) else { continue };
            let Ok(cpu_ns) = sys::thread::cpu_time_ns(thread) else { continue };
            let look = turn.look(slot, now, cpu_ns);
            if look.holds {
                self.gate.set_nap(*index, now + slot.nap);
                kicker.kick(thread);
            }
            again = again.min(look.again);
        }
        again
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.leave();
    }
}
