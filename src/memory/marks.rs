//! Which pages devices have written, for whoever copies memory while the machine runs: KVM's own log sees only what
//! vCPUs write. Off, a write costs one load of a flag and memory holds no map. `vm-memory` marks, savers take.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{FileOffset, GuestRegionMmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{Extent, Pages, Ram};

/// Bytes that one mark stands for, the same as in KVM's log.
pub const PAGE_BYTES: u64 = 4096;

/// The marks of one region.
#[derive(Debug, Default)]
pub struct Marks {
    on: AtomicBool,
    pages: usize,
    /// Whose mapping the region lies in, when it is not its own: that one stays for as long as this is used.
    _within: Option<Arc<Ram>>,
    /// Nothing is given back to the host: somebody still has to read it.
    held: Mutex<bool>,
    /// One bit a page, made when first turned on.
    words: OnceLock<Box<[AtomicU64]>>,
    /// The memory file into which a region goes that was mapped privately, once that has begun.
    own: OnceLock<FileOffset>,
    /// How many bytes of the region lie there, from its beginning on.
    own_bytes: AtomicU64,
}

/// Starts to mark, from no mark at all.
pub fn start(ram: &Ram) {
    for marks in ram.iter().map(marks_of) {
        let words = marks.words();
        words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        marks.on.store(true, Ordering::SeqCst);
    }
}

/// Stops to mark.
pub fn stop(ram: &Ram) {
    ram.iter().map(marks_of).for_each(|marks| marks.on.store(false, Ordering::SeqCst));
}

/// Takes the marks of every region, in the order of the regions: words of 64 pages, the first page lowest. None is
/// left; what is marked meanwhile is in this answer or in the next.
pub fn take(ram: &Ram) -> Vec<Vec<u64>> {
    let taken = |marks: &Marks| marks.words().iter().map(|word| word.swap(0, Ordering::SeqCst)).collect();
    ram.iter().map(marks_of).map(taken).collect()
}

/// Takes the marks of a part that begins and ends with a multiple of 64 pages, and adds them to `pages`. Marks elsewhere are
/// not looked at.
pub fn take_part(ram: &Ram, part: Extent, pages: &mut Pages) {
    let mut before = 0;
    for region in ram.iter() {
        let end = before + region.len();
        let (from, to) = (part.offset.max(before), (part.offset + part.bytes).min(end));
        if from < to {
            let word = |offset: u64| (offset / PAGE_BYTES / 64) as usize;
            let marked = marks_of(region).words().get(word(from - before)..word(to - before));
            let found = pages.words.get_mut(word(from)..word(to));
            for (word, found) in marked.into_iter().flatten().zip(found.into_iter().flatten()) {
                // Mostly there is none, and a look costs the other writers nothing.
                if word.load(Ordering::SeqCst) != 0 {
                    *found |= word.swap(0, Ordering::SeqCst);
                }
            }
        }
        before = end;
    }
}

/// A part of a region has changed in another way than by being written through it.
pub(crate) fn mark(region: &GuestRegionMmap<Marks>, inside: u64, bytes: u64) {
    marks_of(region).mark_dirty(inside as usize, bytes as usize);
}

/// Whether pages may go back to the host, until the answer is dropped.
pub(crate) fn held(region: &GuestRegionMmap<Marks>) -> MutexGuard<'_, bool> {
    marks_of(region).held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in a memory file of its own a region goes that was mapped privately, and how many of its bytes lie there, from the
/// beginning on.
pub(crate) fn own(region: &GuestRegionMmap<Marks>) -> Option<(&FileOffset, u64)> {
    let marks = marks_of(region);
    marks.own.get().map(|file| (file, marks.own_bytes.load(Ordering::SeqCst)))
}

/// Chooses that file, once and for all.
pub(crate) fn set_own(region: &GuestRegionMmap<Marks>, file: FileOffset) {
    let _ = marks_of(region).own.set(file);
}

/// So many bytes lie in it.
pub(crate) fn set_own_bytes(region: &GuestRegionMmap<Marks>, bytes: u64) {
    marks_of(region).own_bytes.store(bytes, Ordering::SeqCst);
}

fn marks_of(region: &GuestRegionMmap<Marks>) -> &Marks {
    // The mapping's own, not the slice that a region answers as guest memory.
    let mapping: &vm_memory::MmapRegion<Marks> = region;
    mapping.bitmap()
}

impl Marks {
    /// Of a region of so many bytes that lies in a mapping of `within`.
    pub(crate) fn within(len: usize, within: Arc<Ram>) -> Marks {
        Marks { _within: Some(within), ..Marks::with_len(len) }
    }

    fn words(&self) -> &[AtomicU64] {
        let words = self.pages.div_ceil(64);
        self.words.get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect())
    }
}

impl NewBitmap for Marks {
    fn with_len(len: usize) -> Marks {
        Marks { pages: len.div_ceil(PAGE_BYTES as usize), ..Marks::default() }
    }
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || !self.on.load(Ordering::Relaxed) {
            return;
        }
        let last = offset.saturating_add(len - 1);
        let page = PAGE_BYTES as usize;
        let words = self.words();
        for page in offset / page..=(last / page).min(self.pages.saturating_sub(1)) {
            if let Some(word) = words.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES as usize;
        let word = self.words.get().and_then(|words| words.get(page / 64));
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Marks> {
        RefSlice::new(self, offset)
    }
}

// Every access to memory takes several slices, so one is a borrow: counting references would be two locked operations for
// each of them.
impl<'a> WithBitmapSlice<'a> for Marks {
    type S = RefSlice<'a, Marks>;
}

#[cfg(test)]
mod tests;
