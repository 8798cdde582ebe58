//! The real launcher: a mode of `toft-vmm`, started once in a session of its own, that starts VMMs and tells of
//! their ends. It is started again when it has gone; VMMs live on without it.
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use model::Code;
use sha2::{Digest, Sha256};
use sys::pidfd::PidFd;
use sys::seqpacket::Socket;
use sys::spawn::Program;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use wire::channel::Channel;
use wire::control::Sandbox;
use wire::launch::{Command, ExitStatus, Jail, JailUser, KvmReport, Message, Reply, Request, Rlimits};

use super::cgroups::{Cgroups, Made};
use super::ids::Ids;
use super::isolation::{self, Finding, Subject};
use super::process::{self, Held};
use super::watched::{Watched, watch};
use super::{Cell, Launch, Process, ProcessId, Start, Walls};
use crate::error::{Error, Result};
use crate::limits;

/// Starts VMMs through a launcher process.
pub struct Launcher {
    vmm: PathBuf,
    kvm: PathBuf,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
    /// Made with the first VMM.
    ids: Mutex<Option<Ids>>,
    /// Name of the control group below which each VMM has its own.
    parent: String,
    /// Looked at with the first VMM.
    cgroups: Mutex<Option<Arc<Cgroups>>>,
}

struct Connection {
    socket: AsyncFd<Watched<Channel>>,
    next: AtomicU64,
    state: Mutex<State>,
    process: PidFd,
    /// VMMs are what the launcher is, whatever has been installed in its place since.
    build: String,
}

#[derive(Default)]
struct State {
    closed: bool,
    waiting: HashMap<u64, oneshot::Sender<Replied>>,
    /// How children ended; an entry is made when the child is told of and goes with its last listener.
    children: HashMap<i32, watch::Sender<Option<ExitStatus>>>,
}

struct Replied {
    result: std::result::Result<Reply, String>,
    descriptors: Vec<OwnedFd>,
    status: Option<watch::Receiver<Option<ExitStatus>>>,
}

impl Launcher {
    /// A launcher that executes `vmm` and opens `kvm`; neither is looked at before it is needed. Each VMM gets a control
    /// group below the one named `parent`.
    pub fn new(vmm: impl Into<PathBuf>, kvm: impl Into<PathBuf>, parent: impl Into<String>) -> Launcher {
        Launcher {
            vmm: vmm.into(),
            kvm: kvm.into(),
            connection: tokio::sync::Mutex::new(None),
            ids: Mutex::default(),
            parent: parent.into(),
            cgroups: Mutex::default(),
        }
    }

    fn open_kvm(&self) -> Result<File> {
        let path = self.kvm.display();
        File::options().read(true).write(true).open(&self.kvm).map_err(|cause| {
            let what_to_do = match cause.kind() {
                std::io::ErrorKind::NotFound => {
                    "load the kvm_intel or kvm_amd module, and turn virtualisation on in the firmware"
                }
                std::io::ErrorKind::PermissionDenied => "run toftd as root or as a member of the group kvm",
                _ => "see the kernel's log",
            };
            Error::new(Code::KvmUnavailable, format!("{path} cannot be opened ({cause}); {what_to_do}"))
                .caused_by(cause)
        })
    }

    fn check_vmm(&self) -> Result<()> {
        match nix::unistd::access(&self.vmm, nix::unistd::AccessFlags::X_OK) {
            Ok(()) => Ok(()),
            Err(cause) => Err(Error::new(
                Code::HostUnprepared,
                format!("{} cannot be executed ({cause}); pass --vmm PATH", self.vmm.display()),
            )
            .caused_by(cause)),
        }
    }

