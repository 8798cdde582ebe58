//! Copying a disk as it is at one moment while its guest writes on: before a request changes a part that is not copied yet, that
//! part is copied first. One thread copies the rest meanwhile, `service` what is about to be written; who comes second for a
//! part waits for the first. A copy that fails is over and holds up nobody.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Disk;
use super::overlay::BLOCK_BYTES;
use crate::limits::KEPT_BYTES;

/// Parts of one word.
const WORD: u64 = 64;

/// One copy of one disk.
#[derive(Debug)]
pub struct Keeping {
    target: File,
    disk_bytes: u64,
    /// By part: somebody copies it, or has.
    claimed: Box<[AtomicU64]>,
    /// By part: it is copied.
    copied: Box<[AtomicU64]>,
    /// Why it has failed. With it whoever waits is told of a part.
    failure: Mutex<Option<io::Error>>,
    changed: Condvar,
    is_over: AtomicBool,
    written_bytes: AtomicU64,
    waits: AtomicU64,
    waited_us_max: AtomicU64,
    waited_us: AtomicU64,
}

/// What a copy has cost so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Requests that waited for it.
    pub waits: u64,
    /// The longest time that one did, in microseconds.
    pub waited_us_max: u64,
    /// All of these times, in microseconds.
    pub waited_us: u64,
}

impl Keeping {
    pub(super) fn new(target: File, disk_bytes: u64) -> Keeping {
        let words = || {
            let words = disk_bytes.div_ceil(KEPT_BYTES).div_ceil(WORD);
            (0..words).map(|_| AtomicU64::new(0)).collect()
        };
        Keeping {
            target,
            disk_bytes,
            claimed: words(),
            copied: words(),
            failure: Mutex::new(None),
            changed: Condvar::new(),
            is_over: AtomicBool::new(false),
            written_bytes: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            waited_us_max: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
        }
    }

    /// Has all parts of a range be copied, by whoever is about to change it.
    pub(super) fn before_change(&self, disk: &Disk, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.disk_bytes).div_ceil(KEPT_BYTES);
        let is_missing = |part: &u64| !is_set(&self.copied, *part) && !self.is_over.load(Ordering::Acquire);
        let Some(first) = (offset / KEPT_BYTES..end).find(is_missing) else { return };
        let began = Instant::now();
        for part in (first..end).filter(is_missing) {
            if set(&self.claimed, part) {
                self.copy(disk, part);
            } else {
                self.wait_for(part);
            }
        }
        let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.waited_us.fetch_add(us, Ordering::Relaxed);
        self.waited_us_max.fetch_max(us, Ordering::Relaxed);
    }

    /// Copies the next part at or after `from` that nobody has copied and that may hold something; answers where the one behind it
    /// begins, or nothing when all is looked at. What others are copying is not waited for ([`Keeping::finish`]).
    pub fn copy_next(&self, disk: &Disk, from: u64) -> io::Result<Option<u64>> {
        self.check()?;
        let first = disk.first_data(from)?.filter(|start| *start < self.disk_bytes);
        let Some(start) = first else { return Ok(None) };
        let part = start / KEPT_BYTES;
        if set(&self.claimed, part) {
            self.copy(disk, part);
        }
        Ok(Some(part.saturating_add(1).saturating_mul(KEPT_BYTES)))
    }

    /// All is looked at: waits for what others are copying. From then on nobody copies anything any more. Fails when the copy has.
    pub fn finish(&self) -> io::Result<()> {
        for part in 0..self.disk_bytes.div_ceil(KEPT_BYTES) {
            // What nobody has claimed by now holds nothing, and whoever changes it later is late.
            if !set(&self.claimed, part) {
                self.wait_for(part);
            }
        }
        self.end();
        self.check()
    }

    /// Nobody copies anything any more, and nobody waits.
    pub fn end(&self) {
        let failure = self.failure();
        self.is_over.store(true, Ordering::Release);
        drop(failure);
        self.changed.notify_all();
    }

    /// What it has cost.
    pub fn kept(&self) -> Kept {
        Kept {
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            waits: self.waits.load(Ordering::Relaxed),
            waited_us_max: self.waited_us_max.load(Ordering::Relaxed),
            waited_us: self.waited_us.load(Ordering::Relaxed),
        }
    }

    /// As whoever copies a part does, which is not copied yet.
    #[cfg(test)]
    pub(super) fn claim(&self, part: u64) -> bool {
        set(&self.claimed, part)
    }

    pub(super) fn copy(&self, disk: &Disk, part: u64) {
        let done = self.try_copy(disk, part);
        let mut failure = self.failure();
        match done {
            Ok(()) => {
                set(&self.copied, part);
            }
            Err(cause) => {
                failure.get_or_insert(cause);
                self.is_over.store(true, Ordering::Release);
            }
        }
        drop(failure);
        self.changed.notify_all();
    }

    fn try_copy(&self, disk: &Disk, part: u64) -> io::Result<()> {
        let offset = part.saturating_mul(KEPT_BYTES);
        let mut data = vec![0; KEPT_BYTES.min(self.disk_bytes.saturating_sub(offset)) as usize];
        disk.read_exact_at(&mut data, offset)?;
        // Block by block, so that the copy has holes where the disk has.
        let blocks: Vec<&[u8]> = data.chunks(BLOCK_BYTES as usize).collect();
        let mut at = offset;
        for run in blocks.chunk_by(|one, next| memory::is_zero(one) == memory::is_zero(next)) {
            let bytes = run.iter().fold(0_usize, |sum, block| sum.saturating_add(block.len()));
            if run.first().is_some_and(|block| !memory::is_zero(block)) {
                let within = at.saturating_sub(offset) as usize;
                let piece = data.get(within..within.saturating_add(bytes)).unwrap_or_default();
                self.target.write_all_at(piece, at)?;
                self.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            at = at.saturating_add(bytes as u64);
        }
        Ok(())
    }

    fn wait_for(&self, part: u64) {
        let mut failure = self.failure();
        while !is_set(&self.copied, part) && !self.is_over.load(Ordering::Acquire) {
            failure = self.changed.wait(failure).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn check(&self) -> io::Result<()> {
        match self.failure().as_ref() {
            Some(cause) => Err(io::Error::new(cause.kind(), cause.to_string())),
            None => Ok(()),
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<io::Error>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_set(bits: &[AtomicU64], part: u64) -> bool {
    // Behind the end there is nothing to copy.
    bits.get((part / WORD) as usize).is_none_or(|word| word.load(Ordering::Acquire) >> (part % WORD) & 1 == 1)
}

/// Whether it was not set before.
fn set(bits: &[AtomicU64], part: u64) -> bool {
    let bit = 1 << (part % WORD);
    bits.get((part / WORD) as usize).is_some_and(|word| word.fetch_or(bit, Ordering::AcqRel) & bit == 0)
}
