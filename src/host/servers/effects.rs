//! The work of each phase: what is done to the world between two saved steps. Each can be done again after a
//! crash anywhere inside it, and ends with the event that the lifecycle waits for.
//! An error means that the host cannot do it now; the actor tries again. What is final is an event.
use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use model::server::Isolation;
use model::{Code, ServerId, Time};
use sys::beneath::Access;
use sys::seqpacket::Listener;
use tokio::sync::{mpsc, watch};
use wire::console::Ring;
use wire::control::{Command, Reply};
use wire::launch::ExitStatus;
use wire::will::Will;

use super::lifecycle::{End, Event, JobKind, Phase, Saved, Spawned, Trouble, Work};
use super::machine::{Building, Prepared};
use super::record::{Disk, ServerRecord};
use super::registry::{Entry, Workshop};
use super::{limits, machine, make, restore, saved};
use crate::core::{blocking, in_place};
use crate::error::{Error, Result};
use crate::vmms::link::AskError;
use crate::vmms::{Cell, Link, Shell, Size, Start, Walls};
use crate::volumes::{Content, Durability, Volumes};

/// One piece of work on one server.
pub(super) struct Doing {
    pub(super) workshop: Arc<Workshop>,
    pub(super) entry: Arc<Entry>,
    pub(super) record: ServerRecord,
    /// Set when nobody wants it any more.
    pub(super) stop: Arc<AtomicBool>,
}

/// What the VMM of a start is made of.
enum Ends {
    /// One that is there, and whose files lie in the server's directory.
    Shell(Shell),
    /// What of a new one is the daemon's: it outlives the process.
    New(Files),
}

/// What a start needs to know of the server's volumes.
pub(super) struct Needs {
    pub(super) cell: Cell,
    /// What is copied to fill them.
    pub(super) copied_bytes: u64,
}

/// Files that a VMM is started with.
pub(super) struct Files {
    pub(super) listener: Listener,
    pub(super) will: File,
    pub(super) log: File,
}

impl Doing {
    /// Does it.
    pub(super) async fn perform(self, work: Work) -> Result<Event> {
        match work {
            Work::Make => self.make().await,
            Work::Spawn => self.final_or(self.spawn().await, Event::StartFailed),
            Work::Await => self.final_or(self.await_machine().await, Event::StartFailed),
            Work::Boot { saved } => self.final_or(self.boot(saved).await, Event::StartFailed),
            Work::Save => self.save().await,
            Work::Snapshot { id } => self.snapshot(id).await,
            Work::CopyBack { to, job } => self.copy_back(to, job).await,
            Work::TakeBack { to } => self.take_back(to).await,
            Work::Pause => self.pause().await,
            Work::Resume => self.resume().await,
            Work::Settle { job } => self.settle(job).await,
            Work::SpawnNext => self.final_or(self.spawn_next().await, Event::HandOverFailed),
            Work::HandOver => self.hand_over().await,
            Work::Retire => self.retire().await,
            Work::CountResets => Ok(match self.resets().await {
                Ok(resets) => Event::ResetsCounted(resets),
                Err(cause) => Event::ResetFailed(Trouble::from(&Error::from(cause))),
            }),
            Work::Reset { resets } => match self.resets().await {
                // The guest started afresh after it was asked for: this is what was wanted.
                Ok(now) if now > resets => Ok(Event::WasReset),
                _ => self.order(Command::Reset, Event::WasReset, Event::ResetFailed).await,
            },
            Work::Press => self.press().await,
            Work::Kill => self.kill().await,
            Work::Release { keep_saved, keep_copied, flush } => {
                if flush {
                    self.fill(Durability::Power, Vec::new()).await?;
                }
                let kept = keep_saved || keep_copied;
                self.release(keep_saved, keep_copied).await.map(|()| Event::Released { flushed: flush, kept })
            }
            Work::Purge => self.purge().await,
        }
    }

