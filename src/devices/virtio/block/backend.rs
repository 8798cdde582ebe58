//! The host's side of a disk: one raw file, or an overlay over another, and the ring that moves its data. It knows no
//! virtqueue. A format is never looked for: every byte of the file is the guest's.
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::ring::{Files, Ring};

use super::Access;
use super::changes::{Changes, Part};
use super::keep::Keeping;
use super::overlay::{Overlay, Piece};
use super::request::{Request, SECTOR_BYTES, Span};
use crate::limits::BLOCK_QUEUE_SIZE;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its length could not be found out.
    #[error("the disk's length cannot be found out")]
    Length(#[source] io::Error),
    /// Its length is not whole sectors.
    #[error(
        "the disk has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}: make it longer or shorter"
    )]
    Sectors {
        /// Its length.
        bytes: u64,
    },
    /// It cannot be an overlay over its backing file.
    #[error("the disk cannot be an overlay over its backing file")]
    Overlay(#[source] io::Error),
    /// The host gave no descriptor.
    #[error("the disk's ring cannot be made")]
    Ring(#[source] io::Error),
}

/// An open raw file or block device with its ring. Cheap to clone. Whoever builds a machine again from the same
/// descriptors keeps a clone, so that the ring made before the sandbox closed serves the next machine too.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: Arc<File>,
    access: Access,
    sectors: u64,
    overlay: Option<Overlay>,
    /// Here between two drivers.
    ring: Mutex<Option<Ring>>,
    cannot_punch: AtomicBool,
    cannot_zero: AtomicBool,
    changes: Changes,
    /// A flush has failed: what was written before may be lost, and the kernel has told that once.
    is_unsure: AtomicBool,
    /// It was not the guest's, who is to be told with its next.
    is_untold: AtomicBool,
    is_kept: AtomicBool,
    keeping: Mutex<Option<Arc<Keeping>>>,
}

impl Disk {
    /// Takes the file as it is: its length is the capacity. With a backing file, which is only read, it is an overlay: whatever
    /// of it is a hole is read from there.
    pub fn new(file: File, backing: Option<File>, access: Access) -> Result<Disk, DiskError> {
        Disk::with(file, backing, access, Ring::new)
    }

    /// The same without io_uring.
    pub fn plain(file: File, backing: Option<File>, access: Access) -> Result<Disk, DiskError> {
        Disk::with(file, backing, access, Ring::plain)
    }

    fn with(
        mut file: File,
        backing: Option<File>,
        access: Access,
        ring: fn(Files, u16) -> io::Result<Ring>,
    ) -> Result<Disk, DiskError> {
        // The end of a block device is its size too, for which its metadata says 0.
        let bytes = file.seek(SeekFrom::End(0)).map_err(DiskError::Length)?;
        if !bytes.is_multiple_of(u64::from(SECTOR_BYTES)) {
            return Err(DiskError::Sectors { bytes });
        }
        let file = Arc::new(file);
        let overlay = backing.map(|backing| Overlay::new(Arc::clone(&file), Arc::new(backing), bytes));
        let overlay = overlay.transpose().map_err(DiskError::Overlay)?;
        let ring = ring(files(&file, overlay.as_ref()), BLOCK_QUEUE_SIZE).map_err(DiskError::Ring)?;
        Ok(Disk(Arc::new(Inner {
            file,
            access,
            sectors: bytes.checked_div(u64::from(SECTOR_BYTES)).unwrap_or(0),
            overlay,
            ring: Mutex::new(Some(ring)),
            cannot_punch: AtomicBool::new(false),
            cannot_zero: AtomicBool::new(false),
            changes: Changes::new(bytes),
            is_unsure: AtomicBool::new(false),
            is_untold: AtomicBool::new(false),
            is_kept: AtomicBool::new(false),
            keeping: Mutex::new(None),
        })))
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.0.sectors
    }

    /// Whether the guest may write.
    pub fn access(&self) -> Access {
        self.0.access
    }

    /// Capacity in bytes.
    pub fn bytes(&self) -> u64 {
        self.0.sectors.saturating_mul(SECTOR_BYTES.into())
    }

    /// The disk's own file, for whoever fills it.
    pub fn file(&self) -> &Arc<File> {
        &self.0.file
    }

