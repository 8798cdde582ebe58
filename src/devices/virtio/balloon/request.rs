//! Turns a descriptor chain into ranges of guest memory. Nothing here touches the pages. Input is written by the
//! guest and may be anything; output is page-aligned, but whether it is guest memory is for the backend to find.
use memory::Ram;

use super::config::PAGE_BYTES;
use crate::limits::BALLOON_PAGES_PER_REQUEST_MAX;
use crate::virtio::queue::Chain;

/// A range of guest memory, page-aligned and not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pages {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// A request that broke the protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The pages of a request to inflate: an array of 32-bit page numbers, of which neighbours are joined.
pub(super) fn numbered(memory: &Ram, chain: &Chain) -> Result<Vec<Pages>, Malformed> {
    let bytes = chain.readable_bytes();
    if !bytes.is_multiple_of(4) || bytes / 4 > BALLOON_PAGES_PER_REQUEST_MAX {
        return Err(Malformed);
    }
    let mut data = vec![0; usize::try_from(bytes).map_err(|_| Malformed)?];
    chain.read(memory, 0, &mut data).map_err(|_| Malformed)?;
    let (numbers, _) = data.as_chunks::<4>();
    let mut numbers: Vec<u32> = numbers.iter().map(|number| u32::from_le_bytes(*number)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut pages: Vec<Pages> = Vec::new();
    for number in numbers {
        let start = u64::from(number).saturating_mul(PAGE_BYTES);
        match pages.last_mut() {
            Some(last) if last.start.saturating_add(last.bytes) == start => {
                last.bytes = last.bytes.saturating_add(PAGE_BYTES);
            }
            _ => pages.push(Pages { start, bytes: PAGE_BYTES }),
        }
    }
    Ok(pages)
}

/// The pages of a report: each writable buffer is a free range, of which only whole pages count.
pub(super) fn reported(chain: &Chain) -> impl Iterator<Item = Pages> + '_ {
    chain.writable().iter().filter_map(|segment| {
        let start = segment.address.0.checked_next_multiple_of(PAGE_BYTES)?;
        let end = segment.address.0.checked_add(u64::from(segment.length))?;
        let end = end.checked_sub(end % PAGE_BYTES)?;
        let bytes = end.checked_sub(start).filter(|bytes| *bytes > 0)?;
        Some(Pages { start, bytes })
    })
}
