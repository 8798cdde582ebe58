//! One control connection to a VMM: requests matched with replies, notices passed on, every wait bounded.
//! It knows no server; `servers` decides what to ask and what a notice means.
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::Code;
use sys::seqpacket::Socket;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::{mpsc, oneshot, watch};
use wire::channel::Channel;
use wire::control::{
    Command, Fault, MachineState, Message, Notice, PROTOCOL, PROTOCOL_PARKS, Reply, Request, Sandbox,
};

use super::watched::{Watched, watch};
use crate::error::Error;
use crate::limits;

/// A connection to a VMM. Cheap to clone; closed when the last clone is dropped.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    _reader: Arc<Reader>,
}

/// What a VMM says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// What its machine does.
    pub state: MachineState,
    /// Total bytes the console has written.
    pub console_written: u64,
    /// What it closed behind itself.
    pub sandbox: Sandbox,
}

/// Why a command did not work.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The VMM closed the connection, which it does when it ends.
    #[error("the VMM has closed its control connection")]
    Gone,
    /// It did not answer in time.
    #[error("the VMM did not answer within {0:?}")]
    Timeout(Duration),
    /// It refused.
    #[error("the VMM refused: {}", .0.detail)]
    Refused(Fault),
    /// It answered something else, or the command could not be sent.
    #[error("the VMM and the daemon do not understand each other: {0}")]
    Protocol(String),
}

impl From<AskError> for Error {
    fn from(cause: AskError) -> Error {
        Error::new(Code::MachineFailed, cause.to_string())
    }
}

/// A reply with its descriptors, or a refusal.
type Answer = std::result::Result<(Reply, Vec<OwnedFd>), Fault>;

type Waiting = HashMap<u64, oneshot::Sender<Answer>>;

struct Shared {
    socket: AsyncFd<Watched<Channel>>,
    /// `None` once the connection has closed.
    heard: Mutex<Option<Heard>>,
    next: AtomicU64,
    /// What the VMM speaks, as it has said.
    protocol: AtomicU32,
    /// `None` once the connection has closed.
    waiting: Mutex<Option<Waiting>>,
    closed: watch::Sender<bool>,
}

/// A command that has been sent, and that the VMM may be carrying out: it does so one after the other. Nobody waits for the reply any
/// more when this is dropped.
pub struct Asked {
    link: Link,
    id: u64,
    timeout: Duration,
    deadline: Instant,
    answer: oneshot::Receiver<Answer>,
}

impl Asked {
    /// Waits for the reply, within what is left of the timeout that it was sent with.
    pub async fn answer(mut self) -> std::result::Result<(Reply, Vec<OwnedFd>), AskError> {
        match tokio::time::timeout_at(self.deadline.into(), &mut self.answer).await {
            Ok(Ok(answer)) => answer.map_err(AskError::Refused),
            Ok(Err(_)) => Err(AskError::Gone),
            Err(_) => Err(AskError::Timeout(self.timeout)),
        }
    }

    /// The same of a command whose only good answer is `Done`.
    pub async fn done(self) -> std::result::Result<(), AskError> {
        match self.answer().await? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(AskError::Protocol(format!("a command was answered with {other:?}"))),
        }
    }

    /// How long [`Asked::answer`] may still take.
    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(waiting) = self.link.shared.waiting().as_mut() {
            waiting.remove(&self.id);
        }
    }
}

/// Who is told what the VMM says unasked.
struct Heard {
    console: watch::Sender<u64>,
    notices: mpsc::Sender<Notice>,
}

