//! A disk over the one that it was made from: what was written lies in its own file, the rest in a backing file that nobody
//! changes. Which is which the file system knows and nobody else keeps: a block of the own file that is a hole is the backing
//! file's (lseek(2), `SEEK_DATA`). So nothing has to be written beside a block, a crash leaves of each block what was, or what
//! was written, and whoever opens both files finds the same disk. Whoever opens them first after a loss of power takes space away that
//! was given to a block which then was not written ([`sys::holes`]): what is read of its neighbour would make data of it. It knows no request; `backend` holds it, `service` tells it
//! what was written.
//!
//! The price: only whole blocks are written, for which the edges of a write are copied up first, and none becomes a hole
//! again for as long as the backing file may be read, in this process or in the next.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::limits::OVERLAY_PIECE_BYTES;

/// What lies in one file or the other as a whole: the least that a file system's hole has, where it tells them exactly.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// Blocks of one word.
const WORD: u64 = 64;

/// Words of a piece of the bits, which stands for 16 MiB.
const PIECE_WORDS: usize = 64;
const PIECE_BLOCKS: u64 = WORD * PIECE_WORDS as u64;
type Bits = Box<[AtomicU64; PIECE_WORDS]>;

/// Where bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Own,
    Backing,
}

/// The two files, and which blocks are in the first.
#[derive(Debug)]
pub(super) struct Overlay {
    own: Arc<File>,
    backing: Arc<File>,
    /// As far as blocks may lie in the backing file; a multiple of [`BLOCK_BYTES`], but for the end of the disk.
    reach: u64,
    /// One bit for each block up to there, in pieces that are made with the first that is there: the most of a large disk may never be.
    present: Box<[OnceLock<Bits>]>,
    /// How far all is in the own file, filled from the beginning on.
    filled: AtomicU64,
    /// Up to where data is known to follow that.
    data_end: AtomicU64,
    /// All of it is there, for good.
    is_whole: AtomicBool,
}

/// A piece of the backing file that was read, to be filled in.
#[derive(Debug)]
pub struct Piece {
    offset: u64,
    data: Vec<u8>,
}

