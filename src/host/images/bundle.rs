//! Reads a bundle: one tar with `image.json` first and then exactly the files it names. The sender may be anyone.
//! Headers are taken raw: extensions, which could carry long names, other sizes, links or holes, are refused, so
//! memory is bounded by one header and one buffer. It knows no callers; `images` calls it.
use std::collections::BTreeMap;
use std::io::{self, Read};

use sha2::{Digest, Sha256};
use tar::{Archive, Entry, EntryType};

use super::incoming::{Arrived, Incoming, Refusal, hexadecimal};
use super::limits::{BUNDLE_PADDING_BYTES_MAX, MANIFEST_BYTES_MAX};
use super::manifest::{self, Expected, Manifest};
use crate::volumes::fill::Watch;

/// What the receiver insists on.
#[derive(Debug, Clone, Default)]
pub(super) struct Conditions {
    /// SHA-256 of the whole stream.
    pub(super) stream_sha256: Option<String>,
    /// SHA-256 of the manifest.
    pub(super) manifest_sha256: Option<String>,
}

/// Reads a whole bundle into `incoming` and gives it its place. Nothing is kept when this fails.
pub(super) fn receive(
    source: impl Read,
    incoming: Incoming,
    conditions: &Conditions,
    watch: &Watch,
) -> Result<Arrived, Refusal> {
    let mut archive = Archive::new(Hashing { source, digest: Sha256::new() });
    let (manifest, sha256) = unpack(&mut archive, &incoming, conditions, watch)?;
    let mut hashing = archive.into_inner();
    read_padding(&mut hashing)?;
    let stream = hexadecimal(&hashing.digest.finalize());
    if conditions.stream_sha256.as_ref().is_some_and(|wanted| *wanted != stream) {
        return Err(Refusal::Corrupt(format!("the bundle's SHA-256 is {stream}, not the one asked for")));
    }
    incoming.finish(manifest, sha256)
}

fn unpack<R: Read>(
    archive: &mut Archive<R>,
    incoming: &Incoming,
    conditions: &Conditions,
    watch: &Watch,
) -> Result<(Manifest, String), Refusal> {
    let mut entries = archive.entries().map_err(unreadable)?.raw(true);
    let first = entries.next().ok_or_else(|| corrupt("the bundle is empty"))?.map_err(unreadable)?;
    let (manifest, sha256) = take_manifest(first, incoming, conditions)?;
    let mut missing: BTreeMap<&str, Expected<'_>> =
        manifest.expected().into_iter().map(|expected| (expected.file, expected)).collect();
    while !missing.is_empty() {
        let entry = entries.next().ok_or_else(|| absent(&missing))?;
        let mut entry = entry.map_err(unreadable)?;
        let name = name(&entry)?;
        let expected = missing.remove(name.as_str()).ok_or_else(|| {
            Refusal::Corrupt(format!(
                "the bundle has {name:?}, which its manifest does not name or names once"
            ))
        })?;
        check_size(
            &entry,
            expected.length.unwrap_or(0),
            expected.length.unwrap_or(expected.bytes_max),
            &name,
        )?;
        incoming.receive(&expected, &mut Whole::of(&mut entry), watch).map_err(|refusal| match refusal {
            Refusal::Source(cause) => unreadable(cause),
            other => other,
        })?;
    }
    drop(missing);
    match entries.next() {
        None => {}
        Some(Err(cause)) => return Err(unreadable(cause)),
        Some(Ok(entry)) => {
            let name = name(&entry)?;
            return Err(Refusal::Corrupt(format!(
                "the bundle has {name:?}, which its manifest does not name"
            )));
        }
    }
    Ok((manifest, sha256))
}

fn take_manifest<R: Read>(
    mut entry: Entry<'_, R>,
    incoming: &Incoming,
    conditions: &Conditions,
) -> Result<(Manifest, String), Refusal> {
    if name(&entry)? != manifest::NAME {
        return Err(Refusal::Corrupt(format!("{} must be the first file of a bundle", manifest::NAME)));
    }
    check_size(&entry, 1, MANIFEST_BYTES_MAX, manifest::NAME)?;
    let mut bytes = Vec::new();
    Whole::of(&mut entry).read_to_end(&mut bytes).map_err(unreadable)?;
    incoming.manifest(&bytes, conditions.manifest_sha256.as_deref())
}

/// The entry's name, when it is a plain file. The header's own name counts, not one that an extension gives.
fn name<R: Read>(entry: &Entry<'_, R>) -> Result<String, Refusal> {
    let kind = entry.header().entry_type();
    if kind != EntryType::Regular {
        return Err(Refusal::Corrupt(format!(
            "the bundle has an entry that is not a plain file (type {:?}); make it with `tar --format=ustar`",
            char::from(kind.as_byte())
        )));
    }
    let path = entry.header().path_bytes();
    let name = std::str::from_utf8(&path).map_err(|_| corrupt("a file name of the bundle is not UTF-8"))?;
    Ok(name.strip_prefix("./").unwrap_or(name).to_owned())
}

fn check_size<R: Read>(entry: &Entry<'_, R>, least: u64, most: u64, name: &str) -> Result<(), Refusal> {
    let size = entry.header().entry_size().map_err(unreadable)?;
    if !(least..=most).contains(&size) {
        return Err(Refusal::Corrupt(format!("{name} has {size} bytes, and {least} to {most} are allowed")));
    }
    Ok(())
}

fn absent(missing: &BTreeMap<&str, Expected<'_>>) -> Refusal {
    let names: Vec<&str> = missing.keys().copied().collect();
    Refusal::Corrupt(format!("the bundle ends before {}", names.join(", ")))
}

fn corrupt(detail: &str) -> Refusal {
    Refusal::Corrupt(detail.to_owned())
}

/// What `tar` calls wrong is a damaged bundle, unless the connection broke; then there is nothing to say of it.
fn unreadable(cause: io::Error) -> Refusal {
    match cause.kind() {
        io::ErrorKind::Other | io::ErrorKind::InvalidData => {
            Refusal::Corrupt(format!("the bundle is not a tar that can be read: {cause}"))
        }
        io::ErrorKind::UnexpectedEof => corrupt("the bundle ends in the middle"),
        _ => Refusal::Source(cause),
    }
}

/// After the end mark only zeros may follow, and not many.
fn read_padding(source: &mut impl Read) -> Result<(), Refusal> {
    let mut padding = Vec::new();
    source.take(BUNDLE_PADDING_BYTES_MAX + 1).read_to_end(&mut padding).map_err(unreadable)?;
    if padding.len() as u64 > BUNDLE_PADDING_BYTES_MAX || padding.iter().any(|byte| *byte != 0) {
        return Err(corrupt("something follows the end of the bundle"));
    }
    Ok(())
}

/// Hashes what is read through it.
struct Hashing<R> {
    source: R,
    digest: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.digest.update(&buffer[..read]);
        Ok(read)
    }
}

/// An entry that must have all the bytes its header promises.
struct Whole<'a> {
    entry: &'a mut dyn Read,
    left: u64,
}

impl<'a> Whole<'a> {
    fn of<'b, R: Read>(entry: &'a mut Entry<'b, R>) -> Whole<'a> {
        let left = entry.size();
        Whole { entry, left }
    }
}

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.entry.read(buffer)?;
        if read == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the bundle ends in the middle of a file",
            ));
        }
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
