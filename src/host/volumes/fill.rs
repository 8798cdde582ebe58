//! Fills a new file from another: by sharing its blocks where the file system can (FICLONE, ioctl_ficlone(2)),
//! else by copying data and leaving holes. It knows no records and no paths. `volumes` calls it.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use model::volume::FillMethod;
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::layers::Layers;
use super::limits::PIECE_BYTES;

/// How far a copy is, and whether it should stop; shared with whoever waits for it.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Set to stop.
    pub(crate) cancelled: AtomicBool,
    /// Bytes of data copied.
    pub(crate) done: AtomicU64,
    /// Bytes of data in all; 0 while that is not known.
    pub(crate) total: AtomicU64,
}

impl Watch {
    /// Fails with `Interrupted` when it should stop.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
        }
        Ok(())
    }
}

/// Makes `target`, which is empty, hold what `source` holds, and be `size_bytes` long, which is at least the
/// length of `source`. Fails with `Interrupted` when `watch` says stop.
pub(crate) fn fill(source: &Layers, target: &File, size_bytes: u64, watch: &Watch) -> io::Result<FillMethod> {
    watch.check()?;
    let method = if share(&source.own, target)? {
        copy(source, target, watch, Of::Lower)?;
        FillMethod::Reflink
    } else {
        copy(source, target, watch, Of::All)?;
        FillMethod::SparseCopy
    };
    target.set_len(size_bytes)?;
    Ok(method)
}

/// Makes `target` share the blocks of `source`; false where the file system cannot.
pub(crate) fn share(source: &File, target: &File) -> io::Result<bool> {
    match ioctl_ficlone(target, source) {
        Ok(()) => Ok(true),
        // Which of these is answered depends on the file system and on whether both files are on the same.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::PERM) => {
            Ok(false)
        }
        Err(cause) => Err(cause.into()),
    }
}

/// What of a source is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    /// Only what lies in lower files.
    Lower,
}

fn copy(source: &Layers, target: &File, watch: &Watch, of: Of) -> io::Result<()> {
    let length = source.own.metadata()?.len();
    let data = || {
        source
            .data(0..length)
            .filter(|found| of == Of::All || found.as_ref().map_or(true, |(_, file)| file.is_some()))
    };
    for found in data() {
        let (extent, _) = found?;
        watch.total.fetch_add(extent.end - extent.start, Ordering::Relaxed);
    }
    let mut buffer = Vec::new();
    for found in data() {
        let (extent, file) = found?;
        let (file, mut at) = (source.file(file)?, extent.start);
        while at < extent.end {
            watch.check()?;
            let most = usize::try_from(extent.end - at).unwrap_or(usize::MAX).min(PIECE_BYTES);
            let copied = copy_piece(file, target, at, most, &mut buffer)?;
            if copied == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the source became shorter"));
            }
            at += copied as u64;
            watch.done.fetch_add(copied as u64, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Where a file has data, by lseek(2), in order. A file system that does not tell answers one piece. None of it is kept: a
/// disk that was written here and there has millions.
pub(crate) struct Extents<'a> {
    source: &'a File,
    length: u64,
    at: u64,
}

impl Extents<'_> {
    /// Of a file's first `length` bytes.
    pub(crate) fn of(source: &File, length: u64) -> Extents<'_> {
        Extents::from(source, length, 0)
    }

    /// Of what follows the first `at` of them.
    pub(crate) fn from(source: &File, length: u64, at: u64) -> Extents<'_> {
        Extents { source, length, at }
    }

    fn find(&mut self) -> io::Result<Option<std::ops::Range<u64>>> {
        if self.at >= self.length {
            return Ok(None);
        }
        let start = match seek(self.source, SeekFrom::Data(self.at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(cause) => return Err(cause.into()),
        };
        let end = seek(self.source, SeekFrom::Hole(start))?.min(self.length);
        Ok((end > start).then_some(start..end))
    }
}

impl Iterator for Extents<'_> {
    type Item = io::Result<std::ops::Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find().transpose()?;
        self.at = found.as_ref().map_or(self.length, |extent| extent.end);
        Some(found)
    }
}

fn copy_piece(source: &File, target: &File, at: u64, most: usize, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let (mut from, mut to) = (at, at);
    match copy_file_range(source, Some(&mut from), target, Some(&mut to), most) {
        Ok(copied) => Ok(copied),
        Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
            buffer.resize(most, 0);
            let read = source.read_at(buffer, at)?;
            target.write_all_at(&buffer[..read], at)?;
            Ok(read)
        }
        Err(cause) => Err(cause.into()),
    }
}

#[cfg(test)]
mod tests;
