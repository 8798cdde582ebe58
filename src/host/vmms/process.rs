//! A VMM process by its pidfd: told apart from others that had its number, ended, waited for.
//! It starts nothing; the launcher does.
use std::os::fd::OwnedFd;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use nix::sys::signal::Signal;
use sys::pidfd::PidFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use wire::launch::ExitStatus;

use super::watched::{Watched, watch};
use super::{Process, ProcessId};
use crate::error::{Error, Result};
use crate::limits;

/// A process held by its pidfd.
pub(super) struct Held {
    id: ProcessId,
    pidfd: AsyncFd<Watched<PidFd>>,
    /// How it ended, from the launcher; stays empty for processes that an earlier launcher started.
    status: watch::Receiver<Option<ExitStatus>>,
    build: Option<String>,
}

impl Held {
    /// Holds a process that has just been started.
    pub(super) fn started(
        pid: i32,
        pidfd: OwnedFd,
        status: watch::Receiver<Option<ExitStatus>>,
        build: String,
    ) -> Result<Held> {
        // A process that has ended already has no start time; it is told apart by its pidfd all the same.
        let start_ticks = start_ticks(pid).unwrap_or_default();
        Held::new(
            ProcessId { pid, start_ticks, boot_id: boot_id()? },
            PidFd::from(pidfd),
            status,
            Some(build),
        )
    }

    /// Finds a process again. `None` when it has ended or its number is somebody else's.
    pub(super) fn adopt(id: &ProcessId) -> Result<Option<Held>> {
        if boot_id()? != id.boot_id {
            return Ok(None);
        }
        let Ok(pidfd) = PidFd::open(id.pid) else { return Ok(None) };
        // Looked at after the pidfd is open: from here on the number cannot change hands.
        if start_ticks(id.pid) != Some(id.start_ticks) || pidfd.has_ended().unwrap_or(true) {
            return Ok(None);
        }
        Held::new(id.clone(), pidfd, watch::Sender::new(None).subscribe(), None).map(Some)
    }

    fn new(
        id: ProcessId,
        pidfd: PidFd,
        status: watch::Receiver<Option<ExitStatus>>,
        build: Option<String>,
    ) -> Result<Held> {
        let pidfd = watch(pidfd, Interest::READABLE)
            .map_err(|cause| Error::internal("a process cannot be watched", cause))?;
        Ok(Held { id, pidfd, status, build })
    }
}

impl Process for Held {
    fn id(&self) -> ProcessId {
        self.id.clone()
    }

    fn build(&self) -> Option<String> {
        self.build.clone()
    }

    fn kill(&self) -> Result<()> {
        match self.pidfd.get_ref().0.signal(Signal::SIGKILL) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::internal(format!("process {} cannot be killed", self.id.pid), cause))
            }
            _ => Ok(()),
        }
    }

    fn ended(&self) -> BoxFuture<'_, Option<ExitStatus>> {
        async {
            while let Ok(mut ready) = self.pidfd.readable().await {
                if self.pidfd.get_ref().0.has_ended().unwrap_or(true) {
                    break;
                }
                ready.clear_ready();
            }
            let mut status = self.status.clone();
            let told = status.wait_for(Option::is_some);
            match tokio::time::timeout(limits::EXIT_STATUS, told).await {
                Ok(Ok(status)) => *status,
                _ => None,
            }
        }
        .boxed()
    }
}

/// The kernel's random name of this boot.
pub(crate) fn boot_id() -> Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .map_err(|cause| Error::internal("the kernel does not say which boot this is", cause))
}

/// Field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)). The name before it may hold spaces and brackets.
pub(super) fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}
