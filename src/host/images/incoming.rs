//! A directory in which an image comes in: each file is written with holes where there are zeros, hashed as it is
//! written, and kept only when it is what the manifest says. It becomes the image's directory in one rename.
//! It knows no bundles, callers or records. `bundle` and `directory` feed it.
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use model::ImageId;
use sha2::{Digest, Sha256};

use super::limits::{HOLE_BYTES, PIECE_BYTES};
use super::manifest::{self, Expected, Manifest};
use crate::volumes::files::{self, Durability};
use crate::volumes::fill::Watch;
use crate::volumes::used_bytes;

/// Begins the name of a directory in which an image comes in. Nothing a crash leaves under such a name is kept.
pub(super) const PREFIX: &str = ".incoming-";

/// Why an image does not come in.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It is damaged or not what it says; the sentence says where.
    #[error("{0}")]
    Corrupt(String),
    /// What it comes from cannot be read.
    #[error("the image cannot be read")]
    Source(#[source] io::Error),
    /// It cannot be written here.
    #[error("the image cannot be stored")]
    Store(#[source] io::Error),
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// The directory, until it is finished or dropped, which removes it.
pub(super) struct Incoming {
    path: PathBuf,
    place: PathBuf,
    finished: bool,
}

/// An image that has come in.
#[derive(Debug, Clone)]
pub(super) struct Arrived {
    /// Its manifest.
    pub(super) manifest: Manifest,
    /// SHA-256 of the manifest's bytes.
    pub(super) sha256: String,
    /// Bytes it takes on the disk.
    pub(super) stored_bytes: u64,
}

impl Incoming {
    /// Starts a directory beside `place`, the image's own.
    pub(super) fn create(images: &Path, id: ImageId) -> io::Result<Incoming> {
        let path = images.join(format!("{PREFIX}{id}"));
        files::remove_tree(&path)?;
        fs::create_dir(&path)?;
        Ok(Incoming { path, place: images.join(id.to_string()), finished: false })
    }

    /// The directory, for whoever makes files in it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks a manifest and stores its bytes as they came. `wanted` is the SHA-256 it must have.
    pub(super) fn manifest(&self, bytes: &[u8], wanted: Option<&str>) -> Result<(Manifest, String), Refusal> {
        let sha256 = hexadecimal(&Sha256::digest(bytes));
        if wanted.is_some_and(|wanted| wanted != sha256) {
            let detail = format!("the manifest's SHA-256 is {sha256}, not the one asked for");
            return Err(Refusal::Corrupt(detail));
        }
        let manifest = Manifest::read(bytes).map_err(Refusal::Corrupt)?;
        files::replace(&self.path.join(manifest::NAME), bytes, Durability::Power).map_err(Refusal::Store)?;
        Ok((manifest, sha256))
    }

    /// Takes one file from `source` to its end, and keeps it when it is what the manifest says.
    pub(super) fn receive(
        &self,
        expected: &Expected<'_>,
        source: &mut dyn Read,
        watch: &Watch,
    ) -> Result<(), Refusal> {
        let path = self.path.join(expected.role.file_name());
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path).map_err(Refusal::Store)?;
        let most = expected.length.unwrap_or(expected.bytes_max);
        let (length, sha256) =
            copy_and_hash(source, most, watch, |at, piece| write_with_holes(&file, at, piece))?;
        check(expected, length, &sha256)?;
        file.set_len(length).map_err(Refusal::Store)?;
        file.sync_all().map_err(Refusal::Store)
    }

    /// Takes a file that lies in this directory already, under any name, when it is what the manifest says.
    pub(super) fn adopt(&self, expected: &Expected<'_>, found: &Path, watch: &Watch) -> Result<(), Refusal> {
        let mut file = File::open(found).map_err(Refusal::Source)?;
        let most = expected.length.unwrap_or(expected.bytes_max);
        let (length, sha256) = copy_and_hash(&mut file, most, watch, |_, _| Ok(()))?;
        check(expected, length, &sha256)?;
        file.sync_all().map_err(Refusal::Store)?;
        fs::rename(found, self.path.join(expected.role.file_name())).map_err(Refusal::Store)
    }

    /// Gives the image its place. Everything the manifest names has been received.
    pub(super) fn finish(mut self, manifest: Manifest, sha256: String) -> Result<Arrived, Refusal> {
        let stored_bytes = manifest
            .expected()
            .iter()
            .map(|e| used_bytes(fs::metadata(self.path.join(e.role.file_name()))))
            .sum();
        let settle = || {
            File::open(&self.path)?.sync_all()?;
            fs::rename(&self.path, &self.place)?;
            files::sync_parent(&self.place)
        };
        settle().map_err(Refusal::Store)?;
        self.finished = true;
        Ok(Arrived { manifest, sha256, stored_bytes })
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.finished
            && let Err(cause) = files::remove_tree(&self.path)
        {
            tracing::warn!("{} is removed at the next start: {cause}", self.path.display());
        }
    }
}

fn check(expected: &Expected<'_>, length: u64, sha256: &str) -> Result<(), Refusal> {
    if let Some(stated) = expected.length.filter(|stated| *stated != length) {
        let detail = format!("{} has {length} bytes, and the manifest says {stated}", expected.file);
        return Err(Refusal::Corrupt(detail));
    }
    if sha256 != expected.sha256 {
        let detail =
            format!("{}: its SHA-256 is {sha256}, and the manifest says {}", expected.file, expected.sha256);
        return Err(Refusal::Corrupt(detail));
    }
    Ok(())
}

/// Reads `source` to its end, but no more than `most` bytes, giving each piece with its position to `store`.
fn copy_and_hash(
    source: &mut dyn Read,
    most: u64,
    watch: &Watch,
    store: impl Fn(u64, &[u8]) -> io::Result<()>,
) -> Result<(u64, String), Refusal> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0u64;
    loop {
        watch.check().map_err(|_| Refusal::Cancelled)?;
        let filled = fill_buffer(source, &mut buffer).map_err(Refusal::Source)?;
        let piece = &buffer[..filled];
        if piece.is_empty() {
            return Ok((at, hexadecimal(&digest.finalize())));
        }
        if at.saturating_add(piece.len() as u64) > most {
            return Err(Refusal::Corrupt(format!("a file is longer than the {most} bytes it may have")));
        }
        digest.update(piece);
        store(at, piece).map_err(Refusal::Store)?;
        at += piece.len() as u64;
        watch.done.fetch_add(piece.len() as u64, Ordering::Relaxed);
    }
}

/// Fills the buffer unless the source ends, so that positions of pieces stay aligned.
fn fill_buffer(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(filled)
}

/// Writes what is not zero; the rest is a hole of a new file.
fn write_with_holes(file: &File, at: u64, piece: &[u8]) -> io::Result<()> {
    let mut from = at;
    for run in piece.chunks(HOLE_BYTES).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length: usize = run.iter().map(|chunk| chunk.len()).sum();
        let start = usize::try_from(from - at).map_err(io::Error::other)?;
        if !run.first().is_some_and(|chunk| is_zero(chunk)) {
            file.write_all_at(&piece[start..start + length], from)?;
        }
        from += length as u64;
    }
    Ok(())
}

fn is_zero(chunk: &[u8]) -> bool {
    chunk.iter().all(|byte| *byte == 0)
}

/// A digest as this room writes it.
pub(super) fn hexadecimal(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