    /// Makes an error an event that ends the phase, unless the daemon itself is ending.
    pub(super) fn final_or(&self, outcome: Result<Event>, failed: fn(Trouble) -> Event) -> Result<Event> {
        match outcome {
            Err(cause) if cause.code == Code::Draining => Err(cause),
            Err(cause) => {
                tracing::warn!(server = %self.record.id, "{}", cause.chain());
                Ok(failed(Trouble::from(&cause)))
            }
            ok => ok,
        }
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.workshop.core.dirs.server(self.record.id).join(name)
    }

    async fn spawn(&self) -> Result<Event> {
        let Needs { cell, .. } = self.needs().await?;
        let spawned = self.vmm(cell, std::future::ready(Ok(Content::Recorded))).await?;
        self.entry.take_errands();
        self.begin_introduction();
        Ok(Event::Spawned(spawned))
    }

    /// Starts a VMM and prepares what it is to be sent, once its volumes are `filled`. Neither needs the other, and
    /// both take a while. Its networks do not know it yet. Repeatable.
    pub(super) async fn vmm(
        &self,
        cell: Cell,
        filled: impl Future<Output = Result<Content>>,
    ) -> Result<Spawned> {
        self.dismiss_stranger().await;
        if let Some(machine) = self.entry.machine() {
            self.uncage(machine.cage).await?;
        }
        self.entry.drop_machine();
        let ends = match self.take_shell(&cell).await {
            Some(shell) => Ends::Shell(shell),
            None => Ends::New(self.bind().await?),
        };
        self.workshop.core.checkpoint("server.directory_made")?;
        let prepared = machine::prepare(&self.workshop, &self.record, filled);
        let is_ready = matches!(ends, Ends::Shell(_));
        let starting = self.start_vmm(ends, cell);
        // Both to their end, whatever becomes of the other: what is half done would be undone too early. What takes longest first:
        // a new VMM; beside one that is ready, files, which another thread writes while this one asks for taps.
        let (started, prepared) = if is_ready {
            let (prepared, started) = tokio::join!(prepared, starting);
            (started, prepared)
        } else {
            tokio::join!(starting, prepared)
        };
        let spawned = started?;
        let prepared = prepared?;
        // A strict server gets no machine before its walls were looked at, and one with a memory is built from that.
        let begins = matches!(self.record.life.phase, Phase::Creating { .. } | Phase::Starting { .. });
        match (self.record.isolation, self.record.life.saved) {
            (Isolation::Standard, None) if begins => {
                let Prepared { of, description } = prepared;
                match Building::begin(&self.entry, of, description).await {
                    Ok(building) => self.entry.keep_building(building),
                    Err(cause) => self.or_end(Err(cause)).await?,
                }
            }
            _ => self.entry.keep_prepared(prepared),
        }
        Ok(spawned)
    }

    /// Takes back what [`Doing::vmm`] has made of a server that is no more to be. Repeatable.
    pub(super) async fn undo_vmm(&self) -> Result<()> {
        // The socket is the first thing that is made for a VMM, and the last that is removed.
        if self.entry.machine().is_none() && !self.file("control.sock").exists() {
            return Ok(());
        }
        match self.entry.machine() {
            Some(machine) => {
                machine.process.kill()?;
                let _ = tokio::time::timeout(limits::KILL, machine.process.ended()).await;
            }
            None => self.dismiss_stranger().await,
        }
        self.release(false, false).await
    }

    /// Binds the control socket and makes the files that a VMM is started with.
    async fn bind(&self) -> Result<Files> {
        self.bind_at("control.sock", "will.json").await
    }

    /// The same under these names.
    pub(super) async fn bind_at(&self, socket: &str, will: &str) -> Result<Files> {
        let (socket, will, log) = (self.file(socket), self.file(will), self.file("vmm.log"));
        let directory = self.workshop.core.dirs.server(self.record.id);
        let ends = in_place(move || {
            machine::make_directory(&directory)?;
            machine::remove_file(&socket)?;
            let listener = Listener::bind(&socket)
                .map_err(|cause| Error::file(format!("cannot bind {}", socket.display()), cause))?;
            Ok(Files { listener, will: machine::fresh_file(&will)?, log: machine::open_log(&log)? })
        })
        .await?;
        self.workshop.core.checkpoint("server.socket_bound")?;
        Ok(ends)
    }

