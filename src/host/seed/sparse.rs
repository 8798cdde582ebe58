//! A file in memory, of which only what is not zeroes takes place. A disk of a megabyte with three short files on it is then a
//! few pages instead of a megabyte that the kernel has to clear for each start.
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};

/// What it is held in, in bytes: pages of the file system that it is written to.
const PIECE_BYTES: usize = 4096;

/// A file of a fixed length, all zeroes at first.
#[derive(Debug)]
pub(super) struct Sparse {
    length: u64,
    position: u64,
    /// By number.
    pieces: BTreeMap<u64, Box<[u8; PIECE_BYTES]>>,
}

impl Sparse {
    /// One of so many bytes, which are whole pieces.
    pub(super) fn new(length: usize) -> Sparse {
        Sparse { length: length as u64, position: 0, pieces: BTreeMap::new() }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// What is in it, with where that begins.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pieces.iter().map(|(number, piece)| (number.saturating_mul(PIECE_BYTES as u64), &piece[..]))
    }

    /// Number of the piece at hand, where in it the position is, and how many of `wanted` bytes it has from there.
    fn place(&self, wanted: usize) -> (u64, usize, usize) {
        let within = (self.position % PIECE_BYTES as u64) as usize;
        let left = usize::try_from(self.length.saturating_sub(self.position)).unwrap_or(usize::MAX);
        (self.position / PIECE_BYTES as u64, within, wanted.min(PIECE_BYTES - within).min(left))
    }
}

impl Read for Sparse {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (number, within, length) = self.place(into.len());
        match self.pieces.get(&number) {
            Some(piece) => into[..length].copy_from_slice(&piece[within..within + length]),
            None => into[..length].fill(0),
        }
        self.position += length as u64;
        Ok(length)
    }
}

impl Write for Sparse {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let (number, within, length) = self.place(from.len());
        let is_kept = self.pieces.contains_key(&number) || from[..length].iter().any(|byte| *byte != 0);
        if is_kept {
            let piece = self.pieces.entry(number).or_insert_with(|| Box::new([0; PIECE_BYTES]));
            piece[within..within + length].copy_from_slice(&from[..length]);
        }
        self.position += length as u64;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = at.ok_or(ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
