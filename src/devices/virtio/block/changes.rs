//! Which parts of a disk were changed, for whoever copies it while the machine runs. Off, a request costs one load of a
//! flag and a disk holds no map. `service` marks when the kernel has answered: who takes a mark before he reads the part
//! reads what was written, or finds another mark.
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::request::{Request, Span};

/// Bytes that one mark stands for.
pub const CHANGE_BYTES: u64 = 64 << 10;

/// Parts of one word.
const WORD: u64 = 64;

/// A part of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Bytes before it.
    pub offset: u64,
    /// Bytes in it.
    pub bytes: u64,
}

/// The marks of one disk.
#[derive(Debug)]
pub(super) struct Changes {
    is_on: AtomicBool,
    disk_bytes: u64,
    /// One bit for each part, made when first turned on.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Changes {
    pub(super) fn new(disk_bytes: u64) -> Changes {
        Changes { is_on: AtomicBool::new(false), disk_bytes, words: OnceLock::new() }
    }

    fn words(&self) -> &[AtomicU64] {
        let words = self.disk_bytes.div_ceil(CHANGE_BYTES).div_ceil(WORD);
        self.words.get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Begins with no mark at all.
    pub(super) fn start(&self) {
        self.words().iter().for_each(|word| word.store(0, Ordering::SeqCst));
        self.is_on.store(true, Ordering::SeqCst);
    }

    pub(super) fn stop(&self) {
        self.is_on.store(false, Ordering::SeqCst);
    }

    /// Marks what a request may have changed, whether it failed or not.
    pub(super) fn mark(&self, request: &Request) {
        if !self.is_on.load(Ordering::SeqCst) {
            return;
        }
        match request {
            Request::Write { offset, bytes } => self.mark_range(*offset, (*bytes).into()),
            Request::Discard(spans) | Request::WriteZeroes(spans) => {
                spans.iter().for_each(|Span { offset, bytes, .. }| self.mark_range(*offset, *bytes));
            }
            Request::Read { .. } | Request::Flush | Request::Identity => {}
        }
    }

    fn mark_range(&self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.disk_bytes).div_ceil(CHANGE_BYTES);
        for part in offset / CHANGE_BYTES..end {
            if let Some(word) = self.words().get((part / WORD) as usize) {
                word.fetch_or(1 << (part % WORD), Ordering::SeqCst);
            }
        }
    }

    /// How much is marked, in bytes, the last part counted whole.
    pub(super) fn bytes(&self) -> u64 {
        let marked = |word: &AtomicU64| u64::from(word.load(Ordering::SeqCst).count_ones());
        let parts: u64 = self.words.get().map_or(0, |words| words.iter().map(marked).sum());
        parts.saturating_mul(CHANGE_BYTES)
    }

    /// Takes all marks; what is marked meanwhile is in this answer or in the next.
    pub(super) fn take(&self) -> Vec<Part> {
        let mut found: Vec<Part> = Vec::new();
        for (at, word) in (0u64..).zip(self.words.get().map(Box::as_ref).unwrap_or_default()) {
            let word = word.swap(0, Ordering::SeqCst);
            for bit in (0..WORD).filter(|bit| word >> bit & 1 == 1) {
                let part = at.saturating_mul(WORD).saturating_add(bit);
                let offset = part.saturating_mul(CHANGE_BYTES);
                let bytes = CHANGE_BYTES.min(self.disk_bytes.saturating_sub(offset));
                match found.last_mut() {
                    Some(last) if last.offset.saturating_add(last.bytes) == offset => {
                        last.bytes = last.bytes.saturating_add(bytes);
                    }
                    _ => found.push(Part { offset, bytes }),
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 100 * CHANGE_BYTES + 512;

    #[test]
    fn what_was_changed_is_told_once_and_in_rows() {
        let changes = Changes::new(BYTES);
        let write = |offset, bytes| changes.mark(&Request::Write { offset, bytes });
        write(0, 512);
        changes.start();
        assert_eq!((changes.bytes(), changes.take()), (0, vec![]), "what was before does not count");
        write(CHANGE_BYTES - 512, 1024);
        write(64 * CHANGE_BYTES, 512);
        changes.mark(&Request::Read { offset: 5 * CHANGE_BYTES, bytes: 4096 });
        changes.mark(&Request::Flush);
        let spans = vec![Span { offset: 99 * CHANGE_BYTES, bytes: CHANGE_BYTES + 512, unmap: true }];
        changes.mark(&Request::Discard(spans.clone()));
        assert_eq!(changes.bytes(), 5 * CHANGE_BYTES);
        let part = |first: u64, bytes| Part { offset: first * CHANGE_BYTES, bytes };
        let wanted = vec![part(0, 2 * CHANGE_BYTES), part(64, CHANGE_BYTES), part(99, CHANGE_BYTES + 512)];
        assert_eq!(changes.take(), wanted);
        assert_eq!((changes.bytes(), changes.take()), (0, vec![]));
        changes.stop();
        changes.mark(&Request::WriteZeroes(spans));
        assert_eq!(changes.take(), []);
    }
}
