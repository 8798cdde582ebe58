//! A machine that was made of a snapshot's memory shares that until it is settled: then all of it is the machine's own, and all of its disks
//! that are overlays is in their own files. It is so before it is handed to another VMM, and when somebody asks for it; of memory before it is
//! saved while it runs, too. The VMM does it, and goes on with it whatever becomes of the daemon; whoever comes after finds how far it is.
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model::volume::FillMethod;
use model::{Code, OperationId, ServerId, VolumeId};
use rusqlite::Connection;
use wire::control::{Command, PROTOCOL_SETTLES, Reply};
use wire::settling::{MemoryStatus, SettleStage, Settling};

use super::effects::Doing;
use super::lifecycle::{Event, Phase, Trouble};
use super::record::{self, ServerRecord};
use super::registry::{Entry, Workshop};
use super::telling::Part;
use super::{advance, limits};
use crate::call::Actor;
use crate::error::{Error, Result};
use crate::store::{Tx, records};
use crate::vmms::Link;
use crate::vmms::link::AskError;
use crate::volumes::Volumes;
use crate::volumes::space;

/// Whose the memory of a machine is; nothing when its VMM is of a build that cannot say.
pub(super) async fn memory(
    link: &Link,
    patience: Duration,
) -> std::result::Result<Option<MemoryStatus>, AskError> {
    if link.protocol() < PROTOCOL_SETTLES {
        return Ok(None);
    }
    match link.ask(Command::MemoryStatus, &[], patience).await? {
        Reply::Memory(status) => Ok(Some(*status)),
        other => Err(AskError::Protocol(format!("a question for memory was answered with {other:?}"))),
    }
}

/// A guest may have reset itself as no daemon was there to hear it. Its machine is asked whether it shares what the record says.
pub(super) async fn look(workshop: &Workshop, entry: &Entry, record: &ServerRecord) -> Result<()> {
    if record.life.shares.is_none() && !record.life.overlaid || entry.machine().is_none() {
        return Ok(());
    }
    let asked = async { memory(&entry.link(limits::COMMAND).await?, limits::COMMAND).await };
    match asked.await {
        Ok(Some(status)) => note(workshop, record, &status).await,
        // It is settled, or found out, when somebody needs it.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Records what the machine of a server, of this run, shares no more by its VMM's word.
async fn note(workshop: &Workshop, record: &ServerRecord, status: &MemoryStatus) -> Result<()> {
    if status.shared_bytes == 0 {
        forget_shared(workshop, record.id, record.life.run).await?;
    }
    if status.disks_shared_bytes == 0 && !is_under_way(status) {
        forget_backing(workshop, record).await?;
    }
    Ok(())
}

fn is_under_way(status: &MemoryStatus) -> bool {
    matches!(status.settling, Some(Settling { stage: SettleStage::UnderWay, .. }))
}

/// All of the disks of a server's machine is in their own files. They let go of others only when that is recorded: what a daemon that
/// dies in between leaves, the next one removes.
async fn forget_backing(workshop: &Workshop, record: &ServerRecord) -> Result<()> {
    let (id, run) = (record.id, record.life.run);
    let disks: Vec<VolumeId> = record.disks.iter().map(|disk| disk.volume_id).collect();
    let ids = disks.clone();
    let is_news = move |all: &Connection| {
        let of_record = records::find::<ServerRecord>(all, id.0)?.is_some_and(|record| record.life.overlaid);
        let volumes = ids.iter().map(|id| Ok(Volumes::find(all, *id)?.filled_by));
        let volumes = volumes.collect::<Result<Vec<_>>>()?;
        Ok(of_record || volumes.contains(&Some(FillMethod::Overlay)))
    };
    if !workshop.core.store.glance(is_news).await? {
        return Ok(());
    }
    let ids = disks.clone();
    let forget = move |tx: &Tx<'_>| {
        let found = records::find::<ServerRecord>(tx, id.0)?;
        let Some(mut record) = found.filter(|record| record.life.run == run) else { return Ok(false) };
        ids.iter().try_for_each(|id| Volumes::is_whole(tx, *id))?;
        if record.life.overlaid {
            record.life.overlaid = false;
            record::save(tx, &mut record)?;
            advance::announce(tx, &record, "server.updated", Some(&Actor::Host))?;
        }
        Ok(true)
    };
    if !workshop.core.store.write(forget).await? {
        return Ok(());
    }
    workshop.core.checkpoint("server.disks_settled")?;
    for id in disks {
        if let Err(cause) = workshop.volumes.let_go(id).await {
            tracing::warn!(server = %record.id, "until the daemon starts again: {}", cause.chain());
        }
    }
    Ok(())
}

/// The machine of a server, of this run, shares nothing any more.
async fn forget_shared(workshop: &Workshop, id: ServerId, run: u64) -> Result<()> {
    let is_it = move |record: &ServerRecord| record.life.shares.is_some() && record.life.run == run;
    forget(workshop, id, is_it, |record| record.life.shares = None).await
}

/// The machine of a server was reset: it has memory of its own and is shown what this host has, wherever the one before it was from.
pub(super) async fn forget_origin(workshop: &Workshop, id: ServerId) -> Result<()> {
    let is_it = |record: &ServerRecord| {
        record.life.shares.is_some() || record.held.features.is_some() || record.held.tsc_khz.is_some()
    };
    let anew = |record: &mut ServerRecord| {
        record.life.shares = None;
        (record.held.features, record.held.tsc_khz) = (None, None);
    };
    forget(workshop, id, is_it, anew).await
}

async fn forget(
    workshop: &Workshop,
    id: ServerId,
    is_it: impl Fn(&ServerRecord) -> bool + Copy + Send + 'static,
    change: impl FnOnce(&mut ServerRecord) + Send + 'static,
) -> Result<()> {
    let found = workshop.core.store.glance(move |all| records::find::<ServerRecord>(all, id.0)).await?;
    if !found.is_some_and(|record| is_it(&record)) {
        return Ok(());
    }
    let forget = move |tx: &Tx<'_>| match records::find::<ServerRecord>(tx, id.0)? {
        Some(mut record) if is_it(&record) => {
            change(&mut record);
            record::save(tx, &mut record)?;
            advance::announce(tx, &record, "server.updated", Some(&Actor::Host))
        }
        _ => Ok(()),
    };
    workshop.core.store.write(forget).await
}

