//! Volumes: writable disks, one raw file each.
//! Called by the facade, and by `servers`, which makes, opens, copies and removes the root volumes.
//!
//! The record is committed before the file is made and removed after it is gone. A file lies at its place only
//! when it is complete; a volume in state `creating` is filled again from the beginning, unless its server knows that it lies there.
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use model::event::EventData;
use model::operation::{Accepted, Resource};
use model::page::{ListQuery, Page};
use model::snapshot::SnapshotVolume;
use model::volume::{FillMethod, PatchVolume, Volume, VolumeFormat, VolumeState};
use model::{Code, ImageId, Labels, Name, OperationId, ServerId, SnapshotId, Time, VolumeId};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::call::{Answer, Call};
use crate::config::Dirs;
use crate::core::Shared;
use crate::error::{Error, Result, size};
use crate::images::Images;
use crate::operations::{self, NewOperation, Outcome};
use crate::snapshots::SnapshotRecord;
use crate::store::Tx;
use crate::store::records::{self, Record};
use crate::{events, labels, snapshots};

mod disk;
pub(crate) mod files;
pub(crate) mod fill;
pub(crate) mod layers;
pub mod limits;
pub(crate) mod overlay;
mod recover;
pub(crate) mod space;

use disk::{NewFile, Source};
pub(crate) use files::Durability;
use layers::Layers;
use overlay::Means;

pub(crate) const TABLES: &str = crate::table!("volumes");

/// Volumes, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Volumes {
    core: Shared,
    images: Images,
    means: Arc<Mutex<Option<Means>>>,
}

/// A volume to make.
pub(crate) struct NewVolume {
    /// Unique name.
    pub name: Name,
    /// The caller's own pairs.
    pub labels: Labels,
    /// Size in bytes, a multiple of 4096, at least the image's.
    pub size_bytes: u64,
    /// The image whose disk it is filled from; nothing makes it empty.
    pub image_id: Option<ImageId>,
    /// The snapshot whose first disk it is filled from instead.
    pub snapshot_id: Option<SnapshotId>,
    /// The server it belongs to.
    pub server_id: Option<ServerId>,
    /// Whether that goes on from the snapshot's memory.
    pub is_clone: bool,
}

/// How a volume is to be filled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fill {
    /// What its file is to outlive.
    pub durability: Durability,
    /// Whether its server goes on from the snapshot's memory. Its file may need that of the snapshot then.
    pub is_clone: bool,
}

impl Record for Volume {
    const TABLE: &'static str = "volumes";
    const NOUN: &'static str = "volume";

    fn id(&self) -> Uuid {
        self.id.0
    }

    fn name(&self) -> &Name {
        &self.name
    }

    fn labels(&self) -> &Labels {
        &self.labels
    }

    fn touch(&mut self) {
        self.generation += 1;
        self.updated_at = Time::now();
    }
}

/// A volume whose file is whole, which its own record does not say yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// Which.
    pub id: VolumeId,
    /// How it was filled.
    pub method: FillMethod,
}

/// How it is known that a volume is what it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Its record says so.
    Recorded,
    /// The caller has filled it, and records that before a guest writes to it; it may not be flushed yet.
    Filled,
}

impl Volumes {
    pub(crate) fn new(core: Shared, images: Images) -> Volumes {
        Volumes { core, images, means: Arc::default() }
    }

