//! A machine, running or paused, gets another VMM of this host: a second process in the same control groups takes its memory, disks and taps
//! from the first. Which of the two has the machine, they decide; [`plan`] says what follows from what they say. A daemon that
//! dies anywhere in it is followed by one that asks them again.
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use model::Code;
use model::server::Isolation;
use tokio::sync::{mpsc, watch};
use wire::control::{Command, Notice, Reply};
use wire::launch::ExitStatus;
use wire::machine::FdIndex;
use wire::migration::{
    MigrationStatus, Mode, Owner, Phase as Stage, ReceiveSpec, SendLimits, SendSpec, Side,
};

use super::effects::{self, Doing, Files};
use super::lifecycle::{End, Event, Phase, Spawned, Trouble};
use super::record::ServerRecord;
use super::{isolation, limits, live, machine};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::store::records;
use crate::vmms::link::{AskError, Hello};
use crate::vmms::{Link, Process, ProcessId, Start, Walls};

mod plan;

use plan::{Deed, Last, Next, Old, Patience, decide};

/// The second VMM's files in the server's directory, until it is the only one.
const SOCKET: &str = "next.sock";
const WILL: &str = "next-will.json";

/// One of the two VMMs, with a connection of its own: of what it says nothing may be missed.
struct Party {
    process: Option<Arc<dyn Process>>,
    socket: PathBuf,
    link: Option<(Link, mpsc::Receiver<Notice>)>,
    /// Whether it has been listened to since before a handover was begun.
    is_heard: bool,
    /// Whether it has said that it goes on with the machine.
    has_run: bool,
    /// Why a move ended, in its words.
    detail: Option<String>,
    /// What else it has said.
    others: Vec<Notice>,
}

/// What a VMM says of its move, or that it cannot.
enum Look {
    Dead(Last),
    Mute,
    Says(Option<MigrationStatus>),
}

impl Party {
    fn new(process: Option<Arc<dyn Process>>, socket: PathBuf) -> Party {
        Party {
            process,
            socket,
            link: None,
            is_heard: false,
            has_run: false,
            detail: None,
            others: Vec::new(),
        }
    }

    /// Everything that it says from now on counts.
    fn begins(&mut self) {
        (self.is_heard, self.has_run) = (true, false);
    }

    async fn connect(&mut self) -> std::result::Result<Hello, AskError> {
        let (console, (notices, inbox)) = (watch::Sender::new(0), mpsc::channel(limits::UPGRADE_NOTICES_MAX));
        let (link, hello) = Link::connect(&self.socket, console, notices, limits::COMMAND).await?;
        self.link = Some((link, inbox));
        Ok(hello)
    }

    fn link(&self) -> std::result::Result<&Link, AskError> {
        self.link.as_ref().map(|(link, _)| link).ok_or(AskError::Gone)
    }

    async fn order(&self, command: Command) -> std::result::Result<(), AskError> {
        self.link()?.order(command, limits::COMMAND).await
    }

    /// Takes note of what it has said.
    fn listen(&mut self) {
        self.check_room();
        let mut said = Vec::new();
        if let Some((_, inbox)) = &mut self.link {
            while let Ok(notice) = inbox.try_recv() {
                said.push(notice);
            }
        }
        said.iter().for_each(|notice| self.take(notice));
    }

    fn check_room(&mut self) {
        if self.link.as_ref().is_some_and(|(_, inbox)| inbox.len() >= inbox.max_capacity()) {
            // More may have come than there was room for.
            self.is_heard = false;
        }
    }

    fn take(&mut self, notice: &Notice) {
        if let Notice::Migration(status) = notice {
            self.has_run |= matches!(
                (status.side, status.phase),
                (Side::Source, Stage::Returned) | (Side::Target, Stage::Release | Stage::Moved)
            );
        } else if self.others.len() < limits::NOTICES_MAX {
            self.others.push(notice.clone());
        }
    }

    /// Each phase is told to whoever is connected before it is done: one that has not come to run the machine will not have
    /// unheard.
    fn heed(&mut self, status: Option<&MigrationStatus>) {
        let is_before = status.is_none_or(|status| match status.side {
            Side::Source => !status.phase.is_end(),
            Side::Target => !status.phase.is_end() && status.phase != Stage::Release,
        });
        if is_before {
            (self.is_heard, self.has_run) = (true, false);
            self.check_room();
        }
    }

