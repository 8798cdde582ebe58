//! Which parts of memory a memory file holds, with their digests. What no part covers was never touched and is zero.
//!
//! ```text
//! bytes of memory 8 │ parts 8 ║ offset 8 │ bytes 4 │ 0 4 │ SHA-256 32 ║ …        ascending, disjoint, whole pages
//! ```
use super::Digest;
use super::form::{FormError, Section, Sections, number, take};

/// Longest part: what is read, compared and copied at once.
pub const PART_BYTES_MAX: u32 = 1 << 20;

const NAME: &str = "memory";
const VERSION: u32 = 1;
const PAGE_BYTES: u64 = 4096;
const ROW_BYTES: usize = 48;

/// The table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Length of memory in bytes.
    pub memory_bytes: u64,
    /// Ascending and disjoint.
    pub parts: Vec<Part>,
}

/// A part of memory that is in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where it begins in memory and in the file, in bytes.
    pub offset: u64,
    /// Its length: whole pages, at most [`PART_BYTES_MAX`].
    pub bytes: u32,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

impl Table {
    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| u64::from(part.bytes)).sum()
    }

    /// Whether it has this very part: then whoever has its memory file needs no other copy of it.
    pub fn holds(&self, part: &Part) -> bool {
        let found = self.parts.binary_search_by_key(&part.offset, |own| own.offset);
        found.is_ok_and(|at| self.parts.get(at) == Some(part))
    }

    /// Its section in a state file.
    pub fn section(&self) -> Section {
        let mut bytes = Vec::with_capacity(self.parts.len().saturating_add(1).saturating_mul(ROW_BYTES));
        bytes.extend(self.memory_bytes.to_le_bytes());
        bytes.extend((self.parts.len() as u64).to_le_bytes());
        for part in &self.parts {
            bytes.extend(part.offset.to_le_bytes());
            bytes.extend(part.bytes.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(part.digest.0);
        }
        Section { name: NAME, version: VERSION, bytes }
    }

    /// Takes it out of a state file's sections. Fails when it is not there, or says what cannot be.
    pub fn parse(sections: &mut Sections<'_>) -> Result<Table, FormError> {
        let refuse = |detail: &str| FormError::Section { section: NAME, detail: detail.to_owned() };
        let (version, mut rest) = sections.take(NAME)?;
        if version != VERSION {
            return Err(refuse(&format!("it has version {version}; this program reads up to {VERSION}")));
        }
        let memory_bytes = number(&mut rest, 8)?;
        let count = number(&mut rest, 8)?;
        if count.checked_mul(ROW_BYTES as u64) != Some(rest.len() as u64) {
            return Err(refuse("its length is not that of its parts"));
        }
        let mut parts = Vec::with_capacity(rest.len() / ROW_BYTES);
        let mut end = 0;
        while !rest.is_empty() {
            let (offset, bytes) = (number(&mut rest, 8)?, number(&mut rest, 4)?);
            let zero = number(&mut rest, 4)?;
            let digest = take(&mut rest, 32).and_then(|digest| digest.try_into().ok());
            let digest = Digest(digest.ok_or_else(|| refuse("it ends within a part"))?);
            let is_whole = offset.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
            let fits = (1..=u64::from(PART_BYTES_MAX)).contains(&bytes) && zero == 0;
            let next = offset.checked_add(bytes).filter(|next| *next <= memory_bytes);
            match next {
                Some(next) if offset >= end && is_whole && fits => end = next,
                _ => return Err(refuse(&format!("a part of {bytes} bytes at {offset:#x} cannot be"))),
            }
            parts.push(Part { offset, bytes: bytes as u32, digest });
        }
        Ok(Table { memory_bytes, parts })
    }
}
