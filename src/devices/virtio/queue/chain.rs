//! One descriptor chain, read once and checked: typed data that no later write of the guest changes. It touches
//! buffers only in [`Chain::read`] and [`Chain::write`].
use memory::Ram;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::Fault;
use crate::limits::CHAIN_DESCRIPTORS_MAX;

/// One buffer of a chain. Not empty; whether it lies in guest memory is seen when it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// How many bytes it has.
    pub length: u32,
}

/// A chain: what the device may read, then what it may write. Both have at most 2³² - 1 bytes together.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of `segments` are readable.
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
}

/// Why a buffer could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BufferError {
    /// The chain is shorter than that.
    #[error("bytes {offset}..+{length} are outside the chain")]
    Range {
        /// First byte.
        offset: u32,
        /// How many bytes.
        length: usize,
    },
    /// A buffer is not guest memory.
    #[error("a buffer lies outside guest memory")]
    Memory(#[source] GuestMemoryError),
}

impl Chain {
    pub(super) fn parse(
        mut descriptors: DescriptorChain<&Ram>,
        mut segments: Vec<Segment>,
    ) -> Result<Chain, Fault> {
        let head = descriptors.head_index();
        segments.clear();
        let (mut count, mut readable) = (0_usize, 0_usize);
        let (mut readable_bytes, mut writable_bytes) = (0_u32, 0_u32);
        // The iterator ends early on whatever is wrong, so a chain is whole only if its last descriptor says so.
        let mut whole = false;
        for descriptor in descriptors.by_ref() {
            count = count.saturating_add(1);
            if count > CHAIN_DESCRIPTORS_MAX {
                return Err(Fault::ChainTooLong { head });
            }
            whole = !descriptor.has_next();
            let length = descriptor.len();
            if descriptor.is_write_only() {
                writable_bytes = writable_bytes.saturating_add(length);
            } else if writable_bytes > 0 || segments.len() > readable {
                return Err(Fault::Order { head });
            } else {
                readable_bytes = readable_bytes.saturating_add(length);
            }
            if length == 0 {
                continue;
            }
            segments.push(Segment { address: descriptor.addr(), length });
            if !descriptor.is_write_only() {
                readable = segments.len();
            }
        }
        if !whole {
            return Err(Fault::Chain { head, descriptors: count });
        }
        Ok(Chain { head, segments, readable, readable_bytes, writable_bytes })
    }

    /// Index of the first descriptor, the chain's name in the rings.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers the device may read.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// The buffers the device may write.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// How many buffers it has.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Bytes in [`Chain::readable`].
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Bytes in [`Chain::writable`].
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Bytes `offset..offset + length` of the readable part as buffers; less when the part is shorter.
    pub fn readable_at(&self, offset: u32, length: u32) -> impl Iterator<Item = Segment> + '_ {
        cut(self.readable(), offset, length)
    }

    /// Bytes `offset..offset + length` of the writable part as buffers; less when the part is shorter.
    pub fn writable_at(&self, offset: u32, length: u32) -> impl Iterator<Item = Segment> + '_ {
        cut(self.writable(), offset, length)
    }

    /// Copies bytes from `offset` of the readable part into the whole of `data`.
    pub fn read(&self, memory: &Ram, offset: u32, data: &mut [u8]) -> Result<(), BufferError> {
        let length = within(self.readable_bytes, offset, data.len())?;
        let mut rest = data;
        for segment in self.readable_at(offset, length) {
            let Some((piece, more)) = rest.split_at_mut_checked(segment.length as usize) else { break };
            memory.read_slice(piece, segment.address).map_err(BufferError::Memory)?;
            rest = more;
        }
        Ok(())
    }

    /// Copies the whole of `data` to `offset` of the writable part.
    pub fn write(&self, memory: &Ram, offset: u32, data: &[u8]) -> Result<(), BufferError> {
        let length = within(self.writable_bytes, offset, data.len())?;
        let mut rest = data;
        for segment in self.writable_at(offset, length) {
            let Some((piece, more)) = rest.split_at_checked(segment.length as usize) else { break };
            memory.write_slice(piece, segment.address).map_err(BufferError::Memory)?;
            rest = more;
        }
        Ok(())
    }

    pub(super) fn into_storage(self) -> Vec<Segment> {
        self.segments
    }
}

/// The length as the chain counts, if `length` bytes from `offset` are among the `total`.
fn within(total: u32, offset: u32, length: usize) -> Result<u32, BufferError> {
    let refused = BufferError::Range { offset, length };
    let Ok(length) = u32::try_from(length) else { return Err(refused) };
    match offset.checked_add(length) {
        Some(end) if end <= total => Ok(length),
        _ => Err(refused),
    }
}

/// The part of `segments` that holds bytes `offset..offset + length`.
fn cut(segments: &[Segment], offset: u32, length: u32) -> impl Iterator<Item = Segment> + '_ {
    let (mut skip, mut left) = (offset, length);
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.length);
        skip = skip.saturating_sub(skipped);
        let taken = segment.length.saturating_sub(skipped).min(left);
        left = left.saturating_sub(taken);
        if taken == 0 {
            return None;
        }
        // A start that wraps is outside memory, and saturation keeps it there.
        let address = GuestAddress(segment.address.0.saturating_add(u64::from(skipped)));
        Some(Segment { address, length: taken })
    })
}
