//! Servers: what a customer creates.
use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::id::{ImageId, NetworkId, OperationId, ServerId, SnapshotId, VolumeId};
use crate::name::{Labels, Name};
use crate::snapshot::GuestIdentity;
use crate::time::Time;

pub use crate::bulk::{BulkAction, BulkActions};
pub use crate::cpu::CpuTemplate;
pub use crate::metrics::{DiskMetrics, NicMetrics, ServerMetrics, SettlingMetrics};

/// A server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Server {
    /// Identity, for ever.
    pub id: ServerId,
    /// Unique name, also the host name.
    pub name: Name,
    /// The caller's own words.
    #[serde(default)]
    pub description: String,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
    /// The caller's own unique reference, such as a billing system's order number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_ref: Option<String>,
    /// What it does.
    pub state: ServerState,
    /// Why it is in this state, where that says more than the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    /// What it should do; after a restart of the host this decides.
    pub wanted: Wanted,
    /// What can be done now.
    pub allowed_actions: Vec<String>,
    /// The work in progress on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Which CPU the guest sees.
    pub cpu: CpuTemplate,
    /// Image its root volume was made from.
    pub image_id: ImageId,
    /// Its disks: the root volume first.
    pub volumes: Vec<ServerVolume>,
    /// Its interfaces.
    pub nics: Vec<ServerNic>,
    /// What happens when its machine ends unasked.
    pub restart_policy: RestartPolicy,
    /// Its latest start by that policy; absent once a machine has run for ten minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,
    /// What its machine must be kept apart by.
    #[serde(default)]
    pub isolation: Isolation,
    /// Of a clone that goes on from another server's memory: what became of who its guest was. Absent of any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<GuestIdentity>,
    /// Of a clone, and of a server that went back to a snapshot: the snapshot from whose files its machine has memory. Absent once that
    /// is settled, and of any other. The snapshot may have been deleted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares_memory_of: Option<SnapshotId>,
    /// What its machine has, where that is not what it gets at its next start: it was changed since this one started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<ServerMachine>,
    /// Which build of the VMM its machine runs in; absent without a machine, or where that was never recorded. Compare it with
    /// that of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_build: Option<String>,
    /// Version of this resource; also its `ETag`.
    pub generation: u64,
    /// When it was created.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
    /// When its machine was last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
}

/// What a server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerState {
    /// Its disk is being made.
    Creating,
    /// Off.
    Stopped,
    /// Its machine is being built.
    Starting,
    /// Its machine runs.
    Running,
    /// Its vCPUs are parked and its devices drained.
    Paused,
    /// Off, with its memory on the disk: a start goes on where it was.
    Hibernated,
    /// It goes to another host. One that ran runs here until it is there.
    Moving,
    /// It comes from another host, whose it is until it is all here.
    Arriving,
    /// It was on its way to another host or from one, and nobody here can know which has it; see `state_reason`.
    InDoubt,
    /// The power button was pressed, or it is being forced off.
    Stopping,
    /// It is being deleted.
    Deleting,
    /// Its machine ended badly and nothing will restart it; see `state_reason`.
    Failed,
}

/// What a server should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Run.
    Running,
    /// Be paused.
    Paused,
    /// Be off and keep its memory.
    Hibernated,
    /// Be off.
    Stopped,
    /// Not exist.
    Deleted,
}

/// Why a server is in its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StateReason {
    /// For programs, such as `guest_powered_off`, `triple_fault`, `out_of_memory`.
    pub code: String,
    /// For people.
    pub detail: String,
    /// Since when.
    pub at: Time,
}

/// A start by the restart policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Restart {
    /// Its number among those in a row, from 1. The pause before it doubles with each: 1 s, and 300 s at most.
    pub attempt: u32,
    /// When it is due; absent once it has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Time>,
}

/// What happens when a machine ends unasked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// The server stays as it ended.
    Never,
    /// Started again after a failure, with growing pauses; a power-off by the guest is not a failure.
    #[default]
    OnFailure,
    /// Started again after any end that was not asked for through the API.
    Always,
}

