//! Guest memory as one row of bytes, region after region, as it lies in a file: what of it is in use, and copies in and
//! out. Addresses with their holes are the guest's; whoever saves or fills memory counts offsets.
use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

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
        match region.file_offset() {
            Some(file) if region.flags() & libc::MAP_PRIVATE == 0 => {
                let mut at = offset;
                while at < end {
                    let next = sys::memfd::next_data(file.file(), at).map_err(Error::Copy)?;
                    let Some((start, stop)) = next.filter(|(start, _)| *start < end) else { break };
                    found.push(Extent { offset: start, bytes: stop.min(end) - start });
                    at = stop;
                }
            }
            _ => found.push(Extent { offset, bytes: region.len() }),
        }
        offset = end;
    }
    Ok(found)
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

fn copy_error(cause: vm_memory::GuestMemoryError) -> Error {
    Error::Copy(io::Error::other(cause))
}

#[cfg(test)]
mod tests;