    async fn look(&mut self) -> Look {
        let Some(process) = self.process.clone() else { return Look::Dead(Last::Unheard) };
        let is_cut = self.link.as_ref().is_some_and(|(link, _)| link.is_closed());
        if is_cut || self.link.is_none() && self.connect().await.is_err() {
            // All that it has said was there to be read before its connection closed.
            self.listen();
            if tokio::time::timeout(limits::ENDED, process.ended()).await.is_ok() {
                let is_silent = self.is_heard && !self.has_run;
                return Look::Dead(if is_silent { Last::Silent } else { Last::Unheard });
            }
            self.is_heard = false;
            if self.connect().await.is_err() {
                return Look::Mute;
            }
        }
        let asked = match self.link() {
            Ok(link) => link.ask(Command::MigrationStatus, &[], limits::COMMAND).await,
            Err(cause) => Err(cause),
        };
        match asked {
            Ok(Reply::Migration(status)) => {
                let status = status.map(|status| *status);
                self.detail = status.as_ref().and_then(|status| status.detail.clone());
                self.heed(status.as_ref());
                Look::Says(status)
            }
            // A VMM without a machine knows of no move.
            Err(AskError::Refused(_)) => Look::Says(None),
            _ => Look::Mute,
        }
    }

    /// Until it says something or ends. Cancel-safe.
    async fn told(&mut self) {
        self.check_room();
        let notice = match &mut self.link {
            Some((link, inbox)) if !link.is_closed() => tokio::select! {
                notice = inbox.recv() => notice,
                () = link.closed() => None,
            },
            _ => std::future::pending().await,
        };
        if let Some(notice) = notice {
            self.take(&notice);
        }
    }
}

fn old(look: Look, has_run: bool) -> Old {
    match look {
        Look::Dead(last) => Old::Dead(last),
        // It is slow, and has said what it does.
        Look::Mute if has_run => Old::Keeps,
        Look::Mute => Old::Mute,
        Look::Says(Some(MigrationStatus { side: Side::Source, phase, in_doubt, .. })) => match phase {
            Stage::Returned => Old::Keeps,
            Stage::Commit => Old::Gave { in_doubt },
            Stage::Moved => Old::Rid,
            _ => Old::Gives,
        },
        // What it has of an earlier move is that its machine came.
        Look::Says(_) => Old::Keeps,
    }
}

fn next(look: Look, has_run: bool) -> Next {
    match look {
        Look::Dead(last) => Next::Dead(last),
        Look::Mute if has_run => Next::Takes,
        Look::Mute => Next::Mute,
        Look::Says(None) => Next::Shell,
        Look::Says(Some(MigrationStatus { phase, in_doubt, .. })) => match phase {
            Stage::Ready => Next::Ready { in_doubt },
            Stage::Release => Next::Takes,
            Stage::Moved => Next::Has,
            Stage::Dropped => Next::Dropped,
            _ => Next::Builds,
        },
    }
}

impl Doing {
    /// Starts a VMM beside the one that has the machine, in the same groups: guest memory stays counted where it is.
    /// Repeatable.
    pub(super) async fn spawn_next(&self) -> Result<Event> {
        let Phase::Upgrading { vmm, was_paused, .. } = &self.record.life.phase else {
            return Err(Error::new(Code::Internal, "the server gets no other VMM"));
        };
        if self.process_at_hand(vmm)?.is_none() {
            self.forget_next().await?;
            return Ok(self.gone(vmm, None).await);
        }
        // Asked first, because a machine that cannot be handed over is to be left in peace.
        let link = self.entry.link(limits::COMMAND).await?;
        live::check_sends_paused(&link, *was_paused)?;
        match link.ask_for(Command::Handles, &[], limits::COMMAND).await {
            Ok((Reply::Handles { disks: Some(_), .. }, _)) => {}
            Ok(_) => {
                let detail = "its VMM is of a build that hands no disks over; a reboot with some grace gives it a new one";
                return Err(Error::new(Code::WrongState, detail));
            }
            Err(AskError::Refused(fault)) => {
                let detail = format!("its machine cannot be handed to another VMM: {}", fault.detail);
                return Err(Error::new(Code::WrongState, detail));
            }
            Err(cause) => return Err(cause.into()),
        }
        let started = self.start_next().await;
        if let Err(cause) = &started
            && cause.code != Code::Draining
        {
            if let Some(process) = self.entry.next() {
                self.end_process(&process).await?;
            }
            self.forget_next().await?;
        }
        started.map(Event::Spawned)
    }

