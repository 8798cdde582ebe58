//! VMMs that were started before anybody asked: in their jail and under their filters, with no machine. A server that
//! is started takes one and is spared all of that. It knows no server; `servers` gives a shell its place.
//!
//! Nothing of a shell is recorded before a server has it, and none lets a machine run before that is. It is known by its
//! key, the name of its control groups and of its directory, in which its socket, last will and log lie until they become
//! a server's. What a daemon that died has left is found by these names and removed by the next one.
use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};
use sys::seqpacket::Listener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use wire::console::Ring;
use wire::control::Command;
use wire::machine::Chassis;

use super::link::Hello;
use super::{Cell, Launch, Link, Process, Start, Walls};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::limits;
use crate::volumes::files;

/// How the name of every shell's control groups begins.
pub(super) const PREFIX: &str = "shell-";

const SOCKET: &str = "control.sock";

/// What a server takes over, the socket first: with it begins what a server has of a VMM.
const FILES: [&str; 3] = [SOCKET, "will.json", "vmm.log"];

/// The console of a server that has none yet.
const RING: &str = "console.ring";

/// A few shells, and a task that makes the next.
pub struct Shells {
    pool: Arc<Pool>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

struct Pool {
    launcher: Arc<dyn Launch>,
    directory: PathBuf,
    most: usize,
    state: Mutex<State>,
    wanted: Arc<Notify>,
}

#[derive(Default)]
struct State {
    /// The oldest first.
    ready: VecDeque<Shell>,
    /// Of the server that was started last: the next one is likely to be the same.
    size: Option<Size>,
    closed: bool,
}

/// A VMM without a machine.
pub struct Shell {
    /// Name of its control groups.
    pub key: String,
    /// The process.
    pub process: Arc<dyn Process>,
    /// What it said of itself.
    pub hello: Hello,
    /// The connection to it, which is its server's from then on. It leaves when nobody is connected for long.
    pub link: Link,
    directory: PathBuf,
    size: Size,
}

/// What a VMM is started for. A shell serves only servers of exactly its own: its limits are theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// Memory and processors.
    pub chassis: Chassis,
    /// See [`Cell::file_bytes_max`].
    pub file_bytes_max: u64,
}

impl Shells {
    /// Keeps up to `most` shells in `directory`, from the first start of a server on.
    pub fn new(launcher: Arc<dyn Launch>, directory: PathBuf, most: usize) -> Shells {
        let (state, wanted) = (Mutex::default(), Arc::default());
        Shells { pool: Arc::new(Pool { launcher, directory, most, state, wanted }), keeper: Mutex::default() }
    }

    /// Removes what an earlier daemon has left of its shells, all but the groups that are named in `kept`.
    pub async fn recover(&self, kept: HashSet<String>) -> Result<()> {
        let (launcher, directory) = (self.pool.launcher.clone(), self.pool.directory.clone());
        blocking(move || {
            launcher.sweep(&prefix(&directory), &kept)?;
            remove_tree(&directory)
        })
        .await
    }

    /// Has shells for servers of this size made in the background: as many as are missing, and one in any case.
    pub fn replenish(&self, size: Size) {
        if self.pool.most > 0 {
            self.pool.state().size = Some(size);
            self.keep();
            self.pool.wanted.notify_one();
        }
    }

    /// A shell that is for servers of this size, if there is one. It may have died without having been missed yet, which is
    /// seen when it does not greet.
    pub fn take(&self, size: Size) -> Option<Shell> {
        loop {
            let shell = self.pool.fitting(&size)?;
            if !shell.link.is_closed() {
                return Some(shell);
            }
            let pool = self.pool.clone();
            tokio::spawn(async move { pool.end(shell).await });
        }
    }

    /// How many a server could take.
    #[cfg(test)]
    pub fn ready(&self) -> usize {
        self.pool.state().ready.iter().filter(|shell| !shell.link.is_closed()).count()
    }

    /// Ends a shell that could not be used, and removes what is left of it.
    pub async fn end(&self, shell: Shell) {
        self.pool.end(shell).await;
    }

