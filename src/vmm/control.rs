//! The main thread: a loop around the control listener, its connections and the bell. It owns the machine and is
//! the only one to build, pause, reset and end it. What the commands do is in `commands`; no peer makes it wait.
//!
//! ```text
//! Shell ──Boot──▶ Running ◀──Pause, Resume──▶ Paused ◀──Build── Shell          any ──ending, Quit──▶ Exiting ─▶ exit
//! ```
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm::{Host, cpuid};
use sys::seqpacket::Listener;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use wire::control::{Message, Notice, Sandbox};
use wire::migration::{MigrationStatus, Phase, Side};
use wire::will::Reason;

use crate::bell::{Bell, Ending, News};
use crate::limits::{
    CONNECTIONS_MAX, DESCRIPTORS_READY, EVENTS_PER_WAIT, FAREWELL_MS_MAX, FORSAKEN_MS, TRIM_MS,
};
use crate::log;
use crate::machine::{Chassis, Machine};
use crate::sandbox;
use crate::threads::{self, ThreadKind};
use crate::will::LastWill;

mod commands;
mod connection;

use connection::{Connection, Gone};

/// What a VMM is started with.
#[derive(Debug)]
pub(crate) struct Inheritance {
    /// Control listener.
    pub(crate) control: OwnedFd,
    /// `/dev/kvm`.
    pub(crate) kvm: OwnedFd,
    /// File for the last will.
    pub(crate) will: OwnedFd,
    /// What KVM offers, if that was asked before.
    pub(crate) offer: Option<OwnedFd>,
}

/// Why a VMM cannot serve at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// What was said to be KVM's offer.
    #[error("descriptor {}: not an offer of KVM in a file that nobody can change", wire::launch::fd::OFFER)]
    Offer,
    /// Nobody came for it.
    #[error("no machine was asked for and nobody was connected for {FORSAKEN_MS} ms")]
    Forsaken,
    /// The control socket or the kernel's event queue.
    #[error("cannot serve the control socket")]
    Serve(#[source] io::Error),
}

const LISTENER: u64 = 0;
const BELL: u64 = 1;
const CONNECTION_FIRST: u64 = 2;

/// The whole process.
struct Shell {
    host: Host,
    sandbox: Sandbox,
    will: LastWill,
    bell: Arc<Bell>,
    machine: Option<Machine>,
    /// Of a move.
    phase_told: Option<Phase>,
    /// Built ahead for the machine to come.
    ready: Option<Chassis>,
    listener: Listener,
    epoll: Epoll,
    connections: BTreeMap<u64, Connection>,
    next_token: u64,
    /// Set once: the loop ends after it.
    reason: Option<Reason>,
    /// Whether a machine was built since memory was last given back.
    has_built: bool,
    /// Whether the machine has yet to run its first instruction.
    is_unbegun: bool,
    /// Whether the guest wanted a reset before all of its memory was here.
    resets_when_whole: bool,
}

/// Serves until the machine ends. Returns when the will is written and the peers were told.
pub(crate) fn run(inheritance: Inheritance) -> Result<(), Error> {
    threads::enter(ThreadKind::Control);
    let Inheritance { control, kvm, will, offer } = inheritance;
    // What it would win is time only.
    let _ = sys::inherited::make_room(&kvm, DESCRIPTORS_READY);
    let will = LastWill::arm(File::from(will));
    let host = Host::from_fd(kvm)?;
    let host = match offer {
        Some(offer) => host.offering(read_offer(&File::from(offer))?),
        None => host,
    };
    kvm::install_handler()?;
    let sandbox = sandbox::close_process();
    let bell = Arc::new(Bell::new().map_err(Error::Serve)?);
    let mut shell = Shell {
        host,
        sandbox,
        will,
        bell,
        machine: None,
        phase_told: None,
        ready: None,
        listener: Listener::from(control),
        epoll: Epoll::new().map_err(Error::Serve)?,
        connections: BTreeMap::new(),
        next_token: CONNECTION_FIRST,
        reason: None,
        has_built: false,
        is_unbegun: false,
        resets_when_whole: false,
    };
    shell.listener.set_nonblocking().map_err(Error::Serve)?;
    shell.watch(shell.listener.as_fd().as_raw_fd(), LISTENER).map_err(Error::Serve)?;
    shell.watch(shell.bell.event().as_raw_fd(), BELL).map_err(Error::Serve)?;
    let reason = shell.serve()?;
    shell.finish(reason);
    match shell.machine.take() {
        // Its threads end with the process, and not before: those that wait for memory would go on with zeroes.
        Some(machine) if machine.is_owed() => std::mem::forget(machine),
        Some(machine) => machine.close(),
        None => {}
    }
    Ok(())
}

