//! A snapshot as one stream, to be kept elsewhere or taken in by another host. `write` makes it of a snapshot's files,
//! `read` makes files of it. Whoever sends one may be anyone. Neither knows callers or records; `export` and `import` do.
//!
//! ```text
//! "toftsnap" │ version 4 │ bytes of the head 4 │ head ║ file 4 │ bytes 4 │ offset 8 │ bytes ║ … ║ end 4 │ 32 4 │ data 8 │ SHA-256 32
//! ```
//! The head is a JSON document. Frames come file by file and in the order of their offsets; what no frame holds is zero.
//! Files are the machine's state and its memory, where there are any, and then the disks. A frame of memory is a part of the
//! table in the state file, one of a disk whole pages. The last frame tells how many bytes all others held, and the digest of everything before it.
//! Numbers are little-endian.
use std::io;
use std::net::Ipv4Addr;

use model::limits as bounds;
use model::server::{CacheMode, CpuTemplate, DiskLimits, Isolation, NicLimits, RestartPolicy};
use model::{Labels, Name, ServerId, Time};
use serde::{Deserialize, Serialize};
use wire::peer::OfferedCpu;
use wire::saved::Digest;

use super::limits::{HEAD_BYTES_MAX, TEXT_CHARS_MAX};
use crate::network::mac::Mac;

mod read;
mod write;

pub(super) use read::{read_files, read_head};
pub(super) use write::Plan;

const MAGIC: &[u8; 8] = b"toftsnap";
const VERSION: u32 = 1;

/// Files by their numbers in frames: disk `n` is `DISKS + n`.
const STATE: u32 = 0;
const MEMORY: u32 = 1;
const DISKS: u32 = 2;
const END: u32 = u32::MAX;

const FRAME_HEAD_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;

