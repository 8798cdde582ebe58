//! One thread per device: an epoll loop around a [`Handler`]. It knows no queue and no backend, only when to call
//! the handler and how to pause, resume and stop it with nothing lost. Every device starts one in `activate`.
//!
//! ```text
//!            Pause                 nothing in flight, or DRAIN_MS_MAX
//! serving ──────────► draining ───────────────────────────────────────► paused
//!    ▲                   │ Resume                                          │
//!    └───────────────────┴─────────────────────────────────────────────────┘
//! any ── Stop ──► draining up to STOP_MS_MAX ──► the handler is dropped, the thread ends
//! ```
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{
    ActivateError, Active, Begin, QueueWiring, Signals, Stand, ThreadHook, Wiring, with_causes,
};
use super::queue::Fault;
use crate::limits::{DRAIN_MS_MAX, EVENTS_MAX, STOP_MS_MAX};
use crate::pause::NotDrained;

/// What a device does in its thread. A [`Fault`] breaks the device: its driver is told, its kicks are no longer
/// heard, and only what is in flight is still waited for.
pub trait Handler: Send {
    /// Called first, in the thread. Adds the device's own descriptors to `sources`.
    fn started(&mut self, _sources: &Sources) -> io::Result<()> {
        Ok(())
    }
    /// Queue `index` may hold something new. Serves a bounded batch.
    fn kicked(&mut self, index: u16, sources: &Sources) -> Result<Progress, Fault>;
    /// The descriptor added with `token` is ready. Called while draining and paused too, for completions.
    fn event(&mut self, _token: u32, _sources: &Sources) -> Result<(), Fault> {
        Ok(())
    }
    /// Requests that the backend has not answered.
    fn in_flight(&self) -> usize {
        0
    }
    /// Where the queues stand, asked when it is paused with nothing in flight; nothing when that cannot be told.
    fn stand(&mut self) -> Option<Stand>;
    /// From here on nothing new may be taken from queues or backend until [`Handler::resumed`]. Kicks are held
    /// back by the worker; the handler silences its own descriptors that would bring new work.
    fn pausing(&mut self, _sources: &Sources) {}
    /// Undoes [`Handler::pausing`]. Each queue is kicked once afterwards.
    fn resumed(&mut self, _sources: &Sources) {}
}

/// Whether a batch left work behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A kick or an event is needed before there is more to do.
    Idle,
    /// Call again after others had their turn.
    More,
}

/// The descriptors a worker waits for.
pub struct Sources {
    epoll: Epoll,
}

impl Sources {
    /// Calls [`Handler::event`] with `token` when `fd` is ready. The handler keeps the descriptor open.
    pub fn add(&self, fd: &impl AsRawFd, token: u32, interest: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, u64::from(token), interest)
    }

    /// Changes what is waited for; an empty set silences the descriptor without forgetting it.
    pub fn change(&self, fd: &impl AsRawFd, token: u32, interest: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, u64::from(token), interest)
    }

    /// Forgets `fd`.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        data: u64,
        interest: EventSet,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd.as_raw_fd(), EpollEvent::new(interest, data))
    }
}

/// A queue's kick as the worker knows it.
pub struct Kick {
    /// The queue's number.
    pub index: u16,
    /// Signalled by the driver.
    pub event: Arc<EventFd>,
}

/// What a worker is started with.
pub struct WorkerOptions {
    /// The kind of thread: its name, and what the hook is told.
    pub kind: &'static str,
    /// The device's name.
    pub device: String,
    /// The kicks to listen to.
    pub kicks: Vec<Kick>,
    /// Where a fault is told.
    pub signals: Arc<dyn Signals>,
    /// Called first in the thread.
    pub threads: ThreadHook,
    /// Whether the thread starts paused.
    pub begin: Begin,
}

impl WorkerOptions {
    /// A thread of `kind` for `device` that listens to every queue of `wiring`.
    pub fn new(kind: &'static str, device: &str, wiring: &Wiring) -> WorkerOptions {
        let kick = |queue: &QueueWiring| Kick { index: queue.index, event: Arc::clone(&queue.kick) };
        WorkerOptions {
            kind,
            device: device.to_owned(),
            kicks: wiring.queues.iter().map(kick).collect(),
            signals: Arc::clone(&wiring.signals),
            threads: Arc::clone(&wiring.threads),
            begin: wiring.begin.clone(),
        }
    }
}

/// A running thread. Dropping it stops it.
pub struct Worker {
    device: String,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    /// Disconnected when the thread has dropped its handler. Nothing is ever sent.
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
    /// What the last pause told, or where it began.
    stand: Option<Stand>,
}

/// What comes of a pause: where the device stands, if it can be told, or how many requests are in flight.
type Drained = Result<Option<Stand>, usize>;

enum Command {
    Pause(Sender<Drained>),
    Resume,
    Stop,
}

