//! Which servers have an actor, and what a server's actor and the facade share: the machine at hand.
//! It decides nothing. Everything here is gone with the daemon and found again by `recover`.
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::ServerId;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use wire::control::{Command, FaultCode, Notice};

use super::capacity::Capacity;
use super::machine::{Building, Prepared};
use super::readers::Readers;
use super::record::ServerRecord;
use super::{actor, limits, machine};
use crate::core::Shared;
use crate::cpu::Processor;
use crate::images::Images;
use crate::network::Networks;
use crate::snapshots::Snapshots;
use crate::vmms::link::{AskError, Hello};
use crate::vmms::{Launch, Link, Process, Shells};
use crate::volumes::Volumes;

/// What actors work with.
pub struct Workshop {
    /// Records and directories.
    pub core: Shared,
    /// What machines boot from.
    pub images: Images,
    /// Their disks.
    pub volumes: Volumes,
    /// What they were.
    pub snapshots: Snapshots,
    /// Their addresses and taps.
    pub networks: Networks,
    /// Starts VMMs.
    pub launcher: Arc<dyn Launch>,
    /// Those that are started already.
    pub shells: Shells,
    /// What guests see of the host's processor.
    pub processor: Processor,
    /// How much memory there is.
    pub capacity: Capacity,
}

/// Every server's entry.
pub struct Registry {
    workshop: Arc<Workshop>,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    closed: bool,
    by_id: HashMap<ServerId, (Arc<Entry>, JoinHandle<()>)>,
}

/// What a server's actor and the facade share.
pub struct Entry {
    /// Whose.
    pub id: ServerId,
    /// Wakes the actor after the record changed.
    pub poke: Notify,
    /// Total bytes of console output; changes also when the machine or the server goes.
    pub console: watch::Sender<u64>,
    /// Set when the server is no more.
    pub gone: AtomicBool,
    /// Told when the VMM has told more of its move.
    pub moved: Notify,
    /// Readers of the console.
    pub readers: Arc<Readers>,
    socket: PathBuf,
    notices: mpsc::Sender<Notice>,
    machine: Mutex<Option<Machine>>,
    /// One that is to take the machine over.
    next: Mutex<Option<Arc<dyn Process>>>,
    /// What the VMM at hand is to be sent.
    prepared: Mutex<Option<Prepared>>,
    /// The taps of a machine that has come and is not announced yet.
    taps: Mutex<Vec<OwnedFd>>,
    /// What it is making already.
    building: Mutex<Option<Building>>,
    /// What else has to be done before its machine may run.
    errands: Mutex<Errands>,
    /// Held while a connection is made, so that there is one.
    connecting: tokio::sync::Mutex<()>,
}

/// Work that goes on until its end or until this is dropped.
pub type Errands = JoinSet<crate::error::Result<()>>;

/// A VMM process at hand.
#[derive(Clone)]
pub struct Machine {
    /// The process.
    pub process: Arc<dyn Process>,
    /// Name of its control groups.
    pub cage: String,
    link: Option<Link>,
}

impl Entry {
    /// The machine at hand.
    pub fn machine(&self) -> Option<Machine> {
        self.held().clone()
    }

    /// Takes a process up; its connection follows when it is needed.
    pub fn hold(&self, process: Arc<dyn Process>, cage: String) {
        *self.held() = Some(Machine { process, cage, link: None });
    }

    /// The same of one to which there is a connection.
    pub fn hold_linked(&self, process: Arc<dyn Process>, cage: String, link: Link) {
        link.pass_to(self.console.clone(), self.notices.clone());
        *self.held() = Some(Machine { process, cage, link: Some(link) });
        // As of a new connection.
        self.wake_readers();
    }

    /// Lets the process and its connection go.
    pub fn drop_machine(&self) {
        *self.held() = None;
        self.take_prepared();
        self.taps().clear();
        self.take_building();
        self.wake_readers();
    }

