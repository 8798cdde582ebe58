//! Saving a machine and building it again from what was saved: commands and reports, the outer form of a state file and
//! the table of memory in it. What else the files hold is the VMM's matter; the daemon keeps them, and the digest by which
//! a reader knows that they are the ones.
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits;
use crate::machine::{FdIndex, MachineSpec, SpecError};

pub mod form;
pub mod lower;
pub mod table;

/// A SHA-256 digest, in JSON 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

/// What to save, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveSpec {
    /// An empty file, open for writing, for everything but memory.
    pub state: FdIndex,
    /// An empty file, open for writing, for memory: as long as memory, each byte at the offset it has there, and what
    /// is not written a hole.
    pub memory: FdIndex,
    /// What was saved before: parts of memory that it has, too, are not written again. Without it, all are written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// How to save while the machine runs. Without it, it is paused and stays so until the end of the save.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
}

/// An earlier save of a machine with as much memory. A part of memory is left out when the table of it has the very part:
/// offset, length and digest ([`table::Table::holds`]). Who wrote to memory in between does not matter, nor who was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its state file, open for reading.
    pub state: FdIndex,
    /// The digest of that.
    pub root: Digest,
}

/// How to save a machine that runs on. Its memory is write-protected piece by piece, then comes the moment that is
/// saved, and then memory is copied as it was at that moment; whoever writes to a page that is not copied yet waits until
/// it has been kept. Meanwhile no page that the guest gives up returns to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Live {
    /// An open `/dev/userfaultfd`.
    pub userfaultfd: FdIndex,
    /// When the moment comes.
    pub moment: Moment,
}

/// When the moment comes that is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// As soon as memory is protected. The VMM pauses and resumes the machine itself.
    Soon,
    /// With the next [`crate::control::Command::Pause`] after [`SaveStatus::Armed`] was told, so that disks can be saved
    /// before [`crate::control::Command::Resume`].
    Pause,
}

/// How a save stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SaveStatus {
    /// Nothing was ever saved by this process.
    None,
    /// Memory is being protected; the machine runs.
    Arming,
    /// Memory is protected, and the moment can come.
    Armed,
    /// The moment has passed, and memory is being copied.
    Copying {
        /// Bytes of memory looked at.
        done_bytes: u64,
        /// Bytes of memory to look at.
        total_bytes: u64,
    },
    /// Both files are complete and on their medium.
    Saved(SaveReport),
    /// Neither file is of use.
    Failed {
        /// Why.
        detail: String,
    },
}

/// What was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveReport {
    /// Digest of the whole state file, which holds the digests of all of memory. Whoever restores names it.
    pub root: Digest,
    /// Length of the state file in bytes.
    pub state_bytes: u64,
    /// Bytes of memory that were written; the rest is holes, and what the base has.
    pub memory_bytes: u64,
    /// How long the VMM held the machine still for it, in microseconds; 0 when others had paused it.
    pub stall_us: u64,
    /// Writes of the guest, and of devices for it, that waited because memory was protected. Without `delay` only those since the
    /// moment.
    pub waits: u64,
    /// How long they waited. Absent where nobody could write, and from a VMM that does not measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<WriteDelay>,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
}

/// How long writes waited while a save protected memory: from when the VMM had read of one until it let that go. Not in it is how
/// long it took to read of it, nor until the writer ran again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteDelay {
    /// The longest, in microseconds.
    pub us_max: u64,
    /// All of them together, in microseconds.
    pub us_sum: u64,
}

/// What to build a machine from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreSpec {
    /// The machine, with as much memory and as many vCPUs, disks and interfaces as the one that was saved. A later
    /// reset boots what it says.
    pub machine: MachineSpec,
    /// The state file, open for reading.
    pub state: FdIndex,
    /// The digest that was reported when it was saved.
    pub root: Digest,
    /// The memory file, open for reading.
    pub memory: FdIndex,
    /// What of memory lies in other files; without it, all is in that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lower: Option<LowerFiles>,
    /// How memory comes from the file.
    pub how: MemoryUse,
    /// The guest's clock.
    #[serde(default)]
    pub clock: Clock,
    /// Whether counters go on.
    #[serde(default)]
    pub counters: Counters,
    /// Whether it is still the machine that was saved.
    #[serde(default)]
    pub identity: Identity,
    /// What the machine does then.
    #[serde(default)]
    pub then: Then,
}

