//! Snapshots: what a server's disks, and its memory if asked for, were at one moment.
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::id::{ImageId, ServerId, SnapshotId};
use crate::name::{Labels, Name};
use crate::server::CpuTemplate;
use crate::time::Time;
use crate::volume::FillMethod;

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Identity.
    pub id: SnapshotId,
    /// Unique name.
    pub name: Name,
    /// The caller's own words.
    #[serde(default)]
    pub description: String,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
    /// Whether it can be used.
    pub state: SnapshotState,
    /// The server it is one of, which may be gone.
    pub server_id: ServerId,
    /// That server's name when it was taken.
    pub server_name: Name,
    /// Whether it came in as a stream: then all that it says of itself, whose it is too, is what the stream said.
    #[serde(default)]
    pub imported: bool,
    /// Whether it holds the memory of a machine that ran, as it was at the same moment as the disks.
    pub memory: bool,
    /// Virtual CPUs of the server.
    pub vcpus: u8,
    /// Memory of the server in bytes.
    pub memory_bytes: u64,
    /// Which CPU its guest saw.
    pub cpu: CpuTemplate,
    /// Image it boots from.
    pub image_id: ImageId,
    /// Its disks: the root volume first.
    pub volumes: Vec<SnapshotVolume>,
    /// Bytes it takes on the host's disk; blocks that are shared with the server's volumes are counted too.
    pub stored_bytes: u64,
    /// The snapshot that it was taken on, of one that is incremental: it holds what is new since that one. That one may have
    /// been deleted since; what is needed of it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<SnapshotId>,
    /// Bytes of it that lie with earlier snapshots, deleted ones too, and stay on the host's disk for it.
    #[serde(default)]
    pub inherited_bytes: u64,
    /// Why one that was to be incremental is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_because: Option<FullReason>,
    /// Memory that the first server that was cloned from it had used after two seconds, in bytes: for the next ones that is read
    /// ahead. Absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set_bytes: Option<u64>,
    /// The moment it shows; absent while it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<Time>,
    /// How long the guest stood still for it, in milliseconds: 0 for a server that did not run. Absent while it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
    /// How many writes of the guest, and of its devices, waited because its memory was saved while it ran, before the moment too, or
    /// to a disk because that was copied while it ran. This and the next two are absent while it is made, where the guest stood
    /// still for all that took time, of a snapshot that was imported, and where the VMM does not measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_writes_delayed: Option<u64>,
    /// The longest that one of them waited, in microseconds, from when the VMM had read of it until it let the write go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_write_delay_us_max: Option<u64>,
    /// How long all of them waited together, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_write_delay_us_sum: Option<u64>,
    /// When it is deleted by itself, unless something uses it then; absent for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
    /// Version of this resource.
    pub generation: u64,
    /// When it was asked for.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
}

/// Why a snapshot that was to be incremental holds everything itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FullReason {
    /// There was no snapshot of the server to take it on: imported ones and those taken for clones do not count.
    NoParent,
    /// The last one needs as many earlier snapshots as one can.
    ChainTooLong,
    /// The last one, or one that it needs, cannot be read; the host's log says why.
    ParentUnreadable,
}

/// Whether a snapshot can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// It is being taken.
    Creating,
    /// It can be used.
    Ready,
    /// It is being deleted.
    Deleting,
}

/// A disk in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotVolume {
    /// Position: 0 is the root disk.
    pub index: u8,
    /// Size in bytes.
    pub size_bytes: u64,
    /// How it was filled; absent while it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filled_by: Option<FillMethod>,
}

/// Body of `POST /v1/servers/{id}/actions/snapshot`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Unique name; made of the server's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Whether to save the memory too, so that a restore goes on where the guest was. Only of a server that runs or is
    /// paused.
    #[serde(default)]
    pub memory: bool,
    /// Whether to hold only what is new since the last snapshot of the server. It restores, clones and exports as a full one
    /// does, and the last one can be deleted: what is needed of it is kept. Where there is none to take it on, it is full and
    /// says why.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incremental: bool,
    /// When to delete it by itself; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,
    /// The caller's own words.
    #[serde(default)]
    pub description: String,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
}

/// Body of `POST /v1/servers/{id}/actions/restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreServer {
    /// Name or id of a snapshot of this server.
    pub snapshot: String,
    /// Whether a machine that runs or is paused may be ended for it, and a memory that was hibernated thrown away.
    #[serde(default)]
    pub stop: bool,
}

/// What a sent snapshot says of itself in query parameters; the body is the exported stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImportSnapshot {
    /// Unique name; the one it was exported under when absent.
    pub name: Option<Name>,
}

/// Body of `POST /v1/snapshots/{id}/actions/clone` and `POST /v1/servers/{id}/actions/clone`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateClones {
    /// Name of the new server. Of several, each has its number behind it: `web-1`, `web-2`.
    pub name: Name,
    /// How many servers, 1 to 100.
    #[serde(default = "count_default")]
    #[schema(minimum = 1, maximum = 100)]
    pub count: u16,
    /// The caller's own pairs, of each server.
    #[serde(default)]
    pub labels: Labels,
}

fn count_default() -> u16 {
    1
}

/// Whether a guest that goes on from another's memory has become another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestIdentity {
    /// It has the name, addresses, machine id and host keys of the server it was cloned from
    /// until somebody changes them. Its hardware addresses and vmgenid are new. Also of a guest that
    /// cannot say more, or has not yet.
    Unchanged,
    /// By its own word it has what this server has: name, addresses, machine id, host keys, and random numbers of its own.
    Renewed,
}

/// Body of `PATCH /v1/snapshots/{id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchSnapshot {
    /// New name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// New description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels to set; null removes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<std::collections::BTreeMap<String, Option<String>>>,
    /// New time to delete it by itself; null for never.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    #[schema(value_type = Option<Time>)]
    pub expires_at: Option<Option<Time>>,
}

/// A member that is there, be it null.
fn given<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}
