//! Volumes: writable disks.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{ImageId, ServerId, SnapshotId, VolumeId};
use crate::name::{Labels, Name};
use crate::time::Time;

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Identity.
    pub id: VolumeId,
    /// Unique name.
    pub name: Name,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
    /// Whether it can be used.
    pub state: VolumeState,
    /// Size the guest sees, in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host's disk.
    pub used_bytes: u64,
    /// How its bytes lie on the host's disk.
    pub format: VolumeFormat,
    /// How it was filled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filled_by: Option<FillMethod>,
    /// The image it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<ImageId>,
    /// The snapshot it was made from, which may be gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<SnapshotId>,
    /// The server it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_id: Option<ServerId>,
    /// Version of this resource.
    pub generation: u64,
    /// When it was created.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
}

/// Whether a volume can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// It is being filled.
    Creating,
    /// It can be used.
    Ready,
    /// It is being deleted.
    Deleting,
}

/// How a volume's bytes lie on the host's disk. Stated, never guessed from content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeFormat {
    /// Byte for byte, with holes.
    Raw,
}

/// How a volume was filled from what it was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FillMethod {
    /// The file system shares the source's blocks until they are written.
    Reflink,
    /// Data was copied, holes were kept.
    SparseCopy,
    /// It is not yet: what was never written lies in the file of what it was made from, which the volume keeps as long as it needs it.
    /// Settling its server copies that.
    Overlay,
    /// Nothing: it began empty.
    Empty,
}

/// Body of `PATCH /v1/volumes/{id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchVolume {
    /// New name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Larger size in bytes; its server must be stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Labels to set; null removes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<std::collections::BTreeMap<String, Option<String>>>,
}
