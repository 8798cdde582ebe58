//! Memory as it was at one moment, while the machine that writes to it runs on: every page is write-protected, and what
//! is about to be written is kept first. Two threads work with it: one serves faults and does nothing else, the other
//! takes part after part. It knows no file and no KVM.
//!
//! ```text
//! new ─▶ arm, rearm … (machine runs; who writes is noted and let go) ─▶ begin (machine paused) ─▶ take … ─▶ end
//! ```
//!
//! What a write waits for is bounded. Until the moment its page is let go of at once, and after it once the page is kept, behind
//! those of other writers, each of whom waits for one. When [`KEPT_PAGES_MAX`] are kept it waits until its part is taken, which is the
//! next one but for those of writers who came before: for as many parts, of whatever length the caller takes them, as there are
//! threads that write, and the one in hand. [`Guard::waits`] tells what it came to.
//!
//! Three rules hold up the guest as little as can be. Memory is protected and let go of in pieces, since the kernel serves
//! none of the guest's faults in what it is changing, and none at all while it lets go. The state's lock, for which a
//! writer waits, is held for what belongs together and for no system call over many pages. And after each piece the thread
//! that works through memory lets others have its processor.
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use sys::userfaultfd::UserFault;
use vm_memory::GuestMemoryBackend;

use kept::Kept;

use crate::mapped::Mapped;
use crate::marks::{self, PAGE_BYTES};
use crate::pages::{Pages, runs};
use crate::{Error, Extent, Ram, extent};

mod kept;

/// Memory protected or let go of at a time while the machine runs, which takes 150 µs. 1 GiB at once takes 30 ms.
const PIECE_BYTES: u64 = 4 << 20;

/// Words of [`Pages`] that a piece has.
const PIECE_WORDS: usize = (PIECE_BYTES / PAGE_BYTES / 64) as usize;

/// Most pages kept for writers who came before their part was taken: 64 MiB, so that a guest that writes to all of its memory does
/// not double it. A writer beyond waits until its part is taken, which the one that takes parts does next ([`Guard::urgent`]).
const KEPT_PAGES_MAX: u32 = 16_384;

/// Guest memory under write protection.
#[derive(Debug)]
pub struct Guard {
    fault: UserFault,
    ram: Arc<Ram>,
    mapped: Mapped,
    state: Mutex<State>,
    ended: EventFd,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// While armed: pages written since they were last protected, and since the first time.
    fresh: Pages,
    ever: Pages,
    /// After the moment: pages whose contents are still those of the moment.
    pending: Pages,
    /// After the moment: pages that were about to be written, as they were.
    kept: Kept,
    /// Offsets of pages whose writers wait because no more is kept.
    urgent: VecDeque<u64>,
    /// What `pending` was at the moment.
    moment: Vec<u64>,
    /// Pages of writers who wait for their parts, and since when.
    held_up: Vec<(u64, Instant)>,
    waits: Waits,
}

/// What writes have waited, from when their fault was read until their page was let go of. What comes before and after is not in it:
/// until the thread that serves faults was given a processor and had served those it had read before, and until the writer runs
/// again. A write that was interrupted while it waited counts again when it is tried again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waits {
    /// How many waited.
    pub count: u64,
    /// The longest that one did.
    pub longest: Duration,
    /// All of them together.
    pub sum: Duration,
}

impl State {
    /// Since when writers have waited for these pages, who do no more.
    fn let_go(&mut self, pages: Range<u64>) -> Vec<Instant> {
        self.held_up.extract_if(.., |(page, _)| pages.contains(page)).map(|(_, since)| since).collect()
    }
}

