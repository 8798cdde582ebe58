//! Snapshots that hold only what is new since another one of the server. A file of such a snapshot has holes for what lies in
//! earlier ones; a list beside it (`wire::saved::lower`), whose digest the record has, says in which. Which snapshots are
//! needed is told by the lists of those that are there and by nothing else: a deleted one of which something is needed
//! keeps just that, in a directory without a record, until nobody needs it.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use model::snapshot::{FullReason, Snapshot, SnapshotState};
use model::volume::FillMethod;
use model::{ServerId, SnapshotId};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use sys::beneath::{self, Access};
use wire::limits::{LOWER_FILES_MAX, LOWER_RUNS_MAX};
use wire::saved::lower::{LOWER_BYTES_MAX, Lower};
use wire::saved::table::Table;
use wire::saved::{Digest, form};

use super::limits::{OPEN_AGAIN, OPEN_TRIES};
use super::{MEMORY, STATE, SnapshotRecord, disk_name, is_disk};
use crate::config::Dirs;
use crate::error::{Error, Result};
use crate::store::records;
use crate::volumes::layers::{self, Layers};

/// What of a snapshot's files lies in earlier ones, by the names of the files. Nothing of one that is full.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chain(BTreeMap<String, Listed>);

/// A file of which something lies in the files of that name of others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// SHA-256 of the list.
    pub(crate) digest: Digest,
    /// The snapshots, in the order in which the list numbers them. They may have been deleted.
    pub(crate) below: Vec<SnapshotId>,
    /// How many bytes lie in them.
    bytes: u64,
}

impl Chain {
    /// Bytes that lie in other snapshots.
    pub(super) fn bytes(&self) -> u64 {
        self.0.values().map(|listed| listed.bytes).sum()
    }

    /// Bytes of this file that do.
    pub(crate) fn bytes_of(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, |listed| listed.bytes)
    }

    /// What is needed for this file.
    pub(crate) fn of(&self, name: &str) -> Option<&Listed> {
        self.0.get(name)
    }

    /// Those that it needs.
    pub(super) fn below(&self) -> BTreeSet<SnapshotId> {
        self.0.values().flat_map(|listed| listed.below.iter().copied()).collect()
    }

    /// Its files that need some of a snapshot, each with the number of that snapshot in its list.
    pub(super) fn needing(&self, id: SnapshotId) -> impl Iterator<Item = (&str, &Listed, u32)> {
        self.0.iter().filter_map(move |(name, listed)| {
            let number = (0..).zip(&listed.below).find(|(_, below)| **below == id);
            number.map(|(number, _)| (name.as_str(), listed, number))
        })
    }

    /// Most snapshots that one of its files needs.
    fn depth(&self) -> usize {
        self.0.values().map(|listed| listed.below.len()).max().unwrap_or_default()
    }
}

/// Name of the list beside a file.
pub(crate) fn list_name(name: &str) -> String {
    format!("{name}.lower")
}

/// The snapshot that the next one of a server is to be taken on, or why there is none: the last one, of those with memory
/// where memory is saved and there are any. Any will do, whatever has become of server and machine since: what is compared is
/// what is in memory and on the disks.
pub(crate) fn base(
    connection: &Connection,
    server: ServerId,
    memory: bool,
) -> Result<std::result::Result<SnapshotId, FullReason>> {
    let all: Vec<SnapshotRecord> = records::all(connection)?;
    let is_base = |record: &SnapshotRecord| {
        let shown = &record.shown;
        // Of one that came in the stream says whose it is.
        shown.server_id == server
            && shown.state == SnapshotState::Ready
            && !shown.imported
            && !record.origin.for_clones
    };
    // Oldest first.
    let all: Vec<_> = all.into_iter().filter(is_base).collect();
    let with_memory = all.iter().rfind(|record| memory && record.shown.memory);
    Ok(match with_memory.or(all.last()) {
        None => Err(FullReason::NoParent),
        Some(base) if base.chain.depth() >= LOWER_FILES_MAX as usize => Err(FullReason::ChainTooLong),
        Some(base) => Ok(base.shown.id),
    })
}

/// For the deletion of one: the names of those that are being taken on it.
pub(super) fn taken_on(connection: &Connection, id: SnapshotId) -> Result<Vec<String>> {
    let all: Vec<SnapshotRecord> = records::all(connection)?;
    let on_it = |shown: &Snapshot| shown.state == SnapshotState::Creating && shown.parent_id == Some(id);
    let names = all.into_iter().map(|record| record.shown).filter(on_it);
    Ok(names.map(|shown| shown.name.to_string()).collect())
}