/// Others have the same open file, so its position is nobody's.
fn read_offer(file: &File) -> Result<Vec<cpuid::Entry>, Error> {
    if !sys::memfd::is_constant(file) {
        return Err(Error::Offer);
    }
    let length = file.metadata().map_or(0, |metadata| metadata.len()).min(cpuid::offer::BYTES_MAX as u64);
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).map_err(Error::Serve)?;
    cpuid::offer::decode(&bytes).ok_or(Error::Offer)
}

impl Shell {
    fn serve(&mut self) -> Result<Reason, Error> {
        let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
        loop {
            let count = match self.epoll.wait(self.patience_ms(), &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) if self.is_to_trim() => {
                    self.trim();
                    continue;
                }
                Ok(0) => return Err(Error::Forsaken),
                result => result.map_err(Error::Serve)?,
            };
            for event in events.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept(),
                    BELL => {
                        let news = self.bell.take();
                        self.hear(news);
                    }
                    token => self.attend(token),
                }
                if let Some(reason) = self.reason.take() {
                    return Ok(reason);
                }
            }
            if self.is_to_trim() {
                // Only now, when everybody was answered: a VM that nobody entered takes long to close.
                self.ready = None;
            }
        }
    }

    /// Whether it still holds what only the building of its machine needed. One that is parked would take it all back when it runs.
    fn is_to_trim(&self) -> bool {
        self.has_built && self.machine.as_ref().is_some_and(|machine| !machine.is_paused())
    }

    /// Gives that back, once the guest has come to run and there is no news: before, it would be needed again at once.
    fn trim(&mut self) {
        self.has_built = false;
        sys::resident::give_back();
    }

    /// How long to wait for anything: for ever, unless there is something to trim or nobody knows of this process. A daemon that died
    /// between starting it and writing that down would leave it for good.
    fn patience_ms(&self) -> i32 {
        if self.is_to_trim() {
            return TRIM_MS;
        }
        let has_none = self.machine.as_ref().is_none_or(Machine::is_dropped);
        if has_none && self.connections.is_empty() { FORSAKEN_MS } else { -1 }
    }

    fn accept(&mut self) {
        // One a turn: with more waiting, the listener stays readable.
        let socket = match self.listener.accept() {
            Ok(socket) => socket,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return log::line(format_args!("cannot accept a control connection: {error}")),
        };
        if self.connections.len() >= CONNECTIONS_MAX {
            return log::line(format_args!("refused a control connection: {CONNECTIONS_MAX} are open"));
        }
        let token = self.next_token;
        let opened = Connection::new(socket)
            .and_then(|connection| self.watch(connection.raw_fd(), token).map(|()| connection));
        match opened {
            Ok(connection) => {
                self.connections.insert(token, connection);
                self.next_token += 1;
            }
            Err(error) => log::line(format_args!("cannot watch a control connection: {error}")),
        }
    }

    /// One connection has something for us, or room for something from us.
    fn attend(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let (requests, mut gone) = connection.receive();
        for (request, descriptors) in requests {
            let (id, mut handles) = (request.id, Vec::new());
            let result = self.obey(token, request.command, descriptors, &mut handles);
            let Some(connection) = self.connections.get_mut(&token) else { return };
            gone = gone.or(connection.push(Message::Reply { id, result }, handles).err());
            if self.reason.is_some() {
                break;
            }
        }
        let Some(connection) = self.connections.get_mut(&token) else { return };
        gone = gone.or(connection.flush().err());
        match gone {
            None => self.rewatch(token),
            Some(why) => self.drop_connection(token, &why),
        }
    }

    /// Tells every connection; one that does not listen is dropped.
    fn tell_all(&mut self, notice: &Notice) {
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        tokens.into_iter().for_each(|token| self.tell(token, notice.clone()));
    }

    fn tell(&mut self, token: u64, notice: Notice) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        match connection.push(Message::Notice(notice), Vec::new()).and_then(|()| connection.flush()) {
            Ok(()) => self.rewatch(token),
            Err(why) => self.drop_connection(token, &why),
        }
    }

    fn drop_connection(&mut self, token: u64, why: &Gone) {
        if let Some(connection) = self.connections.remove(&token) {
            let _ = self.epoll.ctl(ControlOperation::Delete, connection.raw_fd(), EpollEvent::default());
            if let Some(text) = why.complaint() {
                log::line(format_args!("dropped a control connection: {text}"));
            }
        }
        self.arm_console();
    }

    /// What the guest and its devices have done.
    fn hear(&mut self, news: News) {
        for (device, detail) in news.faults {
            log::line(format_args!("{device}: {detail}"));
            self.tell_all(&Notice::DeviceFault { device, detail });
        }
        if news.faults_lost > 0 {
            log::line(format_args!("{} more device faults were not told", news.faults_lost));
        }
        if news.console {
            self.tell_console();
        }
        if let (true, Some(machine)) = (news.save, &mut self.machine) {
            if let Err(error) = machine.take_moment() {
                log::line(format_args!("the machine is not saved: {}", log::chain(&error)));
            }
            let status = machine.save_status();
            self.tell_all(&Notice::Save(status));
        }
        if let (true, Some(machine)) = (news.settling, &mut self.machine) {
            machine.turn_piece();
        }
        match news.ending {
            None if news.moving => drop(self.move_on(true)),
            None => (),
            Some(Ending::ResetAsked) => self.reset_asked(),
            Some(Ending::PoweredOff) => self.reason = Some(Reason::PoweredOff),
            Some(Ending::TripleFault) => self.reason = Some(Reason::TripleFault),
            Some(Ending::Kvm(text)) => self.reason = Some(Reason::KvmError(text)),
            Some(Ending::GuestPanicked) => {
                self.tell_all(&Notice::GuestPanicked);
                self.reason = Some(Reason::GuestPanicked);
            }
        }
    }

    /// A move has got further. A phase is told before its chores are done, so that no machine runs of which nobody knows.
    /// Answers how the move stands when nothing is left to be done for it.
    fn move_on(&mut self, mut is_news: bool) -> Option<MigrationStatus> {
        loop {
            let (chore, status) = self.machine.as_ref()?.next_chore()?;
            is_news |= self.phase_told.replace(status.phase) != Some(status.phase);
            if std::mem::take(&mut is_news) {
                self.tell_all(&Notice::Migration(Box::new(status.clone())));
            }
            let Some(chore) = chore else {
                let is_whole = (status.side, status.phase) == (Side::Target, Phase::Moved);
                if is_whole && std::mem::take(&mut self.resets_when_whole) {
                    self.reset_asked();
                }
                return Some(status);
            };
            self.machine.as_mut()?.do_chore(chore, &self.host);
        }
    }

    /// The will first; then the peers, for as long as they listen within the bound. What the guest was told is
    /// done stays done: devices finish what is in flight.
    fn finish(&mut self, reason: Reason) {
        self.will.write(reason.clone());
        self.tell_all(&Notice::Exiting(reason.clone()));
        self.say_farewell();
        if let (Some(machine), false) = (&mut self.machine, reason == Reason::Asked)
            && !machine.is_owed()
        {
            machine.stop();
        }
    }

    fn say_farewell(&mut self) {
        let deadline = Instant::now() + Duration::from_millis(FAREWELL_MS_MAX);
        let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
        while self.connections.values().any(Connection::has_queued) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let wait_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1);
            let Ok(count) = self.epoll.wait(wait_ms, &mut events) else { break };
            for event in events.iter().take(count) {
                let token = event.data();
                let flushed = self.connections.get_mut(&token).map(Connection::flush);
                match flushed {
                    Some(Ok(())) => self.rewatch(token),
                    Some(Err(why)) => self.drop_connection(token, &why),
                    None => (),
                }
            }
        }
        // A peer whose packets are left unread hears of a reset connection before it hears the rest.
        self.connections.values_mut().for_each(|connection| drop(connection.receive()));
    }

    fn watch(&self, fd: i32, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
    }

    /// Waits for room only while something is queued.
    fn rewatch(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if let Some(wants) = connection.changed_interest() {
            let events = if wants { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            let event = EpollEvent::new(events, token);
            if let Err(error) = self.epoll.ctl(ControlOperation::Modify, connection.raw_fd(), event) {
                log::line(format_args!("cannot watch a control connection: {error}"));
            }
        }
    }
}
