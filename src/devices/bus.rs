//! An address space (memory-mapped or ports) as a sorted list of regions. It holds no device state and takes no
//! lock: `vmm` fills it before the vCPUs run, and every vCPU then looks things up in it at once.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A range of addresses that answers. Called by several vCPUs at once, with any length and alignment the guest
/// likes; the range itself is already checked to lie inside the region.
pub trait Region: Send + Sync {
    /// Fills `data` with what lies at `offset` from the region's start.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` from the region's start.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Whether something answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A region took the access.
    Claimed,
    /// Nothing is there; reads gave all ones, as a bus without a driver floats.
    Unclaimed,
}

/// Why a region cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("{base:#x} + {length:#x} is no range of addresses")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Another region is there.
    #[error("{base:#x} + {length:#x} overlaps another region")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        length: u64,
    },
}

/// An address space.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, disjoint.
    entries: Vec<Entry>,
}

struct Entry {
    base: u64,
    /// The last address inside, so that a region may end at the top of the address space.
    last: u64,
    region: Arc<dyn Region>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Puts `region` at `base`, `length` bytes long.
    pub fn insert(&mut self, base: u64, length: u64, region: Arc<dyn Region>) -> Result<(), BusError> {
        let last = length.checked_sub(1).and_then(|more| base.checked_add(more));
        let last = last.ok_or(BusError::Range { base, length })?;
        let at = self.entries.partition_point(|entry| entry.base < base);
        let before = at.checked_sub(1).and_then(|at| self.entries.get(at));
        let hits_before = before.is_some_and(|entry| entry.last >= base);
        let hits_after = self.entries.get(at).is_some_and(|entry| entry.base <= last);
        if hits_before || hits_after {
            return Err(BusError::Overlap { base, length });
        }
        self.entries.insert(at, Entry { base, last, region });
        Ok(())
    }

    /// Reads at `address`. An access that does not lie wholly inside one region reads all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Claim {
        match self.find(address, data.len()) {
            Some((region, offset)) => {
                region.read(offset, data);
                Claim::Claimed
            }
            None => {
                data.fill(0xFF);
                Claim::Unclaimed
            }
        }
    }

    /// Writes at `address`. An access that does not lie wholly inside one region goes nowhere.
    pub fn write(&self, address: u64, data: &[u8]) -> Claim {
        match self.find(address, data.len()) {
            Some((region, offset)) => {
                region.write(offset, data);
                Claim::Claimed
            }
            None => Claim::Unclaimed,
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn Region, u64)> {
        let more = u64::try_from(length).ok()?.checked_sub(1)?;
        let last = address.checked_add(more)?;
        let at = self.entries.partition_point(|entry| entry.base <= address).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        if last > entry.last {
            return None;
        }
        Some((entry.region.as_ref(), address.checked_sub(entry.base)?))
    }
}

/// Fills `data` with what `image` holds at `offset`; beyond the image's end reads zero.
pub fn read_image(image: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// `data` as a little-endian number; bytes beyond the eighth are left out.
pub fn little_endian(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

/// Takes a lock whose holder cannot leave its data half changed in a way that matters, so that one panic in a
/// test or a debug build does not become many.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