    async fn start_next(&self) -> Result<Spawned> {
        self.dismiss_at(SOCKET).await;
        let Files { listener, will, log } = self.bind_at(SOCKET, WILL).await?;
        let walls = match self.record.isolation {
            Isolation::Strict => Walls::All,
            Isolation::Standard => Walls::AsFound,
        };
        let (label, mut cell) = (self.record.name.to_string(), self.needs().await?.cell);
        // Those of the machine at hand: the next one may be of another size.
        (cell.memory_bytes, cell.vcpus) = (self.record.held.memory_bytes, self.record.held.vcpus);
        cell.file_bytes_max = cell.file_bytes_max.max(self.record.held.memory_bytes);
        cell.key = self.record.cage();
        let start = Start { label, listener: listener.into(), will, log, cell, walls };
        let process = self.workshop.launcher.spawn(start).await?;
        self.workshop.core.checkpoint("server.next_spawned")?;
        let (id, build) = (process.id(), process.build());
        self.entry.keep_next(Some(process.clone()));
        let mut party = Party::new(Some(process), self.file(SOCKET));
        let sandbox = party.connect().await?.sandbox;
        if self.record.isolation == Isolation::Strict {
            isolation::require_of(&self.workshop, &self.record, &id, sandbox).await?;
        }
        Ok(Spawned { vmm: id, sandbox: Some(sandbox), cage: None, build })
    }

    /// Has the machine go from one to the other, or finds out how far that came. Repeatable.
    pub(super) async fn hand_over(&self) -> Result<Event> {
        let Phase::Upgrading { vmm, next: Some(spawned), was_paused } = &self.record.life.phase else {
            return Err(Error::new(Code::Internal, "there is no VMM to hand a machine to"));
        };
        let mut ends = (
            Party::new(self.process_at_hand(vmm)?, self.file("control.sock")),
            Party::new(self.process(&spawned.vmm)?, self.file(SOCKET)),
        );
        let (began, mut has_begun, mut why) = (Instant::now(), false, None);
        loop {
            let looks = tokio::join!(ends.0.look(), ends.1.look());
            let patience = match began.elapsed() {
                long if long > limits::UPGRADE * 2 => Patience::Over,
                long if long > limits::UPGRADE => Patience::Ending,
                _ if has_begun => Patience::Waits,
                _ => Patience::Fresh,
            };
            let stand = (old(looks.0, ends.0.has_run), next(looks.1, ends.1.has_run));
            let deed = match began.elapsed() > limits::UPGRADE * 6 {
                // Whoever does not do what it is told for so long has no machine that anybody can rely on.
                true => Deed::Ended,
                false => decide(stand.0, stand.1, patience),
            };
            tracing::debug!(server = %self.record.id, "a handover: {stand:?}, {patience:?}: {deed:?}");
            let done = match deed {
                Deed::Begin => {
                    has_begun = true;
                    ends.0.begins();
                    ends.1.begins();
                    self.begin(&ends, *was_paused).await
                }
                Deed::Wait => {
                    let _ = tokio::time::timeout(limits::MOVE_LOOK, async {
                        tokio::select! { () = ends.0.told() => (), () = ends.1.told() => () }
                    })
                    .await;
                    Ok(())
                }
                Deed::Cancel => ends.0.order(Command::CancelMigration).await.map_err(Error::from),
                Deed::Refuse => ends.1.order(Command::CancelMigration).await.map_err(Error::from),
                Deed::KillNext => match &ends.1.process {
                    Some(process) => self.end_process(process).await,
                    None => Ok(()),
                },
                Deed::SettleOld => ends.0.order(here()).await.map_err(Error::from),
                Deed::SettleNext => ends.1.order(here()).await.map_err(Error::from),
                Deed::Taken => {
                    // What its guest did before anybody else listened.
                    ends.1.others.drain(..).for_each(|notice| self.entry.pass(notice));
                    self.workshop.core.checkpoint("server.handed_over")?;
                    return Ok(Event::HandedOver);
                }
                Deed::Kept => {
                    self.workshop.core.checkpoint("server.hand_over_failed")?;
                    // What an earlier try came to is of no interest.
                    let told = ends.0.detail.take().or(ends.1.detail.take()).filter(|_| has_begun);
                    let told = told.unwrap_or_else(|| "the new VMM did not take the machine".to_owned());
                    let detail = format!("the machine stays in its old VMM: {}", why.unwrap_or(told));
                    return Ok(Event::HandOverFailed(Trouble { code: Code::MachineFailed, detail }));
                }
                Deed::Ended => return self.end_both(vmm, &ends).await,
            };
            match done {
                Err(cause) if cause.code == Code::Draining => return Err(cause),
                // What it came to is seen at the next look.
                Err(cause) => {
                    tracing::warn!(server = %self.record.id, "a handover: {}", cause.chain());
                    why.get_or_insert(cause.detail);
                    tokio::time::sleep(limits::UPGRADE_AGAIN).await;
                }
                Ok(()) => {}
            }
        }
    }