/// Set in the epoll data of kicks, over the position in `kicks`.
const DATA_KICK: u64 = 1 << 32;
/// The epoll data of the command eventfd.
const DATA_COMMAND: u64 = 2 << 32;

impl Worker {
    /// Starts a thread around `handler`.
    pub fn start(options: WorkerOptions, handler: Box<dyn Handler>) -> Result<Worker, ActivateError> {
        let WorkerOptions { kind, device, kicks, signals, threads, begin } = options;
        let failed = |cause| ActivateError::Thread { kind, cause };
        let sources = Sources { epoll: Epoll::new().map_err(failed)? };
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?);
        let command = EpollEvent::new(EventSet::IN, DATA_COMMAND);
        sources.epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), command).map_err(failed)?;
        let (commands, inbox) = channel();
        // One that goes on from elsewhere is paused there until it is let run.
        let stand = match &begin {
            Begin::Restored(stand) => Some(stand.clone()),
            Begin::Serving | Begin::Paused => None,
        };
        let turns = vec![false; kicks.len()];
        let service = Service {
            handler,
            sources,
            wake: Arc::clone(&wake),
            inbox,
            kicks,
            turns,
            signals,
            phase: if begin == Begin::Serving { Phase::Serving } else { Phase::Paused },
            broken: false,
        };
        let (ending, ended) = channel();
        #[cfg(any(test, fuzzing))]
        let service = match by_hand::keep(service) {
            Some(service) => service,
            None => return Ok(Worker { device, commands, wake, ended, thread: None, stand }),
        };
        let run = move || {
            threads(kind);
            service.run();
            drop(ending);
        };
        let thread = std::thread::Builder::new().name(kind.to_owned()).spawn(run).map_err(failed)?;
        Ok(Worker { device, commands, wake, ended, thread: Some(thread), stand })
    }

    /// A thread that has ended takes no command and holds nothing, so a failed send needs no answer.
    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // An eventfd refuses only when its counter is full, and then the thread is awake anyway.
            let _ = self.wake.write(1);
        }
    }

    fn end(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook; there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

impl Active for Worker {
    fn pause_within(&mut self, patience: Duration) -> Result<(), NotDrained> {
        self.stand = None;
        let (answer, answered) = channel();
        self.send(Command::Pause(answer));
        match answered.recv_timeout(patience) {
            Ok(Ok(stand)) => {
                self.stand = stand;
                Ok(())
            }
            Ok(Err(in_flight)) => Err(NotDrained { device: self.device.clone(), in_flight }),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Ok(()),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                Err(NotDrained { device: self.device.clone(), in_flight: 1 })
            }
        }
    }

    fn stand(&self) -> Option<Stand> {
        self.stand.clone()
    }

    fn resume(&mut self) {
        self.send(Command::Resume);
    }

    fn ask_to_stop(&mut self) {
        self.send(Command::Stop);
    }

    fn has_stopped(&mut self, patience: Duration) -> bool {
        self.ended.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
    }

    fn stop(mut self: Box<Self>) {
        self.end();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the thread is about.
enum Phase {
    Serving,
    Draining { deadline: Instant, answer: Sender<Drained> },
    Paused,
    Stopping { deadline: Instant },
}

/// The thread's side.
struct Service {
    handler: Box<dyn Handler>,
    sources: Sources,
    wake: Arc<EventFd>,
    inbox: Receiver<Command>,
    kicks: Vec<Kick>,
    /// For each kick whether the handler wants another turn without one.
    turns: Vec<bool>,
    signals: Arc<dyn Signals>,
    phase: Phase,
    broken: bool,
}

impl Service {
    fn run(mut self) {
        self.begin();
        loop {
            self.advance();
            if self.is_over() || !self.turn(self.timeout_ms()) {
                return;
            }
        }
    }

    fn begin(&mut self) {
        let started = self.handler.started(&self.sources).and_then(|()| self.listen(Listen::Start));
        if let Err(cause) = started {
            self.fail(format!("the device's thread cannot listen: {cause}"));
        }
        if matches!(self.phase, Phase::Paused) && !self.broken {
            self.deafen();
        }
    }

    /// Waits once and does what there is to do; false when there is no more waiting.
    fn turn(&mut self, timeout_ms: i32) -> bool {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.sources.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => 0,
            Err(cause) => {
                self.fail(format!("the device's thread cannot wait: {cause}"));
                return false;
            }
        };
        for event in events.iter().take(count) {
            self.dispatch(event.data());
        }
        self.take_turns();
        true
    }

    fn dispatch(&mut self, data: u64) {
        if data == DATA_COMMAND {
            // Only the level matters; the inbox says how many.
            let _ = self.wake.read();
            while let Ok(command) = self.inbox.try_recv() {
                self.obey(command);
            }
        } else if data & DATA_KICK != 0 {
            let position = usize::try_from(data & !DATA_KICK).unwrap_or(usize::MAX);
            let Some(kick) = self.kicks.get(position) else { return };
            // A read that finds nothing was beaten by an earlier one; the queue is looked at all the same.
            let _ = kick.event.read();
            if let Some(turn) = self.turns.get_mut(position) {
                *turn = true;
            }
        } else {
            let token = u32::try_from(data).unwrap_or(u32::MAX);
            if let Err(fault) = self.handler.event(token, &self.sources) {
                self.break_down(&fault);
            }
        }
    }

    /// Serves each queue that was kicked or wants more, once.
    fn take_turns(&mut self) {
        for position in 0..self.kicks.len() {
            if self.broken || !matches!(self.phase, Phase::Serving) {
                return;
            }
            let Some(turn) = self.turns.get_mut(position) else { return };
            if !std::mem::take(turn) {
                continue;
            }
            let Some(kick) = self.kicks.get(position) else { return };
            match self.handler.kicked(kick.index, &self.sources) {
                Ok(Progress::Idle) => {}
                Ok(Progress::More) => {
                    if let Some(turn) = self.turns.get_mut(position) {
                        *turn = true;
                    }
                }
                Err(fault) => self.break_down(&fault),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Pause(answer) => {
                self.quieten();
                self.phase = Phase::Draining { deadline: in_ms(DRAIN_MS_MAX), answer };
            }
            Command::Resume if matches!(self.phase, Phase::Draining { .. } | Phase::Paused) => {
                self.phase = Phase::Serving;
                if self.broken {
                    return;
                }
                if let Err(cause) = self.listen(Listen::Again) {
                    self.fail(format!("the device's thread cannot listen: {cause}"));
                    return;
                }
                self.handler.resumed(&self.sources);
                self.turns.fill(true);
            }
            Command::Resume => {}
            // Whoever asked first has the deadline; asking again does not put it off.
            Command::Stop if matches!(self.phase, Phase::Stopping { .. }) => {}
            Command::Stop => {
                self.quieten();
                self.phase = Phase::Stopping { deadline: in_ms(STOP_MS_MAX) };
            }
        }
    }

    /// Stops taking new work, if that has not happened yet.
    fn quieten(&mut self) {
        if matches!(self.phase, Phase::Serving) && !self.broken {
            self.deafen();
        }
    }

    fn deafen(&mut self) {
        // The kicks stay signalled, so what the driver says meanwhile is heard afterwards. This fails only for
        // descriptors that were never added, which need no silencing.
        let _ = self.listen(Listen::Not);
        self.handler.pausing(&self.sources);
    }

    /// Answers a pause that has come to its end.
    fn advance(&mut self) {
        let Phase::Draining { deadline, answer } = &self.phase else { return };
        let in_flight = self.handler.in_flight();
        if in_flight == 0 {
            let stand = if self.broken { None } else { self.handler.stand() };
            // Nobody waits any more when the other side gave up first.
            let _ = answer.send(Ok(stand));
        } else if Instant::now() >= *deadline {
            let _ = answer.send(Err(in_flight));
        } else {
            return;
        }
        self.phase = Phase::Paused;
    }

    fn is_over(&self) -> bool {
        match self.phase {
            Phase::Stopping { deadline } => self.handler.in_flight() == 0 || Instant::now() >= deadline,
            _ => false,
        }
    }

    fn timeout_ms(&self) -> i32 {
        let deadline = match self.phase {
            Phase::Serving if !self.broken && self.turns.contains(&true) => return 0,
            Phase::Serving | Phase::Paused => return -1,
            Phase::Draining { deadline, .. } | Phase::Stopping { deadline } => deadline,
        };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
        i32::try_from(left).unwrap_or(i32::MAX)
    }

    fn listen(&self, how: Listen) -> io::Result<()> {
        for (position, kick) in (0_u64..).zip(&self.kicks) {
            let (operation, interest) = match how {
                Listen::Start => (ControlOperation::Add, EventSet::IN),
                Listen::Again => (ControlOperation::Modify, EventSet::IN),
                Listen::Not => (ControlOperation::Modify, EventSet::empty()),
            };
            let event = EpollEvent::new(interest, DATA_KICK | position);
            self.sources.epoll.ctl(operation, kick.event.as_raw_fd(), event)?;
        }
        Ok(())
    }

    fn break_down(&mut self, fault: &Fault) {
        self.fail(with_causes(fault));
    }

    fn fail(&mut self, detail: String) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        self.signals.broken(detail);
        if matches!(self.phase, Phase::Serving) {
            self.deafen();
        }
    }
}

/// What becomes of the kicks.
#[derive(Clone, Copy)]
enum Listen {
    Start,
    Again,
    Not,
}

fn in_ms(ms: u64) -> Instant {
    let now = Instant::now();
    now.checked_add(Duration::from_millis(ms)).unwrap_or(now)
}

#[cfg(any(test, fuzzing))]
pub(crate) mod by_hand;
#[cfg(test)]
mod tests;
