//! The last will: one JSON document a VMM writes into a file it was given before it ends. The daemon reads
//! it when the process is gone, however long after. An empty file means the process had no time to write.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::limits::WILL_BYTES_MAX;

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest asked for a reset and the specification says to exit.
    Reset,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The guest's kernel crashed and said so through pvpanic.
    GuestPanicked,
    /// [`crate::control::Command::Quit`].
    Asked,
    /// KVM could not go on; the sentence has its words.
    KvmError(String),
    /// A bug of ours; the sentence has the place and message.
    Crashed(String),
}

/// The document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Will {
    /// Why.
    pub reason: Reason,
    /// When, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

impl Will {
    /// Replaces what `file` holds with this will. The first will stands: a file that already holds one is
    /// left alone, because what follows the first reason is only its consequence.
    pub fn write(&self, file: &File) -> io::Result<()> {
        if file.metadata()?.len() > 0 {
            return Ok(());
        }
        let text = serde_json::to_vec(self)?;
        file.write_all_at(&text, 0)
    }

    /// Reads a will; `None` when the file is empty, too long or not a will.
    pub fn read(file: &File) -> io::Result<Option<Will>> {
        let mut text = vec![0; WILL_BYTES_MAX];
        let mut length = 0_usize;
        while let Some(rest) = text.get_mut(length..) {
            match file.read_at(rest, length as u64)? {
                0 => break,
                read => length = length.saturating_add(read),
            }
        }
        text.truncate(length);
        Ok(serde_json::from_slice(&text).ok())
    }
}