    /// A VMM that is there already, with its files in the server's directory. None when there is none, or none that can be
    /// used: then one is started.
    async fn take_shell(&self, cell: &Cell) -> Option<Shell> {
        let log = self.file("vmm.log");
        // A shell brings its own; what earlier VMMs of the server said stays.
        if std::fs::metadata(log).is_ok_and(|found| found.len() > 0) {
            return None;
        }
        let shell = self.workshop.shells.take(self.size(cell))?;
        let (files, directory) = (shell.files(), self.workshop.core.dirs.server(self.record.id));
        let moved = in_place(move || {
            files.move_into(&directory).map_err(|cause| Error::file("it cannot be moved", cause))
        });
        match moved.await {
            Ok(()) => Some(shell),
            Err(cause) => {
                self.reject(shell, &cause).await;
                None
            }
        }
    }

    /// Ends a shell that is of no use.
    async fn reject(&self, shell: Shell, why: &Error) {
        tracing::warn!(server = %self.record.id, "a VMM that was ready is not used: {}", why.chain());
        self.workshop.shells.end(shell).await;
    }

    fn size(&self, cell: &Cell) -> Size {
        Size { chassis: machine::chassis(&self.record), file_bytes_max: cell.file_bytes_max }
    }

    async fn start_vmm(&self, ends: Ends, cell: Cell) -> Result<Spawned> {
        let Files { listener, will, log } = match ends {
            Ends::New(files) => files,
            Ends::Shell(shell) => {
                let (vmm, cage) = (shell.process.id(), Some(shell.key.clone()));
                self.entry.hold_linked(shell.process.clone(), shell.key.clone(), shell.link.clone());
                self.workshop.core.checkpoint("server.spawned")?;
                match shell.link.greet(limits::SHELL_QUIT).await {
                    Ok(_) => {
                        let (sandbox, build) = (Some(shell.hello.sandbox), shell.process.build());
                        return Ok(Spawned { vmm, sandbox, cage, build });
                    }
                    Err(cause) => self.reject(shell, &cause.into()).await,
                }
                self.entry.drop_machine();
                self.bind().await?
            }
        };
        let walls = match self.record.isolation {
            Isolation::Strict => Walls::All,
            Isolation::Standard => Walls::AsFound,
        };
        let label = self.record.name.to_string();
        let start = Start { label, listener: listener.into(), will, log, cell, walls };
        let process = self.workshop.launcher.spawn(start).await?;
        self.workshop.core.checkpoint("server.spawned")?;
        let (vmm, build) = (process.id(), process.build());
        self.entry.hold(process, self.record.id.to_string());
        // Asked now, because later a guest may have taken it over. Whether it answers is seen when it is to boot.
        let hello = self.entry.greet(limits::BOOT).await.ok().and_then(|(_, hello)| hello);
        Ok(Spawned { vmm, sandbox: hello.map(|hello| hello.sandbox), cage: None, build })
    }

    pub(super) async fn needs(&self) -> Result<Needs> {
        let (record, volumes) = (self.record.clone(), self.workshop.volumes.clone());
        let read = move |connection: &rusqlite::Connection| {
            let find = |disk: &Disk| Volumes::find(connection, disk.volume_id);
            let disks = record.disks.iter().map(find).collect::<Result<Vec<_>>>()?;
            let largest = disks.iter().map(|disk| disk.size_bytes).max().unwrap_or_default();
            let cell = Cell {
                key: record.id.to_string(),
                memory_bytes: record.memory_bytes,
                vcpus: record.vcpus,
                file_bytes_max: largest.max(record.memory_bytes).max(limits::FILE_BYTES_MIN),
            };
            let copied = disks.iter().map(|disk| volumes.source_bytes(connection, disk, record.is_clone()));
            Ok(Needs { cell, copied_bytes: copied.sum::<Result<u64>>()? })
        };
        self.workshop.core.store.glance(read).await
    }

    /// A VMM that was started and lost before it was recorded listens on the server's socket. It has no machine;
    /// it is told to leave before another takes its place.
    async fn dismiss_stranger(&self) {
        self.dismiss_at("control.sock").await;
    }

