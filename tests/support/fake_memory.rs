//! The memory of a fake machine: pages of one byte, saved and given back as a VMM does it, so that a control plane that
//! mixes files up is found out.
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};
use wire::machine::FdIndex;
use wire::saved::lower::Lower;
use wire::saved::table::{Part, Table};
use wire::saved::{Digest, RestoreSpec, form};

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

/// What memory holds that is not zero: a page's byte, by its number.
pub(super) type Memory = BTreeMap<u64, u8>;

/// Where a save goes, and the table of what it need not write.
pub(super) struct SaveFiles {
    pub(super) state: File,
    pub(super) memory: File,
    pub(super) base: Option<Table>,
    /// Whether the machine runs meanwhile.
    pub(super) is_live: bool,
}

/// Writes what the base does not have; answers the table of all of it, and how many bytes were written.
pub(super) fn write(memory: &Memory, memory_bytes: u64, files: &SaveFiles) -> std::io::Result<(Table, u64)> {
    files.memory.set_len(memory_bytes)?;
    let (mut table, mut written) = (Table { memory_bytes, parts: Vec::new() }, 0);
    for (page, value) in memory {
        let (offset, bytes) = (page * PAGE_BYTES as u64, [*value; PAGE_BYTES]);
        let part = Part { offset, bytes: PAGE_BYTES as u32, digest: Digest(Sha256::digest(bytes).into()) };
        if !files.base.as_ref().is_some_and(|base| base.holds(&part)) {
            files.memory.write_all_at(&bytes, offset)?;
            written += PAGE_BYTES as u64;
        }
        table.parts.push(part);
    }
    Ok((table, written))
}

/// The table of a state file that is the one that was named.
pub(super) fn table(state: &File, root: Digest) -> Result<Table, String> {
    let bytes = read(state)?;
    if Digest(Sha256::digest(&bytes).into()) != root {
        return Err("the file is not the one that was saved".to_owned());
    }
    let told = |cause: form::FormError| cause.to_string();
    Table::parse(&mut form::split(&bytes).map_err(told)?).map_err(told)
}

/// The memory that was saved: each part is looked for where the list says that it lies, and is to be what its digest says.
pub(super) fn restored(spec: &RestoreSpec, descriptors: &[OwnedFd]) -> Result<Memory, String> {
    let file = |FdIndex(at): FdIndex| {
        let found = descriptors.get(usize::from(at)).and_then(|found| found.try_clone().ok());
        found.map(File::from).ok_or("a file is missing")
    };
    let (table, own) = (table(&file(spec.state)?, spec.root)?, file(spec.memory)?);
    if own.metadata().map_or(0, |found| found.len()) != spec.machine.memory_bytes {
        return Err("the file is not the one that was saved".to_owned());
    }
    let (mut lower, mut files) = (Lower::default(), Vec::new());
    if let Some(named) = &spec.lower {
        let bytes = read(&file(named.runs)?)?;
        if Digest(Sha256::digest(&bytes).into()) != named.digest {
            return Err("the list is not the one that was kept".to_owned());
        }
        lower = Lower::split(&bytes, spec.machine.memory_bytes).map_err(|cause| cause.to_string())?;
        for index in &named.files {
            files.push(file(*index)?);
        }
    }
    let mut memory = Memory::new();
    for part in table.parts {
        let mut bytes = [0; PAGE_BYTES];
        let (_, which) = lower.pieces(part.offset..part.offset + 1).next().ok_or("no piece")?;
        let from = which.map_or(Some(&own), |which| files.get(which as usize)).ok_or("too few files")?;
        from.read_exact_at(&mut bytes, part.offset).map_err(|cause| cause.to_string())?;
        if Digest(Sha256::digest(bytes).into()) != part.digest {
            return Err(format!("memory at {:#x} is not what was saved there", part.offset));
        }
        memory.insert(part.offset / PAGE_BYTES as u64, bytes[0]);
    }
    Ok(memory)
}

fn read(file: &File) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; file.metadata().map_err(|cause| cause.to_string())?.len() as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|cause| cause.to_string())?;
    Ok(bytes)
}
