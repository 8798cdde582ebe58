//! Memory between a machine and a file, part by part, each with its digest. Whoever calls sees to it that memory holds
//! still.
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use memory::guard::give_way;
use memory::{Extent, Ram};
use sha2::{Digest as _, Sha256};
use wire::saved::Digest;
use wire::saved::table::{PART_BYTES_MAX, Part, Table};

use super::{Error, MemoryFiles};

/// What is still to be copied: parts by their offsets.
pub(crate) struct Parts(BTreeMap<u64, u64>);

impl Parts {
    pub(crate) fn new(extents: &[Extent]) -> Parts {
        Parts(extents.iter().copied().flat_map(cut).map(|part| (part.offset, part.bytes)).collect())
    }

    /// The part that holds `offset`, or else the first.
    fn next(&mut self, offset: Option<u64>) -> Option<Extent> {
        let holds = |offset: u64| {
            let (at, bytes) = self.0.range(..=offset).next_back()?;
            (offset - at < *bytes).then_some(*at)
        };
        let (offset, bytes) = match offset.and_then(holds) {
            Some(at) => self.0.remove_entry(&at)?,
            None => self.0.pop_first()?,
        };
        Some(Extent { offset, bytes })
    }
}

/// Copies parts of memory, as `take` gives them, to the same offsets of `file`, which is empty, but for those that `base`
/// has. `urgent` names an offset for which somebody waits. `step` is told of every byte that was looked at, and ends it by
/// answering no. Answers the table of all parts, and how many bytes were written.
pub(crate) fn copy_out(
    mut parts: Parts,
    memory_bytes: u64,
    (file, base): (&File, Option<&Table>),
    take: impl Fn(Extent, &mut [u8]) -> Result<(), memory::Error>,
    urgent: impl Fn() -> Option<u64>,
    mut step: impl FnMut(u64) -> bool,
) -> Result<(Table, u64), Error> {
    let writing = |cause| Error::File { doing: "write the memory file", cause };
    file.set_len(memory_bytes).map_err(writing)?;
    // Room for all of it, so that the heap does not grow while a guest writes.
    let mut table = Table { memory_bytes, parts: Vec::with_capacity(parts.0.len()) };
    let mut buffer = vec![0; PART_BYTES_MAX as usize];
    let mut written = 0;
    while let Some(part) = parts.next(urgent()) {
        let Extent { offset, bytes } = part;
        let Some(data) = buffer.get_mut(..bytes as usize) else { continue };
        take(part, data)?;
        give_way();
        // What was touched and is zero again needs no space either.
        if !memory::is_zero(data) {
            let digest = Digest(Sha256::digest(&*data).into());
            let part = Part { offset, bytes: bytes as u32, digest };
            give_way();
            if base.is_none_or(|base| !base.holds(&part)) {
                file.write_all_at(data, offset).map_err(writing)?;
                written += bytes;
            }
            table.parts.push(part);
        }
        give_way();
        if !step(bytes) {
            return Err(Error::Cancelled);
        }
    }
    table.parts.sort_unstable_by_key(|part| part.offset);
    file.sync_data().map_err(writing)?;
    Ok((table, written))
}

/// Fills memory, which is all zeroes, with the parts of `table` from `files`. None is used that is not what was saved.
pub(crate) fn copy_in(ram: &Ram, table: &Table, files: &MemoryFiles) -> Result<(), Error> {
    let mut buffer = vec![0; PART_BYTES_MAX as usize];
    for part in &table.parts {
        let Some(data) = buffer.get_mut(..part.bytes as usize) else { continue };
        let read = files.read_exact_at(data, part.offset);
        read.map_err(|cause| Error::File { doing: "read the memory file", cause })?;
        if Digest(Sha256::digest(&*data).into()) != part.digest {
            return Err(Error::Chunk { offset: part.offset });
        }
        memory::fill(ram, part.offset, data)?;
    }
    Ok(())
}

/// Cuts an extent at multiples of the longest part, so that parts of two saves can be compared.
fn cut(extent: Extent) -> impl Iterator<Item = Extent> {
    let end = extent.offset + extent.bytes;
    let mut at = extent.offset;
    std::iter::from_fn(move || {
        let next = (at / u64::from(PART_BYTES_MAX) + 1) * u64::from(PART_BYTES_MAX);
        let part = Extent { offset: at, bytes: next.min(end) - at };
        at = next.min(end);
        (part.bytes > 0).then_some(part)
    })
}
