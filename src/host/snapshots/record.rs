//! A snapshot as it is kept: what callers see of it, and what a server made from it needs. It touches records only.
use std::collections::BTreeSet;

use model::event::EventData;
use model::operation::{Accepted, Operation, Resource};
use model::server::{CacheMode, DiskLimits, Isolation, RestartPolicy, ServerNic};
use model::snapshot::{FullReason, Snapshot, SnapshotState};
use model::volume::FillMethod;
use model::{Code, Labels, Name, OperationId, SnapshotId, Time};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use wire::peer::OfferedCpu;
use wire::saved::{Digest, WriteDelay};

use super::chain::{self, Chain};
use crate::call::Actor;
use crate::error::{Error, Result};
use crate::events;
use crate::operations::{self, NewOperation, Outcome};
use crate::store::Tx;
use crate::store::records::{self, Record};
use crate::{servers, volumes};

pub(crate) const TABLES: &str = concat!(
    crate::table!("snapshots"),
    "ALTER TABLE snapshots ADD COLUMN expires_ms INTEGER;
     CREATE INDEX snapshots_by_expiry ON snapshots (expires_ms);"
);

/// Kind of the operation that takes in what another host has exported.
pub(super) const IMPORT: &str = "snapshot.import";

/// A snapshot as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    /// What callers see.
    pub shown: Snapshot,
    /// Digest by which the memory's files are known to be the ones.
    pub root: Option<Digest>,
    /// What the server had besides.
    pub origin: Origin,
    /// What of it lies with earlier ones.
    #[serde(default)]
    pub chain: Chain,
}

/// What a server has that its snapshot does not show, for servers that are made from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// User of the image that keys are given to.
    pub default_user: String,
    /// Public keys.
    pub ssh_keys: Vec<String>,
    /// cloud-init user data.
    pub user_data: Option<String>,
    /// What happens after an unasked end.
    pub restart_policy: RestartPolicy,
    /// What it must be kept apart by.
    pub isolation: Isolation,
    /// Its interfaces.
    pub nics: Vec<ServerNic>,
    /// How each disk is used, the root disk first.
    pub disks: Vec<OriginDisk>,
    /// How many clones with memory led to the server.
    #[serde(default)]
    pub descent: u32,
    /// What its guest was shown of a processor, where it has memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<OfferedCpu>,
    /// It was asked for by a call that clones the server: servers wait for it.
    #[serde(default)]
    pub for_clones: bool,
}

/// How a disk is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OriginDisk {
    /// What a completed write promises.
    pub cache: CacheMode,
    /// Limits in force.
    pub limits: DiskLimits,
}

/// Writes of a guest that ran while its memory was saved, as its VMM counts and measures them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delayed {
    /// How many waited.
    pub writes: u64,
    /// How long.
    pub delay: WriteDelay,
}

/// What taking a snapshot came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The moment that it shows, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// How long the guest stood still, in milliseconds.
    pub paused_ms: u64,
    /// Which writes waited while the guest ran.
    pub delayed: Option<Delayed>,
    /// How each disk was filled.
    pub disks: Vec<FillMethod>,
    /// Digest of the memory, where it was to be saved.
    pub root: Option<Digest>,
    /// Bytes all of it takes on the disk.
    pub stored_bytes: u64,
    /// What of it lies with earlier ones.
    pub chain: Chain,
    /// Why one that was to be incremental is full.
    pub full_because: Option<FullReason>,
}

impl Record for SnapshotRecord {
    const TABLE: &'static str = "snapshots";
    const NOUN: &'static str = "snapshot";
    const SERVER_ID: Option<&'static str> = Some("$.shown.server_id");

    fn id(&self) -> Uuid {
        self.shown.id.0
    }

    fn name(&self) -> &Name {
        &self.shown.name
    }

    fn labels(&self) -> &Labels {
        &self.shown.labels
    }

    fn touch(&mut self) {
        self.shown.generation += 1;
        self.shown.updated_at = Time::now();
    }
}

/// Adds a snapshot that is being taken.
pub(super) fn insert(tx: &Tx<'_>, record: &SnapshotRecord, actor: &Actor) -> Result<()> {
    records::insert(tx, record)?;
    note_expiry(tx, record)?;
    announce(tx, &record.shown, "snapshot.created", None, Some(actor))
}