/// What of a machine is to be its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Own {
    /// Its memory. What of its disks becomes so meanwhile stays so.
    Memory,
    /// Its memory and its disks.
    All,
}

/// Why a machine is not settled.
enum Cause {
    /// It is not wanted any more, or the daemon ends.
    Given(Error),
    /// The VMM has ended.
    Ended,
    Failed(String),
}

impl From<Error> for Cause {
    fn from(cause: Error) -> Cause {
        Cause::Given(cause)
    }
}

impl Doing {
    /// The whole of a phase.
    pub(super) async fn settle(&self, job: OperationId) -> Result<Event> {
        let span = if self.is_to_be_upgraded() { 38 } else { 98 };
        let settled = async {
            if !self.is_to_be_upgraded()
                && self.entry.link(limits::COMMAND).await?.protocol() < PROTOCOL_SETTLES
            {
                let detail = "its VMM is of a build that settles no memory; a reboot with some grace gives it a new one";
                return Err(Error::new(Code::WrongState, detail));
            }
            self.own(Own::All, ("settling_memory", 1, span)).await
        };
        let outcome = settled.await;
        self.workshop.core.checkpoint("server.settled")?;
        match outcome {
            Ok(()) => Ok(Event::Settled(job)),
            Err(cause) if cause.code == Code::Draining => Err(cause),
            Err(cause) => match self.ended_meanwhile().await {
                Some(end) => Ok(Event::Ended(end)),
                None => {
                    tracing::warn!(server = %self.record.id, "{}", cause.chain());
                    Ok(Event::SettleFailed(job, Trouble::from(&cause)))
                }
            },
        }
    }

    fn is_to_be_upgraded(&self) -> bool {
        matches!(self.record.life.phase, Phase::Settling { upgrade: true, .. })
    }