    /// What a VMM is kept in: with ids of its own where they can be changed.
    fn jail(&self, cell: &Cell, walls: Walls, cgroups: usize) -> Result<Jail> {
        let (user, nproc) = if nix::unistd::geteuid().is_root() {
            let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
            let unread = |cause| Error::internal("a VMM's user id cannot be chosen", cause);
            let ids = match &mut *ids {
                Some(ids) => ids,
                none => none.insert(Ids::new().map_err(unread)?),
            };
            let id = ids.take();
            (JailUser::Own { uid: id, gid: id }, limits::VMM_NPROC)
        } else {
            // The user's other processes count, too, so any number could be too low.
            (JailUser::Caller, u64::MAX)
        };
        let rlimits = Rlimits { nofile: limits::VMM_NOFILE, fsize_bytes: cell.file_bytes_max, nproc };
        // There are as many hierarchies at most as controllers.
        let cgroups = u8::try_from(cgroups).unwrap_or(u8::MAX);
        Ok(Jail { user, cgroups, rlimits, required: walls == Walls::All })
    }

    /// The control groups of a VMM that is about to be started. What cannot be had is told, or is an error.
    async fn groups(&self, cell: &Cell, walls: Walls) -> Result<Vec<File>> {
        let (groups, cell) = (self.cgroups()?, cell.clone());
        let made = tokio::task::spawn_blocking(move || groups.make(&cell)).await;
        let Made { joins, missing } =
            made.map_err(|cause| Error::internal("the control groups were not made", cause))?;
        let lacks: Vec<String> = missing.iter().map(ToString::to_string).collect();
        match (walls, lacks.as_slice()) {
            (_, []) => {}
            (Walls::All, lacks) => return Err(not_whole(lacks)),
            (Walls::AsFound, lacks) => tracing::warn!("a VMM is started without {}", lacks.join("; ")),
        }
        Ok(joins)
    }

    fn cgroups(&self) -> Result<Arc<Cgroups>> {
        let mut held = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cgroups) = held.as_ref() {
            return Ok(cgroups.clone());
        }
        let found = Cgroups::of_host(&self.parent)
            .map_err(|cause| Error::internal("it cannot be seen which control groups the host has", cause))?;
        Ok(held.insert(Arc::new(found)).clone())
    }

    /// The connection to a launcher that lives.
    async fn connection(&self) -> Result<Arc<Connection>> {
        let mut held = self.connection.lock().await;
        if let Some(connection) = held.as_ref() {
            if !connection.state().closed {
                return Ok(connection.clone());
            }
            // Our child: reaped here, or it would stay a zombie.
            let _ = connection.process.reap();
        }
        let started = Connection::start(&self.vmm)?;
        *held = Some(started.clone());
        Ok(started)
    }

    async fn ask(
        &self,
        command: Command,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Replied> {
        let connection = self.connection().await?;
        connection.ask(command, descriptors, timeout).await
    }
}

impl Launch for Launcher {
    fn check(&self) -> Result<()> {
        self.check_vmm()?;
        self.open_kvm().map(drop)
    }

