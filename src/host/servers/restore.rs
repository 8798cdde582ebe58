//! Going back to a snapshot: what is checked and recorded when it is asked for, and the work. The files are copied beside
//! what the server has while it does what it did; only when they are whole does its machine end, and they take their
//! places. From then on there is no way back, and a daemon that dies is followed by one that goes on.
//!
//! ```text
//! Restoring: copies beside ──▶ the machine ends ──▶ Returning: copies take their places ──▶ started, as one that hibernated
//!            (failed, cancelled: nothing has changed)                                         or off
//! ```
use std::sync::atomic::Ordering;

use model::operation::Accepted;
use model::server::Server;
use model::snapshot::{RestoreServer, Snapshot};
use model::{Code, OperationId, ServerId, SnapshotId};

use super::effects::Doing;
use super::lifecycle::{Ask, Event, Return, Saved, SavedOf, Trouble};
use super::record::ServerRecord;
use super::registry::Workshop;
use super::telling::Moved;
use super::{Servers, advance, clone, create, saved, view};
use crate::call::{Actor, Answer, Call};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::snapshots::{SnapshotRecord, Snapshots};
use crate::store::{Tx, records};
use crate::volumes::{Volumes, space};

impl Servers {
    /// Makes it what a snapshot of it shows. What it has in memory and on its disks since then is lost.
    pub async fn restore(
        &self,
        call: &Call,
        id: ServerId,
        spec: RestoreServer,
    ) -> Result<Answer<Accepted<Server>>> {
        self.workshop().processor.known().await;
        let accept = move |tx: &Tx<'_>, workshop: &Workshop, record, actor: &Actor| {
            accept(tx, workshop, record, &spec, actor)
        };
        self.change(call, id, accept).await
    }
}

fn accept(
    tx: &Tx<'_>,
    workshop: &Workshop,
    record: ServerRecord,
    spec: &RestoreServer,
    actor: &Actor,
) -> Result<Accepted<Server>> {
    let found = Snapshots::ready(tx, &spec.snapshot)?;
    check_fits(&found, &record)?;
    let shown = &found.shown;
    let has_memory = record.life.phase.vmm().is_some() || record.life.saved.is_some();
    if has_memory && !spec.stop {
        let detail = format!(
            "server {} is {}, and what it has in memory would be lost: if it may be, have it stopped with `stop`, or \
             stop it first",
            record.name,
            view::state_text(&record)
        );
        return Err(Error::new(Code::WrongState, detail).with_actions(view::allowed_actions(&record)));
    }
    let to = Return { snapshot: shown.id, memory: shown.memory };
    if shown.memory {
        // Before anything of what the server has is given up.
        clone::can_go_on(workshop, &found)?;
        create::before_start(workshop, &record)?;
        workshop.capacity.admit(tx, &mut shaped(&record, shown))?;
    }
    let place = workshop.core.dirs.root().join("volumes");
    let (operation, record) =
        advance::ask(tx, workshop.capacity, record, Ask::Restore { to }, actor, |_| Ok(()))?;
    // Of disks whose blocks are shared less is needed. Memory is not copied.
    let disks = (0..shown.volumes.len()).map(|index| workshop.volumes.snapshot_bytes(&found, index));
    space::check(&place, disks.sum(), 0)?;
    Ok(Accepted { operation, resource: Some(view::server(tx, &record)?) })
}

/// Whether it is one of this server as it is built still.
fn check_fits(found: &SnapshotRecord, record: &ServerRecord) -> Result<()> {
    let shown = &found.shown;
    if shown.server_id != record.id {
        let detail = format!(
            "snapshot {} is one of server {}; another server can be created of it with `snapshot`",
            shown.name, shown.server_name
        );
        return Err(Error::invalid("/snapshot", "of_another_server", detail));
    }
    let fits = shown.volumes.len() == record.disks.len()
        && (!shown.memory || found.origin.nics.len() == record.nics.len());
    if !fits {
        let detail =
            format!("server {} has other disks or interfaces than snapshot {}", record.name, shown.name);
        return Err(Error::invalid("/snapshot", "does_not_fit", detail));
    }
    Ok(())
}

/// The server with the machine of a snapshot.
fn shaped(record: &ServerRecord, shown: &Snapshot) -> ServerRecord {
    let (vcpus, memory_bytes, cpu) = (shown.vcpus, shown.memory_bytes, shown.cpu.clone());
    ServerRecord { vcpus, memory_bytes, cpu, ..record.clone() }
}

