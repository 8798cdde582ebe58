//! What of a snapshot's memory the first machine that went on from it had used after its first moments: its *working set*. The
//! next ones will use much the same, so the files are read ahead for them, once for all clones of a call. Where memory is in
//! no cache any more, a guest would wait for the disk at every page instead. Advice and nothing else: what cannot be found out or
//! read is left, and the machines go on without.
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};

use model::SnapshotId;
use model::snapshot::SnapshotState;
use rusqlite::Connection;
use rustix::fs::{Advice, fadvise};
use rustix::io::{ReadWriteFlags, preadv2};
use serde::{Deserialize, Serialize};

use super::limits::{
    AHEAD_LONG_BYTES, AHEAD_PIECE_BYTES, USED_AFTER, USED_BYTES_MAX, USED_GAP_BYTES, USED_RUNS_MAX,
};
use super::{MEMORY, SnapshotRecord, Snapshots, chain, record};
use crate::config::Dirs;
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::store::{Tx, records};
use crate::vmms::Process;
use crate::volumes::layers::Layers;

/// A page of the only architecture that there is.
const PAGE_BYTES: u64 = 4096;

/// The list beside the memory's file.
const USED: &str = "machine.used";

/// Where memory was used, as offset and length in bytes; ascending and disjoint. Offsets are those of the memory's file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Used {
    runs: Vec<(u64, u64)>,
}

impl Used {
    /// Joined where little lies in between, so that there are not too many.
    fn of(mut ranges: Vec<Range<u64>>) -> Used {
        ranges.sort_by_key(|range| range.start);
        let mut gap = USED_GAP_BYTES;
        loop {
            let mut runs: Vec<Range<u64>> = Vec::new();
            for range in &ranges {
                match runs.last_mut().filter(|last| range.start <= last.end.saturating_add(gap)) {
                    Some(last) => last.end = last.end.max(range.end),
                    None => runs.push(range.clone()),
                }
            }
            if runs.len() <= USED_RUNS_MAX {
                return Used { runs: runs.into_iter().map(|run| (run.start, run.end - run.start)).collect() };
            }
            (ranges, gap) = (runs, gap.saturating_mul(2));
        }
    }

    fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, bytes)| bytes).sum()
    }

    fn write(&self, directory: &Path) -> io::Result<()> {
        let (new, path) = (directory.join(format!("{USED}.new")), directory.join(USED));
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(new, path)
    }

    /// A list that is damaged is none; a daemon that died may have left one.
    fn read(dirs: &Dirs, id: SnapshotId) -> io::Result<Used> {
        let file = chain::open_in(dirs, id, USED)?;
        let length = file.metadata()?.len();
        if length > USED_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {length} bytes")));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Used::parse(&bytes)
    }

    /// Runs that lie over one another would have the same memory read again and again.
    fn parse(bytes: &[u8]) -> io::Result<Used> {
        let invalid = |cause: &str| io::Error::new(io::ErrorKind::InvalidData, cause.to_owned());
        let used: Used = serde_json::from_slice(bytes).map_err(|cause| invalid(&cause.to_string()))?;
        let mut end = 0;
        let is_next = |(offset, bytes): &(u64, u64)| {
            let is_behind = *offset >= end && *bytes > 0;
            end = offset.saturating_add(*bytes);
            is_behind
        };
        match used.runs.len() <= USED_RUNS_MAX && used.runs.iter().all(is_next) {
            true => Ok(used),
            false => Err(invalid("its runs do not follow one another")),
        }
    }
}

impl Snapshots {
    /// For `servers`: a machine has just gone on from the memory of a snapshot, which it has mapped. What it will have used
    /// shortly is recorded, unless that has been done.
    pub(crate) fn observe(&self, id: SnapshotId, process: Arc<dyn Process>) {
        // The first of many that begin at once.
        if !self.observed().insert(id) {
            return;
        }
        let snapshots = self.clone();
        tokio::spawn(async move {
            if let Err(cause) = snapshots.observe_now(id, &*process).await {
                tracing::debug!(snapshot = %id, "what of its memory is used first is not known: {}", cause.chain());
            }
            snapshots.observed().remove(&id);
        });
    }