/// What a machine must be kept apart by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Every wall that this host can build.
    #[default]
    Standard,
    /// Every wall there is: where the host cannot build one, the server is not started.
    Strict,
}

/// What keeps a server's machine apart from the rest of the host, as found on the running process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerIsolation {
    /// What was asked for.
    pub isolation: Isolation,
    /// Whether every wall stands.
    pub complete: bool,
    /// Each wall.
    pub items: Vec<IsolationItem>,
}

/// One wall, as found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IsolationItem {
    /// Which, such as `seccomp` or `cgroup_memory`.
    pub name: String,
    /// Whether it stands.
    pub stands: bool,
    /// What was found, for people.
    pub detail: String,
}

/// A disk of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerVolume {
    /// The volume.
    pub volume_id: VolumeId,
    /// Position: 0 is the root disk, `/dev/vda`.
    pub index: u8,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What a completed write promises.
    pub cache: CacheMode,
    /// Limits in force.
    #[serde(default)]
    pub limits: DiskLimits,
}

/// What a completed write promises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheMode {
    /// Durable after the guest's flush.
    #[default]
    Writeback,
    /// Durable when it completes.
    Writethrough,
}

/// An interface of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerNic {
    /// The network it is on.
    pub network_id: NetworkId,
    /// Position: 0 is `eth0`.
    pub index: u8,
    /// Hardware address, `52:54:00:…`.
    pub mac: String,
    /// Its address, known before it boots.
    #[schema(value_type = String, format = Ipv4)]
    pub ipv4: Ipv4Addr,
    /// Limits in force.
    #[serde(default)]
    pub limits: NicLimits,
}

/// A rate with a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Units per second, at least 1.
    #[schema(minimum = 1)]
    pub per_second: u64,
    /// Most units at once after a quiet time; as `per_second` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub burst: Option<u64>,
}

/// Limits of one disk; absent means unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// Bytes read and written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes: Option<Rate>,
    /// Requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations: Option<Rate>,
}

/// Limits of one interface, each direction by itself; absent means unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicLimits {
    /// Bytes to the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_bytes: Option<Rate>,
    /// Packets to the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_packets: Option<Rate>,
    /// Bytes from the server, as they are on a wire: headers of each segment of what the guest leaves to be segmented are among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_bytes: Option<Rate>,
    /// Packets from the server, as they are on a wire: each segment of what the guest leaves to be segmented is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_packets: Option<Rate>,
}

/// Body of `POST /v1/servers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateServer {
    /// Unique name, also the host name.
    pub name: Name,
    /// Image's id or name. This or `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Snapshot's id or name: the root volume begins as the disk in it, and the kernel is its image's. A memory in it is
    /// not used: the server boots, and is another one to cloud-init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Virtual CPUs, 1 to 32.
    #[serde(default = "vcpus_default")]
    #[schema(minimum = 1, maximum = 32)]
    pub vcpus: u8,
    /// Memory in bytes, a multiple of 2 MiB; the image's minimum or 512 MiB when absent, whichever is more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Size of the root volume in bytes, a multiple of 4096; the image's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// What a completed write of the root volume promises.
    #[serde(default)]
    pub cache: CacheMode,
    /// Limits of the root volume.
    #[serde(default)]
    pub disk_limits: DiskLimits,
    /// Interfaces; one on the default network when absent, none when empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nics: Option<Vec<CreateNic>>,
    /// Which CPU the guest sees.
    #[serde(default)]
    pub cpu: CpuTemplate,
    /// ssh public keys of the image's default user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// cloud-init user data: `#cloud-config`, a script, or MIME. At most 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// What happens when its machine ends unasked.
    #[serde(default)]
    pub restart_policy: RestartPolicy,
    /// What its machine must be kept apart by.
    #[serde(default)]
    pub isolation: Isolation,
    /// Whether to start it at once.
    #[serde(default = "start_default")]
    pub start: bool,
    /// The caller's own words.
    #[serde(default)]
    pub description: String,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
    /// The caller's own unique reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_ref: Option<String>,
}