    fn spawn(&self, start: Start) -> BoxFuture<'_, Result<Arc<dyn Process>>> {
        async move {
            self.check_vmm()?;
            let kvm = self.open_kvm()?;
            let groups = self.groups(&start.cell, start.walls).await?;
            let mut descriptors =
                vec![start.listener.as_fd(), kvm.as_fd(), start.will.as_fd(), start.log.as_fd()];
            descriptors.extend(groups.iter().map(AsFd::as_fd));
            let jail = self.jail(&start.cell, start.walls, groups.len())?;
            let command = Command::Spawn { label: start.label.clone(), jail };
            let connection = self.connection().await?;
            let build = connection.build.clone();
            let replied = connection.ask(command, &descriptors, limits::SPAWN).await?;
            match (replied.result, replied.descriptors.into_iter().next(), replied.status) {
                (Ok(Reply::Spawned { pid, missing }), Some(pidfd), Some(status)) => {
                    for missing in missing {
                        tracing::warn!("VMM {pid} runs without {missing}");
                    }
                    Ok(Arc::new(Held::started(pid, pidfd, status, build)?) as Arc<dyn Process>)
                }
                (Err(why), _, _) if start.walls == Walls::All => Err(not_whole(&[why])),
                (Err(why), _, _) => Err(Error::new(Code::MachineFailed, why)),
                _ => Err(nonsense()),
            }
        }
        .boxed()
    }

    fn sweep(&self, prefix: &str, kept: &HashSet<String>) -> Result<()> {
        self.cgroups()?
            .sweep(prefix, kept)
            .map_err(|cause| Error::internal("control groups that nobody knows cannot be removed", cause))
    }

    fn adopt(&self, id: &ProcessId) -> Result<Option<Arc<dyn Process>>> {
        Ok(Held::adopt(id)?.map(|held| Arc::new(held) as Arc<dyn Process>))
    }

    fn release(&self, key: &str) -> Result<()> {
        self.cgroups()?
            .remove(key)
            .map_err(|cause| Error::internal(format!("the control groups of {key} cannot be removed"), cause))
    }

    fn oom_kills(&self, key: &str) -> u64 {
        self.cgroups().map(|cgroups| cgroups.oom_kills(key)).unwrap_or_default()
    }

    fn examine(
        &self,
        id: &ProcessId,
        key: &str,
        sandbox: Option<Sandbox>,
        files: &[PathBuf],
    ) -> Result<Vec<Finding>> {
        let gone = || Error::new(Code::MachineFailed, format!("VMM {} has ended", id.pid));
        let subject = Subject { pid: id.pid, key, sandbox, files };
        let findings =
            isolation::examine(&subject, &*self.cgroups()?).map_err(|cause| gone().caused_by(cause))?;
        // Only now is it certain that all of this was read of the same process.
        if process::start_ticks(id.pid) == Some(id.start_ticks) { Ok(findings) } else { Err(gone()) }
    }

    fn build(&self) -> BoxFuture<'_, Result<String>> {
        async move {
            // A launcher that lives starts what it is; none is started for the question.
            match self.connection.lock().await.as_ref().filter(|connection| !connection.state().closed) {
                Some(connection) => Ok(connection.build.clone()),
                None => build_of(&self.vmm)
                    .map_err(|cause| Error::file(format!("cannot look at {}", self.vmm.display()), cause)),
            }
        }
        .boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Result<KvmReport>> {
        async move {
            self.check_vmm()?;
            let kvm = self.open_kvm()?;
            let replied = self.ask(Command::Probe, &[kvm.as_fd()], limits::PROBE).await?;
            match replied.result {
                Ok(Reply::Probed(report)) => Ok(report),
                Ok(Reply::Spawned { .. }) => Err(nonsense()),
                Err(why) => Err(Error::new(Code::KvmUnavailable, why)),
            }
        }
        .boxed()
    }
}

