//! A file whose bytes may lie in several: what is new in its own, the rest in lower ones. Which lies where a list says
//! (`wire::saved::lower`), or of an overlay its own holes do. It knows no paths and no records. `snapshots` keeps such files, `volumes`
//! fills disks from them and has disks that are.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use wire::limits::LOWER_RUNS_MAX;
use wire::saved::lower::{Lower, Run};

use super::fill::Extents;
use super::limits::{BLOCK_BYTES, BLOCKS_BYTES};

/// A file with the lower ones that it needs.
#[derive(Debug)]
pub(crate) struct Layers {
    /// What is new.
    pub(crate) own: File,
    lower: Lower,
    files: Vec<File>,
    /// Whether what is a hole of its own lies in the only other file.
    is_over: bool,
}

impl Layers {
    /// All of it in one file.
    pub(crate) fn one(own: File) -> Layers {
        Layers { own, lower: Lower::default(), files: Vec::new(), is_over: false }
    }

    /// An overlay: what is a hole of its own is what `backing` has there, and nothing beyond the end of that. As nobody keeps where
    /// holes are, they must hold still while it is read.
    pub(crate) fn over(own: File, backing: File) -> Layers {
        Layers { own, lower: Lower::default(), files: vec![backing], is_over: true }
    }

    /// The file that all of it is in, if it is in one.
    pub(super) fn single(&self) -> Option<&File> {
        self.files.is_empty().then_some(&self.own)
    }

    /// Whether it is an overlay.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Its own file, and of an overlay the other one.
    pub(crate) fn into_own(self) -> (File, Option<File>) {
        (self.own, self.files.into_iter().next().filter(|_| self.is_over))
    }

    /// Bytes that its files take on the disk.
    pub(crate) fn used_bytes(&self) -> u64 {
        let all = std::iter::once(&self.own).chain(&self.files);
        all.map(|file| super::used_bytes(file.metadata())).fold(0, u64::saturating_add)
    }

    /// Fails with `InvalidData` when a lower file is missing or ends before what lies in it.
    pub(crate) fn new(own: File, lower: Lower, files: Vec<File>) -> io::Result<Layers> {
        let invalid = |detail: String| io::Error::new(io::ErrorKind::InvalidData, detail);
        if lower.files as usize != files.len() {
            return Err(invalid(format!("it needs {} lower files, not {}", lower.files, files.len())));
        }
        for (index, file) in (0..).zip(&files) {
            let end = lower.runs.iter().rfind(|run| run.file == index).map_or(0, Run::end);
            let length = file.metadata()?.len();
            if length < end {
                return Err(invalid(format!("lower file {index} has {length} bytes of {end}")));
            }
        }
        Ok(Layers { own, lower, files, is_over: false })
    }

    /// What lies in which lower file.
    pub(crate) fn lower(&self) -> &Lower {
        &self.lower
    }

    /// A lower file, or the own one.
    pub(crate) fn file(&self, lower: Option<u32>) -> io::Result<&File> {
        let found = match lower {
            None => Some(&self.own),
            Some(index) => self.files.get(index as usize),
        };
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Reads from wherever the bytes lie.
    pub(crate) fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + data.len() as u64;
        if self.is_over {
            if self.own.metadata()?.len() < range.end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            data.fill(0);
            for found in self.data(range) {
                let (piece, file) = found?;
                let within = (piece.start - offset) as usize..(piece.end - offset) as usize;
                self.file(file)?.read_exact_at(&mut data[within], piece.start)?;
            }
            return Ok(());
        }
        for (piece, file) in self.lower.pieces(range) {
            let within = (piece.start - offset) as usize..(piece.end - offset) as usize;
            self.file(file)?.read_exact_at(&mut data[within], piece.start)?;
        }
        Ok(())
    }