    /// Gives each its end of a stream, and the next one what nobody can open again.
    async fn begin(&self, ends: &(Party, Party), paused: bool) -> Result<()> {
        let (from, to) = (ends.0.link()?, ends.1.link()?);
        let (reply, handles) = from.ask_for(Command::Handles, &[], limits::COMMAND).await?;
        let Reply::Handles { nics, disks: Some(disks) } = reply else {
            let detail = format!("the VMM answered for its handles with {reply:?}");
            return Err(Error::new(Code::MachineFailed, detail));
        };
        let (described, memory) =
            machine::describe_handed(&self.workshop, &self.record, handles, (nics.into(), disks.into()))
                .await?;
        let machine::Description { spec: machine, descriptors: mut packet } = described;
        let unconnected = |cause| Error::internal("two VMMs cannot be connected", cause);
        let (near, far): (OwnedFd, OwnedFd) =
            UnixStream::pair().map(|(near, far)| (near.into(), far.into())).map_err(unconnected)?;
        let streams = vec![packet.add(far)];
        let (memory, disks, userfaultfd) = (Some(memory), Vec::new(), None);
        let receive = ReceiveSpec { machine, memory, streams, disks, userfaultfd, held: false, paused };
        receive
            .check(packet.0.len())
            .map_err(|cause| Error::internal(format!("the machine cannot be described: {cause}"), cause))?;
        let borrowed: Vec<BorrowedFd<'_>> = packet.0.iter().map(AsFd::as_fd).collect();
        done(to.ask(Command::Receive(Box::new(receive)), &borrowed, limits::UPGRADE).await?)?;
        // The other's end of the stream is the other's alone: it is to see this one's death.
        drop(borrowed);
        drop(packet);
        self.workshop.core.checkpoint("server.next_receives")?;
        let send = SendSpec {
            streams: vec![FdIndex(0)],
            disks: Vec::new(),
            handed: true,
            limits: SendLimits { standstill_ms: limits::UPGRADE_STANDSTILL_MS, ..SendLimits::default() },
            mode: Mode::PreCopy,
            held: false,
            paused,
        };
        done(from.ask(Command::Send(send), &[near.as_fd()], limits::PAUSE).await?)?;
        self.workshop.core.checkpoint("server.hands_over")
    }

    /// Nobody can have the machine any more.
    async fn end_both(&self, vmm: &ProcessId, ends: &(Party, Party)) -> Result<Event> {
        let mut status = None;
        for end in [&ends.1, &ends.0] {
            if let Some(process) = &end.process {
                // How it ended by itself, if it did.
                let ended = tokio::time::timeout(limits::UPGRADE_AGAIN, process.ended()).await;
                status = status.or(ended.ok().flatten());
                self.end_process(process).await?;
            }
        }
        self.workshop.core.checkpoint("server.both_ended")?;
        // The will of whoever wrote one.
        let (from, to) = (self.file(WILL), self.file("will.json"));
        blocking(move || {
            if std::fs::metadata(&from).is_ok_and(|found| found.len() > 0) {
                machine::rename(&from, &to)?;
            }
            Ok(())
        })
        .await?;
        self.forget_next().await?;
        Ok(self.gone(vmm, status).await)
    }

    /// How a machine ended that nobody has any more.
    async fn gone(&self, vmm: &ProcessId, status: Option<ExitStatus>) -> Event {
        Event::Ended(match self.workshop.launcher.boot_id() {
            Ok(boot_id) if boot_id != vmm.boot_id => End::host_restarted(self.record.context().now_ms),
            _ => effects::end_of(&self.workshop, self.record.id, self.record.cage(), status).await,
        })
    }

