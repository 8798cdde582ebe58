//! Where memory lies in this process, for system calls that take addresses of its own: offsets to addresses and back.
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::marks::PAGE_BYTES;
use crate::{Extent, Ram};

/// Where each region lies, in their order.
#[derive(Debug)]
pub(crate) struct Mapped(Vec<Place>);

/// Where a region lies, and what lies before it in memory.
#[derive(Debug)]
struct Place {
    address: u64,
    extent: Extent,
}

impl Mapped {
    pub(crate) fn of(ram: &Ram) -> Mapped {
        let mut offset = 0;
        let place = |region: &crate::ram::Region| {
            let extent = Extent { offset, bytes: region.len() };
            offset += extent.bytes;
            Place { address: region.as_ptr() as u64, extent }
        };
        Mapped(ram.iter().map(place).collect())
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|place| place.extent.bytes).sum()
    }

    /// The offset of the page in which an address lies.
    pub(crate) fn page_at(&self, address: u64) -> Option<u64> {
        let address = address & !(PAGE_BYTES - 1);
        let inside =
            |place: &&Place| address.checked_sub(place.address).is_some_and(|at| at < place.extent.bytes);
        self.0.iter().find(inside).map(|place| place.extent.offset + (address - place.address))
    }

    /// Addresses and bytes of all pieces of at most so many bytes.
    pub(crate) fn pieces(&self, piece_bytes: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().flat_map(move |Place { address, extent }| {
            let starts = (0..extent.bytes).step_by(piece_bytes as usize);
            starts.map(move |done| (address + done, piece_bytes.min(extent.bytes - done)))
        })
    }

    /// Calls with the address of each piece of a part, and which bytes of the part lie there.
    pub(crate) fn each<E>(
        &self,
        part: Extent,
        mut call: impl FnMut(u64, std::ops::Range<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = part.offset + part.bytes;
        for Place { address, extent } in &self.0 {
            let (from, to) = (part.offset.max(extent.offset), end.min(extent.offset + extent.bytes));
            if from < to {
                call(address + (from - extent.offset), from - part.offset..to - part.offset)?;
            }
        }
        Ok(())
    }
}
