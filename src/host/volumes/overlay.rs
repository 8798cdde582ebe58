//! Overlays: volumes whose own files begin as nothing but holes, and that read from another file what they have not written yet. That file
//! has a second name beside the volume's, so it lives as long as that name does, whatever becomes of who had it first. Nobody
//! writes to it any more, whoever else has it. `volumes` calls this; what is read of both is the business of `layers`.
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use model::volume::{FillMethod, Volume, VolumeState};
use model::{Code, VolumeId};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open, statfs};
use rustix::io::Errno;
use sys::beneath::{self, Access};

use super::fill::{Extents, share};
use super::layers::{Layers, Piece};
use super::limits::HOLE_BYTES;
use super::{Volumes, announce, disk, files, space, used_bytes};
use crate::config::Dirs;
use crate::error::{Error, Result};
use crate::store::Tx;
use crate::store::records;

/// Ends the second name of the file that an overlay needs.
pub(super) const BACKING: &str = ".backing";

/// Where that lies for the volume whose file lies here.
pub(super) fn backing(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(BACKING);
    PathBuf::from(name)
}

/// The files that a volume may have.
pub(crate) fn volume_files(dirs: &Dirs, id: VolumeId) -> [PathBuf; 2] {
    let place = dirs.volume(id);
    [backing(&place), place]
}

/// What a new file of a directory can have in common with one that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// Blocks, until one of them is written to.
    Blocks,
    /// All that was never written, as the file system tells exactly what was.
    Holes,
    /// Nothing.
    Nothing,
}

/// Looks at what volumes can have in common with snapshots. An error says nothing of the file system: the disk may just be full.
pub(super) fn means(dirs: &Dirs) -> io::Result<Means> {
    let [volumes, snapshots] = ["volumes", "snapshots"].map(|name| dirs.root().join(name));
    let look = || -> io::Result<Means> {
        if shares_blocks(&snapshots, &volumes)? {
            return Ok(Means::Blocks);
        }
        let is_possible = tells_holes(&volumes)? && names_reach(&snapshots, &volumes)?;
        Ok(if is_possible { Means::Holes } else { Means::Nothing })
    };
    match look() {
        // One that knows no files without names.
        Err(cause) if cause.kind() == io::ErrorKind::Unsupported => Ok(Means::Nothing),
        found => found,
    }
}

/// Tries with two files that have no names, so nothing is left whatever happens, whether files of one directory can share blocks with those
/// of another.
pub(crate) fn shares_blocks(from: &Path, to: &Path) -> io::Result<bool> {
    let (mut source, target) = (nameless(from)?, nameless(to)?);
    source.write_all(&[1; HOLE_BYTES as usize])?;
    share(&source, &target)
}

fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(File::from(open(directory, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Whether files of one directory can have names in the other, which may be another mount of the same file system.
fn names_reach(from: &Path, to: &Path) -> io::Result<bool> {
    // What a daemon that dies here leaves is replaced by the next one's.
    let name = to.join("names.probe");
    let reaches = link(&nameless(from)?, &name)?;
    files::remove(&name).map(|()| reaches)
}

/// Whether the file system says of each block whether it was ever written (lseek(2), `SEEK_DATA`): a block that was would be read from
/// the wrong file if it were called a hole, and one that was not if it were called data. Of ext4 (0xEF53), XFS and tmpfs it is known that what
/// was just written, and is not on the medium yet, is data too, and that nothing else becomes a hole. btrfs and ZFS may tell
/// only after a while, NFS and FUSE what somebody else tells them. Blocks larger than ours, a tmpfs of huge pages, and files that are given
/// more than is written are found by trying. What only a loss of power leaves is taken away ([`clear_unwritten`]).
fn tells_holes(directory: &Path) -> io::Result<bool> {
    const EXT4: u64 = 0xEF53;
    const XFS: u64 = 0x5846_5342;
    const TMPFS: u64 = 0x0102_1994;
    let found = statfs(directory)?;
    let kind = u64::try_from(found.f_type).unwrap_or_default();
    // Of smaller blocks a loss of power could keep a part of one of ours.
    let has_blocks = u64::try_from(found.f_bsize).is_ok_and(|bytes| bytes == HOLE_BYTES);
    if ![EXT4, XFS, TMPFS].contains(&kind) || !has_blocks {
        return Ok(false);
    }
    let (file, at) = (nameless(directory)?, (2 << 20) + HOLE_BYTES);
    let length = 2 * at;
    file.set_len(length)?;
    file.write_all_at(&[1; HOLE_BYTES as usize], at)?;
    // A file system that allocates more than was asked for, as XFS does where it is told to, calls that data once it is read.
    file.sync_all()?;
    let mut all = vec![0; length as usize];
    file.read_exact_at(&mut all, 0)?;
    let found: Vec<_> = Extents::of(&file, length).collect::<io::Result<_>>()?;
    let only = |range: &Range<u64>| *range == (at..at + HOLE_BYTES);
    Ok(found.len() == 1 && found.iter().all(only))
}

/// Makes `own`, which is empty and is to lie at `place`, an overlay of `size_bytes` over `source`. False where that cannot be: then all of it
/// is to be copied.
pub(super) fn lay(source: &Layers, own: &File, place: &Path, size_bytes: u64) -> io::Result<bool> {
    let Some(below) = source.single() else { return Ok(false) };
    if !link(below, &backing(place))? {
        return Ok(false);
    }
    own.set_len(size_bytes)?;
    // Only whole blocks are read from one file or the other.
    let length = below.metadata()?.len();
    let start = length - length % HOLE_BYTES;
    if start < length {
        let mut block = vec![0; HOLE_BYTES.min(size_bytes.saturating_sub(start)) as usize];
        below.read_exact_at(&mut block[..(length - start) as usize], start)?;
        own.write_all_at(&block, start)?;
    }
    Ok(true)
}

/// Gives an open file another name, in place of what has it. False where the file system does not do that.
fn link(file: &File, name: &Path) -> io::Result<bool> {
    files::remove(name)?;
    // By what is open, whatever its first name has come to mean (linkat(2)).
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(CWD, &opened, CWD, name, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(true),
        // Another mount, too many names, or one who may not give any.
        Err(Errno::XDEV | Errno::MLINK | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => Ok(false),
        Err(cause) => Err(cause.into()),
    }
}

/// How a volume was filled that is said to be filled like this. It may have been filled anew since that was said: a whole one lies
/// beside no other file.
pub(super) fn lies(method: FillMethod, place: &Path) -> FillMethod {
    match (backing(place).symlink_metadata().is_ok(), method) {
        (true, _) => FillMethod::Overlay,
        (false, FillMethod::Overlay) => FillMethod::SparseCopy,
        (false, method) => method,
    }
}

/// What a volume is that has been filled like this and is all in its own file.
pub(crate) fn whole(method: FillMethod) -> FillMethod {
    if method == FillMethod::Overlay { FillMethod::SparseCopy } else { method }
}

/// Whether a volume needs another file. Of one whose record does not say yet how it was filled, what lies there tells.
fn is_over(volume: &Volume, place: &Path) -> bool {
    match volume.state {
        VolumeState::Creating => backing(place).symlink_metadata().is_ok(),
        _ => volume.filled_by == Some(FillMethod::Overlay),
    }
}

/// Bytes that the files of a volume take on the disk, wherever else they have names.
pub(crate) fn stored_bytes(place: &Path) -> u64 {
    let own = used_bytes(place.symlink_metadata());
    own.saturating_add(used_bytes(backing(place).symlink_metadata()))
}

/// Bytes that go with it: the file that it was made from counts when nobody else has that any more.
pub(super) fn own_bytes(place: &Path) -> u64 {
    let below = backing(place).symlink_metadata().ok().filter(|found| found.nlink() == 1);
    used_bytes(place.symlink_metadata()).saturating_add(below.map_or(0, |found| used_bytes(Ok(found))))
}

/// Takes away from an overlay what a loss of power has left in it that was never written, before anybody reads of it: what is read ahead would
/// make data of that. Nobody else has it open for writing.
pub(super) async fn clear_unwritten(layers: Layers, id: VolumeId) -> Result<Layers> {
    if !layers.is_over() {
        return Ok(layers);
    }
    let cleared = disk::blocking(move || sys::holes::clear_unwritten(&layers.own).map(|()| layers));
    cleared.await.map_err(|cause| Error::file(format!("cannot look at the file of volume {id}"), cause))
}

fn opened(place: &Path, access: Access) -> io::Result<File> {
    let (Some(directory), Some(name)) = (place.parent(), place.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    beneath::open(directory, Path::new(name), access)
}

/// Bytes that a volume reads from another file. A guest that writes meanwhile makes them fewer. What cannot be looked through may all be read.
fn lacking(place: &Path) -> u64 {
    let below = backing(place);
    let look = || {
        let layers = Layers::over(opened(place, Access::Read)?, opened(&below, Access::ReadLinked)?);
        let length = layers.own.metadata()?.len();
        let of_other = |found: &io::Result<Piece>| found.as_ref().map_or(true, |(_, file)| file.is_some());
        let bytes = |found: io::Result<Piece>| found.map(|(range, _)| range.end - range.start);
        layers.data(0..length).filter(of_other).map(bytes).sum::<io::Result<u64>>()
    };
    look().unwrap_or_else(|_| used_bytes(below.symlink_metadata()))
}

impl Volumes {
    /// What clones' volumes have in common with snapshots. File systems do not change, so it is found out once; while it cannot be, nothing.
    pub(super) fn means(&self) -> Means {
        let mut known = self.means.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            *known = means(&self.core.dirs)
                .inspect_err(|cause| {
                    tracing::warn!("what volumes share with snapshots cannot be told yet: {cause}")
                })
                .ok();
        }
        known.unwrap_or(Means::Nothing)
    }

    /// For `servers`: whether a copy of a volume for a snapshot shares its blocks, and so takes no time.
    pub(crate) fn shares_blocks(&self) -> bool {
        self.means() == Means::Blocks
    }

    /// Joins the open file of a volume with what it needs besides.
    pub(super) async fn with_backing(&self, volume: &Volume, own: File) -> Result<Layers> {
        let place = self.core.dirs.volume(volume.id);
        if !is_over(volume, &place) {
            return Ok(Layers::one(own));
        }
        let opened = disk::blocking(move || opened(&backing(&place), Access::ReadLinked));
        let missing = |cause| {
            Error::file(format!("cannot open the file that volume {} was made from", volume.id), cause)
        };
        Ok(Layers::over(own, opened.await.map_err(missing)?))
    }

    /// For `servers`: fails with `disk_full` when not all of these overlays could be made whole, of which so many bytes are missing.
    pub(crate) async fn check_whole(&self, ids: &[VolumeId], missing_bytes: u64) -> Result<()> {
        if missing_bytes == 0 {
            return Ok(());
        }
        // A VMM knows no holes of the other file, and takes for missing what was rewritten.
        let places: Vec<PathBuf> = ids.iter().map(|id| self.core.dirs.volume(*id)).collect();
        let count = move || Ok(places.iter().map(|place| lacking(place)).fold(0, u64::saturating_add));
        let needed = missing_bytes.min(disk::blocking(count).await.unwrap_or(missing_bytes));
        space::check(&self.core.dirs.root().join("volumes"), needed, 0).map_err(|cause| match cause.code {
            Code::DiskFull => {
                let detail = format!(
                    "the disks have {needed} bytes in the files that they were made from, which do not fit: {}",
                    cause.detail
                );
                Error { detail, ..cause }
            }
            _ => cause,
        })
    }

    /// For `servers`: all of a volume is in its own file, and would outlive a loss of power. Then [`Volumes::let_go`] of the other.
    /// Repeatable.
    pub(crate) fn is_whole(tx: &Tx<'_>, id: VolumeId) -> Result<()> {
        let Some(mut volume) = records::find::<Volume>(tx, id.0)? else { return Ok(()) };
        if volume.filled_by != Some(FillMethod::Overlay) {
            return Ok(());
        }
        volume.filled_by = Some(FillMethod::SparseCopy);
        records::save(tx, &mut volume)?;
        announce(tx, &volume, "volume.updated", None)
    }

    /// For `servers`: removes what a volume needs no more, when that is recorded. Repeatable.
    pub(crate) async fn let_go(&self, id: VolumeId) -> Result<()> {
        let place = backing(&self.core.dirs.volume(id));
        disk::blocking(move || files::remove(&place)).await.map_err(|cause| {
            Error::file(format!("volume {id} cannot let go of what it was made from"), cause)
        })
    }
}

#[cfg(test)]
mod tests;
