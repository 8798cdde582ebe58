//! The file of a volume: making, opening, growing it. It knows no records but their sizes.
//! `volumes` calls it. Everything that touches the disk runs on a thread that may wait.
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use model::volume::FillMethod;
use model::{Code, VolumeId};
use sys::beneath::{self, Access};

use super::files::{self, Durability, Unfinished};
use super::fill::{Watch, fill, share};
use super::layers::Layers;
use super::limits::{LET_GO, LET_GO_AGAIN, PROGRESS_EVERY};
use super::overlay;
use crate::core::{Shared, in_place};
use crate::error::{Error, Result};

/// A file to make.
pub(super) struct NewFile {
    /// Where it is to lie.
    pub(super) place: PathBuf,
    /// Opens what it is filled from; nothing makes it empty.
    pub(super) source: Source,
    /// Its length.
    pub(super) size_bytes: u64,
    /// What it is to outlive.
    pub(super) durability: Durability,
    /// Whether it may be an overlay over what it is filled from.
    pub(super) may_be_over: bool,
}

/// Opens what a file is filled from, where waiting is allowed.
pub(super) type Source = Box<dyn FnOnce() -> io::Result<Option<Layers>> + Send>;

/// No source.
pub(super) fn nothing() -> Source {
    Box::new(|| Ok(None))
}

