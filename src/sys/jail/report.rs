//! The steps of building a jail, and what became of each: written by the child, which shares memory with its
//! parent, and read by the parent when the child has executed or ended.
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

/// One step of building a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Making the child at all.
    Prepare,
    /// Joining the cgroups.
    Cgroups,
    /// Placing the descriptors and marking all others to be closed.
    Descriptors,
    /// Becoming the first process of a pid namespace.
    PidNamespace,
    /// A user namespace that knows the caller alone.
    UserNamespace,
    /// A mount namespace.
    MountNamespace,
    /// A network namespace.
    NetNamespace,
    /// An IPC namespace.
    IpcNamespace,
    /// A UTS namespace, in which the host has no name.
    UtsNamespace,
    /// An empty, read-only root directory; needs the mount namespace.
    Root,
    /// Limits.
    Rlimits,
    /// User and group ids, no further groups.
    Ids,
    /// A keyring of its own in place of the caller's.
    Keyring,
    /// Giving up every capability for good.
    Capabilities,
    /// Never gaining a right by exec.
    NoNewPrivs,
    /// Executing the program.
    Execute,
}

impl Step {
    const COUNT: usize = Step::Execute as usize + 1;

    const ALL: [Step; Step::COUNT] = [
        Step::Prepare,
        Step::Cgroups,
        Step::Descriptors,
        Step::PidNamespace,
        Step::UserNamespace,
        Step::MountNamespace,
        Step::NetNamespace,
        Step::IpcNamespace,
        Step::UtsNamespace,
        Step::Root,
        Step::Rlimits,
        Step::Ids,
        Step::Keyring,
        Step::Capabilities,
        Step::NoNewPrivs,
        Step::Execute,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Step::Prepare => "no process can be made",
            Step::Cgroups => "the cgroup cannot be joined",
            Step::Descriptors => "the descriptors cannot be placed",
            Step::PidNamespace => "no pid namespace can be made",
            Step::UserNamespace => "the user namespace cannot be told its user",
            Step::MountNamespace => "no mount namespace can be made",
            Step::NetNamespace => "no network namespace can be made",
            Step::IpcNamespace => "no IPC namespace can be made",
            Step::UtsNamespace => "no UTS namespace can be made",
            Step::Root => "the root directory cannot be replaced by an empty one",
            Step::Rlimits => "the limits cannot be set",
            Step::Ids => "the user and group ids cannot be taken",
            Step::Keyring => "the keyring cannot be left",
            Step::Capabilities => "the capabilities cannot be given up",
            Step::NoNewPrivs => "the gain of rights by exec cannot be ruled out",
            Step::Execute => {
                "the program cannot be executed (is it a static executable that others may execute?)"
            }
        })
    }
}

/// What became of each step.
#[derive(Debug)]
pub(super) struct Report {
    /// Error numbers; 0 where there was none.
    refused: [AtomicI32; Step::COUNT],
    failed: [AtomicI32; Step::COUNT],
}

impl Report {
    pub(super) fn new() -> Report {
        Report { refused: [const { AtomicI32::new(0) }; _], failed: [const { AtomicI32::new(0) }; _] }
    }

    /// The program is started without this step.
    pub(super) fn refuse(&self, step: Step, error: Option<i32>) {
        self.refused[step as usize].store(error.unwrap_or(libc::EIO), Ordering::SeqCst);
    }

    /// The program is not started because of this step.
    pub(super) fn fail(&self, step: Step, error: Option<i32>) {
        self.failed[step as usize].store(error.unwrap_or(libc::EIO), Ordering::SeqCst);
    }

    pub(super) fn refused(&self) -> Vec<(Step, io::Error)> {
        told(&self.refused).collect()
    }

    pub(super) fn failed(&self) -> Option<(Step, io::Error)> {
        told(&self.failed).next()
    }
}

fn told(errors: &[AtomicI32; Step::COUNT]) -> impl Iterator<Item = (Step, io::Error)> {
    let numbers = errors.iter().map(|error| error.load(Ordering::SeqCst));
    Step::ALL
        .into_iter()
        .zip(numbers)
        .filter(|(_, number)| *number != 0)
        .map(|(step, number)| (step, io::Error::from_raw_os_error(number)))
}
