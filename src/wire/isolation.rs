//! The checklist of what keeps a VMM apart from the rest of its host, by name. The launcher, the VMM and the
//! host all speak of these items; how each is found on a running process is the host's business.
use std::fmt;

use serde::{Deserialize, Serialize};

/// One item of the checklist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// User and group ids of the server's own, no further groups.
    Uid,
    /// No capability in any set.
    Capabilities,
    /// Nothing it executes can gain a right.
    NoNewPrivs,
    /// A mount namespace that is not the host's.
    MountNamespace,
    /// A pid namespace of its own.
    PidNamespace,
    /// A network namespace that is not the host's, with nothing in it.
    NetNamespace,
    /// An IPC namespace of its own.
    IpcNamespace,
    /// A UTS namespace of its own.
    UtsNamespace,
    /// An empty, read-only root directory.
    Root,
    /// Limits of open files, file size, tasks, core dumps and locked memory.
    Rlimits,
    /// A Landlock domain that allows nothing.
    Landlock,
    /// Its CPU time is limited and counted.
    CgroupCpu,
    /// Its memory, the guest's with it, is limited and counted.
    CgroupMemory,
    /// Its tasks are limited.
    CgroupPids,
    /// A system call filter on every thread.
    Seccomp,
    /// Its rings do nothing but read, write and synchronise files it holds.
    IoUring,
    /// It holds the descriptors it was given or made, and no others.
    Descriptors,
}

impl Item {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Item; 17] = [
        Item::Uid,
        Item::Capabilities,
        Item::NoNewPrivs,
        Item::MountNamespace,
        Item::PidNamespace,
        Item::NetNamespace,
        Item::IpcNamespace,
        Item::UtsNamespace,
        Item::Root,
        Item::Rlimits,
        Item::Landlock,
        Item::CgroupCpu,
        Item::CgroupMemory,
        Item::CgroupPids,
        Item::Seccomp,
        Item::IoUring,
        Item::Descriptors,
    ];

    /// The name in JSON, in the API and for people.
    pub fn name(self) -> &'static str {
        match self {
            Item::Uid => "uid",
            Item::Capabilities => "capabilities",
            Item::NoNewPrivs => "no_new_privs",
            Item::MountNamespace => "mount_namespace",
            Item::PidNamespace => "pid_namespace",
            Item::NetNamespace => "net_namespace",
            Item::IpcNamespace => "ipc_namespace",
            Item::UtsNamespace => "uts_namespace",
            Item::Root => "root",
            Item::Rlimits => "rlimits",
            Item::Landlock => "landlock",
            Item::CgroupCpu => "cgroup_cpu",
            Item::CgroupMemory => "cgroup_memory",
            Item::CgroupPids => "cgroup_pids",
            Item::Seccomp => "seccomp",
            Item::IoUring => "io_uring",
            Item::Descriptors => "descriptors",
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// An item that a process was started without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Missing {
    /// Which.
    pub item: Item,
    /// What the kernel refused, for people.
    pub why: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.item, self.why)
    }
}

#[cfg(test)]
mod tests;
