//! Moving a machine from one VMM to another while its guest runs: commands and reports. What the two say to each other
//! over their streams is in [`crate::transfer`]; when which end has the machine, the VMM's phase table says.
//!
//! ```text
//!  source  greet ─▶ rounds ─▶ pause ─▶ last_round ─▶ state ─▶ ready ═▶ commit ═▶ moved
//!                └────────── any failure: returned ───────────┘         │ refused: returned
//!  target  greet ─▶ rounds ─────────────────────▶ state ─▶ ready ═════▶ release ═▶ moved
//!                └── any failure: dropped ──────────┘        │ abort, or its own refusal: dropped
//! ```
//! Where some of memory is owed when the target's machine runs, both are `owing` before they are `moved`.
use serde::{Deserialize, Serialize};

use crate::limits::{BANDWIDTH_BYTES_MIN, DOWNTIME_MS_MAX, STANDSTILL_MS, STANDSTILL_MS_MAX, STREAMS_MAX};
use crate::machine::{FdIndex, MachineSpec, SpecError};

/// Where to send a machine. Of disks that are not named, both ends have the same files open, on one host or on a file system
/// that all hosts see alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendSpec {
    /// Connected stream sockets, whose other ends the target has in the same order. Who is there was made sure of by
    /// who opened them. TCP is without delay (TCP_NODELAY).
    pub streams: Vec<FdIndex>,
    /// The disks whose contents go along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskStream>,
    /// The target has the memory itself, from [`crate::control::Command::Handles`], and the console's ring. Over the one
    /// stream goes the rest, and no disk goes along.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub handed: bool,
    /// How far to go for it.
    #[serde(default)]
    pub limits: SendLimits,
    /// When memory comes in relation to the machine.
    #[serde(default, skip_serializing_if = "Mode::owes_nothing")]
    pub mode: Mode,
    /// Whether whoever commands decides: the machine is given up by [`crate::control::Command::CommitMigration`] and not by
    /// the target's word. Both ends are held, or none.
    #[serde(default)]
    pub held: bool,
    /// The machine is paused, and stays so at whichever end has it. Refused where it is not as said.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// When memory comes in relation to the machine. What is owed comes as the machine runs at the target already, those pages first that it
/// waits for: then neither end has all of it until that is over, and the death of either is the machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// All of it before the machine.
    #[default]
    PreCopy,
    /// All of it before the machine, unless the guest writes too fast though it is held back as far as it goes: then the rest is
    /// owed.
    Auto,
    /// Once all of it and disks are copied, what was written meanwhile is owed.
    PostCopy,
}

impl Mode {
    /// Whether some of memory may be owed.
    pub fn may_owe(self) -> bool {
        self != Mode::PreCopy
    }

    /// A VMM of before there were others is not told of it.
    fn owes_nothing(&self) -> bool {
        !self.may_owe()
    }
}

/// How far a source goes to move its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendLimits {
    /// How long the guest may stand still, in milliseconds: the source stops it when it expects no more.
    pub downtime_ms: u32,
    /// Most bytes a second while the guest runs; no bound without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How much longer than that it may come to stand still before the machine is given up, in milliseconds: then it runs
    /// on at the source.
    #[serde(default = "standstill_ms")]
    pub standstill_ms: u32,
}

fn standstill_ms() -> u32 {
    STANDSTILL_MS
}

impl Default for SendLimits {
    /// 50 ms, and as much as the streams take.
    fn default() -> SendLimits {
        SendLimits { downtime_ms: 50, bandwidth_bytes_per_s: None, standstill_ms: STANDSTILL_MS }
    }
}

/// What machine to receive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveSpec {
    /// The machine, with as much memory and as many vCPUs, disks and interfaces as the one that comes. A later reset
    /// boots what it says. Its console's ring is empty: what the source's ring holds comes along. Where `memory` is handed
    /// over, it is the source's own ring.
    pub machine: MachineSpec,
    /// The memory of a machine of this host, which a source that was told so ([`SendSpec::handed`]) goes on with until it
    /// gives it up. Without it all of memory comes over the streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<FdIndex>,
    /// See [`SendSpec::streams`].
    pub streams: Vec<FdIndex>,
    /// The disks whose contents come along, into files of the same length and any content. What is in them means nothing
    /// until the machine has come.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskStream>,
    /// An open `/dev/userfaultfd`, with which some of memory may be owed. Without it a source that may owe is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub userfaultfd: Option<FdIndex>,
    /// As [`SendSpec::held`]: the machine runs by [`crate::control::Command::SettleMigration`] and not by the source's word.
    #[serde(default)]
    pub held: bool,
    /// As [`SendSpec::paused`]: once the machine is here, it waits for [`crate::control::Command::Resume`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// Streams in the place of those that broke when memory was owed, as many as there were for memory: connected as
