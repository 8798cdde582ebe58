//! A move of a machine that runs or is paused, as the daemons of its two ends carry it: streams for the VMMs, progress, and when the two
//! are told what `servers::moving` has decided. The order is everything:
//!
//! ```text
//!  source  VMM at ready ── VMM promises to stand still ── commit is saved ── said ─▶ ... taken ─▶ VMM ends
//!  target  VMM at ready ── ready is saved ── said ─▶ ... commit heard ── moved is saved ── VMM runs ── said
//! ```
//! Where the machine runs there while some of its memory is owed, *taken* is said when all of it is there, and the source's VMM
//! answers for it until then, over other streams when those break.
use std::pin::pin;
use std::time::Instant;

use model::operation::Progress;
use model::{Code, OperationId, ServerId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use wire::migration::{MigrationStatus, Mode, Phase as VmmPhase, SendLimits, Side};
use wire::peer::{Message, Saying};

use super::link::{Link, Received, out_of_turn};
use super::outlook::Outlook;
use super::streams::{Awaited, Pumps};
use super::take::Pace;
use super::{Migrations, limits};
use crate::error::{Error, Result};
use crate::operations;
use crate::servers::moving::Move;
use crate::servers::moving::parcel::Packed;
use crate::servers::moving::plan::{Event, Phase};
use crate::servers::record::ServerRecord;
use crate::store::records;

/// How many streams the memory of a machine takes: each costs a processor at either end.
pub(super) fn memory_streams() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors).unwrap_or(limits::LIVE_STREAMS_MAX).clamp(1, limits::LIVE_STREAMS_MAX)
}

/// How many a move has that began here, whatever there is now.
pub(super) fn streams_of(begun: &Move) -> u16 {
    begun.streams.unwrap_or_else(memory_streams)
}

impl Migrations {
    /// Sends the machine of a server whose parcel the target has accepted, to the end of the move.
    pub(super) async fn send_machine<S>(
        &self,
        link: &mut Link<S>,
        begun: &Move,
        (bounds, mode): (SendLimits, Mode),
        (packed, streams, job): (&Packed, u16, Option<OperationId>),
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (sockets, pumps) = self.open_streams(begun, usize::from(streams), packed.disks.len()).await?;
        self.core.checkpoint("move.joined")?;
        // One that was cancelled meanwhile is not begun.
        let preparing = Progress { phase: "preparing".to_owned(), percent: 1, ..Progress::default() };
        self.write_progress(begun, job, preparing).await?;
        self.core.checkpoint("move.begun")?;
        self.servers.send_live(begun.server, sockets, (bounds, mode)).await?;
        self.bounds.told(begun.id, bounds);
        self.core.checkpoint("move.sending")?;
        let word = self.follow(link, begun, job).await?;
        self.core.checkpoint("move.heard")?;
        if word == Saying::Ready {
            // Before it is saved: what is promised can be taken back by this daemon, what has been saved cannot.
            self.servers.give_up(begun.server).await?;
            self.core.checkpoint("move.promised")?;
        }
        if self.heed(link, begun.id, word).await?.is_forgotten {
            return Ok(());
        }
        // A target that was told answers at once: what does not come is asked for again on a new connection.
        self.listen_to(link, begun, Some(pumps), limits::CONNECT).await
    }