    /// Ends the VMM that has no machine any more, and makes the other one the server's. Repeatable.
    pub(super) async fn retire(&self) -> Result<Event> {
        let Phase::Retiring { vmm, other, failed, .. } = &self.record.life.phase else {
            return Err(Error::new(Code::Internal, "there is no VMM to end"));
        };
        if let Some(process) = self.process(other)? {
            self.end_process(&process).await?;
        }
        self.workshop.core.checkpoint("server.other_ended")?;
        if failed.is_none() {
            let names = [(SOCKET, "control.sock"), (WILL, "will.json")];
            let renamed = names.map(|(from, to)| (self.file(from), self.file(to)));
            blocking(move || renamed.iter().try_for_each(|(from, to)| machine::rename(from, to))).await?;
            self.workshop.core.checkpoint("server.next_moved_in")?;
        }
        let process = self.process(vmm)?;
        self.forget_next().await?;
        let Some(process) = process else { return Ok(self.gone(vmm, None).await) };
        if self.workshop.launcher.adopt(vmm)?.is_none() {
            let status = tokio::time::timeout(limits::ENDED, process.ended()).await.ok().flatten();
            return Ok(self.gone(vmm, status).await);
        }
        if self.entry.machine().is_none_or(|machine| machine.process.id() != *vmm) {
            self.entry.hold(process, self.record.cage());
        }
        // It may have stood still in the middle of it.
        if failed.is_some()
            && let Some(ended) = self.claim_back().await?
        {
            return Ok(ended);
        }
        // Limits may have been changed while there were two to tell; whoever changes them from now on tells this one.
        let id = self.record.id;
        let record: ServerRecord =
            self.workshop.core.store.read(move |connection| records::one(connection, id.0)).await?;
        if let Err(cause) = self.entry.limit(&record).await {
            tracing::warn!(server = %id, "its limits are not in force: {cause}");
        }
        self.entry.wake_readers();
        Ok(Event::Retired)
    }

    /// Has the old VMM go on with a machine that nobody else has. Answers how it ended, when it has. Repeatable.
    async fn claim_back(&self) -> Result<Option<Event>> {
        let claimed = async { live::keep(&self.entry.link(limits::COMMAND).await?).await };
        match claimed.await {
            Ok(()) => Ok(None),
            Err(cause @ AskError::Gone) => Ok(self.end_of_gone(&cause).await.map(Event::Ended)),
            // What goes on in it is over in a moment.
            Err(cause) => Err(cause.into()),
        }
    }

    /// The process that has the machine, found again by a daemon that is new.
    fn process_at_hand(&self, vmm: &ProcessId) -> Result<Option<Arc<dyn Process>>> {
        let process = self.process(vmm)?;
        if let (Some(process), None) = (&process, self.entry.machine()) {
            self.entry.hold(process.clone(), self.record.cage());
        }
        Ok(process)
    }

    /// A process that is at hand or can be found.
    fn process(&self, id: &ProcessId) -> Result<Option<Arc<dyn Process>>> {
        let at_hand = self.entry.machine().map(|machine| machine.process);
        match at_hand.into_iter().chain(self.entry.next()).find(|process| process.id() == *id) {
            Some(process) => Ok(Some(process)),
            None => self.workshop.launcher.adopt(id),
        }
    }

    async fn end_process(&self, process: &Arc<dyn Process>) -> Result<()> {
        process.kill()?;
        tokio::time::timeout(limits::KILL, process.ended()).await.map(drop).map_err(|_| {
            Error::new(Code::Internal, format!("a VMM has not ended {:?} after SIGKILL", limits::KILL))
        })
    }

    /// Removes what a second VMM leaves. Repeatable.
    pub(super) async fn forget_next(&self) -> Result<()> {
        self.entry.keep_next(None);
        let files = [SOCKET, WILL].map(|name| self.file(name));
        blocking(move || files.iter().try_for_each(|file| machine::remove_file(file))).await
    }
}

fn here() -> Command {
    Command::SettleMigration { owner: Owner::Here }
}

fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(Error::new(Code::MachineFailed, format!("the VMM answered a handover with {other:?}"))),
    }
}
