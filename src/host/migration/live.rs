//! A move of a machine that runs or is paused, as the daemons of its two ends carry it: streams for the VMMs, progress, and when the two
//! are told what `servers::moving` has decided. The order is everything:
//!
//! ```text
//!  source  VMM at ready ── VMM promises to stand still ── commit is saved ── said ─▶ ... taken ─▶ VMM ends
//!  target  VMM at ready ── ready is saved ── said ─▶ ... commit heard ── moved is saved ── VMM runs ── said
//! ```
use std::time::Instant;

use model::migration::MigrateServer;
use model::operation::Progress;
use model::{Code, OperationId};
use tokio::io::{AsyncRead, AsyncWrite};
use wire::migration::{MigrationStatus, Phase as VmmPhase, SendLimits, Side};
use wire::peer::{Message, Saying};

use super::link::{Link, Received, out_of_turn};
use super::streams::Pumps;
use super::take::Pace;
use super::{Migrations, limits};
use crate::error::{Error, Result};
use crate::servers::moving::Move;
use crate::servers::moving::parcel::Packed;
use crate::servers::moving::plan::{Event, Phase};

/// How many streams the memory of a machine takes: each costs a processor at either end.
pub(super) fn memory_streams() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors).unwrap_or(limits::LIVE_STREAMS_MAX).clamp(1, limits::LIVE_STREAMS_MAX)
}

impl Migrations {
    /// Sends the machine of a server whose parcel the target has accepted, to the end of the move.
    pub(super) async fn send_machine<S>(
        &self,
        link: &mut Link<S>,
        begun: &Move,
        spec: &MigrateServer,
        (packed, streams, job): (&Packed, u16, Option<OperationId>),
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (sockets, _pumps) = self.open_streams(begun, usize::from(streams), packed.disks.len()).await?;
        self.core.checkpoint("move.joined")?;
        let aims = SendLimits::default();
        let limits = SendLimits {
            downtime_ms: spec.downtime_ms.unwrap_or(aims.downtime_ms),
            bandwidth_bytes_per_s: spec.bandwidth_bytes_per_s,
            ..aims
        };
        // One that was cancelled meanwhile is not begun.
        let preparing = Progress { phase: "preparing".to_owned(), percent: 1, ..Progress::default() };
        self.write_progress(begun, job, preparing).await?;
        self.core.checkpoint("move.begun")?;
        self.servers.send_live(begun.server, sockets, limits).await?;
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
        self.listen_to(link, begun.id, limits::CONNECT).await
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
                self.write_progress(begun, job, progress(&status)).await?;
            }
            if beaten.elapsed() >= limits::BEAT {
                beaten = Instant::now();
                link.say(Saying::Copying).await?;
            }
        }
    }

    /// Receives the machine of a server that has just been recorded, until all of it is here.
    pub(super) async fn receive_machine<S>(
        &self,
        link: &mut Link<S>,
        begun: &Move,
        packed: &Packed,
        streams: u16,
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
        self.servers.receive_live(begun.server, sockets).await?;
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

/// Why a move has ended before anybody had decided it.
fn ended(status: &MigrationStatus) -> Error {
    let why = status.detail.as_deref().unwrap_or("it was given up");
    let end = match status.side {
        Side::Source => "the machine did not move",
        Side::Target => "the machine did not arrive",
    };
    Error::new(Code::MachineFailed, format!("{end}: {why}"))
}

/// How far a source is, as its operation shows it. What was sent again counts again, so the whole grows.
fn progress(status: &MigrationStatus) -> Progress {
    let sent = status.progress.sent_bytes.saturating_add(status.progress.skipped_bytes);
    let total = sent.saturating_add(status.progress.left_bytes);
    let share =
        |span: u64| u8::try_from(sent.saturating_mul(span).checked_div(total).unwrap_or(0)).unwrap_or(0);
    let (phase, percent) = match (status.phase, status.progress.rounds) {
        (VmmPhase::Greet, _) => ("preparing", 1),
        (VmmPhase::Rounds, 0 | 1) => ("copying", 1_u8.saturating_add(share(39)).min(40)),
        (VmmPhase::Rounds, _) => ("copying_changes", 40_u8.saturating_add(share(45)).min(85)),
        _ => ("standing_still", 88),
    };
    Progress { phase: phase.to_owned(), percent, bytes_done: Some(sent), bytes_total: Some(total) }
}
