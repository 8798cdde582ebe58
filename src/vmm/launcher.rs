//! The launcher: a small process that starts VMMs, each with exactly the descriptors of [`wire::launch::fd`], and
//! tells how they end. It serves one daemon; when that is gone it ends, and its children live on.
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use kvm::{Host, cpuid};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sys::jail::EmptyNamespaces;
use sys::pidfd::{Ended, PidFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use wire::channel::{self, Channel};
use wire::launch::{CGROUPS_MAX, Command, ExitStatus, Jail, Message, Reply, Request};

use crate::limits::{CHILDREN_MAX, EVENTS_PER_WAIT, LABEL_BYTES_MAX};
use crate::threads::{self, ThreadKind};

mod children;
mod probing;

pub use children::jail_of;
use probing::Probing;

/// Why the launcher ends early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The daemon's socket failed or spoke nonsense.
    #[error("the daemon's socket")]
    Daemon(#[from] channel::Error),
    /// The kernel refused to wait for events.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
}

const DAEMON: u64 = 0;
const ENDS: u64 = 1;

struct Launcher {
    daemon: Channel,
    epoll: Epoll,
    /// What KVM offers, when it was asked once.
    offer: Option<File>,
    /// What VMMs are put into, where it can be had.
    empty: Option<EmptyNamespaces>,
    /// By process id.
    children: HashMap<i32, Child>,
}

/// There is no descriptor of a VMM: each process that is started copies the table of all, and closes what is in it.
enum Child {
    Vmm,
    Probe { pidfd: PidFd, probing: Probing },
}

/// Serves the daemon until it closes the socket.
pub(crate) fn run(daemon: OwnedFd) -> Result<(), Error> {
    threads::enter(ThreadKind::Control);
    let daemon = Channel::new(daemon.into());
    let epoll = Epoll::new().map_err(Error::Wait)?;
    // Without it each VMM makes its own, or is told what it lacks.
    let empty = EmptyNamespaces::make().ok();
    let mut launcher = Launcher { daemon, epoll, offer: None, empty, children: HashMap::new() };
    let ends = ends().map_err(Error::Wait)?;
    launcher.watch(launcher.daemon.as_fd(), DAEMON).map_err(Error::Wait)?;
    launcher.watch(ends.as_fd(), ENDS).map_err(Error::Wait)?;
    let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
    loop {
        let timeout_ms = launcher.timeout_ms();
        let count = match launcher.epoll.wait(timeout_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(Error::Wait)?,
        };
        launcher.expire()?;
        for event in events.iter().take(count) {
            match event.data() {
                DAEMON => match launcher.daemon.receive::<Request>()? {
                    Some((request, descriptors)) => launcher.answer(request, descriptors)?,
                    None => return Ok(()),
                },
                _ => {
                    // One word may be for several ends.
                    while ends.read_signal().map_err(|error| Error::Wait(error.into()))?.is_some() {}
                    launcher.reap()?;
                }
            }
        }
    }
}

impl Launcher {
    fn answer(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        let id = request.id;
        let done = match request.command {
            _ if self.children.len() >= CHILDREN_MAX => Err(format!("there are {CHILDREN_MAX} VMMs already")),
            Command::Spawn { label, jail } => self.spawn(&label, &jail, descriptors).map(Some),
            // The answer comes when the child has ended.
            Command::Probe => self.probe(id, descriptors).map(|()| None),
        };
        match done {
            Ok(None) => Ok(()),
            Ok(Some((reply, pidfd))) => self.send(id, Ok(reply), &[pidfd.as_fd()]),
            Err(why) => self.send(id, Err(why), &[]),
        }
    }

    fn send(
        &self,
        id: u64,
        result: Result<Reply, String>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        Ok(self.daemon.send(&Message::Reply { id, result }, descriptors)?)
    }

    /// Starts a VMM; answers what the daemon is told and a descriptor of the process.
    fn spawn(
        &mut self,
        label: &str,
        jail: &Jail,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<(Reply, OwnedFd), String> {
        if label.len() > LABEL_BYTES_MAX || label.chars().any(char::is_control) {
            return Err(format!("a label has at most {LABEL_BYTES_MAX} printable characters"));
        }
        if jail.cgroups > CGROUPS_MAX {
            return Err(format!("a VMM is put into at most {CGROUPS_MAX} cgroups"));
        }
        let cgroups = usize::from(jail.cgroups);
        if descriptors.len() != 4 + cgroups {
            return Err(format!(
                "a VMM needs 4 descriptors (control listener, KVM, will, log) and {cgroups} of cgroups; {} came",
                descriptors.len()
            ));
        }
        let cgroups = descriptors.split_off(4);
        let descriptors: [OwnedFd; 4] =
            descriptors.try_into().map_err(|_| "four descriptors were counted".to_owned())?;
        let [_, kvm, ..] = &descriptors;
        if self.offer.is_none() {
            self.offer = offer(kvm);
        }
        let offer = self.offer.as_ref().map(AsFd::as_fd);
        let children::Vmm { pid, pidfd, missing } =
            children::start_vmm(label, jail, &descriptors, offer, &cgroups, self.empty.as_ref())
                .map_err(|why| format!("cannot start a VMM: {why}"))?;
        self.children.insert(pid, Child::Vmm);
        Ok((Reply::Spawned { pid, missing }, pidfd.into()))
    }

    fn probe(&mut self, id: u64, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let [kvm]: [OwnedFd; 1] = descriptors
            .try_into()
            .map_err(|got: Vec<_>| format!("the probe needs 1 descriptor (KVM); {} came", got.len()))?;
        let (pid, pidfd, output) =
            children::start_probe(&kvm).map_err(|why| format!("cannot start the probe: {why}"))?;
        self.children.insert(pid, Child::Probe { pidfd, probing: Probing::new(id, output) });
        Ok(())
    }

    /// Tells of children that have ended.
    fn reap(&mut self) -> Result<(), Error> {
        while let Some((pid, ended)) = sys::pidfd::reap_any().map_err(Error::Wait)? {
            match self.children.remove(&pid) {
                Some(Child::Vmm) => {
                    self.daemon.send(&Message::Exited { pid, status: status(ended) }, &[])?;
                }
                Some(Child::Probe { probing, .. }) => {
                    let (id, result) = probing.finish(ended);
                    self.send(id, result.map(Reply::Probed), &[])?;
                }
                None => (),
            }
        }
        Ok(())
    }

    /// Ends probes that take too long; their end is then seen like any other.
    fn expire(&mut self) -> Result<(), Error> {
        for child in self.children.values_mut() {
            if let Child::Probe { pidfd, probing } = child {
                probing.expire(pidfd);
            }
        }
        Ok(())
    }

    /// How long to wait for events: without probes, for ever.
    fn timeout_ms(&self) -> i32 {
        let left = self.children.values().filter_map(|child| match child {
            Child::Probe { probing, .. } => probing.left_ms(),
            Child::Vmm => None,
        });
        left.min().unwrap_or(-1)
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let raw: RawFd = fd.as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, raw, EpollEvent::new(EventSet::IN, token))
    }
}

/// Readable when a child has ended. Children begin with no signal kept from them.
fn ends() -> io::Result<SignalFd> {
    let ended = SigSet::from(Signal::SIGCHLD);
    ended.thread_block()?;
    Ok(SignalFd::with_flags(&ended, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

fn status(ended: Ended) -> ExitStatus {
    match ended {
        Ended::Code(code) => ExitStatus::Code(code),
        Ended::Signal(signal) => ExitStatus::Signal(signal),
    }
}

/// What KVM offers, for every VMM that is started; without it they ask themselves, and say what is wrong.
fn offer(kvm: &OwnedFd) -> Option<File> {
    let host = Host::from_fd(kvm.try_clone().ok()?).ok()?;
    sys::memfd::constant("cpuid", &cpuid::offer::encode(&host.supported_cpuid().ok()?)).ok()
}