    /// What the other host says, or nothing when it is time to look at the VMM here.
    async fn next_word<S>(&self, link: &mut Link<S>, begun: &Move) -> Result<Option<Received>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        tokio::select! {
            biased;
            received = link.receive() => received.map(Some),
            () = self.servers.move_told(begun.server) => Ok(None),
        }
    }

    /// Tells how far the machine is until the target says something.
    async fn follow<S>(&self, link: &mut Link<S>, begun: &Move, job: Option<OperationId>) -> Result<Saying>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut told, mut beaten) = (None::<Instant>, Instant::now());
        let mut outlook = Outlook::default();
        loop {
            match self.next_word(link, begun).await? {
                Some(Received::Message(Message::Say(word))) => return Ok(word),
                Some(Received::Message(Message::Refuse { detail })) => {
                    return Err(Error::new(Code::HostUnreachable, detail));
                }
                Some(_) => return Err(out_of_turn()),
                None => {}
            }
            let status = self.servers.move_status(begun.server).await?;
            if status.phase.is_end() {
                return Err(ended(&status));
            }
            if told.is_none_or(|told| told.elapsed() >= crate::servers::limits::PROGRESS_EVERY) {
                told = Some(Instant::now());
                self.write_progress(begun, job, outlook.progress(&status)).await?;
            }
            self.keep_within(begun).await;
            if beaten.elapsed() >= limits::BEAT {
                beaten = Instant::now();
                link.say(Saying::Copying).await?;
            }
        }
    }

    /// Tells the VMM that sends when its bounds are to be others. One that does not answer is told again.
    async fn keep_within(&self, held: &Move) {
        let Some(wanted) = self.bounds.untold(held.id) else { return };
        match self.servers.limit_live(held.server, wanted).await {
            Ok(()) => self.bounds.told(held.id, wanted),
            Err(cause) => {
                tracing::info!(server = %held.server, "its move goes on as before: {}", cause.chain());
            }
        }
    }

    /// Receives the machine of a server that has just been recorded, until all of it is here.
    pub(super) async fn receive_machine<S>(
        &self,
        link: &mut Link<S>,
        begun: &Move,
        packed: &Packed,
        (streams, may_owe): (u16, bool),
    ) -> Result<(Phase, Pumps)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let of_memory = usize::from(streams);
        let awaited = self.await_streams(begun, of_memory.saturating_add(packed.disks.len()));
        self.servers.awaited(begun.server).await?;
        self.core.checkpoint("move.awaited")?;
        link.say(Saying::Copying).await?;
        let (sockets, pumps) = awaited.all(of_memory).await?;
        self.servers.receive_live(begun.server, sockets, may_owe).await?;
        self.core.checkpoint("move.receiving")?;
        if let Some(word) = self.wait_for_arrival(link, begun).await? {
            return Ok((self.give(link, begun.id, Event::Heard(word)).await?, pumps));
        }
        self.core.checkpoint("move.arrived")?;
        Ok((self.give(link, begun.id, Event::Done).await?, pumps))
    }

    /// Waits until the VMM has the machine, or the source says that it will not.
    async fn wait_for_arrival<S>(&self, link: &mut Link<S>, begun: &Move) -> Result<Option<Saying>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut heard, mut pace) = (Instant::now(), Pace::new());
        loop {
            match self.next_word(link, begun).await? {
                Some(Received::Message(Message::Say(Saying::Copying))) => heard = Instant::now(),
                Some(Received::Message(Message::Say(Saying::Abort))) => return Ok(Some(Saying::Abort)),
                Some(_) => return Err(out_of_turn()),
                None => {}
            }
            if heard.elapsed() > limits::SILENCE {
                return Err(Error::new(Code::HostUnreachable, "the other host has fallen silent"));
            }
            let status = self.servers.move_status(begun.server).await?;
            match status.phase {
                VmmPhase::Ready => return Ok(None),
                phase if phase.is_end() => return Err(ended(&status)),
                // What is skipped is not told here, but sent in no time.
                _ => pace.came(status.progress.sent_bytes)?,
            }
        }
    }
}

impl Migrations {
    /// Keeps what the target is owed for it, until it says more. Streams that are not there, or not any more, are opened.
    pub(super) async fn hold<S>(
        &self,
        link: &mut Link<S>,
        held: &Move,
        pumps: &mut Option<Pumps>,
    ) -> Result<Saying>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let server = held.server;
        let look =
            move |connection: &rusqlite::Connection| records::find::<ServerRecord>(connection, server.0);
        let job = self.core.store.read(look).await?.and_then(|record| record.life.job).map(|job| job.id);
        let (mut told, end) = (None::<Instant>, Instant::now() + limits::SILENCE);
        let mut outlook = Outlook::default();
        self.bounds.begin(held.id, None);
        link.has_held = true;
        loop {
            self.keep_within(held).await;
            let Some(status) = self.servers.owing(server).await? else {
                link.say(Saying::Lost).await?;
                return word(link.message(limits::SILENCE).await?);
            };
            let is_owing = status.phase == VmmPhase::Owing;
            if pumps.is_none() && is_owing {
                let (sockets, opened) = self.open_streams(held, usize::from(streams_of(held)), 0).await?;
                self.servers.reconnect(server, sockets).await?;
                self.core.checkpoint("move.reconnected")?;
                *pumps = Some(opened);
            }
            if told.is_none_or(|told| told.elapsed() >= crate::servers::limits::PROGRESS_EVERY) {
                told = Some(Instant::now());
                let shown = outlook.progress(&status);
                self.core
                    .store
                    .write(move |tx| job.map_or(Ok(()), |job| operations::progress(tx, job, shown)))
                    .await?;
            }
            let broke = async {
                match pumps {
                    Some(pumps) if is_owing && !pumps.is_empty() => drop(pumps.join_next().await),
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                message = link.message(end.saturating_duration_since(Instant::now())) => return word(message?),
                () = broke => {
                    if self.servers.owing(server).await?.is_some_and(|status| status.phase == VmmPhase::Owing) {
                        return Err(Error::new(Code::HostUnreachable, "a stream of the machine's memory broke"));
                    }
                    // The end of all of them: it has all.
                    *pumps = Some(Pumps::new());
                }
                () = self.servers.move_told(server) => {}
            }
        }
    }