/// [`SendSpec::streams`], given to both ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReconnectSpec {
    /// In the same order at both ends.
    pub streams: Vec<FdIndex>,
}

impl ReconnectSpec {
    /// Checks that `descriptors` came in the packet and each is named at most once.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        check_count(&self.streams)?;
        crate::machine::check_descriptors(streams(&self.streams, &[]), descriptors)
    }
}

/// A disk that is moved, and the stream that is its own. At the target its file is open for writing, whatever the guest may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskStream {
    /// Its position among the machine's disks.
    pub disk: u16,
    /// As [`SendSpec::streams`].
    pub stream: FdIndex,
}

/// Which end of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Where the machine comes from.
    Source,
    /// Where it goes to.
    Target,
}

/// How far an end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Each makes sure of the other.
    Greet,
    /// Memory is copied while the guest runs.
    Rounds,
    /// The guest is being stopped.
    Pause,
    /// What was written since is copied.
    LastRound,
    /// Processors and devices go over, and the target builds the machine.
    State,
    /// The target could run it, and waits for the source's word.
    Ready,
    /// The source has given it up, and waits to hear that the target has it.
    Commit,
    /// The target has it, and lets it run.
    Release,
    /// The machine is the target's, which asks for what of memory is owed as it runs; the source keeps that for it, and never
    /// runs again.
    Owing,
    /// The end: the machine is the target's.
    Moved,
    /// The end: the machine stays the source's. Only the source says so.
    Returned,
    /// The end: the target does not take it, and never will. Only the target says so.
    Dropped,
}

impl Phase {
    /// Every phase, in the order of a move that works.
    pub const ALL: [Phase; 12] = [
        Phase::Greet,
        Phase::Rounds,
        Phase::Pause,
        Phase::LastRound,
        Phase::State,
        Phase::Ready,
        Phase::Commit,
        Phase::Release,
        Phase::Owing,
        Phase::Moved,
        Phase::Returned,
        Phase::Dropped,
    ];

    /// Whether nothing follows.
    pub fn is_end(self) -> bool {
        matches!(self, Phase::Moved | Phase::Returned | Phase::Dropped)
    }
}

/// Which end has the machine, from where that is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// This end: the other one is dead, or has said for good that it has it not.
    Here,
    /// The other end has it, or will.
    There,
}

/// How a move stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationStatus {
    /// Which end this is.
    pub side: Side,
    /// How far it is.
    pub phase: Phase,
    /// Whether this end cannot know which has the machine: its link broke between [`Phase::Ready`] and the other's
    /// answer. It stays paused until [`crate::control::Command::SettleMigration`].
    pub in_doubt: bool,
    /// Whether some of memory is, or was, owed when the target's machine began to run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owes: bool,
    /// Whether the link broke while memory is owed: the guest waits wherever it needs some of that, until
    /// [`crate::control::Command::Reconnect`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub link_lost: bool,
    /// What was moved.
    pub progress: Progress,
    /// Why it ended, when it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// What was moved so far. A target knows what came, and since when the guest stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Bytes of memory and disks that went over the streams, again ones counted again.
    pub sent_bytes: u64,
    /// Bytes that still have to, as of the last look at what was written; once memory is owed, how much is.
    pub left_bytes: u64,
    /// Bytes that were only told to be zero, or not told at all.
    pub skipped_bytes: u64,
    /// Rounds begun, the last one with it.
    pub rounds: u32,
    /// Bytes a second, over the last round.
    pub bytes_per_s: u64,
    /// Bytes a second that the guest wrote anew, over the last round.
    pub dirtied_bytes_per_s: u64,
    /// How much of their time vCPUs are held back, in percent.
    pub throttle_percent: u8,
    /// How long the guest would stand still if it were stopped at the last look, in microseconds.
    pub expected_downtime_us: u64,
    /// How long the machine stood still at this end, in microseconds: until the target said that it runs.
    pub downtime_us: u64,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
}

impl SendSpec {
    /// Every descriptor the specification names, with the field that names it.
    pub fn descriptors(&self) -> Vec<(String, FdIndex)> {
        streams(&self.streams, &self.disks)
    }