/// Makes a file and says how it was filled. When this fails nothing lies there.
pub(super) async fn make(
    new: NewFile,
    cancelled: &(dyn Fn() -> bool + Send + Sync),
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<FillMethod> {
    let watch = Arc::new(Watch::default());
    // Whoever waits may be dropped; then nobody wants the file any more.
    let _stop = StopOnDrop(watch.clone());
    let shared = watch.clone();
    let shown = new.place.display().to_string();
    let mut work = tokio::task::spawn_blocking(move || make_now(new, &shared));
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let outcome = loop {
        tokio::select! {
            outcome = &mut work => break outcome,
            _ = tick.tick() => {
                progress(watch.done.load(Ordering::Relaxed), watch.total.load(Ordering::Relaxed));
                if cancelled() {
                    watch.cancelled.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    match outcome {
        Ok(Ok(method)) => Ok(method),
        Ok(Err(cause)) if cause.kind() == io::ErrorKind::Interrupted => {
            Err(Error::new(Code::Draining, "the volume was not filled to the end, as was asked"))
        }
        Ok(Err(cause)) => Err(file_trouble(format!("cannot fill {shown}"), cause)),
        Err(cause) => Err(Error::internal(format!("filling {shown} ended badly"), cause)),
    }
}

fn make_now(new: NewFile, watch: &Watch) -> io::Result<FillMethod> {
    let backing = overlay::backing(&new.place);
    fill_now(new, watch).inspect_err(|_| {
        // Whoever begins again replaces what cannot be removed now.
        let _ = files::remove(&backing);
    })
}

/// The file that an overlay needs has its name before the overlay has its own, and beside a file that is whole there is none.
fn fill_now(new: NewFile, watch: &Watch) -> io::Result<FillMethod> {
    let source = (new.source)()?;
    let mut unfinished = Unfinished::create(&new.place)?;
    let mut is_over = false;
    if new.may_be_over
        && let Some(source) = &source
    {
        is_over = overlay::lay(source, unfinished.file(), &new.place, new.size_bytes)?;
    }
    if !is_over {
        files::remove(&overlay::backing(&new.place))?;
    }
    let method = match &source {
        Some(_) if is_over => FillMethod::Overlay,
        Some(source) => fill(source, unfinished.file(), new.size_bytes, watch)?,
        None => {
            unfinished.file().set_len(new.size_bytes)?;
            FillMethod::Empty
        }
    };
    watch.check()?;
    match new.durability {
        Durability::Power => unfinished.finish_in_place()?,
        Durability::Pending => unfinished.begin()?,
        Durability::Process => unfinished.take_place()?,
    }
    Ok(method)
}

/// Shares the blocks of `source` with a file beside `place` that is removed again, where the file system can share
/// blocks at all: what the kernel has not written yet is on the medium then, and sharing them again takes no time.
pub(super) async fn share_ahead(source: File, place: PathBuf) -> Result<()> {
    let shared = blocking(move || {
        let mut unfinished = Unfinished::create(&place)?;
        share(&source, unfinished.file()).map(drop)
    });
    shared.await.map_err(|cause| file_trouble("cannot share the blocks of a volume".to_owned(), cause))
}

/// Opens the file of a volume for reading, without its lock: for whoever knows that nobody writes to it. Nothing is opened that a link in
/// its place leads to.
pub(super) async fn look(core: &Shared, id: VolumeId) -> Result<File> {
    let place = core.dirs.volume(id);
    let shown = place.display().to_string();
    blocking(move || {
        let (Some(directory), Some(name)) = (place.parent(), place.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        beneath::open(directory, Path::new(name), Access::Read)
    })
    .await
    .map_err(|cause| Error::file(format!("cannot open {shown}"), cause))
}

struct StopOnDrop(Arc<Watch>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Opens the file of a volume for reading and writing and takes its lock; none when another opening has it,
/// or when there is no file. The lock belongs to the opening: it goes with the descriptor to the VMM and lasts until the last copy is closed, so
/// it outlives the daemon and no disk is ever given to two machines.
pub(super) async fn hold(core: &Shared, id: VolumeId) -> Result<Option<File>> {
    hold_as_long(core, id, 0).await
}

/// As [`hold`], and makes the file at least `size_bytes` long.
async fn hold_as_long(core: &Shared, id: VolumeId, size_bytes: u64) -> Result<Option<File>> {
    let place = core.dirs.volume(id);
    in_place(move || {
        let held = hold_now(&place);
        let held =
            held.map_err(|cause| Error::file(format!("cannot open the file of volume {id}"), cause))?;
        held.map(|file| grow_now(file, size_bytes)).transpose()
    })
    .await
}

/// As [`hold`], for a machine that follows another: a VMM that has ended may have the file for a moment still. Makes the file at
/// least `size_bytes` long.
pub(super) async fn hold_next(core: &Shared, id: VolumeId, size_bytes: u64) -> Result<Option<File>> {
    let end = Instant::now() + LET_GO;
    loop {
        let held = hold_as_long(core, id, size_bytes).await?;
        if held.is_some() || Instant::now() > end || !core.dirs.volume(id).exists() {
            return Ok(held);
        }
        tokio::time::sleep(LET_GO_AGAIN).await;
    }
}

fn hold_now(place: &Path) -> io::Result<Option<File>> {
    let (Some(directory), Some(name)) = (place.parent(), place.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // The VMM gets to write to it, so it must not be what somebody put a link to in its place.
    let file = match beneath::open(directory, Path::new(name), Access::ReadWrite) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(cause)) => Err(cause),
    }
}

/// Makes the file at least `size_bytes` long.
pub(super) async fn grow(file: File, size_bytes: u64) -> Result<()> {
    in_place(move || grow_now(file, size_bytes).map(drop)).await
}

fn grow_now(file: File, size_bytes: u64) -> Result<File> {
    let grow = || {
        if file.metadata()?.len() < size_bytes {
            file.set_len(size_bytes)?;
            file.sync_all()?;
        }
        Ok(())
    };
    grow().map_err(|cause| file_trouble("cannot grow the volume".to_owned(), cause))?;
    Ok(file)
}

/// The disk being full has a code of its own, and so has a file that the file system cannot hold.
pub(super) fn file_trouble(what: String, cause: io::Error) -> Error {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::new(
                Code::DiskFull,
                "the host's disk is full; delete volumes or images, or add space, and try again",
            )
            .caused_by(cause)
        }
        _ => Error::file(what, cause),
    }
}

/// Runs work that waits for the disk.
pub(super) async fn blocking<T, F>(work: F) -> io::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|cause| Err(io::Error::other(cause)))
}
