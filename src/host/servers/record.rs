//! A server as it is kept: what was asked for, what it has, and its life. Never shown; see `view`.
//! It knows SQL only through the shared shape of records.
use model::server::{CacheMode, CpuTemplate, DiskLimits, Isolation, RestartPolicy, ServerNic};
use model::snapshot::GuestIdentity;
use model::{Code, ImageId, Labels, Name, ServerId, SnapshotId, Time, VolumeId};
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use uuid::Uuid;
use wire::control::Sandbox;
use wire::peer::OfferedCpu;

use super::lifecycle::{Context, Life, SavedOf};
use super::limits;
use crate::error::{Error, Result};
use crate::store::Tx;
use crate::store::records::{self, Record};

pub(crate) const TABLES: &str = concat!(
    crate::table!("servers"),
    "ALTER TABLE servers ADD COLUMN external_ref TEXT;
     ALTER TABLE servers ADD COLUMN memory_held INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE servers ADD COLUMN vcpus_held INTEGER NOT NULL DEFAULT 0;
     CREATE UNIQUE INDEX servers_by_external_ref ON servers (external_ref);
     CREATE TABLE console_tokens (hash TEXT PRIMARY KEY, server TEXT NOT NULL, read_only INTEGER NOT NULL,
        position INTEGER, expires_ms INTEGER NOT NULL) STRICT;"
);

/// Who made a ticket to a console.
pub(crate) const TICKET_HOLDERS: &str =
    "ALTER TABLE console_tokens ADD COLUMN actor TEXT NOT NULL DEFAULT 'host';";

/// Whether a machine fits is asked with each start; the sum is read from here, and no document with it.
pub(crate) const HELD_INDEX: &str = "CREATE INDEX servers_held ON servers (id, memory_held, vcpus_held);";

/// A server as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRecord {
    /// Identity.
    pub id: ServerId,
    /// Unique name.
    pub name: Name,
    /// The caller's own words.
    pub description: String,
    /// The caller's own pairs.
    pub labels: Labels,
    /// The caller's own unique reference.
    pub external_ref: Option<String>,
    /// What decides what it does next.
    pub life: Life,
    /// Virtual CPUs of the next machine.
    pub vcpus: u8,
    /// Memory of the next machine, in bytes.
    pub memory_bytes: u64,
    /// CPU of the next machine.
    pub cpu: CpuTemplate,
    /// What the latest machine was promised; counted while the life holds memory.
    pub held: Held,
    /// Image it was made from.
    pub image_id: ImageId,
    /// User of the image that keys are given to.
    pub default_user: String,
    /// Its disks, the root volume first.
    pub disks: Vec<Disk>,
    /// Its interfaces.
    pub nics: Vec<ServerNic>,
    /// Public keys.
    pub ssh_keys: Vec<String>,
    /// cloud-init user data.
    pub user_data: Option<String>,
    /// What happens after an unasked end.
    pub restart_policy: RestartPolicy,
    /// What it must be kept apart by.
    #[serde(default)]
    pub isolation: Isolation,
    /// What its VMM said of its own walls before it had a machine; absent when it was not asked then.
    #[serde(default)]
    pub sandbox: Option<Sandbox>,
    /// Name of the control groups of its latest VMM; its id when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cage: Option<String>,
    /// Which build of the VMM that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_build: Option<String>,
    /// Of a clone with memory: whether its guest has become another one.
    #[serde(default)]
    pub identity: Option<GuestIdentity>,
    /// How many clones with memory lead to it. Each has a seed disk of another size than the one before, by which its
    /// guest is told to read it again.
    #[serde(default)]
    pub descent: u32,
    /// Version.
    pub generation: u64,
    /// When it was made.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
    /// When its machine was last started.
    pub started_at: Option<Time>,
}

impl ServerRecord {
    /// Name of the control groups of its latest VMM.
    pub fn cage(&self) -> String {
        self.cage.clone().unwrap_or_else(|| self.id.to_string())
    }

    /// Whether it goes on from the memory of another server's snapshot, and has yet to.
    pub fn is_clone(&self) -> bool {
        self.life.saved.is_some_and(|saved| matches!(saved.of, SavedOf::Clone { .. }))
    }