    pub(super) async fn dismiss_at(&self, socket: &str) {
        let (console, (notices, _)) = (watch::Sender::new(0), mpsc::channel(1));
        let socket = self.file(socket);
        if let Ok((link, _)) = Link::connect(&socket, console, notices, limits::QUIT).await {
            tracing::warn!(server = %self.record.id, "a VMM that was never recorded is told to quit");
            if link.order(Command::Quit, limits::QUIT).await.is_ok() {
                let _ = tokio::time::timeout(limits::QUIT, link.closed()).await;
            }
        }
    }

    async fn boot(&self, saved: Option<Saved>) -> Result<Event> {
        self.entry.show_name(&self.record).await;
        let booted = async {
            match saved {
                Some(saved) => {
                    let (restored, ended) = tokio::join!(self.restore(saved), self.end_errands());
                    restored.and(ended).map(|()| Event::Restored)
                }
                None => {
                    self.end_errands().await?;
                    machine::boot(&self.workshop, &self.entry, &self.record).await.map(|()| Event::Booted)
                }
            }
        };
        let booted = booted.await;
        self.workshop.core.checkpoint("server.booted")?;
        // One that was saved is parked still.
        if saved.is_none() {
            self.prepare_next().await;
        }
        self.or_end(booted).await
    }

    /// The last will of a VMM that has ended meanwhile says more than a connection that broke.
    pub(super) async fn or_end<T>(&self, outcome: Result<T>) -> Result<T> {
        match outcome {
            Ok(value) => Ok(value),
            Err(cause) => match self.ended_meanwhile().await {
                Some(end) => Err(Error::new(Code::MachineFailed, end.detail).caused_by(cause)),
                None => Err(cause),
            },
        }
    }

    pub(super) async fn ended_meanwhile(&self) -> Option<End> {
        if self.entry.is_linked() {
            return None;
        }
        self.end_of_gone(&AskError::Gone).await
    }

    /// How a VMM ended that has closed its connection, which may not have been noticed elsewhere.
    pub(super) async fn end_of_gone(&self, cause: &AskError) -> Option<End> {
        if !matches!(cause, AskError::Gone) {
            return None;
        }
        let process = self.entry.machine()?.process;
        let status = tokio::time::timeout(limits::ENDED, process.ended()).await.ok()?;
        Some(end_of(&self.workshop, self.record.id, self.cage(), status).await)
    }

    async fn order(&self, command: Command, done: Event, failed: fn(Trouble) -> Event) -> Result<Event> {
        let ordered = async { self.entry.link(limits::COMMAND).await?.order(command, limits::PAUSE).await };
        let outcome = ordered.await;
        self.workshop.core.checkpoint("server.ordered")?;
        Ok(match outcome {
            Ok(()) => done,
            Err(cause) => failed(Trouble::from(&Error::from(cause))),
        })
    }

    /// How often the machine was reset.
    async fn resets(&self) -> std::result::Result<u64, AskError> {
        let link = self.entry.link(limits::COMMAND).await?;
        match link.ask(Command::Stats, &[], limits::COMMAND).await? {
            Reply::Stats(stats) => Ok(stats.resets),
            other => Err(AskError::Protocol(format!("counters were answered with {other:?}"))),
        }
    }

    /// Has VMMs and taps made ready for servers like this one. Not before its machine runs: its caller waits for every CPU there is,
    /// and the kernel makes what KVM does for one machine wait for what it does for another.
    async fn prepare_next(&self) {
        if self.workshop.core.config.warm_shells == 0 {
            return;
        }
        if let Ok(Needs { cell, .. }) = self.needs().await {
            self.workshop.shells.replenish(self.size(&cell));
        }
        let (networks, nics) = (self.workshop.networks.clone(), self.record.nics.clone());
        tokio::spawn(async move { networks.expect(&nics).await });
    }

