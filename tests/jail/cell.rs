//! Starts the attacker as the launcher starts a VMM: in the jail that the launcher makes of what the daemon asks for, by
//! the same function, with the same numbers for its descriptors; this program in place of the VMM's.
use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use serde_json::Value;
use sys::jail::{EmptyNamespaces, Jail, Program, Refused, Started, Step, spawn};
use sys::pidfd::{Ended, Signal};
use vmm::jail_of;
use wire::launch::{JailUser, Rlimits};

use crate::attacker::{ARGUMENTS, GIVEN, NAME, SOCKET};

/// How long an attack may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Why an attack was refused that a filter of system calls ended.
pub(crate) const FILTERED: &str = "ended by a filter";

/// Limits of the attacker: enough for it to run, little enough to be reached soon.
pub(crate) const RLIMITS: Rlimits = Rlimits { nofile: 64, fsize_bytes: 1 << 20, nproc: 8 };

/// Ids that no process has: above those of people, services and containers, one for each cell.
pub(crate) fn fresh_id() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    0x7400_0000 + std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed) % 64
}

/// An attacker that runs.
pub(crate) struct Cell {
    pub(crate) started: Started,
    pub(crate) socket: UnixStream,
}

/// How an attacker is started.
pub(crate) struct Plan<'p> {
    pub(crate) uid: u32,
    /// Walls that are left out.
    pub(crate) left_out: &'p [Step],
    pub(crate) cgroups: &'p [BorrowedFd<'p>],
    /// The namespaces it shares with others.
    pub(crate) empty: Option<&'p EmptyNamespaces>,
    /// What becomes of walls that the kernel refuses.
    pub(crate) refused: Refused,
    /// A file of the host that it is given at [`GIVEN`].
    pub(crate) given: Option<&'p File>,
}

impl<'p> Plan<'p> {
    /// Every wall but these, and each must stand. One that keeps its capabilities could change what the others share, as a test makes it
    /// try: it has all of its own.
    pub(crate) fn without(left_out: &'p [Step]) -> Plan<'p> {
        static EMPTY: LazyLock<EmptyNamespaces> =
            LazyLock::new(|| EmptyNamespaces::make().expect("empty namespaces"));
        let empty = (!left_out.contains(&Step::Capabilities)).then(|| &*EMPTY);
        Plan { uid: fresh_id(), left_out, cgroups: &[], empty, refused: Refused::Fails, given: None }
    }
}

impl Cell {
    /// Starts it with these walls left out.
    pub(crate) fn start(uid: u32, left_out: &[Step], cgroups: &[BorrowedFd<'_>]) -> Cell {
        let plan = Plan { uid, cgroups, ..Plan::without(left_out) };
        let cell = Cell::of(&plan).unwrap_or_else(|error| panic!("{error}: {}", error.cause));
        assert!(cell.started.refused.is_empty(), "{:?}", cell.started.refused);
        cell
    }

    /// Starts it as planned.
    pub(crate) fn of(plan: &Plan<'_>) -> Result<Cell, sys::jail::Error> {
        assert!(nix::unistd::geteuid().is_root(), "the jail's tests need root");
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let null = File::open("/dev/null").unwrap();
        let stderr = std::io::stderr();
        let executable = File::open("/proc/self/exe").unwrap();
        let mut descriptors =
            vec![(null.as_fd(), 0), (null.as_fd(), 1), (stderr.as_fd(), 2), (theirs.as_fd(), SOCKET)];
        descriptors.extend(plan.given.map(|file| (file.as_fd(), GIVEN)));
        let program = Program {
            executable: executable.as_fd(),
            name: OsStr::new(NAME),
            arguments: &ARGUMENTS.map(OsStr::new),
            descriptors: &descriptors,
        };
        let Plan { uid, left_out, cgroups, empty, refused, .. } = *plan;
        let wanted = wire::launch::Jail {
            user: JailUser::Own { uid, gid: uid },
            cgroups: u8::try_from(cgroups.len()).unwrap(),
            rlimits: RLIMITS,
            required: refused == Refused::Fails,
        };
        let jail = Jail { left_out, ..jail_of(&wanted, cgroups, empty).unwrap() };
        Ok(Cell { started: spawn(&program, &jail)?, socket })
    }

    /// Orders an attack; answers what it got, or why it was refused.
    pub(crate) fn order(&mut self, order: &Value) -> Result<String, String> {
        self.socket.write_all(order.to_string().as_bytes()).unwrap();
        let mut answer = [0; 4096];
        let length = match self.socket.read(&mut answer) {
            // It died before it had read the order.
            Err(cause) if cause.kind() == ErrorKind::ConnectionReset => 0,
            read => read.expect("the attacker answers"),
        };
        if length == 0 && self.end() == Some(Ended::Signal(libc::SIGSYS)) {
            return Err(FILTERED.to_owned());
        }
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        match answer.split_once(' ') {
            Some(("got", what)) => Ok(what.to_owned()),
            Some(("refused", why)) => Err(why.to_owned()),
            _ => panic!("the attacker died on {order}: {:?}", self.end()),
        }
    }

    fn end(&mut self) -> Option<Ended> {
        let _ = self.started.pidfd.signal(Signal::SIGKILL);
        let mut polled = [PollFd::new(self.started.pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut polled, 60_000_u16);
        self.started.pidfd.reap().ok().flatten()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.end();
    }
}