/// Records that a server's disks are those of a snapshot, and its machine is where that has memory.
pub(super) fn taken_back(tx: &Tx<'_>, record: &mut ServerRecord, id: SnapshotId) -> Result<()> {
    let shown = records::one::<SnapshotRecord>(tx, id.0)?.shown;
    if shown.memory {
        *record = shaped(record, &shown);
    }
    for (disk, volume) in record.disks.iter().zip(&shown.volumes) {
        let size_bytes = size(Volumes::find(tx, disk.volume_id)?.size_bytes, volume.size_bytes, shown.memory);
        Volumes::is_back(tx, disk.volume_id, id, *volume, size_bytes)?;
    }
    let moment = shown.taken_at.map(|at| format!(" of {at}")).unwrap_or_default();
    let reason = format!("it went back to snapshot {}{moment}; what it wrote since then is lost", shown.name);
    advance::guest_event(tx, record, "server.restored", reason, &Actor::Host)
}

/// Its guest goes on from a snapshot's memory, with the processor that it had.
pub(super) fn goes_on(tx: &Tx<'_>, record: &mut ServerRecord, id: SnapshotId) -> Result<()> {
    if let Some(had) = records::one::<SnapshotRecord>(tx, id.0)?.origin.processor {
        record.held.go_on_with(&had);
    }
    Ok(())
}

/// Size of a disk that goes back. One that was made larger since stays so, unless its guest goes on and knows better.
fn size(has: u64, had: u64, memory: bool) -> u64 {
    if memory { had } else { has.max(had) }
}

impl Doing {
    /// Copies a snapshot beside what the server has, from the beginning. What fails leaves nothing.
    pub(super) async fn copy_back(&self, to: Return, job: OperationId) -> Result<Event> {
        match self.try_copy_back(to).await {
            Ok(()) => Ok(Event::CopiedBack(job)),
            Err(cause) if self.workshop.core.store.is_dead() => Err(cause),
            Err(cause) => {
                if !self.stop.load(Ordering::SeqCst) {
                    tracing::warn!(server = %self.record.id, "it does not go back: {}", cause.chain());
                }
                forget_copies(&self.workshop, &self.record).await?;
                Ok(Event::CopyBackFailed(job, Trouble::from(&cause)))
            }
        }
    }

    async fn try_copy_back(&self, to: Return) -> Result<()> {
        let shown = self.snapshot_record(to.snapshot).await?.shown;
        let moved = Moved::default();
        let copying = async {
            for (index, (disk, volume)) in self.record.disks.iter().zip(&shown.volumes).enumerate() {
                let id = disk.volume_id;
                let found = self.workshop.core.store.read(move |all| Volumes::find(all, id)).await?;
                let size_bytes = size(found.size_bytes, volume.size_bytes, to.memory);
                let stopped = || self.stop.load(Ordering::SeqCst);
                let note = |done: u64, total: u64| moved.note(done, total);
                let source = (to.snapshot, index);
                self.workshop.volumes.copy_back(id, source, size_bytes, &stopped, &note).await?;
                self.workshop.core.checkpoint("server.disk_copied_back")?;
            }
            Ok(())
        };
        self.telling(("copying_disks", 1, 59), &moved, copying).await
    }

    /// Puts what was copied in its places. Whatever had them is gone, and no machine is there. Repeatable.
    pub(super) async fn take_back(&self, to: Return) -> Result<Event> {
        let found = self.snapshot_record(to.snapshot).await?;
        if to.memory {
            self.workshop.snapshots.read_ahead(to.snapshot);
        }
        let directory = self.workshop.core.dirs.server(self.record.id);
        // A memory that hibernated is not that of these disks.
        blocking(move || saved::discard(&directory)).await?;
        self.workshop.core.checkpoint("server.memory_discarded")?;
        for disk in &self.record.disks {
            self.workshop.volumes.take_back(disk.volume_id).await?;
            self.workshop.core.checkpoint("server.disk_taken_back")?;
        }
        let saved = found.root.filter(|_| to.memory).map(|root| Saved {
            root,
            stored_bytes: found.shown.stored_bytes,
            of: SavedOf::Snapshot { id: to.snapshot },
        });
        Ok(Event::TakenBack(to.snapshot, saved))
    }

    async fn snapshot_record(&self, id: SnapshotId) -> Result<SnapshotRecord> {
        self.workshop.core.store.read(move |connection| records::one(connection, id.0)).await
    }
}

/// Removes what was copied beside what a server has. Repeatable.
pub(super) async fn forget_copies(workshop: &Workshop, record: &ServerRecord) -> Result<()> {
    for disk in &record.disks {
        workshop.volumes.forget_copy(disk.volume_id).await?;
    }
    Ok(())
}
