//! The outer form of a state file: a header, and sections that each tell name, version and length. It knows nothing of
//! what is in a section. All numbers are little-endian.
//!
//! ```text
//! "toftsave" │ version 4 │ sections 4 ║ name 8 │ version 4 │ 0 4 │ length 8 │ that many bytes ║ …
//! ```
use crate::limits::SECTIONS_MAX;

const MAGIC: &[u8; 8] = b"toftsave";

/// Version of this outer form.
const VERSION: u32 = 1;

/// Why bytes are no state file, or not one that this program reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// As a whole.
    #[error("the state file {0}")]
    Form(String),
    /// One of its sections.
    #[error("the state file's {section}: {detail}")]
    Section {
        /// Its name.
        section: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

/// A part of a state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// At most eight bytes.
    pub name: &'static str,
    /// Version of what is in it.
    pub version: u32,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// The sections of a file that nobody has taken yet.
pub struct Sections<'a>(Vec<(&'a str, u32, &'a [u8])>);

impl<'a> Sections<'a> {
    /// The one section of this name: its version and its bytes. Fails when there is none.
    pub fn take(&mut self, name: &'static str) -> Result<(u32, &'a [u8]), FormError> {
        let at = self.0.iter().position(|(found, ..)| *found == name);
        let at = at.ok_or_else(|| FormError::Form(format!("lacks the section {name:?}")))?;
        let (_, version, bytes) = self.0.remove(at);
        Ok((version, bytes))
    }

    /// The name of one that nobody has taken.
    pub fn first_unknown(&self) -> Option<&'a str> {
        self.0.first().map(|(name, ..)| *name)
    }
}

/// The file of these sections.
pub fn join(sections: &[Section]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend((sections.len() as u32).to_le_bytes());
    for section in sections {
        let mut name = [0; 8];
        for (to, from) in name.iter_mut().zip(section.name.bytes()) {
            *to = from;
        }
        file.extend(name);
        file.extend(section.version.to_le_bytes());
        file.extend([0; 4]);
        file.extend((section.bytes.len() as u64).to_le_bytes());
        file.extend(&section.bytes);
    }
    file
}

/// Cuts a file into its sections, which together are all of it. Fails with what is wrong with its form.
pub fn split(file: &[u8]) -> Result<Sections<'_>, FormError> {
    let form = |detail: String| FormError::Form(detail);
    let mut rest = file;
    if take(&mut rest, 8).is_none_or(|magic| magic != MAGIC) {
        return Err(form("does not begin like one".to_owned()));
    }
    let version = number(&mut rest, 4)?;
    if version != u64::from(VERSION) {
        return Err(form(format!("has version {version}; this program reads version {VERSION}")));
    }
    let count = number(&mut rest, 4)?;
    if count > SECTIONS_MAX {
        return Err(form(format!("tells of {count} sections; the most there are is {SECTIONS_MAX}")));
    }
    let mut sections: Vec<(&str, u32, &[u8])> = Vec::new();
    for _ in 0..count {
        let name = take(&mut rest, 8).ok_or_else(cut)?;
        let name = std::str::from_utf8(name).map_err(|_| form("names a section in no text".to_owned()))?;
        let name = name.trim_end_matches('\0');
        let version = number(&mut rest, 4)? as u32;
        if number(&mut rest, 4)? != 0 {
            return Err(form("has something where nothing should be".to_owned()));
        }
        let length = usize::try_from(number(&mut rest, 8)?).map_err(|_| cut())?;
        let bytes = take(&mut rest, length).ok_or_else(cut)?;
        if sections.iter().any(|(other, ..)| *other == name) {
            return Err(form(format!("has the section {name:?} twice")));
        }
        sections.push((name, version, bytes));
    }
    if !rest.is_empty() {
        return Err(form(format!("has {} bytes behind its end", rest.len())));
    }
    Ok(Sections(sections))
}

fn cut() -> FormError {
    FormError::Form("ends before its end".to_owned())
}

/// The next bytes, if there are as many.
pub(super) fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

/// The next number of 4 or 8 bytes.
pub(super) fn number(rest: &mut &[u8], width: usize) -> Result<u64, FormError> {
    let bytes = take(rest, width).ok_or_else(cut)?;
    let mut number = [0; 8];
    for (to, from) in number.iter_mut().zip(bytes) {
        *to = *from;
    }
    Ok(u64::from_le_bytes(number))
}