fn vcpus_default() -> u8 {
    1
}

fn start_default() -> bool {
    true
}

/// An interface to make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNic {
    /// Network's id or name; the default network when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// A free address of the network; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = Ipv4)]
    pub ipv4: Option<Ipv4Addr>,
    /// Limits.
    #[serde(default)]
    pub limits: NicLimits,
}

/// Body of `PATCH /v1/servers/{id}`: an RFC 7396 merge patch of the fields that can be changed. `vcpus`,
/// `memory_bytes`, `cpu` and `isolation` take effect at the next start; the others at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchServer {
    /// New name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// New description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels to set; null removes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<std::collections::BTreeMap<String, Option<String>>>,
    /// Virtual CPUs at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub vcpus: Option<u8>,
    /// Memory in bytes at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// CPU at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuTemplate>,
    /// New policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// What the next machine must be kept apart by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// New reference of the caller's own, unique; null removes it.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub external_ref: Option<Option<String>>,
    /// New limits of the root volume; null lifts them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_limits: Option<PatchDiskLimits>,
    /// New limits of interfaces, those of each replaced as a whole; one that is not named keeps its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic_limits: Option<Vec<PatchNicLimits>>,
}

/// New limits of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchNicLimits {
    /// Which: its `index`.
    pub index: u8,
    /// The limits; none when empty.
    pub limits: NicLimits,
}

/// A member that null takes away is told from one that was left out.
fn given<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

/// Changes of a disk's limits: what is absent stays, null lifts it. A rate is replaced together with its burst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchDiskLimits {
    /// Bytes read and written.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Rate>)]
    pub bandwidth_bytes: Option<Option<Rate>>,
    /// Requests.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Rate>)]
    pub operations: Option<Option<Rate>>,
}

impl PatchDiskLimits {
    /// The limits after the change.
    pub fn applied_to(self, limits: DiskLimits) -> DiskLimits {
        DiskLimits {
            bandwidth_bytes: self.bandwidth_bytes.unwrap_or(limits.bandwidth_bytes),
            operations: self.operations.unwrap_or(limits.operations),
        }
    }
}

/// What a machine was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerMachine {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Which CPU the guest sees; absent where it was started by a daemon that did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuTemplate>,
}

/// What can be done to a server: `POST /v1/servers/{id}/actions/{verb}` with this body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerAction {
    /// Build its machine.
    Start,
    /// Press the power button, and after the grace force it off.
    Stop(StopServer),
    /// Ask the guest to shut down, then start again; with no grace, the reset button.
    Reboot(StopServer),
    /// Park it.
    Pause,
    /// Let it run again.
    Resume,
    /// Save its memory to the disk and end its machine.
    Hibernate,
    /// Have all memory of its machine be its own.
    SettleMemory,
    /// Give its machine to a new VMM while it runs.
    UpgradeVmm,
}

/// Body of the actions `stop` and `reboot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopServer {
    /// Seconds the guest has to shut down before it is forced; 0 forces at once.
    #[serde(default = "grace_default")]
    #[schema(maximum = 3600)]
    pub grace_s: u64,
}

fn grace_default() -> u64 {
    30
}

impl Default for StopServer {
    fn default() -> StopServer {
        StopServer { grace_s: grace_default() }
    }
}

/// How to delete a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeleteServer {
    /// Keep its root volume.
    pub keep_volumes: bool,
}

/// Answer to `POST /v1/servers?dry_run=true`: what would be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerPlan {
    /// The server as it would be; ids and addresses may differ when it is really made.
    pub server: Server,
    /// Each step, for people.
    pub steps: Vec<String>,
    /// Memory the host has left afterwards, in bytes.
    pub memory_bytes_left: u64,
}