impl Waits {
    fn note(&mut self, since: Instant) {
        let waited = since.elapsed();
        self.count += 1;
        self.longest = self.longest.max(waited);
        self.sum += waited;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Arming,
    Copying,
    /// Whatever is written passes.
    Ended,
}

impl Guard {
    /// Prepares to protect all of `ram` and keeps its pages from the host until it is dropped, with an open `/dev/userfaultfd`. Fails where the kernel cannot, as with a
    /// private mapping of a disk's file.
    pub fn new(device: BorrowedFd<'_>, ram: &Arc<Ram>) -> Result<Guard, Error> {
        let fault = UserFault::new(device).map_err(Error::Protect)?;
        let mapped = Mapped::of(ram);
        for (address, bytes) in mapped.pieces(u64::MAX) {
            fault.register(address, bytes).map_err(Error::Protect)?;
        }
        let pages = Pages::of(mapped.bytes() / PAGE_BYTES);
        let state = State {
            phase: Phase::Arming,
            fresh: pages.clone(),
            ever: pages.clone(),
            pending: pages,
            kept: Kept::of(KEPT_PAGES_MAX),
            urgent: VecDeque::new(),
            moment: Vec::new(),
            held_up: Vec::new(),
            waits: Waits::default(),
        };
        let ended = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let ended = ended.map_err(|errno| Error::Protect(errno.into()))?;
        // A page that is given back loses its protection with it.
        ram.iter().for_each(|region| *marks::held(region) = true);
        Ok(Guard { fault, ram: Arc::clone(ram), mapped, state: Mutex::new(state), ended })
    }

    /// What it guards.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Serves everybody who writes to a protected page, until [`Guard::end`]. Run by a thread that writes no guest
    /// memory.
    pub fn serve(&self) -> Result<(), Error> {
        while let Some(addresses) = self.fault.next(&self.ended).map_err(Error::Protect)? {
            let since = Instant::now();
            for address in addresses {
                self.let_write(address, since)?;
            }
        }
        Ok(())
    }

    /// Protects memory no longer, piece by piece, and ends [`Guard::serve`] then: until the last piece, who writes is
    /// served.
    pub fn end(&self) {
        self.state().phase = Phase::Ended;
        for (address, bytes) in self.mapped.pieces(PIECE_BYTES) {
            // What cannot be let go of now is so when the descriptor is closed.
            let _ = self.fault.unregister(address, bytes);
            give_way();
        }
        // A full counter is readable, too.
        let _ = self.ended.write(1);
    }

