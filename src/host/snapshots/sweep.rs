//! What deleted snapshots leave for those that need it. A directory without a record is trimmed to what the lists of the
//! snapshots that are there name, and goes when they name nothing. Needs only shrink: a snapshot that is taken on another names
//! what that one has or names, and that one cannot be deleted meanwhile. So to trim again, or later, is never wrong.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use model::SnapshotId;
use model::snapshot::SnapshotState;
use rusqlite::Connection;

use super::{SnapshotRecord, Snapshots, chain};
use crate::config::Dirs;
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::store::records;
use crate::volumes::files;
use crate::volumes::fill::Extents;
use crate::volumes::layers::punch;

/// What of a directory is needed: by the names of files, ascending and disjoint ranges.
pub(super) type Needed = BTreeMap<String, Vec<Range<u64>>>;

/// Whether all that nobody needs is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trimmed {
    Done,
    /// Somebody has a file open, a clone that runs on it or who reads an export, or it has another name, as a volume needs all of it.
    /// Taking from it would change what they see.
    InUse,
}

impl Trimmed {
    pub(super) fn and(self, other: Trimmed) -> Trimmed {
        if other == Trimmed::InUse { other } else { self }
    }
}

impl Snapshots {
    /// Trims every directory whose snapshot is no more.
    pub(super) async fn sweep(&self) -> Result<()> {
        let _turn = self.sweeping.lock().await;
        // The directories first: each that is made has its record before.
        let directory = self.core.dirs.root().join("snapshots");
        let found = blocking(move || directories(&directory)).await?;
        self.trim_without_record(found).await
    }

    /// Trims again what was in use, or could not be trimmed.
    pub(super) async fn sweep_again(&self) -> Result<()> {
        let _turn = self.sweeping.lock().await;
        let again = std::mem::take(&mut *self.expiry.unswept());
        self.trim_without_record(again).await
    }

    /// Trims those of these directories whose snapshots are no more, for who has the turn. None holds up another: what is in
    /// use, or cannot be trimmed, is noted for later.
    pub(super) async fn trim_without_record(&self, ids: BTreeSet<SnapshotId>) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let all: Vec<SnapshotRecord> = self.core.store.read(records::all).await?;
        let is_there = |id: &SnapshotId| all.iter().any(|record| record.shown.id == *id);
        for id in ids.into_iter().filter(|id| !is_there(id)) {
            let is_done = match self.trim(id).await {
                Ok(trimmed) => trimmed == Trimmed::Done,
                Err(cause) if self.core.store.is_dead() => return Err(cause),
                Err(cause) => {
                    tracing::warn!(snapshot = %id, "what is left of it is looked at again later: {}", cause.chain());
                    false
                }
            };
            if !is_done {
                self.expiry.unswept().insert(id);
            }
            self.core.checkpoint("snapshot.swept")?;
        }
        Ok(())
    }

    /// Trims the directory of a snapshot that is deleted, or was.
    pub(super) async fn trim(&self, id: SnapshotId) -> Result<Trimmed> {
        let dirs = self.core.dirs.clone();
        let users = self.core.store.read(move |connection| users(connection, id)).await?;
        blocking(move || {
            let failed = |cause| Error::file(format!("cannot tidy {}", dirs.snapshot(id).display()), cause);
            trim_now(&dirs, id, &users).map_err(failed)
        })
        .await
    }
}

/// Snapshots that are there and name it.
fn users(connection: &Connection, id: SnapshotId) -> Result<Vec<SnapshotRecord>> {
    let all: Vec<SnapshotRecord> = records::all(connection)?;
    let names_it = |record: &SnapshotRecord| {
        record.shown.state == SnapshotState::Ready
            && record.shown.id != id
            && record.chain.needing(id).next().is_some()
    };
    Ok(all.into_iter().filter(names_it).collect())
}