    /// Ends them all.
    pub async fn close(&self) {
        self.pool.state().closed = true;
        self.pool.wanted.notify_one();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            // It ends with what it is making.
            let _ = keeper.await;
        }
        let ready = std::mem::take(&mut self.pool.state().ready);
        for shell in ready {
            self.pool.end(shell).await;
        }
        let directory = self.pool.directory.clone();
        // Where there never was a shell there is none.
        let _ = blocking(move || Ok(fs::remove_dir(directory))).await;
    }

    /// Starts the task that makes shells, once.
    fn keep(&self) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if keeper.is_none() && !self.pool.state().closed {
            *keeper = Some(tokio::spawn(self.pool.clone().keep()));
        }
    }
}

impl Drop for Shells {
    fn drop(&mut self) {
        if let Some(keeper) = &*self.keeper.lock().unwrap_or_else(PoisonError::into_inner) {
            keeper.abort();
        }
    }
}

impl Shell {
    /// Its files.
    pub fn files(&self) -> ShellFiles {
        ShellFiles(self.directory.clone())
    }
}

/// Files of a shell.
pub struct ShellFiles(PathBuf);

impl ShellFiles {
    /// Makes them those of the server whose directory this is or is to be. Blocks.
    pub fn move_into(&self, directory: &Path) -> io::Result<()> {
        match fs::rename(&self.0, directory) {
            // One that has something in it keeps that.
            Err(cause) if matches!(cause.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
            }
            moved => return moved,
        }
        for file in FILES {
            fs::rename(self.0.join(file), directory.join(file))?;
        }
        files::remove_tree(&self.0)
    }
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fitting(&self, size: &Size) -> Option<Shell> {
        let ready = &mut self.state().ready;
        ready.iter().position(|shell| shell.size == *size).and_then(|at| ready.remove(at))
    }

    fn dead(&self) -> Option<Shell> {
        let ready = &mut self.state().ready;
        ready.iter().position(|shell| shell.link.is_closed()).and_then(|at| ready.remove(at))
    }

    /// What is to be made next, and the shell in whose place it comes.
    fn next(&self) -> Option<(Size, Option<Shell>)> {
        let mut state = self.state();
        let size = state.size.clone().filter(|_| !state.closed)?;
        if state.ready.len() < self.most {
            return Some((size, None));
        }
        let fits = state.ready.iter().any(|shell| shell.size == size);
        // Servers of two sizes that are started in turns have a shell each.
        if fits { None } else { Some((size, state.ready.pop_front())) }
    }

    async fn keep(self: Arc<Pool>) {
        while !self.state().closed {
            self.wanted.notified().await;
            while let Some(dead) = self.dead() {
                self.end(dead).await;
            }
            while let Some((size, other)) = self.next() {
                if let Some(other) = other {
                    self.end(other).await;
                }
                match self.make(size).await {
                    Ok(shell) => self.state().ready.push_back(shell),
                    Err(cause) => {
                        // The next start wants one again, and fails for the same reason if it cannot do without.
                        tracing::info!("no VMM can be kept ready: {}", cause.chain());
                        break;
                    }
                }
            }
        }
    }

    async fn make(&self, size: Size) -> Result<Shell> {
        let digits = uuid::Uuid::now_v7().simple().to_string();
        // The last digits are the random ones; more would make the socket's path longer than a server's.
        let key = format!("{}{}", prefix(&self.directory), &digits[digits.len() - 16..]);
        let directory = self.directory.join(&key);
        let made = self.start(&key, &directory, size).await;
        if made.is_err() {
            // A launcher that died may have started it and not said so: whatever is in its groups is nobody's.
            let launcher = self.launcher.clone();
            let groups = key.clone();
            self.remove(directory, move || launcher.sweep(&groups, &HashSet::new())).await;
        }
        made
    }