/// The task that reads; it ends with the last clone of the link.
struct Reader(tokio::task::JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Link {
    /// Connects to the socket at `path` and exchanges greetings within `timeout`. Notices other than console
    /// output go to `notices`; when it is full they are dropped, because a guest can cause them at will.
    pub async fn connect(
        path: &Path,
        console: watch::Sender<u64>,
        notices: mpsc::Sender<Notice>,
        timeout: Duration,
    ) -> std::result::Result<(Link, Hello), AskError> {
        let socket = Socket::connect(path).map_err(|_| AskError::Gone)?;
        let unusable = |cause: std::io::Error| AskError::Protocol(cause.to_string());
        socket.set_nonblocking().map_err(unusable)?;
        let socket =
            watch(Channel::new(socket), Interest::READABLE | Interest::WRITABLE).map_err(unusable)?;
        let shared = Arc::new(Shared {
            socket,
            heard: Mutex::new(Some(Heard { console, notices })),
            next: AtomicU64::new(1),
            protocol: AtomicU32::new(0),
            waiting: Mutex::new(Some(HashMap::new())),
            closed: watch::Sender::new(false),
        });
        let reading = shared.clone();
        let reader = tokio::spawn(async move {
            reading.read().await;
            reading.close();
        });
        let link = Link { shared, _reader: Arc::new(Reader(reader)) };
        let hello = link.greet(timeout).await?;
        Ok((link, hello))
    }

    /// Has others be told from now on what those of [`Link::connect`] were.
    pub fn pass_to(&self, console: watch::Sender<u64>, notices: mpsc::Sender<Notice>) {
        if let Some(heard) = self.shared.heard().as_mut() {
            *heard = Heard { console, notices };
        }
    }

    /// Asks what it is and does.
    pub async fn greet(&self, timeout: Duration) -> std::result::Result<Hello, AskError> {
        match self.ask(Command::Hello { protocol: PROTOCOL }, &[], timeout).await? {
            Reply::Hello { state, console_written, sandbox, protocol, .. } => {
                self.shared.protocol.store(protocol, Ordering::Relaxed);
                Ok(Hello { state, console_written, sandbox })
            }
            other => Err(AskError::Protocol(format!("a greeting was answered with {other:?}"))),
        }
    }

    /// Version of the protocol that the VMM speaks: an older daemon may have started it.
    pub fn protocol(&self) -> u32 {
        self.shared.protocol.load(Ordering::Relaxed)
    }

    /// Sends a command with its descriptors and waits for its reply.
    pub async fn ask(
        &self,
        command: Command,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> std::result::Result<Reply, AskError> {
        Ok(self.ask_for(command, descriptors, timeout).await?.0)
    }

    /// As [`Link::ask`], of a VMM that answers with descriptors.
    pub async fn ask_for(
        &self,
        command: Command,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> std::result::Result<(Reply, Vec<OwnedFd>), AskError> {
        self.send(command, descriptors, timeout).await?.answer().await
    }

    /// Sends a command with its descriptors. Its reply may be waited for later, `timeout` from now at most.
    pub async fn send(
        &self,
        command: Command,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> std::result::Result<Asked, AskError> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        match self.shared.waiting().as_mut() {
            Some(waiting) if waiting.len() < limits::COMMANDS_MAX => waiting.insert(id, sender),
            Some(_) => return Err(AskError::Protocol("too many commands wait for this VMM".to_owned())),
            None => return Err(AskError::Gone),
        };
        let asked = Asked { link: self.clone(), id, timeout, deadline: Instant::now() + timeout, answer };
        let request = Request { id, command };
        let sent = self.shared.send(&request, descriptors);
        match tokio::time::timeout_at(asked.deadline.into(), sent).await {
            Ok(Ok(())) => Ok(asked),
            Ok(Err(cause)) => Err(cause),
            Err(_) => Err(AskError::Timeout(timeout)),
        }
    }

    /// Sends a command whose answer nobody waits for.
    pub async fn tell(&self, command: Command, timeout: Duration) {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        // One that has gone is missed by whoever waits for it.
        let _ = tokio::time::timeout(timeout, self.shared.send(&Request { id, command }, &[])).await;
    }

    /// Sends a command whose only good answer is `Done`.
    pub async fn order(&self, command: Command, timeout: Duration) -> std::result::Result<(), AskError> {
        self.send(command, &[], timeout).await?.done().await
    }

    /// Has the machine stand still for something that its guest does not notice. A VMM of before knows only a pause that somebody asked
    /// for: its guest's clock falls behind by it.
    pub async fn park(&self, timeout: Duration) -> std::result::Result<(), AskError> {
        let parks = self.protocol() >= PROTOCOL_PARKS;
        self.order(if parks { Command::Park } else { Command::Pause }, timeout).await
    }

    /// Whether the VMM has closed it.
    pub fn is_closed(&self) -> bool {
        *self.shared.closed.borrow()
    }

    /// Waits until the VMM has closed it. Cancel-safe.
    pub async fn closed(&self) {
        let mut closed = self.shared.closed.subscribe();
        // The sender lives in `self`, so this ends only by being closed.
        let _ = closed.wait_for(|closed| *closed).await;
    }
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Option<Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dropping the senders tells everybody who waits.
    fn close(&self) {
        *self.heard() = None;
        *self.waiting() = None;
        self.closed.send_replace(true);
    }

    async fn send(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), AskError> {
        // Tried before anybody has said that it can be written to: of a new connection the runtime learns that only when it looks
        // at its events again, behind whatever its threads are at.
        let mut ready: Option<AsyncFdReadyGuard<'_, _>> = None;
        loop {
            match self.socket.get_ref().0.send(request, descriptors) {
                Ok(()) => return Ok(()),
                Err(cause) if cause.is_would_block() => {}
                Err(wire::channel::Error::Socket(_)) => return Err(AskError::Gone),
                Err(cause) => return Err(AskError::Protocol(cause.to_string())),
            }
            if let Some(mut refused) = ready.take() {
                refused.clear_ready();
            }
            ready = Some(self.socket.writable().await.map_err(|_| AskError::Gone)?);
        }
    }

    /// Reads until the VMM closes, or says what makes no sense or too much. It may be in an attacker's hands, so it gets
    /// neither the runtime's thread nor the daemon's time for itself.
    async fn read(&self) {
        let mut unasked = Unasked::new(Instant::now());
        let (mut turn, mut is_reset) = (0, false);
        loop {
            // Waiting for a socket that stays readable never lets another task run.
            if turn == limits::PACKETS_PER_TURN {
                turn = 0;
                tokio::task::yield_now().await;
            }
            let Ok(mut ready) = self.socket.readable().await else { return };
            let received = ready.get_inner().0.receive::<Message>();
            let (message, descriptors) = match received {
                Ok(Some(received)) => received,
                Ok(None) => return,
                Err(cause) if cause.is_would_block() => {
                    turn = 0;
                    ready.clear_ready();
                    continue;
                }
                // It ended with a command of ours unread, and what it had said before that comes behind the news.
                Err(wire::channel::Error::Socket(cause))
                    if cause.kind() == std::io::ErrorKind::ConnectionReset
                        && !std::mem::replace(&mut is_reset, true) =>
                {
                    continue;
                }
                Err(cause) => {
                    tracing::warn!("a VMM's message cannot be read: {cause}");
                    return;
                }
            };
            turn += 1;
            if !unasked.take(Instant::now()) {
                return tracing::warn!("a VMM says too much unasked; its connection is closed");
            }
            match message {
                Message::Reply { id, result } => {
                    let sender = self.waiting().as_mut().and_then(|waiting| waiting.remove(&id));
                    // Nobody waits any more when the reply came after its time.
                    if let Some(sender) = sender {
                        unasked.answered();
                        let _ = sender.send(result.map(|reply| (reply, descriptors)));
                    }
                }
                Message::Notice(notice) => self.pass(notice),
            }
        }
    }

    fn pass(&self, notice: Notice) {
        let heard = self.heard();
        match (heard.as_ref(), notice) {
            (Some(heard), Notice::Console { written }) => drop(heard.console.send_replace(written)),
            (Some(heard), notice) => {
                if let Err(mpsc::error::TrySendError::Full(notice)) = heard.notices.try_send(notice) {
                    tracing::debug!("dropped a notice: {notice:?}");
                }
            }
            (None, _) => {}
        }
    }
}

/// How much more a VMM may say that is no answer.
struct Unasked {
    left: u32,
    renewed: Instant,
}

impl Unasked {
    fn new(now: Instant) -> Unasked {
        Unasked { left: limits::UNASKED_MAX, renewed: now }
    }

    /// Counts one packet; `false` when it is one too many.
    fn take(&mut self, now: Instant) -> bool {
        if now.duration_since(self.renewed) >= limits::UNASKED_EVERY {
            *self = Unasked::new(now);
        }
        let left = self.left.checked_sub(1);
        self.left = left.unwrap_or_default();
        left.is_some()
    }

    /// The packet answered a command of ours. One notice may follow, such as word of the console.
    fn answered(&mut self) {
        self.left = self.left.saturating_add(2);
    }
}

#[cfg(test)]
mod tests;
