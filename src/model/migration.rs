//! Moving a server to another host: the target's ticket, the request, and what is in the way.
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time::Time;

/// Body of `POST /v1/migration-tickets`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateMigrationTicket {
    /// Seconds it is good for; an hour when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 86400)]
    pub lifetime_s: Option<u64>,
}

/// Lets one other host ask to bring a server here. Made by the host that is to take it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationTicket {
    /// What the source is given. It is shown here and never again, and belongs to the first host that presents it.
    pub ticket: String,
    /// Where this host waits for other hosts. An address of zeroes stands for every one that it has: the source is to be given one
    /// that it reaches.
    #[schema(value_type = String)]
    pub target: SocketAddr,
    /// SHA-256 of this host's certificate, which the ticket holds too.
    pub fingerprint: String,
    /// After this it is worth nothing.
    pub expires_at: Time,
}

/// Body of `POST /v1/servers/{id}/actions/migrate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateServer {
    /// Address and port at which the target waits for other hosts.
    #[schema(value_type = String)]
    pub target: SocketAddr,
    /// The target's ticket.
    pub ticket: String,
    /// How it moves.
    #[serde(default)]
    pub mode: MigrationMode,
    /// Most bytes a second that go over the network; no bound when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long a guest that runs may stand still, in milliseconds: it is stopped when no more is expected. 50 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60000)]
    pub downtime_ms: Option<u32>,
}

/// Body of `POST /v1/servers/{id}/actions/limit-migration`: what `migrate` would be given, in place of what the move has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitMigration {
    /// Most bytes a second that go over the network from now on; no bound when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long a guest that runs may stand still, in milliseconds; 50 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60000)]
    pub downtime_ms: Option<u32>,
}

/// How a server moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationMode {
    /// As it is: as `live` does if it runs or is paused, else as `cold` does.
    #[default]
    Auto,
    /// Off or hibernated, with its disks and its memory if that is saved.
    Cold,
    /// While it runs or is paused, which it stays. All of its memory goes before the machine, unless the guest writes faster than it can
    /// be sent though it is held back as far as it goes: then the rest follows, as with `post_copy`.
    Live,
    /// As `live`, with all of its memory before the machine, or not at all.
    PreCopy,
    /// As `live`, but what was written while its memory was sent follows the machine: what the guest needs is sent first. Until all
    /// of it is there, the end of either host's VMM is the machine's, which starts anew from its disks.
    PostCopy,
}

/// Body of `POST /v1/servers/{id}/actions/settle-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettleMigration {
    /// Which host has the server from now on.
    pub owner: MigrationOwner,
    /// How that is known: that the other host took it, or gave it away, or is off for good. It is kept in the event log,
    /// 10 to 1000 characters. Two hosts that both have a server write to its network as one, and each to its own disk.
    pub proof: String,
}

/// Which host has a server, seen from the one that is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationOwner {
    /// This one.
    Here,
    /// The other.
    There,
}

/// What a migration would move, and what is in its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationPlan {
    /// The target's host name.
    pub target: String,
    /// Version of the target's daemon.
    pub target_version: String,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of its disks that were ever written.
    pub disk_bytes: u64,
    /// Bytes of its memory that go over, if it is hibernated.
    #[serde(default)]
    pub saved_bytes: u64,
    /// Everything that is in the way; nothing when it is empty.
    pub blocked_by: Vec<Obstacle>,
}

/// Something in a migration's way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Obstacle {
    /// For programs.
    pub code: ObstacleCode,
    /// What it is and what to do.
    pub detail: String,
}

/// Kinds of obstacles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObstacleCode {
    /// The target's processor lacks something that the guest may use.
    CpuFeatures,
    /// The target's time stamp counter, by which the guest tells the time, runs at another speed and cannot be scaled.
    Tsc,
    /// The target has not enough memory left.
    Memory,
    /// The target's disk has not enough room.
    Storage,
    /// The target has not the image that the server boots from.
    Image,
    /// The target's networks do not fit.
    Network,
    /// The target has a server of this id or name.
    Name,
    /// The target cannot run servers.
    Kvm,
    /// The server is in a state in which it does not move, or not as was asked.
    State,
    /// Its memory is another version's than the target runs.
    Version,
    /// As many servers are on their way to the target as come at once: wait until one of them has arrived.
    Busy,
}
