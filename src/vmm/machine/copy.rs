//! Copying disks as they are at one moment while the guest runs on: a thread copies part after part, and each disk's own thread
//! what its guest is about to change (`devices::virtio::block`). Nothing of it outlives this process.
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use devices::virtio::block::{Disk, Keeping, Kept};
use memory::guard;
use wire::copies::{CopyReport, CopySpec, CopyStatus};
use wire::saved::WriteDelay;

use super::{Error, Machine};
use crate::limits::COPY_GIVES_WAY_BYTES;
use crate::log;
use crate::threads::{self, ThreadKind};

/// A copy from its moment on. Dropped, it is given up and waited for.
pub(super) struct Copying {
    shared: Arc<Shared>,
    disks: Vec<Disk>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    cancelled: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: u64,
    began: Instant,
    ended: Mutex<Option<Result<CopyReport, String>>>,
}

impl Machine {
    /// Begins to copy disks as they are now; the machine stands still. `spec` was not checked.
    pub(crate) fn copy_disks(&mut self, spec: &CopySpec, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        let drives = &self.lasting.drives;
        let checked = spec.check(drives.len(), descriptors.len());
        checked.map_err(|error| Error::Invalid { field: error.field, detail: error.detail })?;
        self.check_not_moving()?;
        if !self.is_paused() {
            return Err(Error::State(
                "the machine runs; disks are copied as they are at a moment, so park it first",
            ));
        }
        if self.copies_disks() {
            return Err(Error::State("its disks are being copied; wait for the end of that, or cancel it"));
        }
        let mut files: Vec<_> = descriptors.into_iter().map(|file| Some(File::from(file))).collect();
        let mut named = Vec::new();
        for (at, copy) in spec.disks.iter().enumerate() {
            let field = || format!("/disks/{at}/file");
            let file = files.get_mut(usize::from(copy.file.0)).and_then(Option::take);
            let (Some(file), Some(disk)) = (file, drives.get(usize::from(copy.disk))) else {
                return Err(Error::File { field: field(), cause: io::ErrorKind::NotFound.into() });
            };
            let length = file.metadata().map_err(|cause| Error::File { field: field(), cause })?.len();
            if length != disk.bytes() {
                let detail = format!("it has {length} bytes, and the disk {}", disk.bytes());
                return Err(Error::Invalid { field: field(), detail });
            }
            named.push((disk.clone(), file));
        }
        // Those before are let go of first: they are the same disks.
        self.copying = None;
        let disks = named.into_iter().map(|(disk, file)| {
            let keeping = disk.keep(file);
            (disk, keeping)
        });
        self.copying = Some(Copying::start(disks.collect())?);
        Ok(())
    }

    /// Gives up the copy that is under way, if one is.
    pub(crate) fn cancel_copy(&mut self) {
        if let Some(copying) = &self.copying {
            copying.cancel();
        }
    }

    /// How the copy that is under way, or the last one, stands.
    pub(crate) fn copy_status(&self) -> CopyStatus {
        self.copying.as_ref().map_or(CopyStatus::None, |copying| copying.shared.status())
    }

    /// Whether what writes to its disks has to keep what was there.
    pub(super) fn copies_disks(&self) -> bool {
        matches!(self.copy_status(), CopyStatus::Copying { .. })
    }
}

impl Copying {
    fn start(disks: Vec<(Disk, Arc<Keeping>)>) -> Result<Copying, Error> {
        let shared = Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
            total_bytes: disks.iter().map(|(disk, _)| disk.bytes()).sum(),
            began: Instant::now(),
            ended: Mutex::new(None),
        });
        let theirs = Arc::clone(&shared);
        let named = disks.iter().map(|(disk, _)| disk.clone()).collect();
        let mut copying = Copying { shared, disks: named, thread: None };
        let run = move || {
            threads::enter(ThreadKind::Copy);
            theirs.run(disks);
        };
        let thread = std::thread::Builder::new().name("copy".to_owned()).spawn(run);
        // What was begun is given up with it.
        let thread = thread.map_err(|cause| Error::Host { what: "the thread copy".to_owned(), cause })?;
        copying.thread = Some(thread);
        Ok(copying)
    }

    /// Gives it up. The thread is not waited for here, as what it copies to may hang: the next copy does, and the machine's end.
    fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        if self.shared.end(Err("it was given up".to_owned())) {
            self.disks.iter().for_each(Disk::forget_keeping);
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic has aborted the process before it could get here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The files are let go of before anybody is told that it has ended, but for whoever gives it up.
    fn run(&self, disks: Vec<(Disk, Arc<Keeping>)>) {
        let result = self.copy(&disks).map(|()| self.report(&disks));
        if !self.cancelled.load(Ordering::SeqCst) {
            disks.iter().for_each(|(disk, _)| disk.forget_keeping());
        }
        drop(disks);
        if let Err(detail) = &result {
            log::line(format_args!("its disks are not copied: {detail}"));
        }
        self.end(result);
    }

    /// Whether it had not ended before.
    fn end(&self, result: Result<CopyReport, String>) -> bool {
        let mut ended = self.ended();
        let is_first = ended.is_none();
        ended.get_or_insert(result);
        is_first
    }

    fn copy(&self, disks: &[(Disk, Arc<Keeping>)]) -> Result<(), String> {
        let failed = |cause: io::Error| log::chain(&cause);
        for (disk, keeping) in disks {
            let (before, mut at, mut given_way_at) = (self.done_bytes.load(Ordering::Relaxed), 0, 0);
            while let Some(next) = keeping.copy_next(disk, at).map_err(failed)? {
                if self.cancelled.load(Ordering::SeqCst) {
                    return Err("it was given up".to_owned());
                }
                at = next;
                self.done_bytes.store(before.saturating_add(at.min(disk.bytes())), Ordering::Relaxed);
                // Its guest may wait for this processor. Not for each part: where many want it, to have it again takes milliseconds.
                if at >= given_way_at + COPY_GIVES_WAY_BYTES {
                    guard::give_way();
                    given_way_at = at;
                }
            }
            self.done_bytes.store(before.saturating_add(disk.bytes()), Ordering::Relaxed);
        }
        // Only now: a failure of one is the end of all.
        disks.iter().try_for_each(|(_, keeping)| keeping.finish()).map_err(failed)
    }

    fn status(&self) -> CopyStatus {
        match &*self.ended() {
            None => CopyStatus::Copying {
                done_bytes: self.done_bytes.load(Ordering::Relaxed),
                total_bytes: self.total_bytes,
            },
            Some(Ok(report)) => CopyStatus::Copied(report.clone()),
            Some(Err(detail)) => CopyStatus::Failed { detail: detail.clone() },
        }
    }

    fn report(&self, disks: &[(Disk, Arc<Keeping>)]) -> CopyReport {
        let all = disks.iter().map(|(_, keeping)| keeping.kept());
        let sum = all.fold(Kept::default(), |sum, kept| Kept {
            written_bytes: sum.written_bytes + kept.written_bytes,
            waits: sum.waits + kept.waits,
            waited_us_max: sum.waited_us_max.max(kept.waited_us_max),
            waited_us: sum.waited_us + kept.waited_us,
        });
        CopyReport {
            written_bytes: sum.written_bytes,
            waits: sum.waits,
            delay: WriteDelay { us_max: sum.waited_us_max, us_sum: sum.waited_us },
            total_us: u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX),
        }
    }

    fn ended(&self) -> MutexGuard<'_, Option<Result<CopyReport, String>>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
