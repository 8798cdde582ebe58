//! Memory that was mapped privately from somebody else's file goes into a sealed memfd of its own, piece by piece, where it
//! is: addresses stay, so that neither KVM nor a device has to be told. Who keeps its writers away is whoever uses this.
//!
//! ```text
//! begin ─▶ next ─▶ (copy, as memory is written ─▶ copy what was written, and turn, as nobody writes) for each piece
//! ```
//!
//! A piece that was turned is the file's, whatever becomes of the rest: there is never more than one piece twice, and whoever
//! begins again goes on where the last one left off.
use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::{Error, Extent, Ram, extent, marks, ram};

/// Least memory that is turned at once. So much is copied in 4 ms at the worst, when a guest has written all of it again, and is
/// held twice meanwhile.
const PIECE_BYTES_MIN: u64 = 16 << 20;

/// Most of it: what may be held twice of a server's own memory.
const PIECE_BYTES_MAX: u64 = 64 << 20;

/// Pieces that memory has between these two: a machine stands still once for each.
const PIECES: u64 = 512;

/// A piece begins and ends with a multiple of so much, so that no word of marks belongs to two.
const PIECE_STEP: u64 = 2 << 20;

/// Memory on its way into a file of its own.
#[derive(Debug)]
pub struct Settling {
    ram: Arc<Ram>,
    piece_bytes: u64,
}

/// A part of memory that is turned at once.
#[derive(Debug)]
pub struct Piece {
    ram: Arc<Ram>,
    extent: Extent,
    /// The region that it lies in, and how many bytes of that are before it.
    index: usize,
    inside: u64,
    file: Arc<File>,
    start: u64,
    /// Its part of the file, mapped elsewhere: what is written here is there when it is turned.
    window: MmapRegion<()>,
}

/// How many bytes of memory are private to this process and a file's that others have.
pub fn shared_bytes(ram: &Ram) -> u64 {
    let shared = |region: &ram::Region| region.len() - ram::own(region).map_or(0, |(_, bytes)| bytes);
    ram.iter().map(shared).sum()
}

fn piece_bytes(memory_bytes: u64) -> u64 {
    (memory_bytes / PIECES).next_multiple_of(PIECE_STEP).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX)
}

impl Settling {
    /// Prepares to settle what is left of `ram`. One at a time.
    pub fn begin(ram: &Arc<Ram>) -> Result<Settling, Error> {
        let memory_bytes = ram.iter().map(|region| region.len()).sum();
        let begun = ram.iter().find_map(|region| ram::own(region).map(|(file, _)| Arc::clone(file.arc())));
        let file = match begun {
            Some(file) => file,
            None => Arc::new(ram::fresh_file(memory_bytes)?),
        };
        let mut offset = 0;
        for region in ram.iter() {
            match ram::own(region) {
                // What was copied of a piece that never was turned is of then.
                Some((file, own_bytes)) if own_bytes < region.len() => {
                    let (start, bytes) = (file.start() + own_bytes, region.len() - own_bytes);
                    sys::memfd::punch_hole(file.file(), start, bytes).map_err(Error::Discard)?;
                }
                Some(_) => {}
                None => marks::set_own(region, FileOffset::from_arc(Arc::clone(&file), offset)),
            }
            offset += region.len();
        }
        Ok(Settling { ram: Arc::clone(ram), piece_bytes: piece_bytes(memory_bytes) })
    }

    /// The memory that is settled.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The next piece, if one is left.
    pub fn next(&self) -> Result<Option<Piece>, Error> {
        let mut before = 0;
        for (index, region) in self.ram.iter().enumerate() {
            let Some((file, inside)) = ram::own(region) else { continue };
            if inside < region.len() {
                let bytes = self.piece_bytes.min(region.len() - inside);
                let (start, file) = (file.start() + inside, Arc::clone(file.arc()));
                let extent = Extent { offset: before + inside, bytes };
                let window = window(&file, start, bytes)?;
                let ram = Arc::clone(&self.ram);
                return Ok(Some(Piece { ram, extent, index, inside, file, start, window }));
            }
            before += region.len();
        }
        Ok(None)
    }
}

impl Piece {
    /// Where it lies.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Copies a part of it as it is at this moment.
    pub fn copy(&self, part: Extent) -> Result<(), Error> {
        extent::copy(&self.ram, part, &self.window, self.within(part)?)
    }

    /// A part of it is zero.
    pub fn clear(&self, part: Extent) -> Result<(), Error> {
        sys::memfd::punch_hole(&self.file, self.start + self.within(part)?, part.bytes)
            .map_err(Error::Discard)
    }

    /// Puts the file in its place. Nobody writes to it, and every page of it was copied or cleared since it was last written.
    /// The process ends when the kernel refuses: what is there then nobody knows.
    pub fn turn(&self) -> Result<(), Error> {
        let Extent { offset, bytes } = self.extent;
        let region = self.ram.iter().nth(self.index);
        let left = |region: &&ram::Region| ram::own(region).is_some_and(|(_, own)| own == self.inside);
        let region = region.filter(left).ok_or(Error::Range { start: offset, bytes })?;
        ram::map_over(region, (self.inside, bytes), libc::MAP_SHARED, (&self.file, self.start))
            .unwrap_or_else(|error| ram::lost(&error));
        marks::set_own_bytes(region, self.inside + bytes);
        ram::advise_part(region, self.inside as usize, bytes as usize);
        Ok(())
    }

    /// Bytes of the piece before a part of it.
    fn within(&self, part: Extent) -> Result<u64, Error> {
        let refused = Error::Range { start: part.offset, bytes: part.bytes };
        let before = part.offset.checked_sub(self.extent.offset);
        let end = before.and_then(|before| before.checked_add(part.bytes));
        end.filter(|end| *end <= self.extent.bytes).and(before).ok_or(refused)
    }
}

fn window(file: &Arc<File>, start: u64, bytes: u64) -> Result<MmapRegion<()>, Error> {
    let size = usize::try_from(bytes).map_err(|_| Error::Size(bytes))?;
    let window = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), start))
        .build()
        .map_err(|cause| Error::Map { bytes, cause })?;
    ram::advise(&window);
    Ok(window)
}

#[cfg(test)]
mod tests;
