//! What a server's machine has done so far, as counters.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counters of a running server. All totals are since the machine's start and never fall.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerMetrics {
    /// Time its vCPUs were allowed to run, in milliseconds.
    pub running_ms: u64,
    /// Resets by the guest or the API.
    pub resets: u64,
    /// CPU time of each vCPU, in milliseconds.
    pub vcpu_cpu_ms: Vec<u64>,
    /// Exits of each vCPU to the VMM.
    pub vcpu_exits: Vec<u64>,
    /// Memory of the VMM with the guest's, in bytes, as the host counts it.
    pub memory_resident_bytes: u64,
    /// Memory that is mapped from the files of the snapshot that it goes on from, in bytes; 0 once it is settled, and for
    /// every other server. What the guest has written of it is counted.
    #[serde(default)]
    pub memory_shared_bytes: u64,
    /// Memory that has not come yet from the host that the server has moved from, in bytes: the guest runs, and waits wherever it needs
    /// some of that. 0 for every other server, and missing where its VMM could not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_owed_bytes: Option<u64>,
    /// The settling of its memory that is under way, or the last one of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<SettlingMetrics>,
    /// By disk.
    pub disks: Vec<DiskMetrics>,
    /// By interface.
    pub nics: Vec<NicMetrics>,
    /// Bytes the balloon holds.
    pub balloon_bytes: u64,
    /// Bytes returned by free page reporting.
    pub reported_bytes: u64,
    /// Protocol errors of the guest on any device.
    pub device_faults: u64,
}

/// What settling a machine's memory cost its guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SettlingMetrics {
    /// Times that the machine stood still, for a piece of memory each.
    pub pauses: u32,
    /// The longest of them, in microseconds.
    pub longest_pause_us: u64,
    /// All of them, in microseconds.
    pub paused_us: u64,
    /// How long all of it took so far, in microseconds.
    pub total_us: u64,
}

/// Counters of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskMetrics {
    /// Requests.
    pub reads: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Requests.
    pub writes: u64,
    /// Bytes.
    pub written_bytes: u64,
    /// Requests.
    pub flushes: u64,
    /// Requests.
    pub discards: u64,
    /// Requests the host's storage failed.
    pub errors: u64,
    /// Times a request waited for the limits.
    pub throttled: u64,
}

/// Counters of one interface, as the server sees directions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NicMetrics {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets dropped on the way in.
    pub rx_dropped: u64,
    /// Packets dropped on the way out.
    pub tx_dropped: u64,
    /// Times a direction waited for its limits.
    pub throttled: u64,
}
