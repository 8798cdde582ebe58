//! VMM processes: started by the launcher, spoken to over their control sockets, adopted after a restart.
//! It knows no server, volume or network: it gets descriptors and a `MachineSpec`.
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use wire::control::Sandbox;
use wire::launch::{ExitStatus, KvmReport};

use crate::error::Result;

mod cgroups;
mod ids;
mod isolation;
pub mod launcher;
pub mod link;
pub(crate) mod process;
pub mod shells;
mod watched;

pub use isolation::Finding;
pub use launcher::Launcher;
pub use link::Link;
pub use shells::{Shell, Shells, Size};

/// Starts VMM processes and finds them again. The real one is [`launcher::Launcher`]; tests have a fake.
pub trait Launch: Send + Sync + 'static {
    /// Fails with `kvm_unavailable` or `host_unprepared`, saying what to do, when no VMM could be started.
    fn check(&self) -> Result<()>;

    /// Starts a VMM that has no machine yet.
    fn spawn(&self, start: Start) -> BoxFuture<'_, Result<Arc<dyn Process>>>;

    /// Ends every process whose cell has a key that begins with `prefix` and is not among `kept`, and removes its
    /// control groups. Repeatable.
    fn sweep(&self, prefix: &str, kept: &HashSet<String>) -> Result<()>;

    /// Finds a process again that an earlier daemon started; `None` when it has ended.
    fn adopt(&self, id: &ProcessId) -> Result<Option<Arc<dyn Process>>>;

    /// The host's present boot, as [`ProcessId::boot_id`] names it.
    fn boot_id(&self) -> Result<String> {
        process::boot_id()
    }

    /// Removes what was made around a VMM that has ended: the control groups of [`Cell::key`]. Repeatable.
    fn release(&self, key: &str) -> Result<()>;

    /// How often the kernel ended a VMM of [`Cell::key`] because its memory ran out, until it is released.
    fn oom_kills(&self, key: &str) -> u64;

    /// What keeps a VMM apart, as found on its process. `sandbox` is what it said of itself before it had a guest, when that
    /// is known; `files` it may hold, and those that lie in the directories among them. Fails when it has ended.
    fn examine(
        &self,
        id: &ProcessId,
        key: &str,
        sandbox: Option<Sandbox>,
        files: &[PathBuf],
    ) -> Result<Vec<Finding>>;

    /// Which build of the VMM is started from now on: another word for each installation of its program.
    fn build(&self) -> BoxFuture<'_, Result<String>>;

    /// Looks at KVM and tries a guest on it.
    fn probe(&self) -> BoxFuture<'_, Result<KvmReport>>;
}

/// What a VMM is started with.
#[derive(Debug)]
pub struct Start {
    /// Shown by `ps`.
    pub label: String,
    /// Bound and listening control socket.
    pub listener: OwnedFd,
    /// Empty file for the last will.
    pub will: File,
    /// File for its log.
    pub log: File,
    /// What it may use.
    pub cell: Cell,
    /// Whether it is started without what the host cannot do for its jail.
    pub walls: Walls,
}

/// What a VMM may use of the host, with the name by which that is found again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// Unique on this host; the name of its control groups.
    pub key: String,
    /// Memory of its guest.
    pub memory_bytes: u64,
    /// CPUs of its guest.
    pub vcpus: u8,
    /// The largest file it may write: its largest disk, or guest memory, which is a file, too.
    pub file_bytes_max: u64,
}

/// What becomes of a VMM whose jail the host cannot build whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walls {
    /// It is started with what can be had.
    AsFound,
    /// It is not started.
    All,
}

/// A process, over reboots and reuse of process ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// Field `starttime` of `/proc/<pid>/stat`, in clock ticks since boot.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// A VMM process that was started or adopted.
pub trait Process: Send + Sync {
    /// Which one.
    fn id(&self) -> ProcessId;

    /// As [`Launch::build`] when it was started; nothing for one that an earlier daemon started.
    fn build(&self) -> Option<String>;

    /// Ends it at once (SIGKILL). Repeatable; no error when it has ended.
    fn kill(&self) -> Result<()>;

    /// Waits until it has ended; says how where that can be known.
    fn ended(&self) -> BoxFuture<'_, Option<ExitStatus>>;
}