/// Saves a snapshot with its expiry.
pub(super) fn save(tx: &Tx<'_>, record: &mut SnapshotRecord) -> Result<()> {
    records::save(tx, record)?;
    note_expiry(tx, record)
}

/// One that is being taken must not expire before it is there.
fn note_expiry(tx: &Tx<'_>, record: &SnapshotRecord) -> Result<()> {
    let shown = &record.shown;
    let expires_ms =
        shown.expires_at.filter(|_| shown.state == SnapshotState::Ready).map(|time| time.unix_ms());
    tx.prepare_cached("UPDATE snapshots SET expires_ms = ?2 WHERE id = ?1")?
        .execute(params![shown.id.to_string(), expires_ms])?;
    Ok(())
}

/// The snapshot that was being taken is complete.
pub(super) fn complete(tx: &Tx<'_>, id: SnapshotId, taken: &Taken) -> Result<()> {
    let Some(mut record) = records::find::<SnapshotRecord>(tx, id.0)? else { return Ok(()) };
    if record.shown.state != SnapshotState::Creating {
        return Ok(());
    }
    let shown = &mut record.shown;
    shown.state = SnapshotState::Ready;
    shown.taken_at = Some(Time::from_unix_ms(taken.at_ms));
    shown.paused_ms = Some(taken.paused_ms);
    shown.guest_writes_delayed = taken.delayed.map(|delayed| delayed.writes);
    shown.guest_write_delay_us_max = taken.delayed.map(|delayed| delayed.delay.us_max);
    shown.guest_write_delay_us_sum = taken.delayed.map(|delayed| delayed.delay.us_sum);
    shown.stored_bytes = taken.stored_bytes;
    for (volume, method) in shown.volumes.iter_mut().zip(&taken.disks) {
        volume.filled_by = Some(*method);
    }
    shown.inherited_bytes = taken.chain.bytes();
    shown.full_because = taken.full_because;
    if taken.full_because.is_some() {
        shown.parent_id = None;
    }
    record.root = taken.root;
    record.chain = taken.chain.clone();
    save(tx, &mut record)?;
    announce(tx, &record.shown, "snapshot.ready", None, None)
}

/// Nobody takes it any more: unless it is complete, there is none.
pub(super) fn settle(tx: &Tx<'_>, id: SnapshotId) -> Result<()> {
    let found = records::find::<SnapshotRecord>(tx, id.0)?;
    let Some(record) = found.filter(|found| found.shown.state == SnapshotState::Creating) else {
        return Ok(());
    };
    records::remove::<SnapshotRecord>(tx, id.0)?;
    announce(tx, &record.shown, "snapshot.deleted", Some("it was not taken to the end"), None)
}

/// Accepts the deletion of a snapshot that nothing needs.
pub(super) fn doom(
    tx: &Tx<'_>,
    mut record: SnapshotRecord,
    actor: &Actor,
    why: Option<&str>,
) -> Result<Accepted<Snapshot>> {
    let shown = &record.shown;
    let id = shown.id;
    match shown.state {
        SnapshotState::Ready => {}
        SnapshotState::Creating => {
            let detail = format!("snapshot {} is being made; cancel its operation instead", shown.name);
            return Err(Error { operation_id: making(tx, id)?, ..Error::new(Code::WrongState, detail) });
        }
        SnapshotState::Deleting => {
            let detail = format!("snapshot {} is being deleted already", shown.name);
            return Err(Error::new(Code::WrongState, detail));
        }
    }
    let filling = volumes::filled_from(tx, id)?;
    if !filling.is_empty() {
        let names: Vec<&str> = filling.iter().map(Name::as_str).collect();
        let detail = format!("volumes are being made from snapshot {}: {}", shown.name, names.join(", "));
        return Err(Error::new(Code::InUse, detail));
    }
    let users = servers::users_of_snapshot(tx, id)?;
    if !users.is_empty() {
        let names: Vec<&str> = users.iter().map(Name::as_str).collect();
        let detail = format!("servers are to go on from snapshot {}: {}", shown.name, names.join(", "));
        return Err(Error::new(Code::InUse, detail));
    }
    let taken_on_it = chain::taken_on(tx, id)?;
    if !taken_on_it.is_empty() {
        let detail = format!(
            "snapshots are being taken on the base of {}: {}; wait for their operations",
            shown.name,
            taken_on_it.join(", ")
        );
        return Err(Error::new(Code::InUse, detail));
    }
    record.shown.state = SnapshotState::Deleting;
    save(tx, &mut record)?;
    let resources = vec![Resource::Snapshot(id)];
    let new = NewOperation { kind: "snapshot.delete", resources, actor, cancellable: false };
    let operation = operations::accept(tx, new)?;
    announce(tx, &record.shown, "snapshot.deleting", why, Some(actor))?;
    Ok(Accepted { operation, resource: Some(record.shown) })
}