    fn observed(&self) -> MutexGuard<'_, BTreeSet<SnapshotId>> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn observe_now(&self, id: SnapshotId, process: &dyn Process) -> Result<()> {
        let find = move |connection: &Connection| records::find::<SnapshotRecord>(connection, id.0);
        let Some(record) = self.core.store.read(find).await?.filter(is_unobserved) else { return Ok(()) };
        let ended = tokio::time::timeout(USED_AFTER, process.ended()).await.is_ok();
        let (dirs, pid) = (self.core.dirs.clone(), process.id().pid);
        if ended {
            return Ok(());
        }
        let look = move || {
            let failed =
                |cause| Error::file(format!("the memory of process {pid} cannot be looked at"), cause);
            let layers = chain::open(&dirs, id, &record.chain, MEMORY).map_err(failed)?;
            used_of(pid, &layers).map_err(failed)
        };
        let used = blocking(look).await?;
        // Another process may have had the number since.
        if tokio::time::timeout(std::time::Duration::ZERO, process.ended()).await.is_ok()
            || used.runs.is_empty()
        {
            return Ok(());
        }
        let (bytes, directory) = (used.bytes(), self.core.dirs.snapshot(id));
        blocking(move || {
            used.write(&directory)
                .map_err(|cause| Error::file(format!("cannot write into {}", directory.display()), cause))
        })
        .await?;
        let keep = move |tx: &Tx<'_>| {
            let found = records::find::<SnapshotRecord>(tx, id.0)?.filter(is_unobserved);
            let Some(mut record) = found else { return Ok(()) };
            record.shown.working_set_bytes = Some(bytes);
            record::save(tx, &mut record)?;
            record::announce(tx, &record.shown, "snapshot.updated", Some("its working set is known"), None)
        };
        self.core.store.write(keep).await
    }

    /// For `servers`: machines are about to go on from the memory of a snapshot. Answers at once.
    pub(crate) fn read_ahead(&self, id: SnapshotId) {
        let snapshots = self.clone();
        tokio::spawn(async move {
            if let Err(cause) = snapshots.read_ahead_now(id).await {
                tracing::debug!(snapshot = %id, "its memory is not read ahead: {}", cause.chain());
            }
        });
    }

    async fn read_ahead_now(&self, id: SnapshotId) -> Result<()> {
        let find = move |connection: &Connection| records::find::<SnapshotRecord>(connection, id.0);
        let found = self.core.store.read(find).await?;
        let Some(record) = found.filter(|record| record.shown.working_set_bytes.is_some()) else {
            return Ok(());
        };
        let dirs = self.core.dirs.clone();
        blocking(move || {
            let layers = chain::open(&dirs, id, &record.chain, MEMORY);
            let ahead = layers.and_then(|layers| read_ahead(&layers, &Used::read(&dirs, id)?));
            ahead.map_err(|cause| Error::file("the memory cannot be read", cause))
        })
        .await
    }
}

/// One that stays, and of which nobody knows yet what is used first.
fn is_unobserved(record: &SnapshotRecord) -> bool {
    let shown = &record.shown;
    shown.state == SnapshotState::Ready
        && shown.memory
        && shown.working_set_bytes.is_none()
        && !record.origin.for_clones
}

/// Reads what was used, from whichever files it lies in. Short runs first, for all of which the kernel is asked before it is waited
/// for any; it reads long ones faster for a reader, in larger pieces, and some way on, as for whoever reads.
fn read_ahead(layers: &Layers, used: &Used) -> io::Result<()> {
    let length = layers.own.metadata()?.len();
    let is_long = |run: &&(u64, u64)| run.1 >= AHEAD_LONG_BYTES;
    for (file, piece) in
        pieces(layers, used.runs.iter().filter(|run| !is_long(run)), length, AHEAD_PIECE_BYTES)
    {
        fadvise(file?, piece.start, NonZeroU64::new(piece.end - piece.start), Advice::WillNeed)?;
    }
    let mut read = vec![0; AHEAD_LONG_BYTES as usize];
    for (file, piece) in pieces(layers, used.runs.iter().filter(is_long), length, AHEAD_LONG_BYTES) {
        let file = file?;
        // Where its end is in the cache, so is the rest.
        let last = &mut [IoSliceMut::new(&mut read[..1])];
        if preadv2(file, last, piece.end - 1, ReadWriteFlags::NOWAIT) != Ok(1) {
            file.read_exact_at(&mut read[..(piece.end - piece.start) as usize], piece.start)?;
        }
    }
    Ok(())
}

/// Cuts runs into pieces of at most so many bytes of one file each, none of them empty or beyond `length`.
fn pieces<'a>(
    layers: &'a Layers,
    runs: impl Iterator<Item = &'a (u64, u64)>,
    length: u64,
    most: u64,
) -> impl Iterator<Item = (io::Result<&'a File>, Range<u64>)> {
    runs.flat_map(move |(offset, bytes)| {
        let end = offset.saturating_add(*bytes).min(length);
        layers.lower().pieces(*offset..end).flat_map(move |(part, lower)| {
            let starts = (part.start..part.end).step_by(most as usize);
            starts.map(move |at| (layers.file(lower), at..part.end.min(at + most)))
        })
    })
}