    /// Where these bytes have data, in order, and in which lower file, or the own one.
    pub(crate) fn data(&self, range: Range<u64>) -> impl Iterator<Item = io::Result<Piece>> + '_ {
        let over = self.is_over.then(|| self.over_data(range.clone()));
        let listed = (!self.is_over).then(|| self.listed_data(range));
        over.into_iter().flatten().chain(listed.into_iter().flatten())
    }

    fn listed_data(&self, range: Range<u64>) -> impl Iterator<Item = io::Result<Piece>> + '_ {
        self.lower.pieces(range).flat_map(|(piece, file)| {
            let own = file.is_none().then(|| Extents::from(&self.own, piece.end, piece.start));
            let own = own.into_iter().flatten().map(|extent| Ok((extent?, None)));
            own.chain(file.map(|_| Ok((piece, file))))
        })
    }

    /// What is its own, and what is the other file's in the holes between. Neither is listed: a disk has millions of pieces.
    fn over_data(&self, range: Range<u64>) -> impl Iterator<Item = io::Result<Piece>> + '_ {
        let first =
            |file, within: Range<u64>| Extents::from(file, within.end, within.start).next().transpose();
        let (mut at, mut next) = (range.start, None);
        let mut find = move || -> io::Result<Option<Piece>> {
            while at < range.end {
                let own = match next.take() {
                    Some(own) => own,
                    None => first(&self.own, at..range.end)?.unwrap_or(range.end..range.end),
                };
                if own.start <= at {
                    at = own.end;
                    return Ok(Some((own, None)));
                }
                let below = first(self.file(Some(0))?, at..own.start)?;
                at = below.as_ref().map_or(own.start, |below| below.end);
                next = Some(own);
                if let Some(below) = below {
                    return Ok(Some((below, Some(0))));
                }
            }
            Ok(None)
        };
        let mut has_failed = false;
        std::iter::from_fn(move || {
            let found = if has_failed { None } else { find().transpose() };
            has_failed = matches!(found, Some(Err(_)));
            found
        })
    }
}

/// Bytes that lie in a lower file, or in the own one.
pub(crate) type Piece = (Range<u64>, Option<u32>);

/// Gives up what a file has in common with `base`, block by block, and answers where that lies: file 0 is the base's own, its
/// lower ones follow. Fails with `Unsupported` where the file system keeps no holes; nothing is lost then, nor later: what
/// is given up is there still. `stop` ends it with `Interrupted`.
pub(crate) fn thin(file: &File, base: &Layers, stop: &dyn Fn() -> bool) -> io::Result<Lower> {
    let length = file.metadata()?.len();
    let files = base.lower.files.saturating_add(1);
    let mut lower = Lower { bytes: length, files, runs: Vec::new() };
    let comparable = length.min(base.own.metadata()?.len());
    let (mut mine, mut theirs) = (vec![0; BLOCKS_BYTES], vec![0; BLOCKS_BYTES]);
    let mut done = 0;
    for extent in Extents::of(file, length) {
        let extent = extent?;
        // Whole blocks: what is a hole in them reads as zeroes.
        let mut at = (extent.start - extent.start % BLOCK_BYTES).max(done);
        let end = extent.end.next_multiple_of(BLOCK_BYTES).min(length);
        while at < end {
            if stop() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let bytes = (end - at).min(BLOCKS_BYTES as u64) as usize;
            file.read_exact_at(&mut mine[..bytes], at)?;
            let has = comparable.saturating_sub(at).min(bytes as u64) as usize;
            base.read_exact_at(&mut theirs[..has], at)?;
            let blocks =
                mine[..bytes].chunks(BLOCK_BYTES as usize).zip(theirs[..has].chunks(BLOCK_BYTES as usize));
            for (index, _) in (0..).zip(blocks).filter(|(_, (mine, theirs))| mine == theirs) {
                // A block may be in as many pieces as it has pages.
                if lower.runs.len() as u64 + BLOCK_BYTES / 4096 > LOWER_RUNS_MAX {
                    return Ok(lower);
                }
                let start = at + index * BLOCK_BYTES;
                let block = start..(start + BLOCK_BYTES).min(at + bytes as u64);
                punch(file, block.clone())?;
                note(base, block, &mut lower);
            }
            at += bytes as u64;
        }
        done = done.max(end);
    }
    Ok(lower)
}

/// Notes that a range lies where `base` has it.
pub(crate) fn note(base: &Layers, range: Range<u64>, lower: &mut Lower) {
    for (piece, below) in base.lower.pieces(range) {
        let file = below.map_or(0, |below| below + 1);
        lower.push(Run { offset: piece.start, bytes: piece.end - piece.start, file });
    }
}

/// Makes a range a hole.
pub(crate) fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, flags, range.start, range.end - range.start)?)
}

#[cfg(test)]
mod tests;
