//! What of a file lies in other files, its *lower* ones, at the same offsets: a snapshot that holds only what is new has
//! the rest in those before it. What no run covers is in the file itself, holes being zeroes. All numbers are little-endian.
//!
//! ```text
//! "toftruns" │ version 4 │ lower files 4 │ bytes of the file 8 ║ offset 8 │ bytes 8 │ lower file 4 │ 0 4 ║ …
//!                                                                      ascending, disjoint, whole pages
//! ```
use std::ops::Range;

use super::form::{number, take};
use crate::limits::{LOWER_FILES_MAX, LOWER_RUNS_MAX};

const MAGIC: &[u8; 8] = b"toftruns";
const VERSION: u32 = 1;
const PAGE_BYTES: u64 = 4096;
const HEAD_BYTES: usize = 24;
const ROW_BYTES: usize = 24;

/// Longest list of runs in bytes.
pub const LOWER_BYTES_MAX: u64 =
    (HEAD_BYTES as u64).saturating_add(LOWER_RUNS_MAX.saturating_mul(ROW_BYTES as u64));

/// The runs of one file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lower {
    /// Length of the file, in bytes.
    pub bytes: u64,
    /// How many lower files there are.
    pub files: u32,
    /// Ascending and disjoint.
    pub runs: Vec<Run>,
}

/// Bytes that lie in a lower file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where they begin in both files: whole pages.
    pub offset: u64,
    /// How many they are: whole pages, but for a last one that the file cuts short.
    pub bytes: u64,
    /// In which of the lower files, from 0.
    pub file: u32,
}

/// Why bytes are no list of runs for this file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the list of what lies in lower files {0}")]
pub struct LowerError(String);

impl Run {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

impl Lower {
    /// Bytes that lie in lower files.
    pub fn lower_bytes(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.bytes))
    }

    /// Adds a run behind all others; one that continues the last one becomes part of it.
    pub fn push(&mut self, run: Run) {
        match self.runs.last_mut().filter(|last| last.end() == run.offset && last.file == run.file) {
            Some(last) => last.bytes = last.bytes.saturating_add(run.bytes),
            None => self.runs.push(run),
        }
    }

    /// Cuts a range, in order, into what lies in the file itself and what lies in a lower one.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Option<u32>)> + '_ {
        let mut at = range.start;
        let mut next = self.runs.partition_point(|run| run.end() <= at);
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let start = at;
            let run = self.runs.get(next).filter(|run| run.offset < range.end);
            let file = match run {
                Some(run) if run.offset <= start => {
                    at = run.end().min(range.end);
                    next = next.saturating_add(1);
                    Some(run.file)
                }
                Some(run) => {
                    at = run.offset;
                    None
                }
                None => {
                    at = range.end;
                    None
                }
            };
            Some((start..at, file))
        })
    }

    /// The list as bytes.
    pub fn join(&self) -> Vec<u8> {
        let mut bytes =
            Vec::with_capacity(self.runs.len().saturating_mul(ROW_BYTES).saturating_add(HEAD_BYTES));
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.files.to_le_bytes());
        bytes.extend(self.bytes.to_le_bytes());
        for run in &self.runs {
            bytes.extend(run.offset.to_le_bytes());
            bytes.extend(run.bytes.to_le_bytes());
            bytes.extend(run.file.to_le_bytes());
            bytes.extend([0; 4]);
        }
        bytes
    }

    /// Reads the list of a file of `length` bytes. Fails with what it says that cannot be.
    pub fn split(bytes: &[u8], length: u64) -> Result<Lower, LowerError> {
        let refuse = |detail: String| Err(LowerError(detail));
        let cut = |_| LowerError("ends before its end".to_owned());
        let mut rest = bytes;
        if take(&mut rest, 8).is_none_or(|magic| magic != MAGIC) {
            return refuse("does not begin like one".to_owned());
        }
        let version = number(&mut rest, 4).map_err(cut)?;
        if version != u64::from(VERSION) {
            return refuse(format!("has version {version}; this program reads version {VERSION}"));
        }
        let files = number(&mut rest, 4).map_err(cut)?;
        if files > u64::from(LOWER_FILES_MAX) {
            return refuse(format!("tells of {files} files; the most there are is {LOWER_FILES_MAX}"));
        }
        let told = number(&mut rest, 8).map_err(cut)?;
        if told != length {
            return refuse(format!("is one of {told} bytes, the file has {length}"));
        }
        let count = rest.len() / ROW_BYTES;
        if !rest.len().is_multiple_of(ROW_BYTES) || count as u64 > LOWER_RUNS_MAX {
            return refuse(format!("has {} bytes of runs, which cannot be", rest.len()));
        }
        let mut lower = Lower { bytes: length, files: files as u32, runs: Vec::with_capacity(count) };
        let mut end = 0;
        while !rest.is_empty() {
            let (offset, bytes) = (number(&mut rest, 8).map_err(cut)?, number(&mut rest, 8).map_err(cut)?);
            let (file, zero) = (number(&mut rest, 4).map_err(cut)?, number(&mut rest, 4).map_err(cut)?);
            let next = offset.checked_add(bytes).filter(|next| *next <= length);
            let is_whole = |next: u64| {
                offset.is_multiple_of(PAGE_BYTES) && (next.is_multiple_of(PAGE_BYTES) || next == length)
            };
            match next {
                Some(next) if bytes > 0 && offset >= end && is_whole(next) && file < files && zero == 0 => {
                    end = next;
                }
                _ => {
                    return refuse(format!(
                        "has a run of {bytes} bytes at {offset:#x} in file {file}, which cannot be"
                    ));
                }
            }
            lower.runs.push(Run { offset, bytes, file: file as u32 });
        }
        Ok(lower)
    }
}

#[cfg(test)]
mod tests;
