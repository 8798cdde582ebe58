//! What a target does about memory that it is owed: it asks for it, for what somebody waits for first, and for the rest a little at a
//! time: what is asked for ahead is what whoever waits next will wait for, too. Whatever becomes of a stream, what did not come is
//! owed still, and is asked for on the next one.
use std::collections::BTreeSet;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::Extent;
use memory::marks::PAGE_BYTES;
use memory::owed::Owed;
use wire::transfer::{ASK_BYTES_MAX, FrameError, Head, Kind, stream_of};

use super::pack::Unpacker;
use super::ram::shards;
use super::{Error, Shared};
use crate::limits::ASKED_AHEAD_BYTES;

/// All streams of one move.
pub(super) struct Gather {
    shared: Arc<Shared>,
    owed: Arc<Owed>,
    memory_bytes: u64,
    lanes: Vec<Mutex<Lane>>,
    /// Whether all streams have told what is owed.
    is_told: AtomicBool,
}

/// What one stream has been asked for.
#[derive(Default)]
struct Lane {
    /// Offsets of pages that will come over it.
    on_their_way: BTreeSet<u64>,
    /// Where to look for the next ones.
    at: u64,
}

impl Gather {
    pub(super) fn new(shared: &Arc<Shared>, owed: Arc<Owed>, memory_bytes: u64, count: usize) -> Gather {
        let lanes = (0..count).map(|_| Mutex::default()).collect();
        Gather { shared: Arc::clone(shared), owed, memory_bytes, lanes, is_told: AtomicBool::new(false) }
    }

    /// Serves whoever touches what is owed, until nothing is.
    pub(super) fn serve(&self) {
        let served = self.owed.serve(|offset| {
            let stream = stream_of(offset, self.lanes.len() as u64) as usize;
            let Some(mut lane) = self.lane(stream) else { return };
            self.ask_for(stream, &mut lane, Extent { offset, bytes: PAGE_BYTES });
            // Whoever goes through memory needs its neighbours next.
            lane.at = offset + PAGE_BYTES;
        });
        if let Err(error) = served {
            self.shared.fail_with(&error.into());
        }
    }

    /// What the source says that it owes.
    pub(super) fn expect(&self, head: &Head, bits: &[u8]) -> Result<(), Error> {
        // Whatever is said of it later: the machine is not one that has all of its memory.
        self.shared.owes();
        let (words, _) = bits.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        Ok(self
            .owed
            .expect(Extent { offset: head.offset, bytes: words.len() as u64 * 64 * PAGE_BYTES }, &words)?)
    }

    /// Nothing of what was said to be owed on a stream is here any more.
    pub(super) fn synced(&self, stream: usize) -> Result<(), Error> {
        // Though it may be none.
        self.shared.owes();
        self.shared.synced(stream)
    }

    /// All streams have told what is owed.
    pub(super) fn is_told(&self) {
        self.is_told.store(true, Ordering::SeqCst);
    }

    /// Whether something that was asked for on a stream has yet to come. Where all was asked for that there is room for, nothing of
    /// this stream's memory is owed any more when it has.
    pub(super) fn awaits(&self, stream: usize) -> bool {
        self.lane(stream).is_some_and(|lane| !lane.on_their_way.is_empty())
    }

    /// Begins to ask on a stream, on which nothing has been asked for: first what somebody waits for.
    pub(super) fn begin(&self, stream: usize) {
        if let Some(mut lane) = self.lane(stream) {
            *lane = Lane::default();
            for offset in self.owed.wanted() {
                if stream_of(offset, self.lanes.len() as u64) == stream as u64 {
                    self.ask_for(stream, &mut lane, Extent { offset, bytes: PAGE_BYTES });
                }
            }
        }
        self.ask(stream);
        self.look();
    }

    /// Asks for more on a stream, if there is room.
    pub(super) fn ask(&self, stream: usize) {
        let Some(mut lane) = self.lane(stream) else { return };
        while (lane.on_their_way.len() as u64) * PAGE_BYTES < ASKED_AHEAD_BYTES {
            let Some(part) = self.next(stream, &mut lane) else { return };
            self.ask_for(stream, &mut lane, part);
        }
    }

