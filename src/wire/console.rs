//! The console ring: a file of bounded size that holds the newest output of a serial console and the count
//! of all bytes ever written. The VMM writes, any number of readers follow by position, nobody waits for
//! anybody. It survives both the VMM and the daemon.
//!
//! ```text
//!  0        8          16         24          4096                 4096 + capacity
//!  │ magic  │ capacity │ written  │ (zero)     │ data, byte n at n % capacity │
//! ```
//! All numbers are little-endian. The writer puts down at most 1024 bytes before it counts them, so bytes below
//! `written` and above `written - capacity + 1024` are whole. A reader looks at `written` again after it has
//! read, because the writer may have lapped it in between.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::limits::{CONSOLE_RING_BYTES_MAX, CONSOLE_RING_BYTES_MIN};

const MAGIC: &[u8; 8] = b"TOFTCON1";
const DATA: u64 = 4096;

/// No console writes so much; a count above is damage, and adding to it could overflow.
const WRITTEN_MAX: u64 = 1 << 62;

/// Where what is taken over from elsewhere may end at most: whatever is written behind it, the count stays sound.
const ADOPTED_MAX: u64 = WRITTEN_MAX / 2;

/// Most bytes that are put down before they are counted. So many of the oldest are never read, since they may be
/// overwritten at that moment.
const STEP: u64 = 1024;

/// A console ring over an open file.
#[derive(Debug)]
pub struct Ring {
    file: File,
    capacity: u64,
    written: u64,
}

/// A piece of console output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Position of the first byte, counted from the console's first.
    pub start: u64,
    /// The bytes; empty when there is nothing beyond the position asked for.
    pub data: Vec<u8>,
}

impl Piece {
    /// Position after the last byte: where to read next.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.data.len() as u64)
    }
}

impl Ring {
    /// Makes a fresh ring of `capacity` bytes in an empty file. Fails with `InvalidInput` when the capacity is
    /// out of bounds.
    pub fn create(file: File, capacity: u64) -> io::Result<Ring> {
        if !(CONSOLE_RING_BYTES_MIN..=CONSOLE_RING_BYTES_MAX).contains(&capacity) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "capacity of the console ring is out of bounds",
            ));
        }
        file.set_len(DATA.saturating_add(capacity))?;
        file.write_all_at(&0u64.to_le_bytes(), 16)?;
        file.write_all_at(&capacity.to_le_bytes(), 8)?;
        file.write_all_at(MAGIC, 0)?;
        Ok(Ring { file, capacity, written: 0 })
    }

    /// Opens a ring that exists. Fails with `InvalidData` when the header is not one of ours.
    pub fn open(file: File) -> io::Result<Ring> {
        let mut header = [[0; 8]; 3];
        file.read_exact_at(header.as_flattened_mut(), 0)?;
        let [magic, capacity, written] = header;
        let (capacity, written) = (u64::from_le_bytes(capacity), u64::from_le_bytes(written));
        let sound = &magic == MAGIC
            && (CONSOLE_RING_BYTES_MIN..=CONSOLE_RING_BYTES_MAX).contains(&capacity)
            && written <= WRITTEN_MAX
            && file.metadata()?.len() == DATA.saturating_add(capacity);
        if !sound {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a console ring"));
        }
        Ok(Ring { file, capacity, written })
    }

    /// Bytes written in all, as of the last write or read of this handle.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Appends output; returns the new total. Only one handle may write.
    pub fn append(&mut self, data: &[u8]) -> io::Result<u64> {
        let mut position = self.written;
        let mut rest = data;
        while !rest.is_empty() {
            let (offset, room) = self.place(position);
            let (piece, more) = rest.split_at(rest.len().min(room.min(STEP) as usize));
            self.file.write_all_at(piece, DATA.saturating_add(offset))?;
            position = position.saturating_add(piece.len() as u64);
            self.file.write_all_at(&position.to_le_bytes(), 16)?;
            self.written = position;
            rest = more;
        }
        Ok(position)
    }

    /// Puts down what another ring held from `position` on: in a ring that nobody has written to, or where this one goes
    /// on. Anything else is `InvalidInput`. The console's count goes on from there.
    pub fn adopt(&mut self, position: u64, data: &[u8]) -> io::Result<u64> {
        let end = position.saturating_add(data.len() as u64);
        if (self.written != 0 && self.written != position) || end > ADOPTED_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.written = position;
        self.append(data)
    }

    /// Reads at most `length_max` bytes from position `from`. When those bytes have been overwritten, the
    /// piece starts at the oldest byte still held; compare [`Piece::start`] with `from` to see the gap.
    pub fn read(&mut self, from: u64, length_max: usize) -> io::Result<Piece> {
        let before = self.refresh()?;
        let start = from.clamp(self.oldest(before), before);
        let length = before.saturating_sub(start).min(length_max as u64) as usize;
        let mut data = vec![0; length];
        let (offset, room) = self.place(start);
        let (first, second) = data.split_at_mut(length.min(room as usize));
        self.file.read_exact_at(first, DATA.saturating_add(offset))?;
        self.file.read_exact_at(second, DATA)?;
        // The writer may have lapped the oldest of these bytes while they were read.
        let after = self.refresh()?;
        let lapped = self.oldest(after).saturating_sub(start).min(length as u64) as usize;
        data.drain(..lapped);
        Ok(Piece { start: start.saturating_add(lapped as u64), data })
    }

    /// Where in the data byte `position` lies, and how many bytes there are from there to the end.
    fn place(&self, position: u64) -> (u64, u64) {
        // The capacity is within its bounds, so never 0.
        let offset = position.checked_rem(self.capacity).unwrap_or(0);
        (offset, self.capacity.saturating_sub(offset))
    }

    /// The first byte that is not being overwritten when `written` bytes are counted.
    fn oldest(&self, written: u64) -> u64 {
        written.saturating_sub(self.capacity.saturating_sub(STEP))
    }

    /// Bytes written in all, by whichever handle. This one goes on from there.
    pub fn refresh(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, 16)?;
        self.written = u64::from_le_bytes(bytes);
        Ok(self.written)
    }
}

#[cfg(test)]
mod tests;