    /// Stays with a machine that has come and is owed memory, until all of that is here, which is said then, or the connection is lost:
    /// then the source asks again. `awaited` are so many streams in the place of those that broke.
    pub(super) async fn see_whole<S>(
        &self,
        link: &mut Link<S>,
        held: &Move,
        mut pumps: Pumps,
        awaited: Option<(Awaited<'_>, usize)>,
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let server = held.server;
        let mut said = Instant::now();
        let mut is_opened = awaited.is_none();
        let mut opened = pin!(async {
            match awaited {
                Some((awaited, count)) => awaited.all(count).await,
                None => std::future::pending().await,
            }
        });
        // What is said of it may be too cautious: a VMM that has just died is not known to be dead.
        while self.servers.is_owed(server).await? {
            if said.elapsed() >= limits::BEAT {
                said = Instant::now();
                link.say(Saying::Holding).await?;
            }
            let broke = async {
                match pumps.is_empty() {
                    true => std::future::pending().await,
                    false => drop(pumps.join_next().await),
                }
            };
            tokio::select! {
                biased;
                received = link.receive() => self.heed_owing(server, received?).await?,
                opened = &mut opened, if !is_opened => {
                    let (sockets, joined) = opened?;
                    self.servers.reconnect(server, sockets).await?;
                    self.core.checkpoint("move.reconnected")?;
                    (pumps, is_opened) = (joined, true);
                }
                () = broke => {
                    if self.servers.is_owed(server).await? {
                        return Err(Error::new(Code::HostUnreachable, "a stream of the machine's memory broke"));
                    }
                }
                () = self.servers.move_told(server) => {}
            }
        }
        self.core.checkpoint("move.whole")?;
        link.say(Saying::Taken).await?;
        // What its VMM says last is carried to the source's.
        let ended = async { while pumps.join_next().await.is_some() {} };
        let _ = timeout(limits::CONVERSATION, ended).await;
        Ok(())
    }

    /// Heeds what a source may say that answers for memory. A machine that waits for what is lost is ended.
    async fn heed_owing(&self, server: ServerId, received: Received) -> Result<()> {
        match received {
            Received::Message(Message::Say(Saying::Lost)) => {
                // The last of it may have come just before: only its VMM knows.
                match self.servers.lacks_memory(server).await? {
                    Some(true) => {
                        let what = "the memory that it was owed is lost; it starts anew from its disks";
                        tracing::warn!(%server, "{what}");
                        self.servers.end_owed(server)
                    }
                    Some(false) => Ok(()),
                    None => {
                        let detail = "its VMM does not say whether the machine lacks the memory that is lost";
                        tracing::warn!(%server, "{detail}");
                        Err(Error::new(Code::HostUnreachable, detail))
                    }
                }
            }
            // Said before it had heard that the machine runs.
            Received::Message(Message::Say(Saying::Commit | Saying::Copying)) => Ok(()),
            _ => Err(out_of_turn()),
        }
    }
}

/// A word of the other host about a move.
pub(super) fn word(message: Message) -> Result<Saying> {
    match message {
        Message::Say(word) => Ok(word),
        Message::Refuse { detail } => Err(Error::new(Code::HostUnreachable, detail)),
        _ => Err(out_of_turn()),
    }
}

/// Why a move has ended before anybody had decided it.
fn ended(status: &MigrationStatus) -> Error {
    let why = status.detail.as_deref().unwrap_or("it was given up");
    let end = match status.side {
        Side::Source => "the machine did not move",
        Side::Target => "the machine did not arrive",
    };
    Error::new(Code::MachineFailed, format!("{end}: {why}"))
}