    /// Takes up what an earlier daemon left unfinished, except volumes that belong to a server: the server's
    /// actor fills or purges those. Files that no record names are removed.
    pub(crate) async fn recover(&self) -> Result<()> {
        let dirs = self.core.dirs.clone();
        let doomed = self.core.store.read(move |connection| recover::look(connection, &dirs)).await?;
        for id in doomed {
            self.purge(id).await?;
        }
        Ok(())
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Volume>> {
        let dirs = self.core.dirs.clone();
        let look = move |connection: &Connection| {
            let mut page: Page<Volume> = records::page(connection, &query)?;
            page.items.iter_mut().for_each(|volume| measure(volume, &dirs));
            Ok(page)
        };
        self.core.store.read(look).await
    }

    /// The volume.
    pub async fn one(&self, id: VolumeId) -> Result<Volume> {
        let dirs = self.core.dirs.clone();
        let look = move |connection: &Connection| {
            let mut volume: Volume = records::one(connection, id.0)?;
            measure(&mut volume, &dirs);
            Ok(volume)
        };
        self.core.store.read(look).await
    }

    /// Name, labels, size (only larger, and only while its server is off: see `servers::actions_unless_off`).
    pub async fn patch(&self, call: &Call, id: VolumeId, patch: PatchVolume) -> Result<Answer<Volume>> {
        // Held until the file has its new length, so that no machine can start with half of the change.
        let held = match patch.size_bytes {
            Some(_) => disk::hold(&self.core, id).await?,
            None => None,
        };
        let is_held = held.is_some();
        let (conditions, dirs) = (call.clone(), self.core.dirs.clone());
        let change = move |tx: &Tx<'_>| {
            let mut volume: Volume = records::one(tx, id.0)?;
            conditions.check_match(volume.generation)?;
            volume.server_id.map_or(Ok(()), |server| crate::servers::check_not_moving(tx, server))?;
            if let Some(size_bytes) = patch.size_bytes {
                check_growth(tx, &volume, size_bytes, &dirs)?;
                if !is_held {
                    return Err(attached(&volume));
                }
                volume.size_bytes = size_bytes;
            }
            if let Some(name) = patch.name {
                volume.name = name;
            }
            if let Some(changes) = patch.labels {
                volume.labels = labels::merge(&volume.labels, changes)?;
            }
            measure(&mut volume, &dirs);
            records::save(tx, &mut volume)?;
            announce(tx, &volume, "volume.updated", None)?;
            Ok(volume)
        };
        let answer = self.core.mutate(call, change).await?;
        if let (Some(held), false) = (held, answer.replayed) {
            // Should this fail, or the daemon end here, the next opening grows the file.
            disk::grow(held, answer.body.size_bytes).await?;
        }
        Ok(answer)
    }

