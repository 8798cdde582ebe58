//! How a round goes while it is under way: how much of what it has sent the guest has written again.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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
    /// How many streams of memory are at it.
    streams: AtomicUsize,
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
    /// Of a round that sends these pages of memory over so many streams.
    pub(super) fn new(ram: &Ram, pages: Arc<Pages>, streams: usize) -> Midway {
        let shards = ram::bytes(ram).div_ceil(SHARD_BYTES);
        let all_bytes = pages.count() * marks::PAGE_BYTES;
        let gone = (0..shards).map(|_| AtomicBool::new(false)).collect();
        Midway { pages, gone, all_bytes, streams: AtomicUsize::new(streams) }
    }

    /// A stream has sent its share of memory.
    pub(super) fn is_through(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether memory goes still. A disk may take far longer: what is written meanwhile says nothing of whether memory goes faster.
    pub(super) fn goes(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_until_each_of_its_streams_is_through() {
        let ram = memory::new(4 << 20).unwrap();
        let midway = Midway::new(&ram, Arc::new(Pages::all(1024)), 2);
        let goes = [0, 1].map(|_| {
            let goes = midway.goes();
            midway.is_through();
            goes
        });
        assert_eq!((goes, midway.goes()), ([true, true], false));
    }
}