    /// Protects all of memory, piece by piece; `step` ends it by answering no.
    pub fn arm(&self, mut step: impl FnMut() -> bool) -> Result<bool, Error> {
        for (address, bytes) in self.mapped.pieces(PIECE_BYTES) {
            // Without the lock: a page is written after it was protected only when `let_write` has noted it.
            self.fault.protect(address, bytes).map_err(Error::Protect)?;
            give_way();
            if !step() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Protects what was written since it was protected; answers how many pages that were.
    pub fn rearm(&self) -> Result<usize, Error> {
        self.protect_fresh(give_way)
    }

    fn protect_fresh(&self, after_each: impl Fn()) -> Result<usize, Error> {
        let words = self.state().fresh.words.len();
        let mut count = 0;
        for first in (0..words).step_by(PIECE_WORDS) {
            // First taken, then protected: a page that is noted and let go in between is noted for the next time.
            let Some(fresh) = self.take_fresh(first) else { continue };
            let before = first as u64 * 64 * PAGE_BYTES;
            for (offset, bytes) in runs(&fresh) {
                self.each_mapped(before + offset, bytes, |address, bytes| {
                    self.fault.protect(address, bytes)
                })?;
                count += (bytes / PAGE_BYTES) as usize;
            }
            after_each();
        }
        Ok(count)
    }

    /// The pages of one piece that were written, which are not noted any more; nothing when there are none.
    fn take_fresh(&self, first: usize) -> Option<[u64; PIECE_WORDS]> {
        let mut state = self.state();
        let words = state.fresh.words.get_mut(first..)?;
        let mut fresh = [0; PIECE_WORDS];
        fresh.iter_mut().zip(words).for_each(|(fresh, word)| *fresh = std::mem::take(word));
        fresh.iter().any(|word| *word != 0).then_some(fresh)
    }

    /// Adds what was ever touched to what there will be to take. Asked of [`crate::touched`] after [`Guard::arm`], so
    /// that it and what was written since are all.
    pub fn expect(&self, touched: &[Extent]) {
        let mut state = self.state();
        for extent in touched {
            state.ever.set_range(extent.offset / PAGE_BYTES, (extent.offset + extent.bytes) / PAGE_BYTES);
        }
    }

    /// This is the moment: nothing writes to memory, and nothing did since the caller saw to it.
    pub fn begin(&self) -> Result<(), Error> {
        // Without a pause in between: the machine stands still.
        self.protect_fresh(|| ())?;
        let mut state = self.state();
        state.pending = std::mem::take(&mut state.ever);
        state.moment = state.pending.words.clone();
        state.phase = Phase::Copying;
        Ok(())
    }

    /// What there is to take, ascending.
    pub fn extents(&self) -> Vec<Extent> {
        let moment = std::mem::take(&mut self.state().moment);
        runs(&moment).map(|(offset, bytes)| Extent { offset, bytes }).collect()
    }

    /// Copies a part as it was at the moment, and lets go of it. Pages that nobody had touched then are zero.
    pub fn take(&self, part: Extent, data: &mut [u8]) -> Result<(), Error> {
        // Without the lock: what is still pending afterwards was protected all the while, and the rest is kept.
        extent::read(&self.ram, part.offset, data)?;
        let mut state = self.state();
        let first = part.offset / PAGE_BYTES;
        for (page, bytes) in (first..).zip(data.chunks_mut(PAGE_BYTES as usize)) {
            if state.pending.clear(page) {
                continue;
            }
            match state.kept.take(page) {
                Some(kept) if kept.len() == bytes.len() => bytes.copy_from_slice(kept),
                _ => bytes.fill(0),
            }
        }
        // Nobody joins them: who writes to what is not pending is let go at once.
        let let_go = state.let_go(first..first + part.bytes.div_ceil(PAGE_BYTES));
        drop(state);
        self.each_mapped(part.offset, part.bytes, |address, bytes| self.fault.release(address, bytes))?;
        if !let_go.is_empty() {
            let mut state = self.state();
            let_go.into_iter().for_each(|since| state.waits.note(since));
        }
        Ok(())
    }

    /// The offset of a page whose writer waits until its part is taken, if one does.
    pub fn urgent(&self) -> Option<u64> {
        self.state().urgent.pop_front()
    }

    /// What writes have waited since the first page was protected, of those that were let go.
    pub fn waits(&self) -> Waits {
        self.state().waits
    }

    /// Lets a write go on that waits for a page, `since` when that is known here.
    fn let_write(&self, address: u64, since: Instant) -> Result<(), Error> {
        let address = address & !(PAGE_BYTES - 1);
        let Some(offset) = self.mapped.page_at(address) else { return Ok(()) };
        let page = offset / PAGE_BYTES;
        let mut state = self.state();
        let mut others = Vec::new();
        match state.phase {
            Phase::Arming => {
                state.fresh.set(page);
                state.ever.set(page);
            }
            Phase::Copying if state.pending.has(page) => {
                if !state.kept.keep(page, |bytes| extent::read(&self.ram, offset, bytes))? {
                    state.urgent.push_back(offset);
                    state.held_up.push((page, since));
                    return Ok(());
                }
                state.pending.clear(page);
                // There was no room when others came for it.
                others = state.let_go(page..page + 1);
            }
            Phase::Copying | Phase::Ended => {}
        }
        // Still under the lock: a page that is noted is let go before somebody takes the note to protect it again.
        self.fault.release(address, PAGE_BYTES).map_err(Error::Protect)?;
        others.into_iter().chain([since]).for_each(|since| state.waits.note(since));
        Ok(())
    }

    fn each_mapped(
        &self,
        offset: u64,
        bytes: u64,
        mut change: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> Result<(), Error> {
        let change = |address, range: Range<u64>| change(address, range.end - range.start);
        self.mapped.each(Extent { offset, bytes }, change).map_err(Error::Protect)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets whoever waits for this processor have it: first of all the thread that serves faults, which a writer waits for. A
/// scheduler would let it wait for the rest of this thread's share, several milliseconds.
pub fn give_way() {
    std::thread::yield_now();
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.state().phase != Phase::Ended {
            self.end();
        }
        self.ram.iter().for_each(|region| *marks::held(region) = false);
    }
}

#[cfg(test)]
mod tests;