    /// Whether some of a part is owed.
    pub(super) fn owes(&self, part: Extent) -> bool {
        self.owed.first(part).is_some()
    }

    /// Takes what came. The head was admitted.
    pub(super) fn take(
        &self,
        head: &Head,
        from: &mut impl Read,
        unpacker: &mut Unpacker,
        stream: usize,
    ) -> Result<(), Error> {
        let at = Error::at(stream);
        let part = Extent { offset: head.offset, bytes: head.length.into() };
        match head.kind {
            Kind::Part => self.owed.put(part, &head.read_body(from).map_err(&at)?)?,
            Kind::Packed => {
                let packed = head.read_packed(from).map_err(&at)?;
                self.owed.put(part, unpacker.unpacked(head, &packed, stream)?)?;
            }
            Kind::Zero => self.owed.put_zero(part)?,
            other => return Err(at(FrameError::Order(other))),
        }
        if let Some(mut lane) = self.lane(stream) {
            let came: Vec<u64> =
                lane.on_their_way.range(part.offset..part.offset + part.bytes).copied().collect();
            for offset in came {
                lane.on_their_way.remove(&offset);
            }
        }
        self.look();
        Ok(())
    }

    /// Whether all is here.
    fn look(&self) {
        if self.owed.count() == 0 && self.is_told.load(Ordering::SeqCst) {
            self.owed.end();
            self.shared.is_whole();
        }
    }

    /// Pages in a row that are owed and not on their way, not more than are asked for at once: behind what was asked for last, then
    /// from the beginning on.
    fn next(&self, stream: usize, lane: &mut Lane) -> Option<Extent> {
        let found = self.next_between(stream, lane, lane.at, self.memory_bytes);
        let found = found.or_else(|| self.next_between(stream, lane, 0, lane.at));
        lane.at = found.map_or(0, |part| part.offset + part.bytes);
        found
    }

    fn next_between(&self, stream: usize, lane: &Lane, from: u64, to: u64) -> Option<Extent> {
        let cut = |shard: Extent| {
            let (start, end) = (shard.offset.max(from), (shard.offset + shard.bytes).min(to));
            (start < end).then(|| Extent { offset: start, bytes: end - start })
        };
        let shards = shards(self.memory_bytes, stream, self.lanes.len());
        shards.filter_map(cut).find_map(|part| self.next_in(part, lane))
    }

    fn next_in(&self, part: Extent, lane: &Lane) -> Option<Extent> {
        let (mut at, end) = (part.offset, part.offset + part.bytes);
        while let Some(row) = self.owed.first(Extent { offset: at, bytes: end - at }) {
            let pages = (row.offset..row.offset + row.bytes).step_by(PAGE_BYTES as usize);
            let mut free = pages.skip_while(|page| lane.on_their_way.contains(page));
            if let Some(offset) = free.next() {
                let more = free.take_while(|page| !lane.on_their_way.contains(page)).count() as u64;
                return Some(Extent { offset, bytes: ((more + 1) * PAGE_BYTES).min(ASK_BYTES_MAX.into()) });
            }
            at = row.offset + row.bytes;
        }
        None
    }

    /// Asks once for each page.
    fn ask_for(&self, stream: usize, lane: &mut Lane, part: Extent) {
        let pages = (part.offset..part.offset + part.bytes).step_by(PAGE_BYTES as usize);
        let mut is_new = false;
        for page in pages {
            is_new |= lane.on_their_way.insert(page);
        }
        if is_new {
            let ask = Head { kind: Kind::Ask, length: part.bytes as u32, offset: part.offset };
            self.shared.ask(stream, &ask);
        }
    }

    fn lane(&self, stream: usize) -> Option<MutexGuard<'_, Lane>> {
        Some(self.lanes.get(stream)?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
