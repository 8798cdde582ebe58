//! The VMM's part in a move of a machine that runs or is paused, at either end. What the two daemons say to each other and whose the
//! server is are not decided here: `migration` and `servers::moving` do, and ask for what is to be done to a VMM.
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::server::ServerNic;
use model::{Code, ServerId, Time};
use wire::control::{Command, PROTOCOL_OWES, PROTOCOL_SENDS_PAUSED, Reply};
use wire::machine::FdIndex;
use wire::migration::{
    DiskStream, MigrationStatus, Mode, Owner, Phase, ReceiveSpec, ReconnectSpec, SendLimits, SendSpec, Side,
};

use super::Servers;
use super::effects::Doing;
use super::lifecycle::{self, Back, End, EndKind, Event, Trouble};
use super::limits;
use super::machine::{self, Packet};
use super::make;
use super::record::ServerRecord;
use super::registry::Entry;
use super::snapshot::USERFAULTFD;
use crate::error::{Error, Result};
use crate::network::announce;
use crate::store::records;
use crate::vmms::Link;
use crate::vmms::link::AskError;
use crate::volumes::Content;

/// The streams of a move: those of memory first, then one for each disk.
pub(crate) struct Streams {
    /// Ends that are the VMM's.
    pub(crate) sockets: Vec<OwnedFd>,
    /// How many are memory's.
    pub(crate) of_memory: usize,
}

impl Streams {
    /// Adds them to what goes to the VMM, and answers how they are named there.
    fn name(self, packet: &mut Packet) -> (Vec<FdIndex>, Vec<DiskStream>) {
        let mut named: Vec<FdIndex> = self.sockets.into_iter().map(|socket| packet.add(socket)).collect();
        let disks = named.split_off(self.of_memory.min(named.len()));
        let disks = (0..).zip(disks).map(|(disk, stream)| DiskStream { disk, stream });
        (named, disks.collect())
    }
}

impl Servers {
    /// Has the machine of a server sent over these streams. It does on what it does until it is given up.
    pub(crate) async fn send_live(
        &self,
        id: ServerId,
        streams: Streams,
        (limits, mode): (SendLimits, Mode),
    ) -> Result<()> {
        let mut packet = Packet::default();
        let (streams, disks) = streams.name(&mut packet);
        let look = move |connection: &rusqlite::Connection| records::one::<ServerRecord>(connection, id.0);
        let record = self.workshop().core.store.read(look).await?;
        let paused = record.life.phase.is_moving_paused();
        let borrowed: Vec<BorrowedFd<'_>> = packet.0.iter().map(AsFd::as_fd).collect();
        let link = self.live(id)?.link(limits::COMMAND).await?;
        check_sends_paused(&link, paused)?;
        let mode = mode_of(&link, mode)?;
        let spec = SendSpec { streams, disks, handed: false, limits, mode, held: true, paused };
        done(link.ask(Command::Send(spec), &borrowed, limits::PAUSE).await?)
    }

