//! Volumes: writable disks, one raw file each.
//! Called by the facade, and by `servers`, which makes, opens and removes the root volumes.
use std::fs::File;

use model::operation::Accepted;
use model::page::{ListQuery, Page};
use model::volume::{PatchVolume, Volume};
use model::{Code, ImageId, Labels, Name, ServerId, VolumeId};
use rusqlite::Connection;

use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::images::Images;
use crate::store::Tx;

pub(crate) const TABLES: &str = crate::table!("volumes");

/// Volumes, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Volumes {
    core: Shared,
    images: Images,
}

/// A volume to make.
pub(crate) struct NewVolume {
    /// Unique name.
    pub name: Name,
    /// The caller's own pairs.
    pub labels: Labels,
    /// Size in bytes, a multiple of 4096, at least the image's.
    pub size_bytes: u64,
    /// What it is filled from; nothing makes it empty.
    pub image_id: Option<ImageId>,
    /// The server it belongs to.
    pub server_id: Option<ServerId>,
}

fn unbuilt() -> Error {
    Error::new(Code::HostUnprepared, "volumes are not built yet")
}

impl Volumes {
    pub(crate) fn new(core: Shared, images: Images) -> Volumes {
        Volumes { core, images }
    }

    /// Takes up what an earlier daemon left unfinished, except volumes that belong to a server: the server's
    /// actor fills or purges those. Files that no record names are removed.
    pub(crate) async fn recover(&self) -> Result<()> {
        let _ = &self.images;
        Ok(())
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Volume>> {
        let _ = (&self.core, query);
        Err(unbuilt())
    }

    /// The volume.
    pub async fn one(&self, id: VolumeId) -> Result<Volume> {
        let _ = id;
        Err(unbuilt())
    }

    /// Name, labels, size (only larger, and only while its server is off: see `servers::is_off`).
    pub async fn patch(&self, call: &Call, id: VolumeId, patch: PatchVolume) -> Result<Answer<Volume>> {
        let _ = (call, id, patch);
        Err(unbuilt())
    }

    /// Deletes a volume that belongs to no server. Fails with `in_use` otherwise.
    pub async fn delete(&self, call: &Call, id: VolumeId) -> Result<Answer<Accepted<Volume>>> {
        let _ = (call, id);
        Err(unbuilt())
    }

    /// For `servers`: writes the record, in state `creating`. Fails with `disk_full` when the file system cannot
    /// hold it, `already_exists` when the name is taken.
    pub(crate) fn create(&self, tx: &Tx<'_>, new: NewVolume) -> Result<Volume> {
        let _ = (tx, new);
        Err(unbuilt())
    }

    /// For `servers`: the record.
    pub(crate) fn find(connection: &Connection, id: VolumeId) -> Result<Volume> {
        let _ = (connection, id);
        Err(unbuilt())
    }

    /// For `servers`: makes the file and sets the record `ready`. Repeatable; does nothing when it is ready. Looks
    /// at `cancelled` between pieces and then fails with `draining`; `progress` takes bytes done and in all.
    pub(crate) async fn fill(
        &self,
        id: VolumeId,
        cancelled: &(dyn Fn() -> bool + Send + Sync),
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<()> {
        let _ = (id, cancelled, progress);
        Err(unbuilt())
    }

    /// For `servers`: opens it for reading and writing.
    pub(crate) async fn open(&self, id: VolumeId) -> Result<File> {
        let _ = id;
        Err(unbuilt())
    }

    /// For `servers`: gives it to nobody, when its server is deleted and it is kept. Repeatable.
    pub(crate) fn detach(tx: &Tx<'_>, id: VolumeId) -> Result<()> {
        let _ = (tx, id);
        Err(unbuilt())
    }

    /// For `servers`: removes the file, then the record with its event. Repeatable; no record is no error.
    pub(crate) async fn purge(&self, id: VolumeId) -> Result<()> {
        let _ = id;
        Err(unbuilt())
    }
}