    /// Deletes a volume that belongs to no server. Fails with `in_use` otherwise.
    pub async fn delete(&self, call: &Call, id: VolumeId) -> Result<Answer<Accepted<Volume>>> {
        let conditions = call.clone();
        let change = move |tx: &Tx<'_>| {
            let mut volume: Volume = records::one(tx, id.0)?;
            conditions.check_match(volume.generation)?;
            if let Some(server) = volume.server_id {
                let detail = format!("volume {} belongs to server {server}; delete the server", volume.name);
                return Err(Error::new(Code::InUse, detail));
            }
            if volume.state == VolumeState::Deleting {
                let detail = format!("volume {} is being deleted already", volume.name);
                return Err(Error::new(Code::WrongState, detail));
            }
            volume.state = VolumeState::Deleting;
            records::save(tx, &mut volume)?;
            let resources = vec![Resource::Volume(id)];
            let actor = &conditions.actor;
            let new = NewOperation { kind: "volume.delete", resources, actor, cancellable: false };
            let operation = operations::accept(tx, new)?;
            announce(tx, &volume, "volume.deleting", Some(operation.id))?;
            Ok(Accepted { operation, resource: Some(volume) })
        };
        let answer = self.core.mutate(call, change).await?;
        if !answer.replayed {
            let volumes = self.clone();
            tokio::spawn(async move {
                let purged = volumes.core.insist("the deletion of a volume", || volumes.purge(id));
                if let Err(cause) = purged.await {
                    tracing::warn!(volume = %id, "is deleted at the next start: {}", cause.chain());
                }
            });
        }
        Ok(answer)
    }

    /// For `servers`: writes the record, in state `creating`. Fails with `disk_full` when the file system cannot
    /// hold it, `already_exists` when the name is taken.
    pub(crate) fn create(&self, tx: &Tx<'_>, new: NewVolume) -> Result<Volume> {
        let (now, is_clone) = (Time::now(), new.is_clone);
        let volume = Volume {
            id: VolumeId::new(),
            name: new.name,
            labels: new.labels,
            state: VolumeState::Creating,
            size_bytes: new.size_bytes,
            used_bytes: 0,
            format: VolumeFormat::Raw,
            filled_by: None,
            image_id: new.image_id,
            snapshot_id: new.snapshot_id,
            server_id: new.server_id,
            generation: 1,
            created_at: now,
            updated_at: now,
        };
        let place = self.core.dirs.root().join("volumes");
        space::check(&place, self.source_bytes(tx, &volume, is_clone)?, volume.size_bytes)?;
        records::insert(tx, &volume)?;
        announce(tx, &volume, "volume.created", None)?;
        Ok(volume)
    }

    /// For `servers`: writes the record of a volume that comes from another host, in state `creating`.
    pub(crate) fn adopt(tx: &Tx<'_>, volume: &Volume) -> Result<()> {
        records::insert(tx, volume)?;
        announce(tx, volume, "volume.created", None)
    }

    /// For `servers`: makes the file of a volume that comes from another host, for the machine that comes with it to be
    /// filled by its VMM. Repeatable.
    pub(crate) async fn make_empty(&self, id: VolumeId) -> Result<()> {
        let volume: Volume = self.core.store.read(move |connection| records::one(connection, id.0)).await?;
        let place = self.core.dirs.volume(id);
        if volume.state != VolumeState::Creating || place.exists() {
            return Ok(());
        }
        let size_bytes = volume.size_bytes;
        let source = disk::nothing();
        let new = NewFile { place, source, size_bytes, durability: Durability::Power, may_be_over: false };
        disk::make(new, &|| false, &|_, _| {}).await?;
        self.core.checkpoint("volume.made_empty")
    }

    /// For `servers`: all of it has come.
    pub(crate) fn arrived(tx: &Tx<'_>, id: VolumeId) -> Result<()> {
        let volume: Volume = records::one(tx, id.0)?;
        if volume.state == VolumeState::Creating { Volumes::become_ready(tx, volume) } else { Ok(()) }
    }

    fn become_ready(tx: &Tx<'_>, mut volume: Volume) -> Result<()> {
        volume.state = VolumeState::Ready;
        records::save(tx, &mut volume)?;
        announce(tx, &volume, "volume.ready", None)
    }

    /// What a disk made of a snapshot is filled from.
    async fn snapshot_disk(&self, id: SnapshotId, index: usize) -> Result<Source> {
        let find = move |connection: &Connection| records::one::<SnapshotRecord>(connection, id.0);
        let (record, dirs) = (self.core.store.glance(find).await?, self.core.dirs.clone());
        let open = move || snapshots::open_file(&dirs, id, &record.chain, &snapshots::disk_name(index));
        let failed = move |cause| unopened(format!("disk {index} of snapshot {id}"), cause);
        Ok(Box::new(move || open().map(Some).map_err(failed)))
    }

    /// For `servers`: the record.
    pub(crate) fn find(connection: &Connection, id: VolumeId) -> Result<Volume> {
        records::one(connection, id.0)
    }

    /// For `servers`: makes the file, for [`Volumes::complete`]; if its durability is pending, for [`Volumes::flush`] before that.
    /// Repeatable; does nothing when it is ready. Looks at `cancelled` between pieces and then fails with `draining`; `progress`
    /// takes bytes done and in all.
    pub(crate) async fn fill(
        &self,
        id: VolumeId,
        how: Fill,
        cancelled: &(dyn Fn() -> bool + Send + Sync),
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<Option<Filled>> {
        let volume: Volume = self.core.store.glance(move |connection| records::one(connection, id.0)).await?;
        if volume.state != VolumeState::Creating {
            return Ok(None);
        }
        let source = match (volume.snapshot_id, volume.image_id) {
            (Some(snapshot), _) => self.snapshot_disk(snapshot, 0).await?,
            (None, Some(image)) => {
                let dirs = self.core.dirs.clone();
                let failed = move |cause| unopened(format!("the disk of image {image}"), cause);
                Box::new(move || Ok(Images::disk(&dirs, image).map_err(failed)?.map(Layers::one)))
            }
            (None, None) => disk::nothing(),
        };
        let place = self.core.dirs.volume(id);
        let may_be_over = how.is_clone && volume.snapshot_id.is_some() && self.means() == Means::Holes;
        let (size_bytes, durability) = (volume.size_bytes, how.durability);
        let new = NewFile { place, source, size_bytes, durability, may_be_over };
        let method = disk::make(new, cancelled, progress).await?;
        self.core.checkpoint("volume.filled")?;
        Ok(Some(Filled { id, method }))
    }

    /// For `servers`: has the file that [`Volumes::fill`] made outlive a loss of power; false when one that came in between has taken it
    /// away, or what it needs besides. Repeatable.
    pub(crate) async fn flush(&self, Filled { id, method }: Filled) -> Result<bool> {
        let (place, core) = (self.core.dirs.volume(id), self.core.clone());
        let volume: Volume = core.store.glance(move |connection| records::one(connection, id.0)).await?;
        let lacks =
            move |place: &Path| method == FillMethod::Overlay && overlay::lies(method, place) != method;
        let flush = move || match File::open(&place) {
            _ if lacks(&place) => Ok(false),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
            // Not every file system keeps with a name what was written before it had that; then there is nothing of it.
            file => match file? {
                file if file.metadata()?.len() < volume.size_bytes => Ok(false),
                file => files::flush_in_place(&file, &place).map(|()| true),
            },
        };
        let flushed = disk::blocking(flush).await;
        let flushed =
            flushed.map_err(|cause| disk::file_trouble(format!("volume {id} cannot be flushed"), cause))?;
        self.core.checkpoint("volume.flushed")?;
        Ok(flushed)
    }

    /// For `servers`, in the transaction that says that its file is whole for good: from here on it is what it is to be. Repeatable.
    pub(crate) fn complete(tx: &Tx<'_>, filled: &Filled, dirs: &Dirs) -> Result<()> {
        let Some(mut volume) = records::find::<Volume>(tx, filled.id.0)? else { return Ok(()) };
        if volume.state != VolumeState::Creating {
            return Ok(());
        }
        volume.filled_by = Some(overlay::lies(filled.method, &dirs.volume(volume.id)));
        measure(&mut volume, dirs);
        Volumes::become_ready(tx, volume)
    }

    /// For `servers`: opens it for reading and writing. Fails with `in_use` while another opening of it lasts, in
    /// whatever process that is.
    pub(crate) async fn open(&self, id: VolumeId, content: Content) -> Result<Layers> {
        let volume: Volume = self.core.store.glance(move |connection| records::one(connection, id.0)).await?;
        if volume.state != VolumeState::Ready && content == Content::Recorded {
            return Err(Error::new(
                Code::WrongState,
                format!("volume {} is not complete; wait for the operation that makes it", volume.name),
            ));
        }
        let held = disk::hold_next(&self.core, id, volume.size_bytes).await?;
        let layers = self.with_backing(&volume, held.ok_or_else(|| attached(&volume))?).await?;
        overlay::clear_unwritten(layers, id).await
    }

    /// For `servers`: opens it for reading while its machine is parked or has ended.
    pub(crate) async fn look(&self, id: VolumeId) -> Result<Layers> {
        let volume: Volume = self.core.store.glance(move |connection| records::one(connection, id.0)).await?;
        self.with_backing(&volume, disk::look(&self.core, id).await?).await
    }

    /// For `servers`: makes a file of nothing but a hole, into which somebody copies a volume, in place of what an earlier try has left.
    pub(crate) fn hole(place: &Path, size_bytes: u64) -> Result<File> {
        let made = || {
            let mut unfinished = files::Unfinished::create(place)?;
            unfinished.file().set_len(size_bytes)?;
            let file = unfinished.file().try_clone()?;
            unfinished.take_place().map(|()| file)
        };
        made().map_err(|cause| disk::file_trouble(format!("cannot make {}", place.display()), cause))
    }

    /// For `servers`: makes the copy of a volume that follows quick, where its blocks can be shared. Repeatable.
    pub(crate) async fn share_ahead(source: File, place: PathBuf) -> Result<()> {
        disk::share_ahead(source, place).await
    }

    /// For `servers`: copies a volume's file to `place`, sharing its blocks where the file system can, and says how. The
    /// copy outlives the daemon; whoever wants it to outlive a loss of power flushes it. Looks at `cancelled` between
    /// pieces and then fails with `draining`; `progress` takes bytes done and in all.
    pub(crate) async fn copy(
        source: Layers,
        place: PathBuf,
        size_bytes: u64,
        cancelled: &(dyn Fn() -> bool + Send + Sync),
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<FillMethod> {
        let source: Source = Box::new(|| Ok(Some(source)));
        let new = NewFile { place, source, size_bytes, durability: Durability::Process, may_be_over: false };
        disk::make(new, cancelled, progress).await
    }

    /// For `servers`: copies disk `index` of a snapshot beside a volume, whose place it takes with
    /// [`Volumes::take_back`]. As [`Volumes::copy`] otherwise, but that the copy outlives a loss of power.
    pub(crate) async fn copy_back(
        &self,
        id: VolumeId,
        (snapshot, index): (SnapshotId, usize),
        size_bytes: u64,
        cancelled: &(dyn Fn() -> bool + Send + Sync),
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<()> {
        let source = self.snapshot_disk(snapshot, index).await?;
        let place = files::beside(&self.core.dirs.volume(id));
        let new = NewFile { place, source, size_bytes, durability: Durability::Power, may_be_over: false };
        disk::make(new, cancelled, progress).await.map(drop)
    }

    /// For `servers`: what was copied beside a volume takes its place, and needs no other file. Nobody has it open. Repeatable.
    pub(crate) async fn take_back(&self, id: VolumeId) -> Result<()> {
        let place = self.core.dirs.volume(id);
        disk::blocking(move || files::take_beside(&place))
            .await
            .map_err(|cause| Error::file(format!("volume {id} cannot be put in place"), cause))?;
        // The new one is whole, and there for good. Its record says so before the other goes: nobody may ever say that it is back.
        self.core.store.write(move |tx| Volumes::is_whole(tx, id)).await?;
        self.core.checkpoint("volume.taken_back")?;
        self.let_go(id).await
    }

    /// For `servers`: removes what was copied beside a volume. Repeatable.
    pub(crate) async fn forget_copy(&self, id: VolumeId) -> Result<()> {
        let place = files::beside(&self.core.dirs.volume(id));
        disk::blocking(move || files::remove(&place))
            .await
            .map_err(|cause| Error::file(format!("the copy beside volume {id} cannot be removed"), cause))
    }

    /// For `servers`: a volume holds what a snapshot of it holds.
    pub(crate) fn is_back(
        tx: &Tx<'_>,
        id: VolumeId,
        snapshot: SnapshotId,
        shown: SnapshotVolume,
        size_bytes: u64,
    ) -> Result<()> {
        let mut volume: Volume = records::one(tx, id.0)?;
        volume.snapshot_id = Some(snapshot);
        // Both ways lead between the same two file systems, and what went back is whole.
        volume.filled_by = shown.filled_by.or(volume.filled_by).map(overlay::whole);
        volume.size_bytes = size_bytes;
        records::save(tx, &mut volume)?;
        announce(tx, &volume, "volume.restored", None)
    }

    /// For `servers`: gives it to nobody, when its server is deleted and it is kept. Repeatable.
    pub(crate) fn detach(tx: &Tx<'_>, id: VolumeId) -> Result<()> {
        let Some(mut volume) = records::find::<Volume>(tx, id.0)? else { return Ok(()) };
        if volume.server_id.take().is_some() {
            records::save(tx, &mut volume)?;
            announce(tx, &volume, "volume.detached", None)?;
        }
        Ok(())
    }

    /// For `servers`: removes the files, then the record with its event. Repeatable; no record is no error.
    pub(crate) async fn purge(&self, id: VolumeId) -> Result<()> {
        self.forget_copy(id).await?;
        let place = self.core.dirs.volume(id);
        disk::blocking(move || files::remove(&place))
            .await
            .map_err(|cause| Error::file(format!("cannot remove the file of volume {id}"), cause))?;
        self.let_go(id).await?;
        self.core.checkpoint("volume.removed")?;
        self.core.store.write(move |tx| forget(tx, id)).await
    }
}

/// What a volume is to be filled from. Its name is told inside the error: what failed is the filling.
fn unopened(what: String, cause: io::Error) -> io::Error {
    io::Error::new(cause.kind(), format!("cannot open {what}: {cause}"))
}

fn attached(volume: &Volume) -> Error {
    let detail = format!("volume {} is attached to a machine; stop its server first", volume.name);
    Error::new(Code::InUse, detail)
}

fn check_growth(tx: &Tx<'_>, volume: &Volume, size_bytes: u64, dirs: &Dirs) -> Result<()> {
    let pointer = "/size_bytes";
    if size_bytes < volume.size_bytes {
        let (wanted, has) = (size(size_bytes), size(volume.size_bytes));
        let detail = format!("{wanted} is less than the {has} it has; volumes only grow");
        return Err(Error::invalid(pointer, "smaller", detail));
    }
    if !size_bytes.is_multiple_of(4096) || size_bytes > model::limits::VOLUME_BYTES_MAX {
        let most = model::limits::VOLUME_BYTES_MAX;
        return Err(Error::invalid(
            pointer,
            "invalid",
            format!("must be a multiple of {} and at most {}", size(4096), size(most)),
        ));
    }
    if volume.state != VolumeState::Ready {
        return Err(Error::new(
            Code::WrongState,
            format!("volume {} is not complete; wait for the operation that makes it", volume.name),
        ));
    }
    if let Some(server) = volume.server_id
        && let Some(actions) = crate::servers::actions_unless_off(tx, server)?
    {
        let detail =
            format!("volume {} belongs to server {server}, which is not off; stop it first", volume.name);
        return Err(Error::new(Code::WrongState, detail).with_actions(actions));
    }
    space::check(&dirs.root().join("volumes"), 0, size_bytes)
}

/// Removes the record of a volume whose file is gone, and ends the operation that deleted it.
fn forget(tx: &Tx<'_>, id: VolumeId) -> Result<()> {
    let Some(volume) = records::find::<Volume>(tx, id.0)? else { return Ok(()) };
    records::remove::<Volume>(tx, id.0)?;
    for operation in operations::unfinished(tx)? {
        if operation.kind == "volume.delete" && operation.resources.contains(&Resource::Volume(id)) {
            operations::finish(tx, operation.id, Outcome::Succeeded)?;
        }
    }
    announce(tx, &volume, "volume.deleted", None)
}

/// Reads how much of the host's disk it takes. A file that is not there yet takes nothing.
fn measure(volume: &mut Volume, dirs: &Dirs) {
    volume.used_bytes = overlay::own_bytes(&dirs.volume(volume.id));
}

/// Bytes a file takes on the disk (`st_blocks` counts 512 bytes, stat(2)).
pub(crate) fn used_bytes(metadata: io::Result<std::fs::Metadata>) -> u64 {
    metadata.map(|metadata| metadata.blocks().saturating_mul(512)).unwrap_or_default()
}

fn announce(tx: &Tx<'_>, volume: &Volume, kind: &str, operation: Option<OperationId>) -> Result<()> {
    let state = serde_json::to_value(volume.state)?;
    let data = EventData {
        resource: Some(Resource::Volume(volume.id)),
        generation: Some(volume.generation),
        state: state.as_str().map(str::to_owned),
        operation_id: operation,
        ..EventData::default()
    };
    events::append(tx, kind, data)?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod testing;
/// For `snapshots`: the volumes that are being filled from one.
pub(crate) fn filled_from(connection: &Connection, snapshot: SnapshotId) -> Result<Vec<Name>> {
    let all: Vec<Volume> = records::all(connection)?;
    let is_filling =
        |volume: &Volume| volume.snapshot_id == Some(snapshot) && volume.state == VolumeState::Creating;
    Ok(all.into_iter().filter(is_filling).map(|volume| volume.name).collect())
}

#[cfg(test)]
mod tests;
