//! Copying a machine's disks as they are at one moment, while its guest runs on. For file systems that cannot share blocks:
//! there the guest would stand still for as long as a copy takes.
use serde::{Deserialize, Serialize};

use crate::limits::DISKS_MAX;
use crate::machine::{FdIndex, SpecError, check_descriptors};
use crate::saved::WriteDelay;

/// What to copy, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySpec {
    /// One or more, each once.
    pub disks: Vec<DiskCopy>,
}

/// One disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCopy {
    /// Its position among the machine's disks.
    pub disk: u16,
    /// A file that is one hole, as long as the disk, open for writing. What the disk has no data for stays a hole.
    pub file: FdIndex,
}

/// How a copy stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CopyStatus {
    /// Nothing was ever copied by this process.
    None,
    /// The moment has passed, and what is not copied yet is copied, or kept before the guest writes to it.
    Copying {
        /// Bytes of disks looked at.
        done_bytes: u64,
        /// Bytes of disks to look at.
        total_bytes: u64,
    },
    /// All files are complete. They are not flushed.
    Copied(CopyReport),
    /// No file is of use.
    Failed {
        /// Why.
        detail: String,
    },
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyReport {
    /// Bytes that were written; the rest is holes.
    pub written_bytes: u64,
    /// Requests of the guest that waited until what they were to change had been kept.
    pub waits: u64,
    /// How long they waited.
    pub delay: WriteDelay,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
}

impl CopySpec {
    /// Checks that the disks are among `disks` and the descriptors among those that came, each once.
    pub fn check(&self, disks: usize, descriptors: usize) -> Result<(), SpecError> {
        let refuse = |field: String, detail: &str| Err(SpecError { field, detail: detail.to_owned() });
        if self.disks.is_empty() || self.disks.len() > DISKS_MAX {
            return refuse("/disks".to_owned(), "must name some disks, and each once");
        }
        for (at, copy) in self.disks.iter().enumerate() {
            if usize::from(copy.disk) >= disks {
                return refuse(format!("/disks/{at}/disk"), "is none of the machine's");
            }
            if self.disks.iter().take(at).any(|other| other.disk == copy.disk) {
                return refuse(format!("/disks/{at}/disk"), "is named twice");
            }
        }
        let named = self.disks.iter().enumerate();
        let named = named.map(|(at, copy)| (format!("/disks/{at}/file"), copy.file)).collect();
        check_descriptors(named, descriptors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_and_each_file_is_there_and_named_once() {
        let spec = |named: &[(u16, u16)]| CopySpec {
            disks: named.iter().map(|(disk, file)| DiskCopy { disk: *disk, file: FdIndex(*file) }).collect(),
        };
        assert_eq!(spec(&[(1, 0), (0, 1)]).check(2, 2), Ok(()));
        let cases: [(&[(u16, u16)], &str); 5] = [
            (&[], "/disks"),
            (&[(0, 0), (2, 1)], "/disks/1/disk"),
            (&[(0, 0), (0, 1)], "/disks/1/disk"),
            (&[(0, 2)], "/disks/0/file"),
            (&[(0, 1), (1, 1)], "/disks/1/file"),
        ];
        for (named, field) in cases {
            assert_eq!(spec(named).check(2, 2).unwrap_err().field, field, "{named:?}");
        }
    }
}
