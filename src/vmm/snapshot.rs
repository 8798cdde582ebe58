//! A machine as files, the one form for all who keep or move one: `contents` is what is in the sections, `copy` moves
//! memory between machine and file, `lower` finds it where it lies in several. The outer form and the table of memory's parts are in [`wire::saved`], for the daemon
//! looks at them too. `machine` fills and reads it; nothing here knows a running machine or a socket.
//!
//! ```text
//! state file: header ─ sections ─ (JSON: shape, machine, counters) ─ table of memory       its SHA-256 is the root
//! memory file: every byte at the offset it has in memory, the rest holes           digests of its parts: the table
//! of a save on a base: parts that the base has are holes, too                      a list says in which file they are
//! ```
mod contents;
mod copy;
mod lower;

pub(crate) use contents::{Contents, Counted, MachineState, Shape};
pub(crate) use copy::{Parts, copy_in, copy_out};
pub(crate) use lower::MemoryFiles;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};
use wire::saved::Digest;
use wire::saved::form::{self, FormError};
use wire::saved::lower::LowerError;
use wire::saved::state_bytes_max;
use wire::saved::table::Table;

/// Why a machine cannot be saved, or what was saved not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {doing}")]
    File {
        doing: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error("the file has {found} bytes; one for this machine has at most {most}")]
    TooLong { found: u64, most: u64 },
    #[error("the file is not the one that was named: its digest is {found}")]
    Root { found: Digest },
    #[error(transparent)]
    Form(#[from] FormError),
    #[error(transparent)]
    Lower(#[from] LowerError),
    #[error("{found} lower memory files came, the list tells of {wanted}")]
    LowerFiles { wanted: u32, found: usize },
    #[error("memory at {offset:#x} is not what was saved there")]
    Chunk { offset: u64 },
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error("the save was cancelled")]
    Cancelled,
}

impl Error {
    /// Whether the host failed, not what was given.
    pub(crate) fn is_of_the_host(&self) -> bool {
        matches!(self, Error::File { .. } | Error::Memory(_) | Error::Cancelled)
    }
}

/// Writes the state file from its start; answers its digest and its length in bytes.
pub(crate) fn write(file: &File, contents: &Contents, table: &Table) -> Result<(Digest, u64), Error> {
    let bytes = bytes(contents, table)?;
    file.set_len(0).and_then(|()| file.write_all_at(&bytes, 0)).map_err(writing)?;
    file.sync_data().map_err(writing)?;
    Ok((digest(&bytes), bytes.len() as u64))
}

/// A state file's bytes.
pub(crate) fn bytes(contents: &Contents, table: &Table) -> Result<Vec<u8>, Error> {
    let mut sections = contents.sections()?;
    sections.push(table.section());
    Ok(form::join(&sections))
}

/// Reads a state file for a machine of `memory_bytes` that has the digest `root`. Nothing of it is looked at before
/// the digest has been found right.
pub(crate) fn read(file: &File, root: Digest, memory_bytes: u64) -> Result<(Contents, Table), Error> {
    parse(&named(file, root, memory_bytes)?)
}

/// Reads the table of memory alone, as [`read`] does: of a machine with as much memory.
pub(crate) fn read_table(file: &File, root: Digest, memory_bytes: u64) -> Result<Table, Error> {
    let bytes = named(file, root, memory_bytes)?;
    Ok(Table::parse(&mut form::split(&bytes)?)?)
}

/// The bytes of a state file that has the digest `root`.
fn named(file: &File, root: Digest, memory_bytes: u64) -> Result<Vec<u8>, Error> {
    let reading = |cause| Error::File { doing: "read the state file", cause };
    let found = file.metadata().map_err(reading)?.len();
    let most = state_bytes_max(memory_bytes);
    if found > most {
        return Err(Error::TooLong { found, most });
    }
    let mut bytes = vec![0; found as usize];
    file.read_exact_at(&mut bytes, 0).map_err(reading)?;
    let found = digest(&bytes);
    if found != root {
        return Err(Error::Root { found });
    }
    Ok(bytes)
}

/// What the bytes of a state file say.
pub(crate) fn parse(bytes: &[u8]) -> Result<(Contents, Table), Error> {
    let mut sections = form::split(bytes)?;
    let contents = Contents::parse(&mut sections)?;
    let table = Table::parse(&mut sections)?;
    match sections.first_unknown() {
        None => Ok((contents, table)),
        Some(name) => {
            Err(FormError::Form(format!("has a section {name:?} that this version does not know")).into())
        }
    }
}

fn writing(cause: io::Error) -> Error {
    Error::File { doing: "write the state file", cause }
}

fn digest(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

#[cfg(test)]
mod tests;
