//! Memory of which a part is still to come while the machine that uses it runs: what is owed is missing, whoever touches it
//! waits, and is told of, so that it can be asked for first. One thread serves those who wait and does nothing else; others put
//! what comes. It knows no stream and no KVM. None of the threads that serve may touch guest memory.
//!
//! ```text
//! new ─▶ expect, expect … (nobody runs; what is there of it goes) ─▶ (machine runs) put, put … ─▶ nothing is owed ─▶ end
//! ```
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use sys::userfaultfd::UserFault;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::mapped::Mapped;
use crate::marks::{self, PAGE_BYTES};
use crate::pages::{Pages, runs};
use crate::ram::{allow_huge_pages, own};
use crate::{Error, Extent, Ram};

/// What of memory is owed.
#[derive(Debug)]
pub struct Owed {
    fault: UserFault,
    mapped: Mapped,
    state: Mutex<State>,
    ended: EventFd,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    /// Nothing from the end on: what is asked later is how much is owed, and not of the memory.
    ram: Option<Arc<Ram>>,
    pages: Pages,
    count: u64,
    /// Pages that somebody waits for, in the order in which they came.
    wanted: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing was ever owed; memory is as any other.
    Nothing,
    Waiting,
    Ended,
}

impl Owed {
    /// Of memory that is a memfd of its own, of which nothing is owed yet; with an open `/dev/userfaultfd`. Fails where the
    /// kernel cannot have missing pages of it waited for.
    pub fn new(device: BorrowedFd<'_>, ram: &Arc<Ram>) -> Result<Owed, Error> {
        let fault = UserFault::missing(device).map_err(Error::Missing)?;
        let mapped = Mapped::of(ram);
        let pages = Pages::of(mapped.bytes() / PAGE_BYTES);
        let state =
            State { stage: Stage::Nothing, ram: Some(Arc::clone(ram)), pages, count: 0, wanted: Vec::new() };
        let ended = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let ended = ended.map_err(|errno| Error::Missing(errno.into()))?;
        // A hole in a huge page may leave its zeroes in place, which nobody would wait for.
        allow_huge_pages(ram, false);
        Ok(Owed { fault, mapped, state: Mutex::new(state), ended })
    }

    /// From now on these pages of a part are owed, given as words of 64 pages, the first page lowest; the part begins and ends
    /// with a word. What is there of them goes. No machine has run on this memory.
    pub fn expect(&self, part: Extent, words: &[u64]) -> Result<(), Error> {
        if words.len() as u64 * 64 * PAGE_BYTES != part.bytes
            || part.offset + part.bytes > self.mapped.bytes()
        {
            return Err(Error::Range { start: part.offset, bytes: part.bytes });
        }
        let ram = {
            let mut state = self.state();
            let Some(ram) = state.ram.clone() else { return Ok(()) };
            if state.stage == Stage::Nothing {
                for (address, bytes) in self.mapped.pieces(u64::MAX) {
                    self.fault.register(address, bytes).map_err(Error::Missing)?;
                }
                // A page that is given back would have to be told from one that is owed.
                ram.iter().for_each(|region| *marks::held(region) = true);
                state.stage = Stage::Waiting;
            }
            let before = state.pages.count_of(part);
            state.pages.add_words(part.offset, words);
            state.count += state.pages.count_of(part) - before;
            ram
        };
        // Without the lock: who touches one of them meanwhile waits for what will come, or has what goes.
        for (inside, bytes) in runs(words) {
            punch(&ram, Extent { offset: part.offset + inside, bytes })?;
        }
        Ok(())
    }

    /// Serves everybody who touches a missing page, until [`Owed::end`]: one that is owed is told to `ask` by its offset, once,
    /// whatever comes of it; any other is zero.
    pub fn serve(&self, mut ask: impl FnMut(u64)) -> Result<(), Error> {
        while let Some(addresses) = self.fault.next(&self.ended).map_err(Error::Missing)? {
            for address in addresses {
                let Some(offset) = self.mapped.page_at(address) else { continue };
                let mut state = self.state();
                if state.stage == Stage::Ended {
                    // Nobody waits any longer, and nothing is missing that could be filled.
                    return Ok(());
                }
                if !state.pages.has(offset / PAGE_BYTES) {
                    // Under the lock: a page that is about to be owed is not made zero behind it.
                    self.fault.fill_zero(address & !(PAGE_BYTES - 1), PAGE_BYTES).map_err(Error::Missing)?;
                } else if !state.wanted.contains(&offset) {
                    state.wanted.push(offset);
                    drop(state);
                    ask(offset);
                }
            }
        }
        Ok(())
    }

