//! Guest memory as one row of bytes, region after region, as it lies in a file: what of it is in use, and copies in and
//! out. Addresses with their holes are the guest's; whoever saves or fills memory counts offsets.
use std::io;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile, VolatileMemory,
    VolatileMemoryError, WriteVolatile,
};

use crate::ram::own;
use crate::{Error, Ram};

/// A part of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes before it.
    pub offset: u64,
    /// Bytes in it.
    pub bytes: u64,
}

/// What may hold something else than zeroes, ascending. Pages that nobody ever touched are not in it; of memory that
/// is mapped privately, all is.
pub fn touched(ram: &Ram) -> Result<Vec<Extent>, Error> {
    let mut found = Vec::new();
    let mut offset = 0;
    for region in ram.iter() {
        let end = offset + region.len();
        let mut own_end = offset;
        if let Some((file, own_bytes)) = own(region) {
            own_end += own_bytes;
            let mut at = offset;
            while at < own_end {
                let next = sys::memfd::next_data(file.file(), at).map_err(Error::Copy)?;
                let Some((start, stop)) = next.filter(|(start, _)| *start < own_end) else { break };
                found.push(Extent { offset: start, bytes: stop.min(own_end) - start });
                at = stop;
            }
        }
        if own_end < end {
            found.push(Extent { offset: own_end, bytes: end - own_end });
        }
        offset = end;
    }
    Ok(found)
}

/// Where in a part the first page is that may hold something else than zeroes, if there is one. Looking makes none; of
/// memory that is mapped privately, that is the first of all. Cheap, however large the memory is: where a row of touched
/// pages ends is not looked for.
pub fn first_touched(ram: &Ram, part: Extent) -> Result<Option<u64>, Error> {
    let mut before = 0;
    for region in ram.iter() {
        let (from, to) = (part.offset.max(before), (part.offset + part.bytes).min(before + region.len()));
        let own = own(region);
        let own_end = before + own.map_or(0, |(_, bytes)| bytes);
        let first = match own {
            _ if from >= to => None,
            Some((file, _)) if from < own_end => {
                let first = sys::memfd::first_data(file.file(), from).map_err(Error::Copy)?;
                // Behind what is its own anything may be.
                first
                    .map(|first| first.min(own_end))
                    .or((own_end < to).then_some(own_end))
                    .filter(|first| *first < to)
            }
            _ => Some(from),
        };
        if first.is_some() {
            return Ok(first);
        }
        before += region.len();
    }
    Ok(None)
}

/// Writes a part as it is at this moment, with no copy of ours in between.
pub fn send(ram: &Ram, part: Extent, to: &mut impl WriteVolatile) -> Result<(), Error> {
    each_part(ram, part.offset, part.bytes as usize, |address, from, end| {
        let slice = ram.get_slice(address, end - from).map_err(copy_error)?;
        to.write_all_volatile(&slice).map_err(volatile_error)
    })
}

/// Fills a part with what is read, with no copy of ours in between.
pub fn receive(ram: &Ram, part: Extent, from: &mut impl ReadVolatile) -> Result<(), Error> {
    each_part(ram, part.offset, part.bytes as usize, |address, start, end| {
        let mut slice = ram.get_slice(address, end - start).map_err(copy_error)?;
        from.read_exact_volatile(&mut slice).map_err(volatile_error)
    })
}

/// Copies a part to other memory, from byte `at` of that on, with no copy of ours in between.
pub(crate) fn copy(from: &Ram, part: Extent, to: &impl VolatileMemory, at: u64) -> Result<(), Error> {
    each_part(from, part.offset, part.bytes as usize, |address, start, end| {
        let source = from.get_slice(address, end - start).map_err(copy_error)?;
        let place = to.get_slice(at as usize + start, end - start).map_err(volatile_error)?;
        source.copy_to_volatile_slice(place);
        Ok(())
    })
}

/// Copies from `offset` into the whole of `data`.
pub fn read(ram: &Ram, offset: u64, data: &mut [u8]) -> Result<(), Error> {
    each_part(ram, offset, data.len(), |address, from, to| {
        ram.read_slice(data.get_mut(from..to).unwrap_or_default(), address).map_err(copy_error)
    })
}

/// Copies the whole of `data` to `offset`.
pub fn fill(ram: &Ram, offset: u64, data: &[u8]) -> Result<(), Error> {
    each_part(ram, offset, data.len(), |address, from, to| {
        ram.write_slice(data.get(from..to).unwrap_or_default(), address).map_err(copy_error)
    })
}

/// Makes a part zero, and gives its pages back to the host.
pub fn clear(ram: &Ram, part: Extent) -> Result<(), Error> {
    each_part(ram, part.offset, part.bytes as usize, |address, from, to| {
        crate::discard(ram, address, (to - from) as u64)
    })
}

/// Whether there are only zeroes.
pub fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Cuts a range at the ends of regions: calls with the guest's address, and which bytes of the range lie there.
fn each_part(
    ram: &Ram,
    offset: u64,
    length: usize,
    mut copy: impl FnMut(GuestAddress, usize, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let (mut before, mut done) = (0, 0);
    for region in ram.iter() {
        let at = offset + done as u64;
        let end = before + region.len();
        if done < length && (before..end).contains(&at) {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(length - done);
            copy(GuestAddress(region.start_addr().0 + (at - before)), done, done + part)?;
            done += part;
        }
        before = end;
    }
    if done == length { Ok(()) } else { Err(Error::Range { start: offset, bytes: length as u64 }) }
}

fn volatile_error(cause: VolatileMemoryError) -> Error {
    match cause {
        VolatileMemoryError::IOError(cause) => Error::Copy(cause),
        other => Error::Copy(io::Error::other(other)),
    }
}

fn copy_error(cause: vm_memory::GuestMemoryError) -> Error {
    Error::Copy(io::Error::other(cause))
}

#[cfg(test)]
mod tests;