/// Why a snapshot does not come in.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It is damaged or not what it says; the sentence says where.
    #[error("{0}")]
    Corrupt(String),
    /// What it comes from cannot be read.
    #[error("the snapshot cannot be read")]
    Source(#[source] io::Error),
    /// It cannot be written here.
    #[error("the snapshot cannot be stored")]
    Store(#[source] io::Error),
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// What a stream says before its first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    /// The snapshot's name where it was exported.
    pub(super) name: Name,
    pub(super) description: String,
    pub(super) labels: Labels,
    pub(super) server_id: ServerId,
    pub(super) server_name: Name,
    pub(super) vcpus: u8,
    pub(super) memory_bytes: u64,
    pub(super) cpu: CpuTemplate,
    pub(super) image: HeadImage,
    pub(super) taken_at: Option<Time>,
    pub(super) paused_ms: Option<u64>,
    pub(super) memory: Option<HeadMemory>,
    /// The root disk, or none.
    pub(super) disks: Vec<HeadDisk>,
    pub(super) nics: Vec<HeadNic>,
    pub(super) default_user: String,
    pub(super) ssh_keys: Vec<String>,
    pub(super) user_data: Option<String>,
    pub(super) restart_policy: RestartPolicy,
    pub(super) isolation: Isolation,
    /// How many clones with memory led to the server: by it a clone's seed disk has another size than the one its guest knows.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) descent: u32,
    /// What its guest was shown of a processor, where it has memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) processor: Option<OfferedCpu>,
    /// Bytes that all frames hold.
    pub(super) data_bytes: u64,
}

/// Hosts that know nothing of clones take in what is none.
fn is_zero(descent: &u32) -> bool {
    *descent == 0
}

/// What the server boots from: an image is known by what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeadImage {
    pub(super) name: Name,
    /// SHA-256 of its manifest in lower-case hexadecimal.
    pub(super) sha256: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeadMemory {
    /// Digest of the state file.
    pub(super) root: Digest,
    /// Length of the state file in bytes.
    pub(super) state_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeadDisk {
    pub(super) size_bytes: u64,
    pub(super) cache: CacheMode,
    pub(super) limits: DiskLimits,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeadNic {
    /// Absent when it was deleted before the export.
    pub(super) network: Option<Name>,
    pub(super) mac: String,
    pub(super) ipv4: Ipv4Addr,
    pub(super) limits: NicLimits,
}

impl Head {
    /// Says what cannot be. Names and labels were checked when they were read.
    pub(super) fn check(&self) -> Result<(), String> {
        let short = |text: &str, most: usize| text.chars().count() <= most;
        let sound = |limits: &[Option<model::server::Rate>]| {
            limits.iter().flatten().all(|rate| rate.per_second > 0 && rate.burst != Some(0))
        };
        let disk = |disk: &HeadDisk| {
            (bounds::VOLUME_BYTES_MIN..=bounds::VOLUME_BYTES_MAX).contains(&disk.size_bytes)
                && disk.size_bytes.is_multiple_of(PAGE_BYTES)
                && sound(&[disk.limits.bandwidth_bytes, disk.limits.operations])
        };
        let nic = |nic: &HeadNic| {
            let NicLimits { rx_bytes, rx_packets, tx_bytes, tx_packets } = nic.limits;
            nic.mac.parse::<Mac>().is_ok() && sound(&[rx_bytes, rx_packets, tx_bytes, tx_packets])
        };
        let key = |key: &String| key.len() <= bounds::SSH_KEY_BYTES_MAX && !key.chars().any(char::is_control);
        let memory_range = bounds::MEMORY_BYTES_MIN..=bounds::MEMORY_BYTES_MAX;
        let state = |memory: &HeadMemory| {
            (1..=wire::saved::state_bytes_max(self.memory_bytes)).contains(&memory.state_bytes)
        };
        let (count, most) = (self.disks.len(), bounds::VOLUMES_MAX);
        if count > most {
            return Err(format!("it has {count} disks, and a server {most} at most"));
        }
        let checks = [
            ("its description", short(&self.description, bounds::DESCRIPTION_CHARS_MAX)),
            ("its number of vCPUs", (1..=bounds::VCPUS_MAX).contains(&self.vcpus)),
            (
                "its memory's size",
                memory_range.contains(&self.memory_bytes)
                    && self.memory_bytes.is_multiple_of(bounds::MEMORY_STEP_BYTES),
            ),
            ("its processor", crate::cpu::template(&self.cpu).fault().is_none()),
            ("the processor of its guest", self.processor.as_ref().is_none_or(OfferedCpu::is_sound)),
            ("its state file's length", self.memory.as_ref().is_none_or(state)),
            ("a disk", self.disks.iter().all(disk)),
            ("its number of interfaces", self.nics.len() <= bounds::NICS_MAX),
            ("an interface", self.nics.iter().all(nic)),
            ("its user's name", short(&self.default_user, TEXT_CHARS_MAX)),
            ("a key", self.ssh_keys.len() <= bounds::SSH_KEYS_MAX && self.ssh_keys.iter().all(key)),
            (
                "its user data",
                self.user_data.as_ref().is_none_or(|data| data.len() <= bounds::USER_DATA_BYTES_MAX),
            ),
            ("its image's digest", self.image.sha256.parse::<Digest>().is_ok()),
            ("the amount of its data", self.data_bytes <= self.bytes_max()),
        ];
        match checks.into_iter().find(|(_, is_sound)| !is_sound) {
            None => Ok(()),
            Some((what, _)) => Err(format!("{what} is not one that a server can have")),
        }
    }

    /// Most bytes that its frames can hold.
    fn bytes_max(&self) -> u64 {
        let memory =
            self.memory.as_ref().map_or(0, |memory| memory.state_bytes.saturating_add(self.memory_bytes));
        self.disks.iter().fold(memory, |sum, disk| sum.saturating_add(disk.size_bytes))
    }

    /// Length of a file of this number; none when there is no such file.
    fn file_bytes(&self, file: u32) -> Option<u64> {
        match file {
            STATE => Some(self.memory.as_ref()?.state_bytes),
            MEMORY => self.memory.as_ref().map(|_| self.memory_bytes),
            disk => self.disks.get(usize::try_from(disk - DISKS).ok()?).map(|disk| disk.size_bytes),
        }
    }

    /// Numbers of its files, in the order of their frames.
    fn files(&self) -> impl Iterator<Item = u32> {
        let disks = u32::try_from(self.disks.len()).unwrap_or_default();
        let memory = self.memory.as_ref().map(|_| [STATE, MEMORY]);
        memory.into_iter().flatten().chain(DISKS..DISKS + disks)
    }
}

const PAGE_BYTES: u64 = 4096;

/// Name of a file in a snapshot's directory.
fn file_name(file: u32) -> String {
    match file {
        STATE => super::STATE.to_owned(),
        MEMORY => super::MEMORY.to_owned(),
        disk => super::disk_name(usize::try_from(disk - DISKS).unwrap_or_default()),
    }
}

/// What comes before the first frame.
fn preamble(head: &Head) -> serde_json::Result<Vec<u8>> {
    let head = serde_json::to_vec(head)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(u32::try_from(head.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(head);
    Ok(bytes)
}

fn frame_head(file: u32, bytes: u32, offset: u64) -> [u8; FRAME_HEAD_BYTES] {
    let mut head = [0; FRAME_HEAD_BYTES];
    head[..4].copy_from_slice(&file.to_le_bytes());
    head[4..8].copy_from_slice(&bytes.to_le_bytes());
    head[8..].copy_from_slice(&offset.to_le_bytes());
    head
}

fn check_head_bytes(bytes: u32) -> Result<usize, Refusal> {
    usize::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes <= HEAD_BYTES_MAX)
        .ok_or_else(|| Refusal::Corrupt(format!("its head has {bytes} bytes; {HEAD_BYTES_MAX} are possible")))
}

#[cfg(test)]
mod tests;