    /// Puts what has come of a part, whole pages: of them those that are owed, once.
    pub fn put(&self, part: Extent, data: &[u8]) -> Result<(), Error> {
        let piece = |at: u64, bytes: u64| {
            data.get(at as usize..(at + bytes) as usize)
                .ok_or(Error::Range { start: part.offset + at, bytes })
        };
        self.settle(part, |address, at, bytes| {
            // SAFETY: the range is guest memory, which may change at any time and of which nobody takes anything for granted.
            unsafe { self.fault.fill(address, piece(at, bytes)?) }.map_err(Error::Missing)
        })
    }

    /// The same of a part that is all zeroes. Nothing is made of a page for which nobody waits.
    pub fn put_zero(&self, part: Extent) -> Result<(), Error> {
        self.settle(part, |_, _, _| Ok(()))
    }

    /// Calls for each row of pages of a part that is owed, with its address and where in the part it lies; they are owed no
    /// longer then.
    fn settle(
        &self,
        part: Extent,
        mut fill: impl FnMut(u64, u64, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut state = self.state();
        if state.stage == Stage::Ended {
            return Ok(());
        }
        let mut at = part.offset;
        let end = part.offset + part.bytes;
        while let Some(row) = state.pages.first(Extent { offset: at, bytes: end - at }) {
            self.mapped.each(row, |address, range| {
                fill(address, row.offset - part.offset + range.start, range.end - range.start)
            })?;
            at = row.offset + row.bytes;
            for page in row.offset / PAGE_BYTES..at / PAGE_BYTES {
                state.pages.clear(page);
            }
            state.count -= row.bytes / PAGE_BYTES;
        }
        let State { wanted, pages, .. } = &mut *state;
        let waited: Vec<u64> = wanted.extract_if(.., |offset| !pages.has(*offset / PAGE_BYTES)).collect();
        // Whoever waits for one that stayed missing has zeroes; the others were woken, and are so again.
        for offset in waited {
            self.mapped
                .each(Extent { offset, bytes: PAGE_BYTES }, |address, _| {
                    self.fault.fill_zero(address, PAGE_BYTES)
                })
                .map_err(Error::Missing)?;
        }
        Ok(())
    }

    /// The first row of pages of a part that are owed.
    pub fn first(&self, part: Extent) -> Option<Extent> {
        self.state().pages.first(part)
    }

    /// Offsets of pages that somebody waits for.
    pub fn wanted(&self) -> Vec<u64> {
        self.state().wanted.clone()
    }

    /// How many pages are owed.
    pub fn count(&self) -> u64 {
        self.state().count
    }

    /// Has nobody wait any longer, and ends [`Owed::serve`]. What is still owed is zero from then on: only for memory of which
    /// nothing is, or that no machine will run on. It lets go of the memory.
    pub fn end(&self) {
        let mut state = self.state();
        let ram = state.ram.take();
        if state.stage == Stage::Waiting {
            for (address, bytes) in self.mapped.pieces(u64::MAX) {
                // What cannot be let go of now is so when the descriptor is closed.
                let _ = self.fault.unregister(address, bytes);
            }
            ram.iter().flat_map(|ram| ram.iter()).for_each(|region| *marks::held(region) = false);
        }
        if let Some(ram) = &ram {
            allow_huge_pages(ram, true);
        }
        state.stage = Stage::Ended;
        drop(state);
        // A full counter is readable, too.
        let _ = self.ended.write(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.end();
    }
}

fn punch(ram: &Ram, part: Extent) -> Result<(), Error> {
    let (mut before, end) = (0, part.offset + part.bytes);
    for region in ram.iter() {
        let (from, to) = (part.offset.max(before), end.min(before + region.len()));
        if from < to {
            let (file, _) = own(region).ok_or(Error::Range { start: part.offset, bytes: part.bytes })?;
            let punched = sys::memfd::punch_hole(file.file(), file.start() + (from - before), to - from);
            punched.map_err(Error::Discard)?;
        }
        before += region.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