/// What tells a program from another that was installed in its place: twelve hexadecimal digits of its file's identity,
/// length and time, which nobody has to read the whole file for.
fn build_of(program: &Path) -> std::io::Result<String> {
    let found = std::fs::metadata(program)?;
    let of = [found.dev(), found.ino(), found.len(), found.mtime() as u64, found.mtime_nsec() as u64];
    let digest = Sha256::digest(of.map(u64::to_le_bytes).as_flattened());
    Ok(digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}

impl Connection {
    fn start(vmm: &Path) -> Result<Arc<Connection>> {
        let failed = |cause: std::io::Error| {
            Error::new(
                Code::HostUnprepared,
                format!("the launcher {} cannot be started: {cause}", vmm.display()),
            )
            .caused_by(cause)
        };
        let build = build_of(vmm).map_err(failed)?;
        let (ours, theirs) = Socket::pair().map_err(failed)?;
        let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
        let (_, process) = sys::spawn::spawn(&Program {
            executable: vmm,
            name: OsStr::new("toft-vmm"),
            arguments: &[OsStr::new("launcher")],
            descriptors: &[
                (null.as_fd(), 0),
                (std::io::stdout().as_fd(), 1),
                (std::io::stderr().as_fd(), 2),
                (theirs.as_fd(), 3),
            ],
        })
        .map_err(failed)?;
        ours.set_nonblocking().map_err(failed)?;
        let socket = watch(Channel::new(ours), Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        let connection =
            Arc::new(Connection { socket, next: AtomicU64::new(1), state: Mutex::default(), process, build });
        let reading = Arc::downgrade(&connection);
        tokio::spawn(async move {
            // The reader holds the connection while it reads, so the launcher lives as long as the daemon.
            if let Some(connection) = reading.upgrade() {
                connection.read().await;
                let mut state = connection.state();
                state.closed = true;
                state.waiting.clear();
                state.children.clear();
            }
        });
        Ok(connection)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(
        &self,
        command: Command,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Replied> {
        let gone = || {
            let detail = "the launcher has ended; try again. If it ends each time, see the daemon's log, and whether \
                          `toft-vmm --version` runs on this host";
            Error::new(Code::MachineFailed, detail)
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.state();
            if state.closed {
                return Err(gone());
            }
            if state.waiting.len() >= limits::COMMANDS_MAX {
                return Err(Error::new(Code::TooMany, "too many VMMs are being started; try again"));
            }
            state.waiting.insert(id, sender);
        }
        let exchange = async {
            self.send(&Request { id, command }, descriptors).await?;
            receiver.await.map_err(|_| gone())
        };
        let answer = tokio::time::timeout(timeout, exchange).await;
        self.state().waiting.remove(&id);
        answer.unwrap_or_else(|_| {
            Err(Error::new(Code::MachineFailed, format!("the launcher did not answer within {timeout:?}")))
        })
    }

    async fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::new(Code::MachineFailed, format!("the launcher cannot be reached: {cause}"))
        };
        loop {
            let mut ready = self.socket.writable().await.map_err(|cause| failed(&cause))?;
            match ready.get_inner().0.send(request, descriptors) {
                Ok(()) => return Ok(()),
                Err(cause) if cause.is_would_block() => ready.clear_ready(),
                Err(cause) => return Err(failed(&cause)),
            }
        }
    }

    async fn read(&self) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else { return };
            match ready.get_inner().0.receive::<Message>() {
                Ok(Some((message, descriptors))) => self.take(message, descriptors),
                Ok(None) => return,
                Err(cause) if cause.is_would_block() => ready.clear_ready(),
                Err(cause) => {
                    tracing::warn!("the launcher's message cannot be read: {cause}");
                    return;
                }
            }
        }
    }

    fn take(&self, message: Message, descriptors: Vec<OwnedFd>) {
        let mut state = self.state();
        match message {
            Message::Reply { id, result } => {
                let status = match &result {
                    Ok(Reply::Spawned { pid, .. }) => {
                        state.children.retain(|_, sender| !sender.is_closed());
                        let sender = state.children.entry(*pid).or_insert_with(|| watch::Sender::new(None));
                        Some(sender.subscribe())
                    }
                    _ => None,
                };
                let waiting = state.waiting.remove(&id);
                drop(state);
                let replied = Replied { result, descriptors, status };
                let taken = match waiting {
                    Some(sender) => sender.send(replied),
                    None => Err(replied),
                };
                if let Err(replied) = taken {
                    end_unwanted(replied);
                }
            }
            Message::Exited { pid, status } => {
                if let Some(sender) = state.children.remove(&pid) {
                    sender.send_replace(Some(status));
                }
            }
        }
    }
}

/// A VMM that came after its time has no machine and no record; nobody else would ever end it.
fn end_unwanted(replied: Replied) {
    if let (Ok(Reply::Spawned { pid, .. }), Some(pidfd)) =
        (replied.result, replied.descriptors.into_iter().next())
    {
        tracing::warn!("VMM {pid} was started too late and is ended");
        if let Err(cause) = PidFd::from(pidfd).signal(nix::sys::signal::Signal::SIGKILL) {
            tracing::warn!("VMM {pid} cannot be ended: {cause}");
        }
    }
}

/// A server asked for walls that this host does not have.
pub(crate) fn not_whole(lacks: &[String]) -> Error {
    let detail = format!(
        "strict isolation cannot be had on this host, which lacks {}; mend that (`toft host check` says more), or \
         create the server with standard isolation",
        lacks.join("; ")
    );
    Error::new(Code::HostUnprepared, detail)
}

fn nonsense() -> Error {
    Error::new(Code::MachineFailed, "the launcher answered something else than it was asked")
}