/// Which parts of files a process has in its page tables: what it has read or written, and what the kernel has mapped with that.
/// The process may have been taken over by its guest, so it is looked at no longer than one that has each page mapped twice.
/// Source: proc(5), `/proc/pid/maps` and `map_files`.
fn used_of(pid: i32, layers: &Layers) -> io::Result<Used> {
    let lower = (0..layers.lower().files).map(|index| layers.file(Some(index)));
    let files: Vec<(u64, u64)> =
        [layers.file(None)].into_iter().chain(lower).map(identity).collect::<io::Result<_>>()?;
    let process = PathBuf::from(format!("/proc/{pid}"));
    let pages = File::open(process.join("pagemap"))?;
    let length = layers.own.metadata()?.len();
    let mut found = Found { length, left: length / PAGE_BYTES * 2, ranges: Vec::new() };
    for line in std::fs::read_to_string(process.join("maps"))?.lines() {
        let Some(mapping) = Mapping::parse(line) else { continue };
        if !files.iter().any(|(_, inode)| *inode == mapping.inode) {
            continue;
        }
        // Some file systems have numbers of their own in the line, and several the same ones.
        let mapped = std::fs::metadata(process.join("map_files").join(mapping.name))?;
        if files.contains(&(mapped.dev(), mapped.ino())) {
            found.look(&pages, &mapping)?;
        }
    }
    Ok(Used::of(found.ranges))
}

fn identity(file: io::Result<&File>) -> io::Result<(u64, u64)> {
    let found = file?.metadata()?;
    Ok((found.dev(), found.ino()))
}

/// A line of a process's `maps`.
struct Mapping<'a> {
    /// Its addresses, as `map_files` names it.
    name: &'a str,
    addresses: Range<u64>,
    /// Where in the file it begins.
    offset: u64,
    inode: u64,
}

impl Mapping<'_> {
    fn parse(line: &str) -> Option<Mapping<'_>> {
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?;
        let (start, end) = name.split_once('-')?;
        let hexadecimal = |word| u64::from_str_radix(word, 16).ok();
        let addresses = hexadecimal(start)?..hexadecimal(end)?;
        let offset = hexadecimal(words.nth(1)?)?;
        let inode = words.nth(1)?.parse().ok()?;
        (inode != 0).then_some(Mapping { name, addresses, offset, inode })
    }
}

/// What has been found of one process.
struct Found {
    /// Of the memory's file, in bytes.
    length: u64,
    /// Pages that may still be looked at.
    left: u64,
    /// In the order of the mappings, joined where little lies in between.
    ranges: Vec<Range<u64>>,
}

impl Found {
    /// Adds where in its file a mapping has pages. Source: the kernel's `admin-guide/mm/pagemap.rst`, bits 63 (present) and 62
    /// (swapped) of an entry of eight bytes a page.
    fn look(&mut self, pages: &File, mapping: &Mapping<'_>) -> io::Result<()> {
        const ENTRIES: u64 = 8192;
        let mut entries = vec![0; ENTRIES as usize * 8];
        let (start, end) = (mapping.addresses.start, mapping.addresses.end);
        // A mapping may go on beyond its file.
        let end = end.min(start.saturating_add(self.length.saturating_sub(mapping.offset)));
        let mut at = start;
        while at < end {
            let count = (end - at).div_ceil(PAGE_BYTES).min(ENTRIES);
            let Some(left) = self.left.checked_sub(count) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "it has mapped memory again and again",
                ));
            };
            self.left = left;
            let entries = &mut entries[..count as usize * 8];
            pages.read_exact_at(entries, at / PAGE_BYTES * 8)?;
            for entry in entries.as_chunks().0 {
                if u64::from_ne_bytes(*entry) >> 62 != 0 {
                    self.add(mapping.offset.saturating_add(at - start));
                }
                at = at.saturating_add(PAGE_BYTES);
            }
        }
        Ok(())
    }

    fn add(&mut self, page: u64) {
        let near =
            |last: &&mut Range<u64>| (last.start..=last.end.saturating_add(USED_GAP_BYTES)).contains(&page);
        let end = page.saturating_add(PAGE_BYTES);
        match self.ranges.last_mut().filter(near) {
            Some(last) => last.end = last.end.max(end),
            None => self.ranges.push(page..end),
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
#[cfg(test)]
mod tests;