    /// A parked guest cannot see a button, so it runs first.
    async fn press(&self) -> Result<Event> {
        if let Err(cause) = make::flush(&self.workshop.volumes, &self.record.life.unflushed).await {
            return self.final_or(Err(cause), |_| Event::PressFailed);
        }
        let pressed = async {
            let link = self.entry.link(limits::COMMAND).await?;
            link.order(Command::Resume, limits::COMMAND).await?;
            link.order(Command::PressPowerButton, limits::COMMAND).await
        };
        let outcome = pressed.await;
        self.workshop.core.checkpoint("server.pressed")?;
        Ok(match outcome {
            Ok(()) | Err(AskError::Gone) => Event::Pressed,
            Err(cause) => {
                tracing::warn!(server = %self.record.id, "the power button cannot be pressed: {cause}");
                Event::PressFailed
            }
        })
    }

    pub(super) async fn kill(&self) -> Result<Event> {
        let Some(machine) = self.entry.machine() else {
            self.dismiss_stranger().await;
            return Ok(Event::Ended(end_of(&self.workshop, self.record.id, self.cage(), None).await));
        };
        let asked = async {
            let link = self.entry.link(limits::QUIT).await?;
            link.order(Command::Quit, limits::QUIT).await
        };
        // Whether it answers or not: what counts is whether it ends, and that in time.
        let ended = async {
            let _ = asked.await;
            machine.process.ended().await
        };
        let status = match tokio::time::timeout(limits::QUIT, ended).await {
            Ok(status) => status,
            Err(_) => {
                tracing::warn!(server = %self.record.id, "its VMM does not quit and is killed");
                machine.process.kill()?;
                tokio::time::timeout(limits::KILL, machine.process.ended()).await.map_err(|_| {
                    Error::new(
                        Code::Internal,
                        format!("the VMM has not ended {:?} after SIGKILL", limits::KILL),
                    )
                })?
            }
        };
        self.workshop.core.checkpoint("server.killed")?;
        Ok(Event::Ended(end_of(&self.workshop, self.record.id, machine.cage, status).await))
    }

    /// A memory that the machine was restored from is of no use once it runs.
    async fn resume(&self) -> Result<Event> {
        let job = self.record.life.job.map(|job| job.kind);
        // One that is only being made has never moved.
        let is_new = job == Some(JobKind::Create);
        if !is_new && let Some(ended) = self.reclaim().await? {
            return Ok(ended);
        }
        self.entry.show_name(&self.record).await;
        let building = self.entry.take_building();
        let is_current = building.as_ref().is_none_or(|building| building.is_of(&self.record));
        if is_new && let Err(cause) = self.end_errands().await {
            return self.final_or(Err(cause), Event::ResumeFailed);
        }
        let outcome = machine::run(&self.entry, &self.record, building, is_current).await;
        self.workshop.core.checkpoint("server.ordered")?;
        let event = match outcome {
            Ok(()) => Event::Resumed,
            Err(cause) => match self.end_of_gone(&cause).await {
                // Or what follows it would be wanted parked, as one that only refuses.
                Some(end) => return Ok(Event::Ended(end)),
                None => match self.end_elsewhere().await {
                    Some(end) => return Ok(Event::NotHere(end)),
                    None => Event::ResumeFailed(Trouble::from(&Error::from(cause))),
                },
            },
        };
        if event == Event::Resumed {
            let directory = self.workshop.core.dirs.server(self.record.id);
            blocking(move || saved::discard(&directory)).await?;
            self.workshop.core.checkpoint("server.saved_discarded")?;
            let has_gone_on = matches!(job, Some(JobKind::Create | JobKind::Restore));
            if let (true, Some(of), Some(machine)) =
                (has_gone_on, self.record.life.shares, self.entry.machine())
            {
                self.workshop.snapshots.observe(of, machine.process);
            }
            // Whatever else is done, it ends a start from what was saved.
            if job.is_some_and(|job| job != JobKind::Resume) {
                self.prepare_next().await;
            }
        }
        Ok(event)
    }

    /// Name of the control groups of the VMM at hand, or of the latest.
    fn cage(&self) -> String {
        self.entry.machine().map_or_else(|| self.record.cage(), |machine| machine.cage)
    }

