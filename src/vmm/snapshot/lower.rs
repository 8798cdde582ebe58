//! Memory that lies in more files than one: what is new in a file of its own, the rest in those of earlier saves.
use std::cmp::Reverse;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use memory::{Extent, Ram};
use wire::saved::Digest;
use wire::saved::lower::{LOWER_BYTES_MAX, Lower};
use wire::saved::table::PART_BYTES_MAX;

use super::{Error, digest};

/// A memory file and the lower ones that it needs.
#[derive(Debug)]
pub(crate) struct MemoryFiles {
    pub(crate) own: File,
    lower: Lower,
    files: Vec<File>,
}

impl MemoryFiles {
    /// All of memory in one file.
    pub(crate) fn one(own: File) -> MemoryFiles {
        MemoryFiles { own, lower: Lower::default(), files: Vec::new() }
    }

    /// Memory of `memory_bytes` of which the runs in `runs`, whose digest is `wanted`, lie in `files`.
    pub(crate) fn new(
        own: File,
        (runs, wanted): (&File, Digest),
        files: Vec<File>,
        memory_bytes: u64,
    ) -> Result<MemoryFiles, Error> {
        let reading = |cause| Error::File { doing: "read the list of what lies in lower files", cause };
        let found = runs.metadata().map_err(reading)?.len();
        if found > LOWER_BYTES_MAX {
            return Err(Error::TooLong { found, most: LOWER_BYTES_MAX });
        }
        let mut bytes = vec![0; found as usize];
        runs.read_exact_at(&mut bytes, 0).map_err(reading)?;
        let found = digest(&bytes);
        if found != wanted {
            return Err(Error::Root { found });
        }
        let lower = Lower::split(&bytes, memory_bytes)?;
        if lower.files as usize != files.len() {
            return Err(Error::LowerFiles { wanted: lower.files, found: files.len() });
        }
        for file in &files {
            let found = file.metadata().map_err(reading)?.len();
            // Memory that is mapped from beyond the end of a file kills who touches it.
            if found != memory_bytes {
                return Err(memory::Error::Length { found, wanted: memory_bytes }.into());
            }
        }
        Ok(MemoryFiles { own, lower, files })
    }

    /// All of them.
    pub(crate) fn into_files(self) -> Vec<File> {
        let mut files = self.files;
        files.push(self.own);
        files
    }

    /// Reads from wherever the bytes lie.
    pub(super) fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        for (piece, file) in self.lower.pieces(offset..offset + data.len() as u64) {
            let (from, to) = ((piece.start - offset) as usize, (piece.end - offset) as usize);
            let part = data.get_mut(from..to).unwrap_or_default();
            self.file(file)?.read_exact_at(part, piece.start)?;
        }
        Ok(())
    }

    fn file(&self, file: Option<u32>) -> io::Result<&File> {
        let found = match file {
            None => Some(&self.own),
            Some(file) => self.files.get(file as usize),
        };
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Puts what lies in lower files over the memory of the own one, which is mapped privately and not used yet. Each run
    /// makes the kernel keep two more mappings, so of more than `runs_max` the shortest are read instead, into memory of
    /// the machine's own.
    pub(crate) fn lay_over(&self, ram: &Arc<Ram>, runs_max: usize) -> Result<(), Error> {
        let mut runs = self.lower.runs.clone();
        runs.sort_by_key(|run| Reverse(run.bytes));
        let reading = |cause| Error::File { doing: "read a lower memory file", cause };
        let (mapped, copied) = runs.split_at(runs.len().min(runs_max));
        for run in mapped {
            let part = Extent { offset: run.offset, bytes: run.bytes };
            memory::lay_over(ram, part, self.file(Some(run.file)).map_err(reading)?)?;
        }
        let mut buffer = Vec::new();
        for run in copied {
            let mut at = run.offset;
            while at < run.end() {
                buffer.resize((run.end() - at).min(u64::from(PART_BYTES_MAX)) as usize, 0);
                self.read_exact_at(&mut buffer, at).map_err(reading)?;
                memory::fill(ram, at, &buffer)?;
                at += buffer.len() as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