    async fn start(&self, key: &str, directory: &Path, size: Size) -> Result<Shell> {
        let made = directory.to_owned();
        let (listener, will, log) = blocking(move || {
            let failed = |cause| Error::file(format!("cannot make {}", made.display()), cause);
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&made).map_err(failed)?;
            let [socket, will, log] = FILES.map(|file| made.join(file));
            let listener = Listener::bind(&socket).map_err(failed)?;
            let create = |path: &Path, options: &mut fs::OpenOptions| {
                options.read(true).create_new(true).mode(0o600).open(path).map_err(failed)
            };
            let ring = create(&made.join(RING), fs::File::options().write(true))?;
            Ring::create(ring, wire::limits::CONSOLE_RING_BYTES).map_err(failed)?;
            let will = create(&will, fs::File::options().write(true))?;
            Ok((listener, will, create(&log, fs::File::options().append(true))?))
        })
        .await?;
        let Size { chassis, file_bytes_max } = size.clone();
        let (memory_bytes, vcpus) = (chassis.memory_bytes, chassis.vcpus);
        let cell = Cell { key: key.to_owned(), memory_bytes, vcpus, file_bytes_max };
        // A strict server may take it, so it lacks nothing.
        let walls = Walls::All;
        // Spaces, in whose place a longer name can be put.
        let label = format!("{key:<0$}", limits::LABEL_BYTES);
        let start = Start { label, listener: listener.into(), will, log, cell, walls };
        let process = self.launcher.spawn(start).await?;
        let (console, (notices, mut told)) = (watch::Sender::new(0), mpsc::channel(1));
        let greeted = Link::connect(&directory.join(SOCKET), console, notices, limits::SPAWN).await;
        match greeted {
            Ok((link, hello)) => {
                // One that cannot is of use all the same: why is told when its machine is built.
                if let Err(cause) = link.order(Command::Prepare(chassis), limits::SPAWN).await {
                    tracing::info!("no machine can be built ahead: {cause}");
                }
                let wanted = self.wanted.clone();
                tokio::spawn(async move {
                    while told.recv().await.is_some() {}
                    // One that has died is replaced. What dies at once does not keep the host busy.
                    tokio::time::sleep(limits::SHELL_AGAIN).await;
                    wanted.notify_one();
                });
                let (key, directory) = (key.to_owned(), directory.to_owned());
                Ok(Shell { key, process, hello, link, directory, size })
            }
            Err(cause) => {
                self.kill(&process).await;
                Err(cause.into())
            }
        }
    }

    async fn end(&self, shell: Shell) {
        let Shell { key, process, link, directory, .. } = shell;
        // One that quits writes its will and is reaped as any other; whether it answers or not, it ends.
        let _ = link.order(Command::Quit, limits::SHELL_QUIT).await;
        let _ = tokio::time::timeout(limits::SHELL_QUIT, process.ended()).await;
        self.kill(&process).await;
        let launcher = self.launcher.clone();
        self.remove(directory, move || launcher.release(&key)).await;
    }

    async fn kill(&self, process: &Arc<dyn Process>) {
        if let Err(cause) = process.kill() {
            tracing::warn!("a VMM without a server cannot be ended: {}", cause.chain());
        }
        let _ = tokio::time::timeout(limits::SHELL_QUIT, process.ended()).await;
    }

    /// Removes what is left of one whose groups this `release`s.
    async fn remove(&self, directory: PathBuf, release: impl FnOnce() -> Result<()> + Send + 'static) {
        let removed = blocking(move || {
            release()?;
            remove_tree(&directory)
        });
        if let Err(cause) = removed.await {
            // The next daemon tries again.
            tracing::warn!("what is left of a VMM without a server stays: {}", cause.chain());
        }
    }
}

/// How the names of a daemon's own shells begin: those of another daemon on this host, which are in another directory, are
/// none of its affair, least of all when servers of that one run in them.
fn prefix(directory: &Path) -> String {
    let place = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    let digest = Sha256::digest(place.as_os_str().as_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{digits}-")
}

fn remove_tree(directory: &Path) -> Result<()> {
    let failed = |cause| Error::file(format!("cannot remove {}", directory.display()), cause);
    files::remove_tree(directory).map_err(failed)
}