/// The memory files of earlier saves that a memory file needs. Each is as long as that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowerFiles {
    /// What lies in which, as [`lower::Lower`] writes it; open for reading.
    pub runs: FdIndex,
    /// SHA-256 of that.
    pub digest: Digest,
    /// The files, open for reading, in the order of their numbers in it.
    pub files: Vec<FdIndex>,
}

/// How a machine's memory comes from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryUse {
    /// Mapped; what the guest writes stays in this process, and the file must not change while it lives. Nothing is
    /// read or checked beforehand: only for files whose digests were compared when they came to be.
    Private,
    /// Read whole into memory of its own, every part compared with its digest before the guest runs.
    Copy,
    /// Taken over with all that is written to it: the sealed memory file of a machine that has ended or stays paused
    /// for good. Digests say nothing about it.
    Adopt,
}

/// What a guest's clock shows after a restore. It never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// It goes on where it stopped, as after a pause.
    #[default]
    Continue,
    /// The time since the save has passed, by the hosts' wall clocks.
    Advance,
}

/// Whether a machine's counters go on from those that were saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counters {
    /// It is the same machine.
    #[default]
    Continue,
    /// It is another one, which has done nothing yet.
    Fresh,
}

/// Whether a restored machine is the one that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// It goes on, and nobody else does.
    #[default]
    Same,
    /// It may be one of several: its generation id (vmgenid) is new and the guest is told, so that a kernel that knows
    /// of it seeds its random numbers again.
    New,
}

/// What a restored machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// Its vCPUs run.
    #[default]
    Run,
    /// It stays paused until [`crate::control::Command::Resume`].
    Stay,
}

/// Longest state file of a machine with so much memory; both in bytes.
pub fn state_bytes_max(memory_bytes: u64) -> u64 {
    let table_bytes = (memory_bytes >> 20).saturating_mul(limits::STATE_BYTES_PER_MIB);
    limits::STATE_BYTES_MAX.saturating_add(table_bytes)
}

impl SaveSpec {
    /// Every descriptor the specification names, with the field that names it.
    pub fn descriptors(&self) -> Vec<(String, FdIndex)> {
        let mut named = vec![("/state".to_owned(), self.state), ("/memory".to_owned(), self.memory)];
        named.extend(self.base.map(|base| ("/base/state".to_owned(), base.state)));
        named.extend(self.live.map(|live| ("/live/userfaultfd".to_owned(), live.userfaultfd)));
        named
    }

    /// Checks that `descriptors` came in the packet and each is named at most once.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        crate::machine::check_descriptors(self.descriptors(), descriptors)
    }
}

impl RestoreSpec {
    /// Checks the machine and every descriptor.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        self.machine.check(descriptors)?;
        if let Some(lower) = self.lower.as_ref().filter(|_| self.how == MemoryUse::Adopt) {
            let detail = format!("memory that is adopted is in one file, not in {} more", lower.files.len());
            return Err(SpecError { field: "/lower".to_owned(), detail });
        }
        crate::machine::check_descriptors(self.descriptors(), descriptors)
    }

    /// Every descriptor the specification names, with the field that names it.
    pub fn descriptors(&self) -> Vec<(String, FdIndex)> {
        let mut named = self.machine.descriptors();
        named.extend([("/state".to_owned(), self.state), ("/memory".to_owned(), self.memory)]);
        if let Some(lower) = &self.lower {
            named.push(("/lower/runs".to_owned(), lower.runs));
            let files = (0..)
                .zip(&lower.files)
                .map(|(index, file): (usize, _)| (format!("/lower/files/{index}"), *file));
            named.extend(files);
        }
        named
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Digest, DigestError> {
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != 32 || !rest.is_empty() {
            return Err(DigestError);
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(DigestError);
        let mut bytes = [0; 32];
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = (digit(*high)? << 4 | digit(*low)?) as u8;
        }
        Ok(Digest(bytes))
    }
}

/// A text that is no digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest has 64 hexadecimal digits")]
pub struct DigestError;

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