/// The operation that makes a snapshot.
fn making(tx: &Tx<'_>, id: SnapshotId) -> Result<Option<OperationId>> {
    let makes = |operation: &Operation| {
        matches!(operation.kind.as_str(), "server.snapshot" | IMPORT)
            && operation.resources.contains(&Resource::Snapshot(id))
    };
    Ok(operations::unfinished(tx)?.into_iter().find(makes).map(|operation| operation.id))
}

/// The files of a doomed snapshot are gone, or of one that did not come in before the daemon ended.
pub(super) fn forget(tx: &Tx<'_>, id: SnapshotId) -> Result<()> {
    let Some(record) = records::find::<SnapshotRecord>(tx, id.0)? else { return Ok(()) };
    records::remove::<SnapshotRecord>(tx, id.0)?;
    for operation in operations::unfinished(tx)? {
        if !operation.resources.contains(&Resource::Snapshot(id)) {
            continue;
        }
        let outcome = match operation.kind.as_str() {
            "snapshot.delete" => Outcome::Succeeded,
            IMPORT => {
                let detail =
                    "the daemon ended during the import, and nothing of the snapshot was kept; send it again";
                Outcome::Failed(Error::new(Code::Draining, detail))
            }
            _ => continue,
        };
        operations::finish(tx, operation.id, outcome)?;
    }
    announce(tx, &record.shown, "snapshot.deleted", None, None)
}

/// When the next one expires after this time; both in milliseconds since the Unix epoch.
pub(super) fn next_expiry_ms(connection: &Connection, now_ms: i64) -> Result<Option<i64>> {
    let sql = "SELECT min(expires_ms) FROM snapshots WHERE expires_ms > ?1";
    Ok(connection.prepare_cached(sql)?.query_row([now_ms], |row| row.get(0)).optional()?.flatten())
}

/// Those whose time has come, oldest first.
pub(super) fn expired(connection: &Connection, now_ms: i64) -> Result<Vec<SnapshotRecord>> {
    let sql = "SELECT body FROM snapshots WHERE expires_ms <= ?1 ORDER BY id";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map([now_ms], |row| row.get::<_, String>(0))?;
    rows.map(|body| Ok(serde_json::from_str(&body?)?)).collect()
}

/// Those that are being taken and that no server takes, and those that were being deleted.
pub(super) fn left_behind(connection: &Connection, taken: &BTreeSet<SnapshotId>) -> Result<Vec<SnapshotId>> {
    let all: Vec<SnapshotRecord> = records::all(connection)?;
    let doomed = all.iter().map(|record| &record.shown).filter(|shown| match shown.state {
        SnapshotState::Ready => false,
        SnapshotState::Creating => !taken.contains(&shown.id),
        SnapshotState::Deleting => true,
    });
    Ok(doomed.map(|shown| shown.id).collect())
}

pub(super) fn announce(
    tx: &Tx<'_>,
    shown: &Snapshot,
    kind: &str,
    reason: Option<&str>,
    actor: Option<&Actor>,
) -> Result<()> {
    let state = serde_json::to_value(shown.state)?;
    let data = EventData {
        resource: Some(Resource::Snapshot(shown.id)),
        generation: Some(shown.generation),
        state: state.as_str().map(str::to_owned),
        reason: reason.map(str::to_owned),
        actor: actor.map(Actor::to_string),
        ..EventData::default()
    };
    events::append(tx, kind, data).map(drop)
}