    /// Whether the next machine is to be another than the one at hand, so that the memory of this one fits no more.
    pub fn is_changed(&self) -> bool {
        let Held { memory_bytes, vcpus, cpu, .. } = &self.held;
        (*memory_bytes, *vcpus) != (self.memory_bytes, self.vcpus)
            || cpu.as_ref().is_some_and(|cpu| *cpu != self.cpu)
    }
}

/// What a machine was promised.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// CPU that the guest sees; absent in records of machines that were started before it was kept.
    #[serde(default)]
    pub cpu: Option<CpuTemplate>,
    /// How fast its time stamp counter runs, in thousands of ticks a second, if its guest measured that before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<u32>,
    /// What its guest was shown of a processor, here or on another host, if it goes on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<BTreeSet<String>>,
    /// Snapshots in whose memory files a part of what it shares lies, besides the one that it goes on from. Any may have been deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub below: Vec<SnapshotId>,
}

impl Held {
    /// Notes what processor its guest had, and goes on with.
    pub(crate) fn go_on_with(&mut self, had: &OfferedCpu) {
        self.tsc_khz = had.tsc_khz;
        self.features = Some(had.features.clone()).filter(|features| !features.is_empty());
    }
}

/// A disk of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The volume.
    pub volume_id: VolumeId,
    /// What a completed write promises.
    pub cache: CacheMode,
    /// Limits in force.
    pub limits: DiskLimits,
}

impl Record for ServerRecord {
    const TABLE: &'static str = "servers";
    const NOUN: &'static str = "server";
    const HAS_EXTERNAL_REF: bool = true;
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

impl ServerRecord {
    /// What a step may know.
    pub fn context(&self) -> Context {
        Context { now_ms: Time::now().unix_ms(), policy: self.restart_policy }
    }
}

/// Adds a server. Fails with `already_exists` when its name or reference is taken.
pub(super) fn insert(tx: &Tx<'_>, record: &ServerRecord) -> Result<()> {
    records::insert(tx, record)?;
    if record.external_ref.is_some() {
        refer(tx, record)?;
    }
    hold(tx, record)
}

/// Saves under which reference a server is found. Fails with `already_exists` when another has it.
pub(super) fn refer(tx: &Tx<'_>, record: &ServerRecord) -> Result<()> {
    tx.prepare_cached("UPDATE servers SET external_ref = ?2 WHERE id = ?1")?
        .execute(params![record.id.to_string(), record.external_ref])
        .map_err(|cause| match (cause.sqlite_error_code(), &record.external_ref) {
            (Some(rusqlite::ErrorCode::ConstraintViolation), Some(reference)) => Error::new(
                Code::AlreadyExists,
                format!("there is a server with external_ref {reference:?} already"),
            ),
            _ => Error::from(cause),
        })?;
    Ok(())
}

/// Saves a server with what it holds of the host.
pub(super) fn save(tx: &Tx<'_>, record: &mut ServerRecord) -> Result<()> {
    records::save(tx, record)?;
    hold(tx, record)
}

fn hold(tx: &Tx<'_>, record: &ServerRecord) -> Result<()> {
    let (memory, vcpus) = if record.life.holds_memory() {
        (record.held.memory_bytes.saturating_add(limits::VMM_OVERHEAD_BYTES), record.held.vcpus)
    } else {
        (0, 0)
    };
    // What stays as it is leaves its index alone.
    tx.prepare_cached(
        "UPDATE servers SET memory_held = ?2, vcpus_held = ?3
         WHERE id = ?1 AND (memory_held, vcpus_held) IS NOT (?2, ?3)",
    )?
    .execute(params![record.id.to_string(), memory, vcpus])?;
    Ok(())
}

/// Memory and CPUs that servers hold, but for one of them.
pub(super) fn held(connection: &Connection, except: Option<ServerId>) -> Result<(u64, u32)> {
    let except = except.map(|id| id.to_string()).unwrap_or_default();
    Ok(connection
        .prepare_cached(
            "SELECT coalesce(sum(memory_held), 0), coalesce(sum(vcpus_held), 0) FROM servers WHERE id != ?1",
        )?
        .query_row([except], |row| Ok((row.get(0)?, row.get(1)?)))?)
}