/// Opens a file of a snapshot with those below it.
pub(crate) fn open(dirs: &Dirs, id: SnapshotId, chain: &Chain, name: &str) -> io::Result<Layers> {
    let own = open_in(dirs, id, name)?;
    let Some(listed) = chain.of(name) else { return Ok(Layers::one(own)) };
    let lower = read_list(dirs, id, listed, name)?;
    let files = listed.below.iter().map(|below| open_in(dirs, *below, name)).collect::<io::Result<_>>()?;
    Layers::new(own, lower, files)
}

/// Opens a file in a snapshot's directory.
pub(crate) fn open_in(dirs: &Dirs, id: SnapshotId, name: &str) -> io::Result<File> {
    let mut tries = OPEN_TRIES;
    // Volumes may have disks under other names, of which nobody writes to any.
    let access = if is_disk(name) { Access::ReadLinked } else { Access::Read };
    loop {
        match beneath::open(&dirs.snapshot(id), Path::new(name), access) {
            // Somebody asks at this moment whether it is in use.
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock && tries > 0 => tries -= 1,
            other => return other,
        }
        std::thread::sleep(OPEN_AGAIN);
    }
}

/// The list of a file, after it was compared with its digest.
pub(super) fn read_list(dirs: &Dirs, id: SnapshotId, listed: &Listed, name: &str) -> io::Result<Lower> {
    let length = open_in(dirs, id, name)?.metadata()?.len();
    let bytes = read_named(&open_in(dirs, id, &list_name(name))?, listed.digest, LOWER_BYTES_MAX)?;
    Lower::split(&bytes, length).map_err(invalid)
}

/// All bytes of a file that has this digest.
fn read_named(file: &File, wanted: Digest, most: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    if length > most {
        return Err(invalid(format!("it has {length} bytes; {most} are possible")));
    }
    let mut bytes = vec![0; length as usize];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0)?;
    if Digest(Sha256::digest(&bytes).into()) != wanted {
        return Err(invalid("it is not the one that was kept: its digest is another"));
    }
    Ok(bytes)
}

fn invalid(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause)
}

/// A snapshot that has just been taken, before anybody can use it.
pub(crate) struct Fresh<'a> {
    pub(crate) id: SnapshotId,
    pub(crate) memory_bytes: u64,
    /// Digest of its state file, and how much of memory was written beside it; where memory can be compared.
    pub(crate) memory: Option<(Digest, u64)>,
    pub(crate) disks: &'a [FillMethod],
}

/// Makes it hold only what `base` has not. What it holds in all does not change. Repeatable.
pub(crate) fn thin(
    dirs: &Dirs,
    fresh: &Fresh<'_>,
    base: &SnapshotRecord,
    stop: &dyn Fn() -> bool,
) -> Result<Chain> {
    let failed = |cause: io::Error| match cause.kind() {
        io::ErrorKind::Interrupted => Error::new(model::Code::WrongState, "the snapshot was given up"),
        _ => Error::file(format!("snapshot {} cannot be compared with {}", fresh.id, base.shown.id), cause),
    };
    let mut chain = Chain::default();
    let mut add = |name: String, lower: Lower| -> io::Result<()> {
        let below = base.chain.of(&name).map(|listed| listed.below.as_slice()).unwrap_or_default();
        let below = [base.shown.id].into_iter().chain(below.iter().copied());
        if let Some(listed) = keep(dirs, fresh.id, &name, lower, below.collect())? {
            chain.0.insert(name, listed);
        }
        Ok(())
    };
    if let (Some((root, written)), Some(base_root)) = (fresh.memory, base.root) {
        let table = |id, root| read_table(dirs, id, root, fresh.memory_bytes);
        let (mine, theirs) =
            (table(fresh.id, root).map_err(failed)?, table(base.shown.id, base_root).map_err(failed)?);
        let lower = thin_memory(dirs, fresh.id, base, (&mine, &theirs)).map_err(failed)?;
        if written < mine.bytes().saturating_sub(lower.lower_bytes()) {
            let detail = format!(
                "the VMM wrote {written} bytes of memory, and the base has {} of {}: some are nowhere",
                lower.lower_bytes(),
                mine.bytes()
            );
            return Err(Error::new(model::Code::MachineFailed, detail));
        }
        add(MEMORY.to_owned(), lower).map_err(failed)?;
    }
    for (index, (method, _)) in fresh.disks.iter().zip(&base.shown.volumes).enumerate() {
        // Blocks that are shared take no room.
        if *method == FillMethod::Reflink {
            continue;
        }
        let name = disk_name(index);
        let below = open(dirs, base.shown.id, &base.chain, &name).map_err(failed)?;
        match layers::thin(&open_own(dirs, fresh.id, &name).map_err(failed)?, &below, stop) {
            Ok(lower) => add(name, lower).map_err(failed)?,
            Err(cause) if cause.kind() == io::ErrorKind::Unsupported => {
                tracing::info!(snapshot = %fresh.id, "holds its disk in full: the file system keeps no holes");
            }
            Err(cause) => return Err(failed(cause)),
        }
    }
    Ok(chain)
}

