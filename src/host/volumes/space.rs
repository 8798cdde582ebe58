//! Whether the disk has room, asked before anything is begun. The answer can be outdated at once, so a disk that
//! fills up later is handled where it is written to. `volumes`, `images` and `store` ask.
use std::path::Path;

use model::volume::Volume;
use model::{Code, VolumeId};
use rusqlite::Connection;

use super::limits::RESERVE_BYTES;
use super::overlay::{self, Means};
use super::{Volumes, used_bytes};
use crate::error::{Error, Result};
use crate::snapshots::{self, SnapshotRecord};
use crate::store::records;

/// The file system of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    /// In all.
    pub total_bytes: u64,
    /// For us to use.
    pub free_bytes: u64,
    /// In use. Some of what is neither may be kept for root, or for other users of a shared disk.
    pub used_bytes: u64,
}

/// Looks at the file system that holds `directory`.
pub(crate) fn look(directory: &Path) -> std::io::Result<Space> {
    let found = rustix::fs::statvfs(directory)?;
    Ok(Space {
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        used_bytes: found.f_blocks.saturating_sub(found.f_bfree).saturating_mul(found.f_frsize),
    })
}

/// Fails with `disk_full` when `now_bytes` cannot be written, or a file that grows to `later_bytes` could never be.
pub(crate) fn check(directory: &Path, now_bytes: u64, later_bytes: u64) -> Result<()> {
    let shown = directory.display();
    let space = look(directory).map_err(|cause| Error::file(format!("cannot look at {shown}"), cause))?;
    judge(space, now_bytes, later_bytes).map_err(|detail| Error::new(Code::DiskFull, detail))
}

/// Why something could not be written, if there is no room left: for what is told by whoever tried.
pub(crate) fn short(directory: &Path) -> Option<&'static str> {
    let is_short = look(directory).is_ok_and(|space| space.free_bytes < RESERVE_BYTES);
    is_short.then_some("the host's disk is full; delete volumes or images, or add space, and try again")
}

fn judge(space: Space, now_bytes: u64, later_bytes: u64) -> std::result::Result<(), String> {
    if now_bytes.saturating_add(RESERVE_BYTES) > space.free_bytes {
        return Err(format!(
            "{now_bytes} bytes are needed, and {RESERVE_BYTES} are kept for the host, but only {} are free; delete \
             volumes or images, or add space",
            space.free_bytes
        ));
    }
    if later_bytes > space.total_bytes {
        return Err(format!(
            "{later_bytes} bytes are more than the {} that the host's disk has in all; ask for less",
            space.total_bytes
        ));
    }
    Ok(())
}

impl Volumes {
    /// For `servers`: bytes that filling it copies where blocks cannot be shared, and for a clone where they can.
    pub(crate) fn source_bytes(
        &self,
        connection: &Connection,
        volume: &Volume,
        is_clone: bool,
    ) -> Result<u64> {
        let bytes_of = |snapshot| match is_clone {
            true => self.cloned_bytes(&snapshot, 0),
            false => self.snapshot_bytes(&snapshot, 0),
        };
        match (volume.snapshot_id, volume.image_id) {
            (Some(snapshot), _) => {
                Ok(records::find::<SnapshotRecord>(connection, snapshot.0)?.map_or(0, bytes_of))
            }
            (None, Some(image)) => Ok(self.images.disk_stored_bytes(image)),
            (None, None) => Ok(0),
        }
    }

    /// For `servers`: bytes that a disk of a snapshot takes, wherever they lie.
    pub(crate) fn snapshot_bytes(&self, snapshot: &SnapshotRecord, index: usize) -> u64 {
        let name = snapshots::disk_name(index);
        let own = used_bytes(std::fs::metadata(self.core.dirs.snapshot(snapshot.shown.id).join(&name)));
        own.saturating_add(snapshot.chain.bytes_of(&name))
    }

    /// For `servers`: bytes that a clone's volume copies of a disk of a snapshot.
    pub(crate) fn cloned_bytes(&self, snapshot: &SnapshotRecord, index: usize) -> u64 {
        let inherited = snapshot.chain.bytes_of(&snapshots::disk_name(index));
        match self.means() {
            Means::Blocks => inherited,
            Means::Holes if inherited == 0 => 0,
            Means::Holes | Means::Nothing => self.snapshot_bytes(snapshot, index),
        }
    }

    /// For `servers`: the same of a volume of which a snapshot is yet to be taken.
    pub(crate) fn cloned_bytes_of(&self, id: VolumeId) -> u64 {
        if self.means() == Means::Nothing { self.stored_bytes(id) } else { 0 }
    }

    /// For `servers`: bytes that are copied with it, at most.
    pub(crate) fn stored_bytes(&self, id: VolumeId) -> u64 {
        overlay::stored_bytes(&self.core.dirs.volume(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_stays_and_what_can_never_fit_is_refused() {
        let space = Space { total_bytes: 1000 << 20, free_bytes: 100 << 20, used_bytes: 900 << 20 };
        assert_eq!(judge(space, 36 << 20, 1000 << 20), Ok(()));
        assert!(judge(space, (36 << 20) + 1, 0).unwrap_err().contains("are free"));
        assert!(judge(space, 0, (1000 << 20) + 1).unwrap_err().contains("in all"));
        assert!(judge(space, u64::MAX, u64::MAX).is_err());
    }
}
