//! What the daemon asks of the launcher: start a VMM, look at KVM. The launcher answers each request once,
//! in any order, and tells every exit of its children.
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::isolation::Missing;
use crate::machine::CpuTemplate;

/// Descriptors a VMM is started with, by number. Anything else is closed before exec.
pub mod fd {
    /// `/dev/null`.
    pub const STDIN: i32 = 0;
    /// Seqpacket socket, bound and listening, that speaks [`crate::control`].
    pub const CONTROL: i32 = 3;
    /// `/dev/kvm`, open for reading and writing.
    pub const KVM: i32 = 4;
    /// File for the last will, empty, open for writing.
    pub const WILL: i32 = 5;
    /// What KVM was found to offer as CPUID (`kvm::cpuid::offer`), in a memfd that nobody can change. A VMM that is
    /// started without it asks by itself.
    pub const OFFER: i32 = 6;
}

/// One request to the launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the sender, unique on its connection.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What a launcher can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Start a VMM. The packet carries four descriptors in this order: control listener, KVM, last will,
    /// log (becomes standard output and error); then those of [`Jail::cgroups`].
    Spawn {
        /// Shown by `ps`, at most 64 printable characters. Nothing is derived from it.
        label: String,
        /// What it is kept in.
        jail: Jail,
    },
    /// Look at KVM and try a guest on it. The packet carries one descriptor: KVM.
    Probe,
}

/// How a VMM is confined. Namespaces, the empty root, the loss of every capability and `no_new_privs` need no
/// words: they are the same for all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// Whose rights it has.
    pub user: JailUser,
    /// How many descriptors of cgroups the packet carries after the first four, at most [`CGROUPS_MAX`]. Each is
    /// a `cgroup.procs` (v2) or `tasks` (v1) file open for writing, into which the child writes itself before
    /// anything else.
    pub cgroups: u8,
    /// Limits of the process.
    pub rlimits: Rlimits,
    /// Whether a step that the host cannot do fails the spawn. Otherwise it is left out and told in
    /// [`Reply::Spawned`].
    pub required: bool,
}

/// Whose rights a VMM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum JailUser {
    /// Ids that nobody else on the host has, and no further groups. Needs a launcher with the right to change ids.
    Own {
        /// User id, not 0.
        uid: u32,
        /// Group id, not 0.
        gid: u32,
    },
    /// The launcher's own: there is no root to change them. A user namespace that knows this one user stands in
    /// for the rights that the other namespaces need.
    Caller,
}

/// Limits of a process (getrlimit(2)). Core dumps are always 0, locked memory is [`MEMLOCK_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimits {
    /// Most open descriptors.
    pub nofile: u64,
    /// Largest file it can write, in bytes; `u64::MAX` for no limit. Guest memory is a file, too.
    pub fsize_bytes: u64,
    /// Most tasks of its user id.
    pub nproc: u64,
}

/// Memory a VMM may lock, in bytes: not 0, because some kernels count the rings of io_uring.
pub const MEMLOCK_BYTES: u64 = sys::jail::MEMLOCK_BYTES;

/// Most cgroups a VMM is put into: v1 has a hierarchy for each of cpu, cpuacct, memory, pids and a few more.
pub const CGROUPS_MAX: u8 = 16;

/// Anything a launcher sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The answer to request `id`.
    Reply {
        /// The request's number.
        id: u64,
        /// What came of it; the error is a sentence for people.
        result: Result<Reply, String>,
    },
    /// A child has ended and was reaped.
    Exited {
        /// Its process id, as told by [`Reply::Spawned`].
        pid: i32,
        /// How it ended.
        status: ExitStatus,
    },
}

/// What a request answers when it worked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The VMM runs. The packet carries one descriptor: its pidfd.
    Spawned {
        /// Process id in the launcher's pid namespace.
        pid: i32,
        /// What the jail is without; empty when all of it stands.
        missing: Vec<Missing>,
    },
    /// Answer to [`Command::Probe`].
    Probed(KvmReport),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called exit.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

/// What KVM on this host can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmReport {
    /// `KVM_GET_API_VERSION`; 12 is the only one there is.
    pub api_version: i32,
    /// Each extension Toft looks at, by the kernel's name, with its value (0: absent).
    pub extensions: Vec<(String, i32)>,
    /// Extensions without which no machine can be built.
    pub missing: Vec<String>,
    /// Whether a stock Linux kernel can be expected to boot.
    pub linux: LinuxSupport,
    /// Instructions per second of guest kernel mode, measured with a counting loop.
    pub kernel_mode_ips: u64,
    /// Median cost of one exit to user space and back, in nanoseconds.
    pub exit_ns: u64,
    /// Version of Landlock's interface that a process of this host can put in force; 0 when there is none.
    pub landlock_abi: u32,
    /// Thousands of ticks a second of the time stamp counter that a guest sees unless it is scaled, where KVM tells it.
    #[serde(default)]
    pub tsc_khz: Option<u32>,
    /// What processors guests can see.
    #[serde(default)]
    pub cpu: CpuReport,
}

/// What processors guests can see on a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuReport {
    /// Vendor, as the processor names it.
    pub vendor: String,
    /// The features of each template that can be shown, by the names of `kvm::cpuid`; those of `host` are all there are.
    pub shown: Vec<ShownCpu>,
    /// Those of all that protect a guest from its own programs or the processor's leaks.
    pub protections: BTreeSet<String>,
}

/// What a guest of one template sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownCpu {
    /// The template.
    pub template: CpuTemplate,
    /// The features.
    pub features: BTreeSet<String>,
}

/// Whether Linux guests run here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinuxSupport {
    /// The instructions a kernel needs were executed and fast enough.
    Yes,
    /// They were not; the sentence says which.
    No(String),
}
