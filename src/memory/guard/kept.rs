//! Pages that were about to be written, as they were. All its memory is there from the beginning: a heap that grows takes
//! the lock of the process's mappings, for which every fault of the guest waits.
use std::collections::HashMap;

use crate::Error;
use crate::marks::PAGE_BYTES;

/// Pages by their numbers, so many at most.
#[derive(Debug)]
pub(super) struct Kept {
    /// Where in `bytes` a page lies, counted in pages.
    places: HashMap<u64, u32>,
    free: Vec<u32>,
    /// Zeroes of the kernel's, of which none is made before it is written.
    bytes: Box<[u8]>,
}

impl Kept {
    pub(super) fn of(pages: u32) -> Kept {
        Kept {
            places: HashMap::with_capacity(pages as usize),
            free: (0..pages).rev().collect(),
            bytes: vec![0; pages as usize * PAGE_BYTES as usize].into_boxed_slice(),
        }
    }

    /// Keeps what `read` writes of a page; answers no when there is no room.
    pub(super) fn keep(
        &mut self,
        page: u64,
        read: impl FnOnce(&mut [u8]) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let Some(place) = self.free.pop() else { return Ok(false) };
        read(self.at(place))?;
        self.places.insert(page, place);
        Ok(true)
    }

    /// What was kept of a page, which may be kept again until the next call.
    pub(super) fn take(&mut self, page: u64) -> Option<&[u8]> {
        let place = self.places.remove(&page)?;
        self.free.push(place);
        Some(self.at(place))
    }

    fn at(&mut self, place: u32) -> &mut [u8] {
        let start = place as usize * PAGE_BYTES as usize;
        self.bytes.get_mut(start..start + PAGE_BYTES as usize).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(byte: u8) -> impl FnOnce(&mut [u8]) -> Result<(), Error> {
        move |bytes| {
            bytes.fill(byte);
            Ok(())
        }
    }

    #[test]
    fn pages_are_given_back_as_they_were_and_make_room_for_others() {
        let mut kept = Kept::of(2);
        assert!(kept.keep(7, fill(7)).unwrap());
        assert!(kept.keep(1 << 40, fill(8)).unwrap());
        assert!(!kept.keep(9, |_| panic!("nothing is read without room")).unwrap());
        assert!(kept.take(9).is_none());
        assert!(kept.take(7).unwrap().iter().all(|byte| *byte == 7));
        assert!(kept.take(7).is_none());
        assert!(kept.keep(9, fill(9)).unwrap());
        for (page, byte) in [(1 << 40, 8), (9, 9)] {
            let found = kept.take(page).unwrap();
            assert!(found.len() == PAGE_BYTES as usize && found.iter().all(|found| *found == byte));
        }
    }
}