impl Overlay {
    /// Looks which blocks are there. `bytes` is the disk's length, at least the backing file's.
    pub(super) fn new(own: Arc<File>, backing: Arc<File>, bytes: u64) -> io::Result<Overlay> {
        let length = backing.metadata()?.len();
        if length > bytes {
            let detail = format!("the backing file has {length} bytes, more than the {bytes} of the disk");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, detail));
        }
        let reach = length.next_multiple_of(BLOCK_BYTES).min(bytes);
        let pieces = reach.div_ceil(BLOCK_BYTES).div_ceil(PIECE_BLOCKS);
        let overlay = Overlay {
            own,
            backing,
            reach,
            present: (0..pieces).map(|_| OnceLock::new()).collect(),
            filled: AtomicU64::new(0),
            data_end: AtomicU64::new(0),
            is_whole: AtomicBool::new(false),
        };
        overlay.look(0, reach)?;
        // The ring cannot read zeroes behind the end of a file.
        if !length.is_multiple_of(BLOCK_BYTES) && !overlay.has(length / BLOCK_BYTES) {
            overlay.copy_up(length / BLOCK_BYTES)?;
        }
        Ok(overlay)
    }

    /// For the ring.
    pub(super) fn backing(&self) -> &Arc<File> {
        &self.backing
    }

    fn has(&self, block: u64) -> bool {
        // What is not counted is behind the backing file.
        let Some(piece) = self.present.get((block / PIECE_BLOCKS) as usize) else { return true };
        let word = piece.get().and_then(|bits| bits.get((block % PIECE_BLOCKS / WORD) as usize));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block % WORD) & 1 == 1)
    }

    fn mark(&self, block: u64) {
        let Some(piece) = self.present.get((block / PIECE_BLOCKS) as usize) else { return };
        let bits = piece.get_or_init(|| Box::new([const { AtomicU64::new(0) }; PIECE_WORDS]));
        if let Some(word) = bits.get((block % PIECE_BLOCKS / WORD) as usize) {
            word.fetch_or(1 << (block % WORD), Ordering::Release);
        }
    }

    /// Where the first bytes of a range lie, and how many of them, at most all.
    pub(super) fn place(&self, offset: u64, bytes: u64) -> (Place, u64) {
        let end = offset.saturating_add(bytes);
        if self.is_whole.load(Ordering::Acquire) || offset >= self.reach {
            return (Place::Own, bytes);
        }
        let first = offset / BLOCK_BYTES;
        let is_own = self.has(first);
        let others = first.saturating_add(1)..end.min(self.reach).div_ceil(BLOCK_BYTES);
        let change = others.into_iter().find(|block| self.has(*block) != is_own);
        let stop = match (change, is_own) {
            (Some(block), _) => block.saturating_mul(BLOCK_BYTES),
            (None, true) => end,
            (None, false) => end.min(self.reach),
        };
        (if is_own { Place::Own } else { Place::Backing }, stop.min(end).saturating_sub(offset))
    }

    /// The blocks that a write has in part and that are not there, so that they are to be copied up first.
    pub(super) fn edges(&self, offset: u64, bytes: u64) -> impl Iterator<Item = u64> + '_ {
        let end = offset.saturating_add(bytes);
        let first = (!offset.is_multiple_of(BLOCK_BYTES)).then_some(offset / BLOCK_BYTES);
        let last = (!end.is_multiple_of(BLOCK_BYTES)).then_some(end / BLOCK_BYTES);
        let last = last.filter(|last| first != Some(*last));
        let is_whole = self.is_whole.load(Ordering::Acquire);
        first.into_iter().chain(last).filter(move |block| !is_whole && !self.has(*block))
    }

    /// Has a block be in the own file. Nobody writes to it meanwhile.
    pub(super) fn copy_up(&self, block: u64) -> io::Result<()> {
        let offset = block.saturating_mul(BLOCK_BYTES);
        let mut data = [0; BLOCK_BYTES as usize];
        let bytes = self.reach.saturating_sub(offset).min(BLOCK_BYTES) as usize;
        let data = data.get_mut(..bytes).unwrap_or_default();
        read_as_far(&self.backing, data, offset)?;
        self.own.write_all_at(data, offset)?;
        self.mark(block);
        Ok(())
    }

    /// A write was answered. Its edges were there before.
    pub(super) fn wrote(&self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes);
        let last = if end >= self.reach { self.reach.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES };
        (offset.div_ceil(BLOCK_BYTES)..last).for_each(|block| self.mark(block));
    }

    /// Looks what of a range is there, where that is not known: a write has failed, or was never answered.
    pub(super) fn look(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset.saturating_add(bytes).min(self.reach);
        let mut at = offset;
        while at < end {
            let data = sys::memfd::next_data(&self.own, at)?;
            let Some((start, stop)) = data.filter(|(start, _)| *start < end) else { break };
            let blocks = start / BLOCK_BYTES..stop.min(end).div_ceil(BLOCK_BYTES);
            blocks.into_iter().for_each(|block| self.mark(block));
            at = stop;
        }
        Ok(())
    }

    /// Where the next range at or after `from` begins that may hold something else than zeroes.
    pub(super) fn first_data(&self, from: u64) -> io::Result<Option<u64>> {
        let own = sys::memfd::first_data(&self.own, from)?;
        let backing = sys::memfd::first_data(&self.backing, from)?;
        Ok(own.into_iter().chain(backing).min())
    }

    /// The next range at or after `from` that may hold something else than zeroes, as start and end in bytes.
    pub(super) fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        let own = sys::memfd::next_data(&self.own, from)?;
        let backing = sys::memfd::next_data(&self.backing, from)?;
        Ok(own.into_iter().chain(backing).min_by_key(|(start, _)| *start))
    }

    /// Reads from wherever the bytes lie.
    pub(super) fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (data, offset);
        while !rest.is_empty() {
            let (place, bytes) = self.place(at, rest.len() as u64);
            let Some((piece, behind)) = rest.split_at_mut_checked(bytes as usize) else { break };
            match place {
                Place::Own => self.own.read_exact_at(piece, at)?,
                Place::Backing => read_as_far(&self.backing, piece, at)?,
            }
            (rest, at) = (behind, at.saturating_add(bytes));
        }
        Ok(())
    }

    /// Bytes that may lie in the backing file yet.
    pub(super) fn shared_bytes(&self) -> u64 {
        if self.is_whole.load(Ordering::Acquire) {
            return 0;
        }
        // One more than nothing until all of it is known to be durable.
        self.reach.saturating_sub(self.filled.load(Ordering::Acquire)).max(1)
    }

    /// Reads the next piece that is to be filled in; nothing when there is none.
    pub(super) fn read_ahead(&self) -> io::Result<Option<Piece>> {
        let from = self.filled.load(Ordering::Acquire);
        let known_end = self.data_end.load(Ordering::Acquire);
        let data = match known_end > from {
            true => Some((from, known_end)),
            false => sys::memfd::next_data(&self.backing, from)?.filter(|(start, _)| *start < self.reach),
        };
        let Some((start, end)) = data else {
            self.filled.store(self.reach, Ordering::Release);
            return Ok(None);
        };
        let offset = start.saturating_sub(start % BLOCK_BYTES);
        let end = end.next_multiple_of(BLOCK_BYTES).min(self.reach);
        self.data_end.store(end, Ordering::Release);
        let mut data = vec![0; end.saturating_sub(offset).min(OVERLAY_PIECE_BYTES) as usize];
        read_as_far(&self.backing, &mut data, offset)?;
        Ok(Some(Piece { offset, data }))
    }

    /// Fills in what of a piece is not there. Nobody writes to the disk meanwhile.
    pub(super) fn fill(&self, piece: &Piece) -> io::Result<()> {
        let end = piece.offset.saturating_add(piece.data.len() as u64);
        let mut at = piece.offset;
        while at < end {
            let (place, bytes) = self.place(at, end.saturating_sub(at));
            if place == Place::Backing {
                let from = at.saturating_sub(piece.offset) as usize;
                let data = piece.data.get(from..from.saturating_add(bytes as usize)).unwrap_or_default();
                self.own.write_all_at(data, at)?;
                self.wrote(at, bytes);
            }
            at = at.saturating_add(bytes.max(1));
        }
        self.filled.store(end, Ordering::Release);
        Ok(())
    }

    /// All of it is filled in, and durable.
    pub(super) fn make_whole(&self) {
        self.is_whole.store(true, Ordering::Release);
    }
}

/// Reads what there is; behind the end of the file are zeroes.
fn read_as_far(file: &File, data: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(bytes) => done = done.saturating_add(bytes),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}