    /// Where the next range at or after `from` begins that may hold something else than zeroes. Its end may be far to look for.
    pub fn first_data(&self, from: u64) -> io::Result<Option<u64>> {
        match &self.0.overlay {
            None => sys::memfd::first_data(&self.0.file, from),
            Some(overlay) => overlay.first_data(from),
        }
    }

    /// The next range at or after `from` that may hold something else than zeroes, as start and end in bytes.
    pub fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        match &self.0.overlay {
            None => sys::memfd::next_data(&self.0.file, from),
            Some(overlay) => overlay.next_data(from),
        }
    }

    /// Reads what the guest would, for whoever copies it.
    pub fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.0.overlay {
            None => self.0.file.read_exact_at(data, offset),
            Some(overlay) => overlay.read_exact_at(data, offset),
        }
    }

    /// Where what is not written yet lies, if not in the disk's own file.
    pub(super) fn overlay(&self) -> Option<&Overlay> {
        self.0.overlay.as_ref()
    }

    /// Bytes that may be read from a backing file; more than nothing until all lies in the disk's own and is durable there.
    pub fn shared_bytes(&self) -> u64 {
        self.overlay().map_or(0, Overlay::shared_bytes)
    }

    /// Reads the next piece that [`Disk::fill`] is to fill in, as the guest runs; nothing when all is filled in.
    pub fn read_ahead(&self) -> io::Result<Option<Piece>> {
        self.overlay().map_or(Ok(None), Overlay::read_ahead)
    }

    /// Puts what the guest has not written of a piece into the disk's own file. Nothing may be in flight.
    pub fn fill(&self, piece: &Piece) -> io::Result<()> {
        self.overlay().map_or(Ok(()), |overlay| overlay.fill(piece))
    }

    /// Has what is not written down yet of the disk's own file be, which is no more than that. The kernel tells a failure to write of
    /// all of this file's descriptors once, so what it tells here the guest is told with its next flush.
    pub fn write_out(&self) -> io::Result<()> {
        sys::writeback::write_out(&self.0.file).inspect_err(|_| self.lose_untold())
    }

    /// A flush has failed that is not the guest's.
    pub(super) fn lose_untold(&self) {
        self.0.is_unsure.store(true, Ordering::SeqCst);
        self.0.is_untold.store(true, Ordering::SeqCst);
    }

    /// Makes durable what was filled in, which is all.
    pub fn sync(&self) -> io::Result<()> {
        self.0.file.sync_data().inspect_err(|_| self.lose_untold())
    }

    /// All is filled in, and durable: from then on no request begins to read the backing file. Nothing may be in flight. Fails for good
    /// when a flush has failed before, the guest's or one of ours: what was lost then nobody knows.
    pub fn make_whole(&self) -> io::Result<()> {
        let Some(overlay) = self.overlay() else { return Ok(()) };
        if self.0.is_unsure.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "some of the disk could not be written to the medium; start its machine anew when that is mended",
            ));
        }
        overlay.make_whole();
        Ok(())
    }

    /// What an answer of the ring says of what is to be on the medium.
    pub(super) fn judge(&self, result: io::Result<()>) -> Answer {
        match &result {
            Ok(())
                if self.0.is_untold.load(Ordering::Relaxed)
                    && self.0.is_untold.swap(false, Ordering::SeqCst) =>
            {
                Answer::Others(io::Error::other("a flush failed that was not the guest's"))
            }
            // For want of room, too: it may have been found only as earlier writes were written down, which are lost then.
            Err(_) => {
                self.0.is_unsure.store(true, Ordering::SeqCst);
                Answer::Own(result)
            }
            Ok(()) => Answer::Own(result),
        }
    }

    /// Begins to mark what the guest changes, from no mark at all.
    pub fn track_changes(&self) {
        self.0.changes.start();
    }

    /// Ends that.
    pub fn forget_changes(&self) {
        self.0.changes.stop();
    }

    /// What was changed since it was last asked, ascending. Whoever reads it after asking reads it as it is now, or is told
    /// of it again.
    pub fn take_changes(&self) -> Vec<Part> {
        self.0.changes.take()
    }

    /// How much that would be, in bytes.
    pub fn changed_bytes(&self) -> u64 {
        self.0.changes.bytes()
    }

    /// Marks what a request may have changed that the kernel has answered.
    pub(super) fn mark_changes(&self, request: &Request) {
        self.0.changes.mark(request);
    }

    /// Begins to copy the disk as it is now into a file that is one hole of its length; one copy at a time. Nothing may be in
    /// flight.
    pub fn keep(&self, target: File) -> Arc<Keeping> {
        let keeping = Arc::new(Keeping::new(target, self.bytes()));
        *self.keeping() = Some(Arc::clone(&keeping));
        self.0.is_kept.store(true, Ordering::SeqCst);
        keeping
    }

    /// Ends that.
    pub fn forget_keeping(&self) {
        self.0.is_kept.store(false, Ordering::SeqCst);
        if let Some(keeping) = self.keeping().take() {
            keeping.end();
        }
    }

    /// Whether nothing of it is to be given up.
    pub(super) fn keeps_data(&self) -> bool {
        self.overlay().is_some() || self.0.is_kept.load(Ordering::SeqCst)
    }

    /// Has what a request is about to change be copied first, if the disk is being copied.
    pub(super) fn before_change(&self, offset: u64, bytes: u64) {
        if self.0.is_kept.load(Ordering::SeqCst) {
            let keeping = self.keeping().clone();
            keeping.inspect(|keeping| keeping.before_change(self, offset, bytes));
        }
    }

    fn keeping(&self) -> MutexGuard<'_, Option<Arc<Keeping>>> {
        self.0.keeping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ring, for one driver. When an earlier driver's requests never ended, a new one.
    pub(super) fn lease(&self) -> io::Result<Lease> {
        let kept = self.0.ring.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ring = match kept {
            Some(ring) => ring,
            None => Ring::new(files(&self.0.file, self.overlay()), BLOCK_QUEUE_SIZE)?,
        };
        Ok(Lease { ring, disk: self.clone() })
    }

    /// Whether the ring has come back from the last driver.
    #[cfg(test)]
    pub(super) fn has_ring(&self) -> bool {
        crate::bus::locked(&self.0.ring).is_some()
    }

    /// How to zero `span` first.
    pub(super) fn zeroing(&self, span: Span) -> Zeroing {
        if self.overlay().is_some() {
            // What is a hole would be the backing file's, for the next who opens it if not here.
            Zeroing::Write
        } else if span.unmap && !self.0.cannot_punch.load(Ordering::Relaxed) {
            Zeroing::Punch
        } else if self.0.cannot_zero.load(Ordering::Relaxed) {
            Zeroing::Write
        } else {
            Zeroing::Zero
        }
    }

    /// How to zero after `tried` was refused with `cause`, or nothing when the error is final. What a file can never
    /// do is not tried again.
    pub(super) fn zeroing_after(&self, tried: Zeroing, cause: &io::Error) -> Option<Zeroing> {
        // EINVAL: a block device whose own sectors are larger than the range's alignment.
        if !is_unsupported(cause) && cause.kind() != io::ErrorKind::InvalidInput {
            return None;
        }
        let (known, next) = match tried {
            Zeroing::Punch => (&self.0.cannot_punch, Zeroing::Zero),
            Zeroing::Zero => (&self.0.cannot_zero, Zeroing::Write),
            Zeroing::Write => return None,
        };
        if is_unsupported(cause) {
            known.store(true, Ordering::Relaxed);
        }
        Some(next)
    }
}

