//! Reads an image from a directory: an entry of the operator's import directory, or what a recipe has built. No
//! path leads out of the directory and no link is followed, whatever is swapped meanwhile (openat2(2)). It knows
//! no callers; `images` calls it.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::bundle::{self, Conditions};
use super::incoming::{Arrived, Incoming, Refusal};
use super::limits::MANIFEST_BYTES_MAX;
use super::manifest;
use crate::volumes::fill::Watch;

/// Whether `name` can be an entry of the import directory: one name that is not hidden.
pub(super) fn is_entry_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// Takes the entry `name` of the directory `import`: a bundle, or a directory with the same files.
pub(super) fn receive(
    import: &Path,
    name: &str,
    incoming: Incoming,
    conditions: &Conditions,
    watch: &Watch,
) -> Result<Arrived, Refusal> {
    let import = File::open(import).map_err(Refusal::Source)?;
    let entry = open(&import, name)?;
    let metadata = entry.metadata().map_err(Refusal::Source)?;
    if metadata.is_dir() {
        return receive_files(&entry, incoming, conditions, watch);
    }
    if !metadata.is_file() {
        return Err(Refusal::Corrupt(format!("{name} is neither a bundle nor a directory")));
    }
    watch.total.store(metadata.len(), Ordering::Relaxed);
    bundle::receive(entry, incoming, conditions, watch)
}

fn receive_files(
    directory: &File,
    incoming: Incoming,
    conditions: &Conditions,
    watch: &Watch,
) -> Result<Arrived, Refusal> {
    let (manifest, sha256) =
        incoming.manifest(&read_manifest(directory)?, conditions.manifest_sha256.as_deref())?;
    let mut files = Vec::new();
    for expected in manifest.expected() {
        let file = open_file(directory, expected.file)?;
        let length = file.metadata().map_err(Refusal::Source)?.len();
        watch.total.fetch_add(length, Ordering::Relaxed);
        files.push((expected, file));
    }
    for (expected, mut file) in files {
        incoming.receive(&expected, &mut file, watch)?;
    }
    incoming.finish(manifest, sha256)
}

/// Takes what was built in `built`, a directory inside `incoming`, without copying it.
pub(super) fn adopt(
    built: &Path,
    incoming: Incoming,
    conditions: &Conditions,
    watch: &Watch,
) -> Result<Arrived, Refusal> {
    let directory = File::open(built).map_err(Refusal::Source)?;
    let (manifest, sha256) =
        incoming.manifest(&read_manifest(&directory)?, conditions.manifest_sha256.as_deref())?;
    for expected in manifest.expected() {
        let length = open_file(&directory, expected.file)?.metadata().map_err(Refusal::Source)?.len();
        watch.total.fetch_add(length, Ordering::Relaxed);
    }
    for expected in manifest.expected() {
        incoming.adopt(&expected, &built.join(expected.file), watch)?;
    }
    crate::volumes::files::remove_tree(built).map_err(Refusal::Store)?;
    incoming.finish(manifest, sha256)
}

fn read_manifest(directory: &File) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    let file = open_file(directory, manifest::NAME)?;
    file.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(Refusal::Source)?;
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(Refusal::Corrupt(format!(
            "{} is longer than {MANIFEST_BYTES_MAX} bytes",
            manifest::NAME
        )));
    }
    Ok(bytes)
}

fn open_file(directory: &File, name: &str) -> Result<File, Refusal> {
    let file = open(directory, name)?;
    if !file.metadata().map_err(Refusal::Source)?.is_file() {
        return Err(Refusal::Corrupt(format!("{name} is not a plain file")));
    }
    Ok(file)
}

/// Opens one entry. Non-blocking, so that a pipe of that name holds nobody up.
fn open(directory: &impl AsFd, name: &str) -> Result<File, Refusal> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match openat2(directory, name, flags, Mode::empty(), resolve) {
        Ok(file) => Ok(file.into()),
        Err(Errno::NOENT) => Err(Refusal::Corrupt(format!("{name} is missing"))),
        Err(Errno::LOOP | Errno::XDEV) => {
            Err(Refusal::Corrupt(format!("{name} is a link, and links are not followed")))
        }
        Err(cause) => Err(Refusal::Source(io::Error::from(cause))),
    }
}

#[cfg(test)]
mod tests;