    /// Has all of that be the machine's own, and waits for it. Nothing is done by a VMM that cannot, or when it is so
    /// already. Fails with `wrong_state` when it cannot be done, with `disk_full` when there is no room for the disks: the machine runs
    /// on as it was. Repeatable.
    pub(super) async fn own(&self, what: Own, part: Part) -> Result<()> {
        let cause = match self.try_own(what, part).await {
            Ok(()) => return Ok(()),
            // The next daemon finds how far it is.
            Err(Cause::Given(cause)) if cause.code == Code::Draining => return Err(cause),
            Err(Cause::Ended) => return Err(AskError::Gone.into()),
            Err(cause) => cause,
        };
        // Nobody looks after it from here on. A save, a move and a reset give it up, too.
        let cancelled = async {
            self.entry.link(limits::COMMAND).await?.order(Command::CancelSettle, limits::PAUSE).await
        };
        if let Err(cause) = cancelled.await {
            tracing::warn!(server = %self.record.id, "its memory may be settled all the same: {cause}");
        }
        match cause {
            Cause::Given(cause) => Err(cause),
            Cause::Failed(why) => {
                let detail = format!("server {} could not be settled: {why}", self.record.name);
                Err(self.full_or("volumes", Code::WrongState, detail))
            }
            Cause::Ended => Err(AskError::Gone.into()),
        }
    }

    async fn try_own(&self, what: Own, part: Part) -> std::result::Result<(), Cause> {
        let (mut has_begun, mut failures, mut told) = (false, 0, Instant::now());
        let mut disks_bytes = 0;
        loop {
            let status = match self.look_at_memory().await {
                Ok(Some(status)) => status,
                Ok(None) => return Ok(()),
                Err(cause) if self.end_of_gone(&cause).await.is_some() => return Err(Cause::Ended),
                // It may just stand still, or have closed a connection that was too slow.
                Err(_) if failures < limits::SETTLE_ASKS => {
                    failures += 1;
                    tokio::time::sleep(limits::SETTLE_ASK_AGAIN).await;
                    continue;
                }
                Err(cause) => return Err(Cause::Failed(cause.to_string())),
            };
            failures = 0;
            // Whoever wants memory alone neither waits for disks nor has them counted.
            let shared = if what == Own::All { status.disks_shared_bytes } else { 0 };
            let is_going_on = what == Own::All && is_under_way(&status);
            if status.shared_bytes == 0 && shared == 0 && !is_going_on {
                if is_under_way(&status) {
                    // It goes on with disks, for which nobody has asked, nor looked whether there is room.
                    let given_up = async {
                        let link = self.entry.link(limits::COMMAND).await?;
                        link.order(Command::CancelSettle, limits::PAUSE).await
                    };
                    given_up.await.map_err(|cause| Cause::Failed(cause.to_string()))?;
                }
                return Ok(note(&self.workshop, &self.record, &status).await?);
            }
            disks_bytes = shared.max(disks_bytes);
            if self.stop.load(Ordering::SeqCst) {
                return Err(Error::new(Code::WrongState, "it is not to be settled any more").into());
            }
            match status.settling {
                Some(Settling { stage: SettleStage::UnderWay, .. }) => {
                    has_begun = true;
                    let total_bytes = status.total_bytes.saturating_add(disks_bytes);
                    let left_bytes = status.shared_bytes.saturating_add(shared);
                    let own_bytes = total_bytes.saturating_sub(left_bytes);
                    self.tell_at_times(&mut told, part, own_bytes, total_bytes).await?;
                    tokio::time::sleep(limits::SAVE_LOOK).await;
                }
                Some(Settling { stage: SettleStage::Failed { detail }, .. }) if has_begun => {
                    return Err(Cause::Failed(detail));
                }
                _ => {
                    let ids: Vec<VolumeId> = self.record.disks.iter().map(|disk| disk.volume_id).collect();
                    self.workshop.volumes.check_whole(&ids, shared).await?;
                    let begun = async {
                        self.entry.link(limits::COMMAND).await?.order(Command::Settle, limits::PAUSE).await
                    };
                    begun.await.map_err(|cause| Cause::Failed(cause.to_string()))?;
                    has_begun = true;
                    self.workshop.core.checkpoint("server.settling")?;
                }
            }
        }
    }

    /// What a VMM could not do with a disk: with a code of its own where there is no room left in that directory.
    pub(super) fn full_or(&self, written_to: &str, code: Code, detail: String) -> Error {
        match space::short(&self.workshop.core.dirs.root().join(written_to)) {
            Some(advice) => Error::new(Code::DiskFull, format!("{detail}: {advice}")),
            None => Error::new(code, detail),
        }
    }

    /// The VMM may stand still for as long as a pause may take.
    async fn look_at_memory(&self) -> std::result::Result<Option<MemoryStatus>, AskError> {
        memory(&self.entry.link(limits::COMMAND).await?, limits::PAUSE).await
    }
}