fn files(own: &Arc<File>, overlay: Option<&Overlay>) -> Files {
    Files { own: Arc::clone(own), backing: overlay.map(|overlay| Arc::clone(overlay.backing())) }
}

/// What became of a step.
#[derive(Debug)]
pub(super) enum Answer {
    /// What the kernel says of it.
    Own(io::Result<()>),
    /// It worked, and something before it was lost that the guest does not know of.
    Others(io::Error),
}

/// Ways to make a range read zero, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zeroing {
    /// Give the space back.
    Punch,
    /// Keep the space and mark it as zero.
    Zero,
    /// Write zeroes.
    Write,
}

/// Whether the file cannot do that at all.
pub(super) fn is_unsupported(cause: &io::Error) -> bool {
    use nix::errno::Errno;
    let number = cause.raw_os_error().map(Errno::from_raw);
    matches!(number, Some(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV | Errno::ENOTTY))
}

/// A ring on loan. [`Lease::end`] gives it back; dropping the lease instead drops the ring.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) ring: Ring,
    pub(super) disk: Disk,
}

impl Lease {
    /// Gives the ring back if it is idle; otherwise waits for the kernel and lets it go.
    pub(super) fn end(self) {
        let Lease { ring, disk } = self;
        if ring.in_flight() == 0 {
            *disk.0.ring.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
        }
    }
}
