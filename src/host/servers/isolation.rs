//! What keeps a server's machine apart: looked at for callers, and judged before a strict server gets its machine.
//! What each wall is found by is the business of `vmms`.
use std::path::PathBuf;

use model::SnapshotId;
use model::server::{Isolation, IsolationItem, ServerIsolation};
use rusqlite::Connection;
use wire::control::Sandbox;

use super::record::ServerRecord;
use super::registry::{Entry, Workshop};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::snapshots::{MEMORY, SnapshotRecord};
use crate::store::records;
use crate::vmms::launcher::not_whole;
use crate::vmms::{Finding, ProcessId};
use crate::volumes::overlay::volume_files;

/// Looks at the VMM of `record`. What only it can say, it has said before there was a guest. Fails when it has ended.
pub(super) async fn examine(
    workshop: &Workshop,
    entry: &Entry,
    record: &ServerRecord,
) -> Result<Vec<Finding>> {
    let gone = || Error::new(model::Code::MachineFailed, "the VMM has ended");
    let machine = entry.machine().ok_or_else(gone)?;
    examine_process(workshop, record, machine.process.id(), machine.cage, record.sandbox).await
}

async fn examine_process(
    workshop: &Workshop,
    record: &ServerRecord,
    id: ProcessId,
    key: String,
    sandbox: Option<Sandbox>,
) -> Result<Vec<Finding>> {
    let (launcher, files) = (workshop.launcher.clone(), files(workshop, record).await?);
    blocking(move || launcher.examine(&id, &key, sandbox, &files)).await
}

/// Fails with `host_unprepared`, naming what lacks, unless every wall stands. The VMM has no machine yet, so no
/// guest has run outside a wall.
pub(super) async fn require(workshop: &Workshop, entry: &Entry, record: &ServerRecord) -> Result<()> {
    judge(examine(workshop, entry, record).await?)
}

/// As [`require`], of a VMM beside the one at hand, in the same groups.
pub(super) async fn require_of(
    workshop: &Workshop,
    record: &ServerRecord,
    vmm: &ProcessId,
    sandbox: Sandbox,
) -> Result<()> {
    judge(examine_process(workshop, record, vmm.clone(), record.cage(), Some(sandbox)).await?)
}

fn judge(findings: Vec<Finding>) -> Result<()> {
    let lacks: Vec<String> = findings
        .into_iter()
        .filter_map(|finding| Some(format!("{}: {}", finding.item, finding.found.err()?)))
        .collect();
    if lacks.is_empty() { Ok(()) } else { Err(not_whole(&lacks)) }
}

/// As callers see it.
pub(super) fn shown(isolation: Isolation, findings: Vec<Finding>) -> ServerIsolation {
    let item = |finding: Finding| {
        let (stands, detail) = match finding.found {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        IsolationItem { name: finding.item.name().to_owned(), stands, detail }
    };
    let items: Vec<IsolationItem> = findings.into_iter().map(item).collect();
    ServerIsolation { isolation, complete: items.iter().all(|item| item.stands), items }
}

/// What its VMM was given: files of its own directory, its volumes, its image, what it copies into, and the memory that it shares.
async fn files(workshop: &Workshop, record: &ServerRecord) -> Result<Vec<PathBuf>> {
    let dirs = &workshop.core.dirs;
    let mut files = vec![dirs.server(record.id), dirs.image(record.image_id)];
    files.extend(record.disks.iter().flat_map(|disk| volume_files(dirs, disk.volume_id)));
    files.extend(record.life.phase.snapshot().map(|id| workshop.snapshots.directory(id)));
    if let Some(id) = record.life.shares {
        let find = move |connection: &Connection| below(connection, id);
        // One that was deleted since has left no word of them but what the server has kept.
        let below = workshop.core.store.glance(find).await?.unwrap_or_else(|| record.held.below.clone());
        let all = std::iter::once(id).chain(below);
        files.extend(all.map(|id| workshop.snapshots.directory(id).join(MEMORY)));
    }
    Ok(files)
}

/// Snapshots in which a part of this one's memory lies, if it is there.
pub(super) fn below(connection: &Connection, id: SnapshotId) -> Result<Option<Vec<SnapshotId>>> {
    let found = records::find::<SnapshotRecord>(connection, id.0)?;
    let listed = |record: SnapshotRecord| record.chain.of(MEMORY).map(|listed| listed.below.clone());
    Ok(found.map(|record| listed(record).unwrap_or_default()))
}
