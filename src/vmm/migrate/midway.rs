//! How a round goes while it is under way: how much of what it has sent the guest has written again.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm::DirtyLog;
use memory::{Extent, Pages, Ram, marks};
use wire::transfer::SHARD_BYTES;

use super::{Error, ram};

/// One round.
pub(super) struct Midway {
    /// The pages that go in it.
    pages: Arc<Pages>,
    /// Which shards have gone, by their positions.
    gone: Vec<AtomicBool>,
    all_bytes: u64,
}

/// What a round has shown that is not over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Glimpse {
    /// Bytes of pages that go in it.
    pub(crate) all_bytes: u64,
    /// How many of them have gone.
    pub(crate) gone_bytes: u64,
    /// Bytes of pages that were written since, among those that have gone.
    pub(crate) again_bytes: u64,
}

impl Midway {
    /// Of a round that sends these pages of memory.
    pub(super) fn new(ram: &Ram, pages: Arc<Pages>) -> Midway {
        let shards = ram::bytes(ram).div_ceil(SHARD_BYTES);
        let all_bytes = pages.count() * marks::PAGE_BYTES;
        Midway { pages, gone: (0..shards).map(|_| AtomicBool::new(false)).collect(), all_bytes }
    }

    /// A shard has gone.
    pub(super) fn has_gone(&self, shard: Extent) {
        if let Some(gone) = self.gone.get((shard.offset / SHARD_BYTES) as usize) {
            gone.store(true, Ordering::Relaxed);
        }
    }

    /// How it stands. Nothing where the log forgets what it tells.
    pub(super) fn look(&self, ram: &Ram, log: &DirtyLog) -> Result<Option<Glimpse>, Error> {
        if !log.keeps() {
            return Ok(None);
        }
        let mut written = Pages::of(ram::bytes(ram) / marks::PAGE_BYTES);
        // Looked at first: a shard that goes after this is not counted, whatever the log has of it.
        let gone: Vec<bool> = self.gone.iter().map(|gone| gone.load(Ordering::Relaxed)).collect();
        log.collect(&mut written)?;
        let bytes = |pages: &Pages, shard: Extent| {
            let count = |word: &u64| u64::from(word.count_ones());
            pages.words_of(shard).iter().map(count).sum::<u64>() * marks::PAGE_BYTES
        };
        let mut glimpse = Glimpse { all_bytes: self.all_bytes, gone_bytes: 0, again_bytes: 0 };
        for (shard, _) in ram::shards(ram::bytes(ram), 0, 1).zip(gone).filter(|(_, gone)| *gone) {
            glimpse.gone_bytes += bytes(&self.pages, shard);
            glimpse.again_bytes += bytes(&written, shard);
        }
        Ok(Some(glimpse))
    }
}
