//! Long work: a stored row that outlives the request, the connection and the daemon.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{ImageId, NetworkId, OperationId, ServerId, SnapshotId, VolumeId};
use crate::problem::Problem;
use crate::time::Time;

/// A long job with progress and an end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Identity.
    pub id: OperationId,
    /// What it does, such as `server.create`.
    pub kind: String,
    /// How far it is.
    pub state: OperationState,
    /// Where in its work.
    pub progress: Progress,
    /// What it works on.
    pub resources: Vec<Resource>,
    /// Version of this row.
    pub generation: u64,
    /// When it was accepted.
    pub created_at: Time,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Whether `DELETE` can still stop it.
    pub cancellable: bool,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Box<Problem>>,
    /// The operation that started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<OperationId>,
}

/// States of an operation; the last three are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Accepted, not begun.
    Pending,
    /// At work.
    Running,
    /// Done.
    Succeeded,
    /// Ended with `error`; what it had begun is undone.
    Failed,
    /// Ended because it was asked to; what it had begun is undone.
    Cancelled,
}

impl OperationState {
    /// Whether it will not change any more.
    pub fn is_final(self) -> bool {
        matches!(self, OperationState::Succeeded | OperationState::Failed | OperationState::Cancelled)
    }
}

/// Where an operation is in its work.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Name of the step, lower snake; empty before the first.
    pub phase: String,
    /// 0 to 100, never falling.
    pub percent: u8,
    /// Bytes done, where the step moves bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_done: Option<u64>,
    /// Bytes in all, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<u64>,
    /// Of a move, while bytes go: how many a second of memory and disks, counted as they are and not as they are packed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
    /// Of a move: in how many seconds these bytes are expected to have gone, with what the guest is expected to write
    /// meanwhile. Absent where nothing can be said, as of a guest that writes about as fast as its memory goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_s: Option<u64>,
    /// Of a move, while the guest runs: how long it would stand still if it were stopped at the end of the last round, in
    /// milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_ms: Option<u64>,
    /// Of a move, while the guest runs: how much of their time its processors are held back because it writes too fast.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_percent: Option<u8>,
}

/// A reference to a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", content = "id", rename_all = "snake_case")]
pub enum Resource {
    /// A server.
    Server(ServerId),
    /// An image.
    Image(ImageId),
    /// A volume.
    Volume(VolumeId),
    /// A network.
    Network(NetworkId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

/// Answer to a request that started long work: 202 with `Location: /v1/operations/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Accepted<T> {
    /// The work.
    pub operation: Operation,
    /// The resource as it stands at acceptance; absent when the work deletes it.
    // Naming the function keeps serde from asking for `T: Default`.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub resource: Option<T>,
}