    /// Has the machine of a server that is being sent go within these bounds from now on. It may have nothing to send any more.
    pub(crate) async fn limit_live(&self, id: ServerId, bounds: SendLimits) -> Result<()> {
        let link = self.live(id)?.link(limits::COMMAND).await?;
        match link.order(Command::LimitMigration { limits: bounds }, limits::COMMAND).await {
            Ok(()) | Err(AskError::Refused(_)) => Ok(()),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Has the VMM of a server that comes receive its machine over these streams. `may_owe` as the source has said.
    pub(crate) async fn receive_live(&self, id: ServerId, streams: Streams, may_owe: bool) -> Result<()> {
        let (entry, workshop) = (self.live(id)?, self.workshop());
        let record: ServerRecord =
            workshop.core.store.read(move |connection| records::one(connection, id.0)).await?;
        // One that comes paused is not let run, which is where others are given their name.
        entry.show_name(&record).await;
        let Some((link, described)) = machine::ready(workshop, &entry, &record).await? else {
            return Err(Error::new(
                Code::MachineFailed,
                "the VMM for the machine that comes has one already",
            ));
        };
        let machine::Description { spec: machine, descriptors: mut packet } = described;
        let taps = machine.nics.iter().filter_map(|nic| packet.0.get(usize::from(nic.tap.0)));
        let taps: std::io::Result<Vec<OwnedFd>> = taps.map(OwnedFd::try_clone).collect();
        *entry.taps() = taps.map_err(|cause| Error::internal("a tap cannot be copied", cause))?;
        let (streams, disks) = streams.name(&mut packet);
        let (memory, paused) = (None, record.life.phase.is_moving_paused());
        let userfaultfd =
            may_owe.then(|| File::options().read(true).write(true).open(USERFAULTFD)).transpose();
        let userfaultfd =
            userfaultfd.map_err(|cause| Error::file(format!("cannot open {USERFAULTFD}"), cause))?;
        let userfaultfd = userfaultfd.map(|device| packet.add(OwnedFd::from(device)));
        let spec = ReceiveSpec { machine, memory, streams, disks, userfaultfd, held: true, paused };
        spec.check(packet.0.len())
            .map_err(|cause| Error::internal(format!("the machine cannot be described: {cause}"), cause))?;
        let borrowed: Vec<BorrowedFd<'_>> = packet.0.iter().map(AsFd::as_fd).collect();
        done(link.ask(Command::Receive(Box::new(spec)), &borrowed, limits::BOOT).await?)
    }

    /// Waits until a server that comes has a VMM. Fails with what kept it from having one.
    pub(crate) async fn awaited(&self, id: ServerId) -> Result<()> {
        let end = Instant::now() + limits::BOOT;
        loop {
            let record: Option<ServerRecord> =
                self.workshop().core.store.read(move |connection| records::find(connection, id.0)).await?;
            match record.map(|record| record.life.phase) {
                Some(lifecycle::Phase::Arriving { vmm: Some(_), .. }) => return Ok(()),
                Some(lifecycle::Phase::Arriving { back: Back::Running | Back::Paused, .. })
                    if Instant::now() < end => {}
                Some(lifecycle::Phase::Arriving { back: Back::Failed { why }, .. }) => {
                    return Err(Error::new(Code::MachineFailed, why.detail));
                }
                _ => return Err(Error::new(Code::MachineFailed, "no VMM could be started for it")),
            }
            tokio::time::sleep(limits::MOVE_SPAWN_LOOK).await;
        }
    }

    /// How the move of a server's machine stands. Fails when its VMM is gone, or has no move.
    pub(crate) async fn move_status(&self, id: ServerId) -> Result<MigrationStatus> {
        let link = self.live(id)?.link(limits::COMMAND).await?;
        let none = || Error::new(Code::MachineFailed, "the VMM knows of no move");
        status(&link).await?.ok_or_else(none)
    }

    /// Whether the machine of a server that has come here still waits for some of its memory; nothing while its VMM cannot be asked.
    pub(crate) async fn lacks_memory(&self, id: ServerId) -> Result<Option<bool>> {
        let record: Option<ServerRecord> =
            self.workshop().core.store.read(move |connection| records::find(connection, id.0)).await?;
        // One of two VMMs has it, or takes it back.
        if record.is_some_and(|record| record.life.phase.is_upgrading()) {
            return Ok(None);
        }
        if !self.has_vmm(id).await? {
            return Ok(Some(false));
        }
        let asked = async { status(&self.live(id)?.link(limits::COMMAND).await?).await.map_err(Error::from) };
        Ok(asked.await.ok().map(|found| found.is_some_and(|found| owes(&found))))
    }

    /// Whether it has to be taken for one that does: whoever has that memory keeps it.
    pub(crate) async fn is_owed(&self, id: ServerId) -> Result<bool> {
        Ok(self.lacks_memory(id).await?.unwrap_or(true))
    }

    /// How a source's VMM stands that answers for memory, on word that the target has the machine. Nothing when there is no such VMM any
    /// more, and no such memory. Fails when that cannot be known.
    pub(crate) async fn owing(&self, id: ServerId) -> Result<Option<MigrationStatus>> {
        if !self.has_vmm(id).await? {
            return Ok(None);
        }
        let link = self.live(id)?.link(limits::COMMAND).await?;
        // It may not have heard of it by itself.
        let there = Command::SettleMigration { owner: Owner::There };
        match link.order(there, limits::PAUSE).await {
            Ok(()) | Err(AskError::Refused(_)) => {}
            Err(cause) => return Err(cause.into()),
        }
        Ok(status(&link).await?.filter(|found| found.side == Side::Source))
    }

    /// Whether the VMM that a server's record names lives, known to this daemon or not yet.
    async fn has_vmm(&self, id: ServerId) -> Result<bool> {
        let record: Option<ServerRecord> =
            self.workshop().core.store.read(move |connection| records::find(connection, id.0)).await?;
        match record.and_then(|record| record.life.phase.vmm().cloned()) {
            Some(vmm) => Ok(self.workshop().launcher.adopt(&vmm)?.is_some()),
            None => Ok(false),
        }
    }

    /// Has a VMM at either end go on with memory that is owed, over these streams.
    pub(crate) async fn reconnect(&self, id: ServerId, streams: Streams) -> Result<()> {
        let mut packet = Packet::default();
        let (streams, _) = streams.name(&mut packet);
        let borrowed: Vec<BorrowedFd<'_>> = packet.0.iter().map(AsFd::as_fd).collect();
        let link = self.live(id)?.link(limits::COMMAND).await?;
        done(link.ask(Command::Reconnect(ReconnectSpec { streams }), &borrowed, limits::PAUSE).await?)
    }

    /// Ends a machine that will never have all of its memory. What follows is as when its VMM dies.
    pub(crate) fn end_owed(&self, id: ServerId) -> Result<()> {
        match self.registry.find(id).and_then(|entry| entry.machine()) {
            Some(machine) => machine.process.kill(),
            None => Ok(()),
        }
    }

    /// Whether a source's VMM has heard from the target's that the machine runs there: that is proof, for it is let run only
    /// when its host has the server. A VMM that is gone knows nothing.
    pub(crate) async fn has_moved(&self, id: ServerId) -> bool {
        let status = self.move_status(id).await;
        status.is_ok_and(|status| (status.side, status.phase) == (Side::Source, Phase::Moved))
    }

    /// The same, though some of its memory may still be here.
    pub(crate) async fn has_left(&self, id: ServerId) -> bool {
        let status = self.move_status(id).await;
        status.is_ok_and(|status| {
            status.side == Side::Source && matches!(status.phase, Phase::Owing | Phase::Moved)
        })
    }

    /// Waits until the VMM has told more of its move, but not for long. Cancel-safe.
    pub(crate) async fn move_told(&self, id: ServerId) {
        let told = async {
            match self.registry.find(id) {
                Some(entry) => entry.moved.notified().await,
                None => std::future::pending().await,
            }
        };
        let _ = tokio::time::timeout(limits::MOVE_LOOK, told).await;
    }

    /// Has the source's VMM give its machine up: from the answer on it is taken back only by a word of this daemon. It is
    /// asked once the target is ready, of which the VMM may hear a moment later.
    pub(crate) async fn give_up(&self, id: ServerId) -> Result<()> {
        let link = self.live(id)?.link(limits::COMMAND).await?;
        let end = Instant::now() + limits::COMMAND;
        loop {
            match link.order(Command::CommitMigration, limits::COMMAND).await {
                Err(AskError::Refused(fault)) => {
                    let under_way = status(&link).await?.is_some_and(|status| !status.phase.is_end());
                    if !under_way || Instant::now() > end {
                        return Err(AskError::Refused(fault).into());
                    }
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Has a machine run on here that is not to move. A server without one is left alone.
    pub(crate) async fn take_back(&self, id: ServerId) -> Result<()> {
        let Some(entry) = self.registry.find(id).filter(|entry| entry.machine().is_some()) else {
            return Ok(());
        };
        Ok(keep(&entry.link(limits::COMMAND).await?).await?)
    }

    /// Lets a machine run that has arrived, which is recorded. Its actor does the same, a little later.
    pub(crate) async fn let_run(&self, id: ServerId) -> Result<()> {
        let link = self.live(id)?.link(limits::COMMAND).await?;
        Ok(link.order(Command::SettleMigration { owner: Owner::Here }, limits::PAUSE).await?)
    }

    fn live(&self, id: ServerId) -> Result<Arc<Entry>> {
        self.registry.find(id).ok_or_else(|| Error::new(Code::MachineFailed, "the server has no machine"))
    }
}

fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(Error::new(Code::MachineFailed, format!("the VMM answered a move with {other:?}"))),
    }
}

/// Whether a target's machine has, or will have when it runs, less than all of its memory.
fn owes(status: &MigrationStatus) -> bool {
    status.side == Side::Target && status.owes && !status.phase.is_end()
}

/// Whether memory can be owed here.
pub(crate) fn may_owe() -> bool {
    nix::unistd::access(USERFAULTFD, nix::unistd::AccessFlags::R_OK | nix::unistd::AccessFlags::W_OK).is_ok()
}

/// How a machine ended here that has moved, or has not come, against what is recorded; nothing of one that is here.
fn not_here(status: &MigrationStatus) -> Option<End> {
    let (kind, detail) = match (status.side, status.phase) {
        (Side::Target, Phase::Dropped) => {
            let why = status.detail.as_deref().unwrap_or("its VMM does not say why");
            (EndKind::DidNotArrive, format!("the machine that came could not run here: {why}"))
        }
        (Side::Source, Phase::Owing | Phase::Moved) => {
            let detail = "the machine goes on at the other host, though it was settled that the server is here; delete it on one \
                          of the two";
            (EndKind::WentElsewhere, detail.to_owned())
        }
        _ => return None,
    };
    Some(End { kind, detail, at_ms: Time::now().unix_ms() })
}

/// Fails where a machine is paused and its VMM gives up none that is.
pub(super) fn check_sends_paused(link: &Link, is_paused: bool) -> Result<()> {
    if is_paused && link.protocol() < PROTOCOL_SENDS_PAUSED {
        let detail = "its VMM is of a build that gives up no machine that is paused; resume it first";
        return Err(Error::new(Code::WrongState, detail));
    }
    Ok(())
}

/// What of this mode a source's VMM can do. Fails where that is not what was asked for.
fn mode_of(link: &Link, mode: Mode) -> Result<Mode> {
    match mode {
        Mode::PostCopy if link.protocol() < PROTOCOL_OWES => {
            let detail = "its VMM is of a build that owes no memory; give it a new one with upgrade-vmm, or have all of its \
                          memory go first (pre_copy)";
            Err(Error::new(Code::WrongState, detail))
        }
        Mode::Auto if link.protocol() < PROTOCOL_OWES => Ok(Mode::PreCopy),
        mode => Ok(mode),
    }
}

/// Has a source's VMM keep its machine, whatever it has promised. Repeatable.
pub(super) async fn keep(link: &Link) -> std::result::Result<(), AskError> {
    let under_way =
        status(link).await?.filter(|status| status.side == Side::Source && !status.phase.is_end());
    if under_way.is_none() || link.order(Command::CancelMigration, limits::PAUSE).await.is_ok() {
        return Ok(());
    }
    link.order(Command::SettleMigration { owner: Owner::Here }, limits::PAUSE).await
}

/// How much of its memory a machine that has come here lacks, in bytes.
pub(super) async fn owed_bytes(link: &Link) -> std::result::Result<u64, AskError> {
    let found = status(link).await?;
    Ok(found.filter(owes).map_or(0, |status| status.progress.left_bytes))
}

async fn status(link: &Link) -> std::result::Result<Option<MigrationStatus>, AskError> {
    match link.ask(Command::MigrationStatus, &[], limits::COMMAND).await? {
        Reply::Migration(status) => Ok(status.map(|status| *status)),
        other => Err(AskError::Protocol(format!("the state of a move was answered with {other:?}"))),
    }
}

impl Doing {
    /// Makes the files of a machine that comes, and starts a VMM for it. Repeatable.
    pub(super) async fn await_machine(&self) -> Result<Event> {
        self.make_directory().await?;
        for disk in &self.record.disks {
            self.workshop.volumes.make_empty(disk.volume_id).await?;
        }
        self.workshop.core.checkpoint("server.arrival_prepared")?;
        let cell = self.needs().await?.cell;
        let spawned = self.vmm(cell, std::future::ready(Ok(Content::Filled))).await?;
        make::introduce(&self.workshop.networks, &self.record.nics).await?;
        Ok(Event::Spawned(spawned))
    }

    /// How the machine ended, if the VMM at hand says that it has none that could run here.
    pub(super) async fn end_elsewhere(&self) -> Option<End> {
        let found = async { status(&self.entry.link(limits::COMMAND).await?).await };
        not_here(&found.await.ok()??)
    }

    /// Parks its vCPUs. One that was moved as it was paused is claimed by it. Repeatable.
    pub(super) async fn pause(&self) -> Result<Event> {
        if let Some(ended) = self.reclaim().await? {
            return Ok(ended);
        }
        let ordered = async {
            let link = self.entry.link(limits::COMMAND).await?;
            let paused = link.order(Command::Pause, limits::PAUSE).await;
            // One that lacks memory may do so for long, and runs.
            let moves = matches!(paused, Err(AskError::Refused(_)))
                && status(&link)
                    .await?
                    .is_some_and(|found| !found.phase.is_end() && found.phase != Phase::Owing);
            Ok((paused, moves))
        };
        let outcome: std::result::Result<_, AskError> = ordered.await;
        self.workshop.core.checkpoint("server.ordered")?;
        match outcome {
            Ok((Ok(()), _)) => Ok(Event::Paused),
            // Only who says so has not parked them: of others it is not known, and what was paused must not come to run by it.
            Ok((Err(cause @ AskError::Refused(_)), false)) => {
                Ok(Event::PauseFailed(Trouble::from(&Error::from(cause))))
            }
            Ok((Err(cause), _)) | Err(cause) => match self.end_of_gone(&cause).await {
                Some(end) => Ok(Event::Ended(end)),
                None => Err(cause.into()),
            },
        }
    }

    /// The server is this host's, whatever its VMM waits for: a move that may still be under way ends here. Answers what
    /// follows where the machine cannot run here any more. Repeatable.
    pub(super) async fn reclaim(&self) -> Result<Option<Event>> {
        let reclaimed = async {
            let link = self.entry.link(limits::COMMAND).await?;
            let Some(found) = status(&link).await? else { return Ok(None) };
            match (found.side, found.phase) {
                (Side::Source, Phase::Returned | Phase::Owing | Phase::Moved)
                | (Side::Target, Phase::Moved | Phase::Dropped) => return Ok(Some(found)),
                (Side::Source, _) => keep(&link).await?,
                (Side::Target, Phase::Release | Phase::Owing) => {}
                (Side::Target, _) => {
                    let here = Command::SettleMigration { owner: Owner::Here };
                    link.order(here, limits::PAUSE).await?;
                }
            }
            status(&link).await
        };
        let reclaimed: std::result::Result<_, AskError> = reclaimed.await;
        self.workshop.core.checkpoint("server.reclaimed")?;
        match reclaimed {
            Ok(found) => {
                let not_here = found.as_ref().and_then(not_here);
                if let Some(end) = &not_here {
                    tracing::error!(server = %self.record.id, "{}", end.detail);
                } else if found.is_some_and(|found| found.side == Side::Target) {
                    self.announce().await;
                }
                Ok(not_here.map(Event::NotHere))
            }
            Err(cause @ AskError::Gone) => Ok(self.end_of_gone(&cause).await.map(Event::Ended)),
            // What goes on in the VMM is over in a moment.
            Err(cause) => Err(cause.into()),
        }
    }

    /// Tells its networks where a machine is that has come: before that is over with, so that a daemon which dies tells it
    /// again, and some times more, since what is lost once is lost.
    async fn announce(&self) {
        if self.entry.taps().is_empty() {
            // A daemon that has started since has none of its own.
            match self.taps_of_vmm().await {
                Ok(taps) => *self.entry.taps() = taps,
                Err(cause) => {
                    let server = self.record.id;
                    tracing::warn!(%server, "a machine that has come is not announced: {}", cause.chain());
                }
            }
        }
        let (entry, nics) = (self.entry.clone(), self.record.nics.clone());
        tell_networks(&entry, &nics);
        tokio::spawn(async move {
            for pause in limits::ANNOUNCE_AFTER {
                tokio::time::sleep(pause).await;
                // Of a machine that has ended meanwhile there are no taps.
                tell_networks(&entry, &nics);
            }
            entry.taps().clear();
        });
    }

    async fn taps_of_vmm(&self) -> Result<Vec<OwnedFd>> {
        let link = self.entry.link(limits::COMMAND).await?;
        let (reply, handles) = link.ask_for(Command::Handles, &[], limits::COMMAND).await?;
        let Reply::Handles { nics, .. } = reply else {
            let detail = format!("the VMM answered for its handles with {reply:?}");
            return Err(Error::new(Code::MachineFailed, detail));
        };
        // Memory comes first, and disks last.
        Ok(handles.into_iter().skip(1).take(nics.into()).collect())
    }
}

fn tell_networks(entry: &Entry, nics: &[ServerNic]) {
    for (nic, tap) in nics.iter().zip(entry.taps().iter()) {
        if let Err(cause) = announce::announce(tap, &nic.mac, nic.ipv4) {
            tracing::warn!(server = %entry.id, "a machine that has come is not announced: {cause}");
        }
    }
}