    /// Removes the control groups of a VMM that has ended. A daemon that died before it recorded a VMM has left groups under
    /// the server's own name, which no later one has when it is on a shell.
    async fn uncage(&self, cage: String) -> Result<()> {
        let (launcher, own) = (self.workshop.launcher.clone(), self.record.id.to_string());
        blocking(move || {
            launcher.release(&cage)?;
            if cage == own { Ok(()) } else { launcher.release(&own) }
        })
        .await
    }

    async fn release(&self, keep_saved: bool, keep_copied: bool) -> Result<()> {
        let cage = self.cage();
        self.workshop.networks.unplug(self.record.id, &self.record.nics).await?;
        self.workshop.core.checkpoint("server.unplugged")?;
        self.uncage(cage).await?;
        // Not before: where its groups are is told by the machine at hand.
        self.entry.drop_machine();
        self.workshop.core.checkpoint("server.uncaged")?;
        let (socket, directory) = (self.file("control.sock"), self.workshop.core.dirs.server(self.record.id));
        blocking(move || {
            if !keep_saved {
                saved::discard(&directory)?;
            }
            machine::remove_file(&socket)
        })
        .await?;
        self.forget_next().await?;
        if !keep_copied {
            restore::forget_copies(&self.workshop, &self.record).await?;
        }
        self.workshop.core.checkpoint("server.released")
    }

    async fn purge(&self) -> Result<Event> {
        // A daemon may have died with a VMM started for a server that was not made to the end.
        self.undo_vmm().await?;
        let keep_volumes = matches!(self.record.life.phase, Phase::Deleting { keep_volumes: true, .. });
        if !keep_volumes {
            for disk in &self.record.disks {
                self.workshop.volumes.purge(disk.volume_id).await?;
                self.workshop.core.checkpoint("server.volume_purged")?;
            }
        }
        let directory = self.workshop.core.dirs.server(self.record.id);
        blocking(move || machine::remove_directory(&directory)).await?;
        self.workshop.core.checkpoint("server.directory_removed")?;
        Ok(Event::Purged)
    }
}

/// How the machine of a server ended, as far as can be known.
pub(super) async fn end_of(
    workshop: &Workshop,
    id: ServerId,
    cage: String,
    status: Option<ExitStatus>,
) -> End {
    let path = workshop.core.dirs.server(id).join("will.json");
    let will = blocking(move || {
        let file = machine::open_own(&path, Access::Read)
            .map_err(|cause| Error::file("the last will cannot be opened", cause))?;
        Will::read(&file).map_err(|cause| Error::file("the last will cannot be read", cause))
    });
    let will = will.await.unwrap_or_else(|cause| {
        tracing::debug!(server = %id, "{}", cause.chain());
        None
    });
    let launcher = workshop.launcher.clone();
    // What cannot be read was not counted.
    let oom_kills = blocking(move || Ok(launcher.oom_kills(&cage))).await.unwrap_or_default();
    End::of(will, status, oom_kills, Time::now().unix_ms())
}

/// Opens the console ring of a server, or makes one where there is none that can be read.
pub(super) fn open_ring(path: &std::path::Path) -> Result<File> {
    let failed = |cause| Error::file(format!("cannot open {}", path.display()), cause);
    match machine::open_own(path, Access::ReadWrite) {
        Ok(file) => match Ring::open(file.try_clone().map_err(failed)?) {
            Ok(_) => return Ok(file),
            // It is never synced, so a host that lost its power may find its name before its content. Old output is
            // not worth a server that cannot start.
            Err(cause) if matches!(cause.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) => {
                tracing::warn!("{} is begun anew: {cause}", path.display());
            }
            Err(cause) => return Err(failed(cause)),
        },
        Err(cause) if cause.kind() != ErrorKind::NotFound => return Err(failed(cause)),
        Err(_) => {}
    }
    // A ring is whole before it has its name, so the daemon's death leaves none that cannot be read.
    let fresh = path.with_extension("new");
    let file = machine::fresh_file(&fresh)?;
    Ring::create(file, wire::limits::CONSOLE_RING_BYTES).map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)?;
    machine::open_own(path, Access::ReadWrite).map_err(failed)
}