fn trim_now(dirs: &Dirs, id: SnapshotId, users: &[SnapshotRecord]) -> io::Result<Trimmed> {
    let directory = dirs.snapshot(id);
    let needed = match needed(dirs, id, users) {
        // One that cannot be told is no reason to take anything away, nor to hold up anything else.
        Err(cause) => {
            tracing::warn!(snapshot = %id, "all that is left of it is kept, as what is needed of it is not known: {cause}");
            return Ok(Trimmed::InUse);
        }
        Ok(needed) => needed,
    };
    if needed.is_empty() {
        return files::remove_tree(&directory).map(|()| Trimmed::Done);
    }
    let entries = match std::fs::read_dir(&directory) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Trimmed::Done),
        other => other?,
    };
    let mut outcome = Trimmed::Done;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let done = match name.to_str().and_then(|name| needed.get(name)) {
            None => files::remove(&entry.path()).map(|()| Trimmed::Done),
            Some(ranges) => trim_file(&entry.path(), ranges),
        };
        outcome = outcome.and(done.unwrap_or_else(|cause| {
            tracing::warn!("{} takes more room than is needed: {cause}", entry.path().display());
            Trimmed::InUse
        }));
    }
    Ok(outcome)
}

/// What the users need of a snapshot.
fn needed(dirs: &Dirs, id: SnapshotId, users: &[SnapshotRecord]) -> io::Result<Needed> {
    let mut needed = Needed::new();
    for record in users {
        for (name, listed, number) in record.chain.needing(id) {
            let lower = chain::read_list(dirs, record.shown.id, listed, name)?;
            let runs = lower.runs.iter().filter(|run| run.file == number);
            needed.entry(name.to_owned()).or_default().extend(runs.map(|run| run.offset..run.end()));
        }
    }
    needed.values_mut().for_each(|ranges| *ranges = joined(std::mem::take(ranges)));
    Ok(needed)
}

/// The same bytes, in ascending and disjoint ranges.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut().filter(|last| last.end >= range.start) {
            Some(last) => last.end = last.end.max(range.end),
            None => joined.push(range),
        }
    }
    joined
}

/// Makes holes of all but these ranges, unless somebody has the file.
fn trim_file(path: &Path, ranges: &[Range<u64>]) -> io::Result<Trimmed> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let (length, names) = file.metadata().map(|found| (found.len(), found.nlink()))?;
    // Another name it gets no more: there is no snapshot to clone. To look for what could be taken takes long in a large file.
    if names > 1 {
        return Ok(Trimmed::InUse);
    }
    let (ends, starts) = (ranges.iter().map(|range| range.end), ranges.iter().map(|range| range.start));
    let gaps = [0].into_iter().chain(ends).zip(starts.chain([length]));
    let mut unneeded = Vec::new();
    for (start, end) in gaps.filter(|(start, end)| start < end) {
        for extent in Extents::from(&file, end, start) {
            unneeded.push(extent?);
        }
    }
    if unneeded.is_empty() {
        return Ok(Trimmed::Done);
    }
    if !is_unused(&file, path) {
        return Ok(Trimmed::InUse);
    }
    // Whoever opens it from here on does so for a snapshot that is there, and reads nothing but what is needed.
    for range in unneeded {
        match punch(&file, range) {
            // Where no holes can be made it goes with the last who needs it.
            Err(cause) if cause.kind() == io::ErrorKind::Unsupported => break,
            other => other?,
        }
    }
    Ok(Trimmed::Done)
}

fn is_unused(file: &File, path: &Path) -> bool {
    sys::lease::is_unused(file).unwrap_or_else(|cause| {
        // Only on a file system that has no leases: nothing is taken from what may be mapped.
        tracing::warn!("whether somebody uses {} cannot be told: {cause}", path.display());
        false
    })
}

/// Only names that Toft gives; what else lies there is somebody's and is left.
fn directories(directory: &Path) -> Result<BTreeSet<SnapshotId>> {
    let failed = |cause| Error::file(format!("cannot tidy {}", directory.display()), cause);
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let id: Option<SnapshotId> =
            entry.map_err(failed)?.file_name().to_str().and_then(|name| name.parse().ok());
        found.extend(id);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_another_name_is_left_without_a_look_at_what_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let [path, other] = ["disk-0.raw", "second"].map(|name| directory.path().join(name));
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        std::fs::hard_link(&path, &other).unwrap();
        // Even if nothing could be taken from it: that is not known.
        for needed in [0..4096, 0..1 << 20] {
            assert_eq!(trim_file(&path, &[needed]).unwrap(), Trimmed::InUse);
        }
        assert!(std::fs::read(&other).unwrap() == vec![1; 1 << 20]);
        std::fs::remove_file(other).unwrap();
        assert_eq!(trim_file(&path, std::slice::from_ref(&(0..4096))).unwrap(), Trimmed::Done);
    }
}