    /// Checks that `descriptors` came in the packet and each is named at most once, and every number.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        check_count(&self.streams)?;
        check_disks(&self.disks, None)?;
        check_handed(self.handed, &self.streams, &self.disks)?;
        if self.handed && self.mode.may_owe() {
            let detail = "must be pre_copy where memory is handed over".to_owned();
            return Err(SpecError { field: "/mode".to_owned(), detail });
        }
        self.limits.check()?;
        crate::machine::check_descriptors(self.descriptors(), descriptors)
    }
}

impl SendLimits {
    /// Checks every number.
    pub fn check(&self) -> Result<(), SpecError> {
        if !(1..=DOWNTIME_MS_MAX).contains(&self.downtime_ms) {
            let detail = format!("must be 1 to {DOWNTIME_MS_MAX}");
            return Err(SpecError { field: "/limits/downtime_ms".to_owned(), detail });
        }
        if !(1..=STANDSTILL_MS_MAX).contains(&self.standstill_ms) {
            let detail = format!("must be 1 to {STANDSTILL_MS_MAX}");
            return Err(SpecError { field: "/limits/standstill_ms".to_owned(), detail });
        }
        match self.bandwidth_bytes_per_s {
            Some(less) if less < BANDWIDTH_BYTES_MIN => Err(SpecError {
                field: "/limits/bandwidth_bytes_per_s".to_owned(),
                detail: format!("must be at least {BANDWIDTH_BYTES_MIN}"),
            }),
            _ => Ok(()),
        }
    }
}

impl ReceiveSpec {
    /// Checks the machine and every descriptor.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        self.machine.check(descriptors)?;
        check_count(&self.streams)?;
        check_disks(&self.disks, Some(self.machine.disks.len()))?;
        check_handed(self.memory.is_some(), &self.streams, &self.disks)?;
        if let Some(at) = self.machine.disks.iter().position(|disk| disk.backing.is_some()) {
            let detail = "what comes is all of a disk, or its own file has all of it".to_owned();
            return Err(SpecError { field: format!("/disks/{at}/backing"), detail });
        }
        let mut named = self.machine.descriptors();
        named.extend(self.memory.map(|memory| ("/memory".to_owned(), memory)));
        named.extend(self.userfaultfd.map(|device| ("/userfaultfd".to_owned(), device)));
        named.extend(streams(&self.streams, &self.disks));
        crate::machine::check_descriptors(named, descriptors)
    }
}

fn streams(streams: &[FdIndex], disks: &[DiskStream]) -> Vec<(String, FdIndex)> {
    let streams = streams.iter().enumerate().map(|(at, stream)| (format!("/streams/{at}"), *stream));
    let disks = disks.iter().enumerate().map(|(at, disk)| (format!("/disks/{at}/stream"), disk.stream));
    streams.chain(disks).collect()
}

/// Each disk once; that the machine has it, where that is known.
fn check_disks(disks: &[DiskStream], has: Option<usize>) -> Result<(), SpecError> {
    for (at, named) in disks.iter().enumerate() {
        let is_twice = disks.iter().take(at).any(|other| other.disk == named.disk);
        let is_absent = has.is_some_and(|has| usize::from(named.disk) >= has);
        if is_twice || is_absent {
            let detail = if is_twice { "is named twice" } else { "is no disk of the machine" };
            return Err(SpecError { field: format!("/disks/{at}/disk"), detail: detail.to_owned() });
        }
    }
    Ok(())
}

fn check_handed(is_handed: bool, streams: &[FdIndex], disks: &[DiskStream]) -> Result<(), SpecError> {
    if is_handed && streams.len() > 1 {
        let detail = "must be one where memory is handed over".to_owned();
        return Err(SpecError { field: "/streams".to_owned(), detail });
    }
    if is_handed && !disks.is_empty() {
        let detail = "must be empty where memory is handed over: both ends have the same files".to_owned();
        return Err(SpecError { field: "/disks".to_owned(), detail });
    }
    Ok(())
}

fn check_count(streams: &[FdIndex]) -> Result<(), SpecError> {
    if (1..=STREAMS_MAX).contains(&streams.len()) {
        return Ok(());
    }
    Err(SpecError { field: "/streams".to_owned(), detail: format!("must be 1 to {STREAMS_MAX}") })
}

#[cfg(test)]
mod tests;