    /// Gives the actor a notice of a VMM that somebody else has listened to.
    pub fn pass(&self, notice: Notice) {
        // As of the others, one too many is dropped: a guest can cause them at will.
        let _ = self.notices.try_send(notice);
    }

    /// Takes a process up that is to have the machine of the one at hand.
    pub fn keep_next(&self, process: Option<Arc<dyn Process>>) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = process;
    }

    /// That one.
    pub fn next(&self) -> Option<Arc<dyn Process>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what the VMM at hand is to be sent.
    pub fn keep_prepared(&self, prepared: Prepared) {
        *self.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
    }

    /// What the VMM at hand is to be sent, if it was kept.
    pub fn take_prepared(&self) -> Option<Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The taps of the machine at hand, of one that has come.
    pub fn taps(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what the VMM at hand is making.
    pub fn keep_building(&self, building: Building) {
        *self.building.lock().unwrap_or_else(PoisonError::into_inner) = Some(building);
    }

    /// What the VMM at hand is making, if it was kept.
    pub fn take_building(&self) -> Option<Building> {
        self.building.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Begins with something that has to be done before the machine may run, while its caller goes on.
    pub fn begin_errand(&self, errand: impl Future<Output = crate::error::Result<()>> + Send + 'static) {
        self.errands.lock().unwrap_or_else(PoisonError::into_inner).spawn(errand);
    }

    /// What was begun so, and has to end well; or what is left of an earlier try, which ends here.
    pub fn take_errands(&self) -> Errands {
        std::mem::take(&mut self.errands.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes readers of the console look again.
    pub fn wake_readers(&self) {
        self.console.send_modify(|_| {});
    }

    /// The connection to the machine, made anew when there is none or it has closed.
    pub async fn link(&self, timeout: Duration) -> Result<Link, AskError> {
        Ok(self.greet(timeout).await?.0)
    }

    /// As [`Entry::link`], with what the VMM says of itself when the connection is new.
    pub async fn greet(&self, timeout: Duration) -> Result<(Link, Option<Hello>), AskError> {
        let _connecting = self.connecting.lock().await;
        match self.held().as_ref() {
            None => return Err(AskError::Gone),
            Some(Machine { link: Some(link), .. }) if !link.is_closed() => return Ok((link.clone(), None)),
            Some(_) => {}
        }
        let (link, hello) =
            Link::connect(&self.socket, self.console.clone(), self.notices.clone(), timeout).await?;
        if let Some(machine) = self.held().as_mut() {
            machine.link = Some(link.clone());
        }
        // Readers of the console ask the new connection for word of more.
        self.wake_readers();
        Ok((link, Some(hello)))
    }

    /// Has a VMM that was made ready for anybody be shown under its server's name before its machine runs, for people who look at
    /// processes: it reads this before what it is told next. It is no trouble when it is not shown.
    pub async fn show_name(&self, record: &ServerRecord) {
        if self.machine().is_some_and(|machine| machine.cage != record.id.to_string())
            && let Ok(link) = self.link(limits::COMMAND).await
        {
            link.tell(Command::Label { label: record.name.to_string() }, limits::COMMAND).await;
        }
    }

    /// Puts all limits of a record in force in a machine that runs, as [`Entry::limit_disk`] does.
    pub async fn limit(&self, record: &ServerRecord) -> Result<(), AskError> {
        self.limit_disk(record).await?;
        self.limit_nics(record).await
    }

    /// Puts the limits of the root volume in force in a machine that runs; does nothing in a VMM without one,
    /// which gets them as it boots.
    pub async fn limit_disk(&self, record: &ServerRecord) -> Result<(), AskError> {
        let (Some(disk), true) = (record.disks.first(), self.machine().is_some()) else { return Ok(()) };
        let command = Command::LimitDisk { disk: 0, limits: machine::disk_limits(&disk.limits) };
        match self.link(limits::COMMAND).await?.order(command, limits::COMMAND).await {
            Err(AskError::Refused(fault)) if fault.code == FaultCode::WrongState => Ok(()),
            outcome => outcome,
        }
    }

    /// As [`Entry::limit_disk`], with the limits of every interface.
    pub async fn limit_nics(&self, record: &ServerRecord) -> Result<(), AskError> {
        if self.machine().is_none() {
            return Ok(());
        }
        for nic in &record.nics {
            let (rx, tx) = machine::nic_limits(&nic.limits);
            let command = Command::LimitNic { nic: u16::from(nic.index), rx, tx };
            match self.link(limits::COMMAND).await?.order(command, limits::COMMAND).await {
                Err(AskError::Refused(fault)) if fault.code == FaultCode::WrongState => return Ok(()),
                outcome => outcome?,
            }
        }
        Ok(())
    }

    /// Whether there is a connection that has not closed.
    pub fn is_linked(&self) -> bool {
        self.held().as_ref().is_some_and(|held| held.link.as_ref().is_some_and(|link| !link.is_closed()))
    }

    /// Waits until the connection at hand has closed; for ever when there is none.
    pub async fn link_closed(&self) {
        let link = self.held().as_ref().and_then(|machine| machine.link.clone());
        match link {
            Some(link) => link.closed().await,
            None => std::future::pending().await,
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Machine>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    /// Nobody yet.
    pub fn new(workshop: Arc<Workshop>) -> Registry {
        Registry { workshop, entries: Mutex::default() }
    }

    /// What actors work with.
    pub fn workshop(&self) -> &Arc<Workshop> {
        &self.workshop
    }

    /// The entry of a server; its actor is started if there is none. Call it only for servers that have a record.
    pub fn entry(self: &Arc<Self>, id: ServerId) -> Option<Arc<Entry>> {
        let mut entries = self.entries();
        if entries.closed {
            return None;
        }
        if let Some((entry, _)) = entries.by_id.get(&id) {
            return Some(entry.clone());
        }
        let (notices, inbox) = mpsc::channel(limits::NOTICES_MAX);
        let entry = Arc::new(Entry {
            id,
            poke: Notify::new(),
            console: watch::Sender::new(0),
            gone: AtomicBool::new(false),
            moved: Notify::new(),
            readers: Arc::default(),
            socket: self.workshop.core.dirs.server(id).join("control.sock"),
            notices,
            machine: Mutex::new(None),
            next: Mutex::new(None),
            prepared: Mutex::new(None),
            taps: Mutex::default(),
            building: Mutex::new(None),
            errands: Mutex::default(),
            connecting: tokio::sync::Mutex::new(()),
        });
        let actor = actor::Actor::new(self.workshop.clone(), entry.clone(), inbox);
        let registry = Arc::downgrade(self);
        let ended = entry.clone();
        let task = tokio::spawn(async move {
            actor.run().await;
            ended.gone.store(true, Ordering::SeqCst);
            ended.wake_readers();
            if let Some(registry) = registry.upgrade() {
                registry.entries().by_id.remove(&id);
            }
        });
        entries.by_id.insert(id, (entry.clone(), task));
        Some(entry)
    }

    /// The entry of a server that has an actor.
    pub fn find(&self, id: ServerId) -> Option<Arc<Entry>> {
        self.entries().by_id.get(&id).map(|(entry, _)| entry.clone())
    }

    /// Wakes a server's actor after its record changed, or starts it.
    pub fn poke(self: &Arc<Self>, id: ServerId) {
        match self.find(id) {
            Some(entry) => entry.poke.notify_one(),
            // It reads the record as it starts.
            None => drop(self.entry(id)),
        }
    }

    /// Ends every actor where it stands; what it was doing is taken up by the next daemon.
    pub async fn close(&self) {
        let tasks: Vec<JoinHandle<()>> = {
            let mut entries = self.entries();
            entries.closed = true;
            entries.by_id.drain().map(|(_, (_, task))| task).collect()
        };
        for task in &tasks {
            task.abort();
        }
        for task in tasks {
            // An aborted task answers an error that says so.
            let _ = task.await;
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
