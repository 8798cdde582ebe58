//! The walls a VMM puts around itself, beside the jail it was started in: Landlock, and a system call filter for each
//! kind of thread. It builds no jail and opens nothing. `control` closes the process, `threads` each thread.
//!
//! ```text
//! start ─▶ close_process ─▶ packets are read ─▶ disks get their rings ─▶ close_rings ─▶ vCPUs, devices: close_thread
//! ```
//! A thread inherits the filters of the one that started it, and filters only ever add up. A call that no filter
//! allows ends the process with SIGSYS before it is made; the kernel's audit log has its number, and so has
//! `strace -f` of a VMM that does it again.
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetStatus, Scope,
};
use seccompiler::BpfProgram;
use wire::control::Sandbox;

use crate::log;

mod filters;

/// A set of system calls: what one kind of thread needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// The main thread: builds, pauses, answers the daemon. Every other thread starts below it.
    Control,
    /// Runs a vCPU, answers its exits, and starts device threads when a driver is ready.
    Vcpu,
    /// Serves a disk.
    Block,
    /// Serves an interface.
    Net,
    /// Serves the entropy device.
    Rng,
    /// Serves the balloon.
    Balloon,
    /// Copies memory into a file.
    Save,
    /// Moves memory over a stream.
    Move,
    /// Copies memory into a file of its own.
    Settle,
    /// Copies disks into files.
    Copy,
    /// Pretends that clone3 does not exist: its flags lie in memory, where a filter cannot look.
    NoClone3,
    /// Pretends that rings do not exist.
    NoRings,
}

impl Filter {
    /// All of them.
    pub const ALL: [Filter; 12] = [
        Filter::Control,
        Filter::Vcpu,
        Filter::Block,
        Filter::Net,
        Filter::Rng,
        Filter::Balloon,
        Filter::Save,
        Filter::Move,
        Filter::Settle,
        Filter::Copy,
        Filter::NoClone3,
        Filter::NoRings,
    ];

    /// The filter of device threads of a kind; a kind nobody has thought about gets the smallest.
    fn of_device(kind: &str) -> Filter {
        match kind {
            "block" => Filter::Block,
            "net" => Filter::Net,
            "balloon" => Filter::Balloon,
            _ => Filter::Rng,
        }
    }

    /// The program for the kernel, made once.
    fn program(self) -> Result<&'static BpfProgram, seccompiler::Error> {
        static PROGRAMS: [OnceLock<BpfProgram>; Filter::ALL.len()] = [const { OnceLock::new() }; 12];
        let Some(kept) = PROGRAMS.get(self as usize) else { return Err(seccompiler::Error::EmptyFilter) };
        if kept.get().is_none() {
            // Two threads may both make it; it comes out the same.
            let _ = kept.set(filters::compile(self)?);
        }
        kept.get().ok_or(seccompiler::Error::EmptyFilter)
    }

    /// Lays it on the calling thread, and on every thread that this one starts later, for good. Also gives up the
    /// right to gain privileges by executing a file.
    pub fn load(self) -> Result<(), seccompiler::Error> {
        seccompiler::apply_filter(self.program()?)
    }

    /// Instructions of the program; loading costs some microseconds for each.
    pub fn instructions(self) -> Result<usize, seccompiler::Error> {
        self.program().map(Vec::len)
    }
}

/// Whether this kernel filters. Decided once, by the first filter.
static FILTERS: AtomicBool = AtomicBool::new(false);

/// Closes the process, which has one thread. What the kernel does not have is left out and reported.
pub fn close_process() -> Sandbox {
    sys::thread::share_heaps(1);
    let landlock_abi = forbid_files_and_network().unwrap_or_else(|error| {
        log::line(format_args!("Landlock is not in force: {error}"));
        0
    });
    let filtered = Filter::NoClone3.load().and_then(|()| Filter::Control.load());
    if let Err(error) = &filtered {
        log::line(format_args!("system calls are not filtered: {error}"));
    }
    FILTERS.store(filtered.is_ok(), Ordering::Relaxed);
    // Rings are restricted where they are made; a kernel that cannot do that gets none.
    Sandbox { seccomp: filtered.is_ok(), landlock_abi, rings_restricted: true }
}

/// From here on this thread, and those it starts, get no further ring: whoever asks is told that the kernel has none.
pub fn close_rings() -> Result<(), seccompiler::Error> {
    if FILTERS.load(Ordering::Relaxed) { Filter::NoRings.load() } else { Ok(()) }
}

/// Closes the calling thread, which runs a vCPU.
pub fn close_vcpu() {
    close_thread(Filter::Vcpu);
}

/// Closes the calling thread, which saves memory.
pub fn close_save() {
    close_thread(Filter::Save);
}

/// Closes the calling thread, which moves memory over a stream.
pub(crate) fn close_move() {
    close_thread(Filter::Move);
}

/// Closes the calling thread, which settles memory.
pub fn close_settle() {
    close_thread(Filter::Settle);
}

/// Closes the calling thread, which copies disks.
pub fn close_copy() {
    close_thread(Filter::Copy);
}

/// Closes the calling thread, which serves a device.
pub fn close_device(kind: &str) {
    close_thread(Filter::of_device(kind));
}

/// Where the first filter held, each must: a guest does not get a thread with fewer walls than were reported.
#[expect(
    clippy::panic,
    reason = "runs before the thread has seen anything of the guest's; the will tells why"
)]
fn close_thread(filter: Filter) {
    if FILTERS.load(Ordering::Relaxed)
        && let Err(error) = filter.load()
    {
        panic!("the filter of a thread cannot be loaded ({filter:?}): {error}");
    }
}

/// A Landlock domain in which no rule allows anything; answers the version of the interface in force.
pub fn forbid_files_and_network() -> Result<u32, landlock::RulesetError> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => 0,
        (_, LandlockStatus::Available { effective_abi, .. }) => (effective_abi as u32).min(abi as u32),
        _ => 0,
    })
}

#[cfg(test)]
mod tests;
