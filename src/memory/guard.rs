//! Memory as it was at one moment, while the machine that writes to it runs on: every page is write-protected, and what
//! is about to be written is kept first. Two threads work with it: one serves faults and does nothing else, the other
//! takes part after part. It knows no file and no KVM.
//!
//! ```text
//! new ─▶ arm, rearm … (machine runs; who writes is noted and let go) ─▶ begin (machine paused) ─▶ take … ─▶ drop
//! ```
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sys::userfaultfd::UserFault;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::marks::{self, PAGE_BYTES};
use crate::pages::{Pages, runs};
use crate::{Error, Extent, Ram, extent};

/// Memory protected at a time while the machine runs. Protecting 1 GiB at once holds up the guest for 30 ms.
const ARM_BYTES: u64 = 16 << 20;

/// Most pages kept for writers who came before their part was taken: 64 MiB. Writers beyond wait for their part.
const KEPT_PAGES_MAX: usize = 16_384;

/// Guest memory under write protection.
#[derive(Debug)]
pub struct Guard {
    fault: UserFault,
    ram: Arc<Ram>,
    regions: Vec<Mapped>,
    state: Mutex<State>,
    ended: EventFd,
}

/// Where a region lies in this process, and what lies before it in memory.
#[derive(Debug)]
struct Mapped {
    address: u64,
    extent: Extent,
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
    kept: BTreeMap<u64, Box<[u8]>>,
    /// Offsets of pages whose writers wait because no more is kept.
    urgent: VecDeque<u64>,
    /// What `pending` was at the moment.
    moment: Vec<u64>,
    /// Writes that had to wait for the moment's page to be kept.
    faults: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Arming,
    Copying,
}

impl Guard {
    /// Prepares to protect all of `ram` and keeps its pages from the host until it is dropped, with an open `/dev/userfaultfd`. Fails where the kernel cannot, as with a
    /// private mapping of a disk's file.
    pub fn new(device: BorrowedFd<'_>, ram: &Arc<Ram>) -> Result<Guard, Error> {
        let fault = UserFault::new(device).map_err(Error::Protect)?;
        let (mut regions, mut offset) = (Vec::new(), 0);
        for region in ram.iter() {
            let (address, bytes) = (region.as_ptr() as u64, region.len());
            fault.register(address, bytes).map_err(Error::Protect)?;
            regions.push(Mapped { address, extent: Extent { offset, bytes } });
            offset += bytes;
        }
        let pages = Pages::of(offset / PAGE_BYTES);
        let state = State {
            phase: Phase::Arming,
            fresh: pages.clone(),
            ever: pages.clone(),
            pending: pages,
            kept: BTreeMap::new(),
            urgent: VecDeque::new(),
            moment: Vec::new(),
            faults: 0,
        };
        let ended = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let ended = ended.map_err(|errno| Error::Protect(errno.into()))?;
        // A page that is given back loses its protection with it.
        ram.iter().for_each(|region| *marks::held(region) = true);
        Ok(Guard { fault, ram: Arc::clone(ram), regions, state: Mutex::new(state), ended })
    }

    /// What it guards.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Serves everybody who writes to a protected page, until [`Guard::end`]. Run by a thread that writes no guest
    /// memory.
    pub fn serve(&self) -> Result<(), Error> {
        loop {
            let mut asked = [
                PollFd::new(self.fault.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.ended.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut asked, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::Protect(errno.into())),
            }
            if self.ended.read().is_ok() {
                return Ok(());
            }
            for address in self.fault.waiting().map_err(Error::Protect)? {
                self.let_write(address)?;
            }
        }
    }

    /// Ends [`Guard::serve`]. Whoever waits is let go when the guard is dropped.
    pub fn end(&self) {
        // A full counter is readable, too.
        let _ = self.ended.write(1);
    }

    /// Protects all of memory, piece by piece; `step` ends it by answering no.
    pub fn arm(&self, mut step: impl FnMut() -> bool) -> Result<bool, Error> {
        for Mapped { address, extent } in &self.regions {
            let mut done = 0;
            while done < extent.bytes {
                let bytes = ARM_BYTES.min(extent.bytes - done);
                // Under the lock, so that no page that was written after it was protected counts as not written.
                let state = self.state();
                self.fault.protect(address + done, bytes).map_err(Error::Protect)?;
                drop(state);
                if !step() {
                    return Ok(false);
                }
                done += bytes;
            }
        }
        Ok(true)
    }

    /// Protects what was written since it was protected; answers how many pages that were.
    pub fn rearm(&self) -> Result<usize, Error> {
        let mut state = self.state();
        let fresh = std::mem::take(&mut state.fresh.words);
        state.fresh = Pages::of(fresh.len() as u64 * 64);
        let mut count = 0;
        for (offset, bytes) in runs(&fresh) {
            self.each_mapped(offset, bytes, |address, bytes| self.fault.protect(address, bytes))?;
            count += (bytes / PAGE_BYTES) as usize;
        }
        Ok(count)
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
        self.rearm()?;
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
        let mut state = self.state();
        extent::read(&self.ram, part.offset, data)?;
        let first = part.offset / PAGE_BYTES;
        for (page, bytes) in (first..).zip(data.chunks_mut(PAGE_BYTES as usize)) {
            if state.pending.clear(page) {
                continue;
            }
            match state.kept.remove(&page) {
                Some(kept) if kept.len() == bytes.len() => bytes.copy_from_slice(&kept),
                _ => bytes.fill(0),
            }
        }
        self.each_mapped(part.offset, part.bytes, |address, bytes| self.fault.release(address, bytes))
    }

    /// The offset of a page whose writer waits until its part is taken, if one does.
    pub fn urgent(&self) -> Option<u64> {
        self.state().urgent.pop_front()
    }

    /// How many writes had to wait since the moment.
    pub fn faults(&self) -> u64 {
        self.state().faults
    }

    fn let_write(&self, address: u64) -> Result<(), Error> {
        let address = address & !(PAGE_BYTES - 1);
        let inside =
            |mapped: &&Mapped| address.checked_sub(mapped.address).is_some_and(|at| at < mapped.extent.bytes);
        let Some(mapped) = self.regions.iter().find(inside) else { return Ok(()) };
        let offset = mapped.extent.offset + (address - mapped.address);
        let page = offset / PAGE_BYTES;
        let mut state = self.state();
        match state.phase {
            Phase::Arming => {
                state.fresh.set(page);
                state.ever.set(page);
            }
            Phase::Copying if state.pending.has(page) => {
                state.faults += 1;
                if state.kept.len() >= KEPT_PAGES_MAX {
                    state.urgent.push_back(offset);
                    return Ok(());
                }
                let mut bytes = vec![0; PAGE_BYTES as usize].into_boxed_slice();
                extent::read(&self.ram, offset, &mut bytes)?;
                state.kept.insert(page, bytes);
                state.pending.clear(page);
            }
            Phase::Copying => {}
        }
        self.fault.release(address, PAGE_BYTES).map_err(Error::Protect)
    }

    fn each_mapped(
        &self,
        offset: u64,
        bytes: u64,
        mut change: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> Result<(), Error> {
        let end = offset + bytes;
        for Mapped { address, extent } in &self.regions {
            let (from, to) = (offset.max(extent.offset), end.min(extent.offset + extent.bytes));
            if from < to {
                change(address + (from - extent.offset), to - from).map_err(Error::Protect)?;
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.ram.iter().for_each(|region| *marks::held(region) = false);
    }
}

#[cfg(test)]
mod tests;