/// Whether one can be taken on this snapshot: all of it can be read. Answers whether memory of so many bytes can be compared
/// with what it has.
pub(crate) fn check(dirs: &Dirs, base: &SnapshotRecord, memory_bytes: u64) -> io::Result<bool> {
    for index in 0..base.shown.volumes.len() {
        open(dirs, base.shown.id, &base.chain, &disk_name(index))?;
    }
    let Some(root) = base.root.filter(|_| base.shown.memory_bytes == memory_bytes) else { return Ok(false) };
    let table = read_table(dirs, base.shown.id, root, memory_bytes)?;
    let below = open(dirs, base.shown.id, &base.chain, MEMORY)?;
    // Each part may be in another file than the one before.
    Ok(table.parts.len() as u64 + below.lower().runs.len() as u64 <= LOWER_RUNS_MAX)
}

/// Parts of memory that the base has, too. A VMM that was told of it has left them out already.
fn thin_memory(
    dirs: &Dirs,
    id: SnapshotId,
    base: &SnapshotRecord,
    (mine, theirs): (&Table, &Table),
) -> io::Result<Lower> {
    let below = open(dirs, base.shown.id, &base.chain, MEMORY)?;
    let file = open_own(dirs, id, MEMORY)?;
    let length = file.metadata()?.len();
    if length != mine.memory_bytes {
        return Err(invalid(format!(
            "the VMM made a memory file of {length} bytes, not {}",
            mine.memory_bytes
        )));
    }
    let mut lower = Lower { bytes: mine.memory_bytes, files: below.lower().files + 1, runs: Vec::new() };
    for part in mine.parts.iter().filter(|part| theirs.holds(part)) {
        let range = part.offset..part.offset + u64::from(part.bytes);
        match layers::punch(&file, range.clone()) {
            // Where no holes can be made, what was written takes its room, and is not looked at.
            Err(cause) if cause.kind() == io::ErrorKind::Unsupported => {}
            other => other?,
        }
        layers::note(&below, range, &mut lower);
    }
    Ok(lower)
}

/// Writes a list of what lies below, with no more files than are needed; nothing where nothing does.
fn keep(
    dirs: &Dirs,
    id: SnapshotId,
    name: &str,
    mut lower: Lower,
    below: Vec<SnapshotId>,
) -> io::Result<Option<Listed>> {
    if lower.runs.is_empty() {
        return Ok(None);
    }
    if lower.runs.len() as u64 > LOWER_RUNS_MAX {
        return Err(invalid(format!("{name} would lie in {} pieces", lower.runs.len())));
    }
    let mut needed = Vec::new();
    for run in &mut lower.runs {
        let id = below[run.file as usize];
        let number = needed.iter().position(|other| *other == id).unwrap_or(needed.len());
        if number == needed.len() {
            needed.push(id);
        }
        run.file = u32::try_from(number).map_err(io::Error::other)?;
    }
    lower.files = u32::try_from(needed.len()).map_err(io::Error::other)?;
    let bytes = lower.join();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(dirs.snapshot(id).join(list_name(name)))?.write_all(&bytes)?;
    Ok(Some(Listed {
        digest: Digest(Sha256::digest(&bytes).into()),
        below: needed,
        bytes: lower.lower_bytes(),
    }))
}

fn read_table(dirs: &Dirs, id: SnapshotId, root: Digest, memory_bytes: u64) -> io::Result<Table> {
    let bytes = read_named(&open_in(dirs, id, STATE)?, root, wire::saved::state_bytes_max(memory_bytes))?;
    let table = Table::parse(&mut form::split(&bytes).map_err(invalid)?).map_err(invalid)?;
    if table.memory_bytes != memory_bytes {
        return Err(invalid("it tells of another amount of memory"));
    }
    Ok(table)
}

fn open_own(dirs: &Dirs, id: SnapshotId, name: &str) -> io::Result<File> {
    beneath::open(&dirs.snapshot(id), Path::new(name), Access::ReadWrite)
}

#[cfg(test)]
mod tests;
