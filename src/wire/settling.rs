//! Settling a machine: what was mapped privately from a saved machine's file goes into memory of the machine's own while its
//! guest runs, and what of its disks lies in the files that these were made from goes into their own. Then it can be handed over
//! and saved without standing still. The files that memory was mapped from are nobody's any more; those of disks the VMM has open until
//! it ends.
use serde::{Deserialize, Serialize};

/// Whose a machine's memory is, and its disks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes that are mapped from a file which others may have mapped too; what the guest has written of them is counted.
    pub shared_bytes: u64,
    /// Bytes of its disks that it may read from the files that these were made from.
    #[serde(default)]
    pub disks_shared_bytes: u64,
    /// How the settling that is under way, or the last one, stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<Settling>,
}

/// One settling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settling {
    /// Whether it goes on.
    pub stage: SettleStage,
    /// How often the machine stood still for a piece of memory.
    pub pauses: u32,
    /// The longest time that it did, in microseconds.
    pub longest_pause_us: u64,
    /// All of these times, in microseconds.
    pub paused_us: u64,
    /// How long all of it took so far, in microseconds.
    pub total_us: u64,
}

/// How a settling stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SettleStage {
    /// It goes on.
    UnderWay,
    /// All memory and all disks are the machine's own.
    Settled,
    /// It came to no end. What was settled stays so, and the next one goes on from there.
    Failed {
        /// Why.
        detail: String,
    },
}
