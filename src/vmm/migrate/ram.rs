//! Memory on its way over one stream: which pages of a shard go, and where those that come belong. Nothing is copied in
//! between, but what is packed: the kernel reads and writes guest memory itself.
use std::io;
use std::time::{Duration, Instant};

use memory::{Extent, Pages, Ram};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use wire::transfer::{self, Head, Kind, SHARD_BYTES};

use super::pack::{Packer, Span, Unpacker};
use super::{Error, Stream};

const PAGE_BYTES: u64 = memory::marks::PAGE_BYTES;

/// Of a page that is not zero, the beginning mostly tells.
const GLANCE_BYTES: usize = 64;

/// Bytes of memory.
pub(crate) fn bytes(ram: &Ram) -> u64 {
    ram.iter().map(|region| region.len()).sum()
}

/// What became of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sum {
    pub(crate) sent_bytes: u64,
    pub(crate) skipped_bytes: u64,
}

/// Where what is sent goes, or a judge in its place.
pub(crate) trait Outlet {
    /// A piece of memory that is not all zeroes.
    fn part(&mut self, part: Extent) -> Result<(), Error>;
    /// A piece of memory that is zero and may have been something else.
    fn zero(&mut self, part: Extent) -> Result<(), Error>;
}

/// Goes through those pages of a shard that are in `pages`. In the first round the other end has nothing yet, so that
/// zeroes need not be told. Of the pages in `touched` it is known that they are no holes.
///
/// Holes are not looked at, which alone would make pages of them, as far as finding them is cheap: those that a row of
/// pages begins with, or that follow a page in `touched`.
pub(crate) fn walk(
    ram: &Ram,
    shard: Extent,
    pages: &Pages,
    touched: &Pages,
    first: bool,
    outlet: &mut impl Outlet,
) -> Result<Sum, Error> {
    let mut all = Sum::default();
    for wanted in pages.extents_of(shard) {
        let sum = walk_row(ram, wanted, touched, first, outlet)?;
        all.sent_bytes += sum.sent_bytes;
        all.skipped_bytes += sum.skipped_bytes;
    }
    Ok(all)
}

/// The same of pages in a row.
pub(super) fn walk_row(
    ram: &Ram,
    wanted: Extent,
    touched: &Pages,
    first: bool,
    outlet: &mut impl Outlet,
) -> Result<Sum, Error> {
    let mut sum = Sum::default();
    let mut flush = |run: Option<(bool, Extent)>| match run {
        None => Ok(()),
        Some((true, extent)) => {
            sum.sent_bytes += extent.bytes;
            outlet.part(extent)
        }
        Some((false, extent)) => {
            sum.skipped_bytes += extent.bytes;
            if first { Ok(()) } else { outlet.zero(extent) }
        }
    };
    let end = wanted.offset + wanted.bytes;
    let mut run: Option<(bool, Extent)> = None;
    // Where the hole ends that was last asked for.
    let mut hole_end = None;
    for offset in (wanted.offset..end).step_by(PAGE_BYTES as usize) {
        let may_hold = if touched.has(offset / PAGE_BYTES) {
            hole_end = None;
            true
        } else {
            let rest = Extent { offset, bytes: end - offset };
            let until = match hole_end {
                Some(until) => until,
                None => memory::first_touched(ram, rest)?.unwrap_or(end),
            };
            hole_end = Some(until);
            offset >= until
        };
        let goes = may_hold && !is_zero(ram, offset)?;
        match &mut run {
            Some((kind, extent)) if *kind == goes => extent.bytes += PAGE_BYTES,
            _ => flush(run.replace((goes, Extent { offset, bytes: PAGE_BYTES })))?,
        }
    }
    flush(run)?;
    Ok(sum)
}

fn is_zero(ram: &Ram, offset: u64) -> Result<bool, Error> {
    let mut glance = [0; GLANCE_BYTES];
    memory::read(ram, offset, &mut glance)?;
    if !memory::is_zero(&glance) {
        return Ok(false);
    }
    let mut page = [0; PAGE_BYTES as usize];
    memory::read(ram, offset, &mut page)?;
    Ok(memory::is_zero(&page))
}

/// Shards of memory that have this stream, ascending.
pub(super) fn shards(memory_bytes: u64, stream: usize, streams: usize) -> impl Iterator<Item = Extent> {
    (stream as u64..memory_bytes.div_ceil(SHARD_BYTES)).step_by(streams.max(1)).map(move |shard| {
        let offset = shard * SHARD_BYTES;
        Extent { offset, bytes: SHARD_BYTES.min(memory_bytes - offset) }
    })
}

/// A stream that takes frames.
pub(super) struct Frames<'a> {
    pub(super) ram: &'a Ram,
    pub(super) stream: &'a mut Stream,
    pub(super) packer: &'a mut Packer,
    pub(super) index: usize,
    /// Waits until so many bytes may go.
    pub(super) before: &'a dyn Fn(u64),
}

impl Outlet for Frames<'_> {
    fn part(&mut self, part: Extent) -> Result<(), Error> {
        let (mut offset, end) = (part.offset, part.offset + part.bytes);
        while offset < end {
            let rest = Extent { offset, bytes: end - offset };
            let piece = Extent { offset, bytes: self.packer.piece_bytes(rest).min(rest.bytes) };
            self.piece(piece)?;
            offset += piece.bytes;
        }
        Ok(())
    }

    fn zero(&mut self, part: Extent) -> Result<(), Error> {
        self.head(Kind::Zero, part)
    }
}

impl Frames<'_> {
    fn piece(&mut self, part: Extent) -> Result<(), Error> {
        let (began, waited) = (Instant::now(), self.stream.waited());
        let (sent_bytes, held) = match self.packer.pack(self.ram, part)? {
            Some(packed) => {
                let held = Self::hold(self.before, packed.len() as u64);
                let sent = transfer::write_packed(self.stream, part.offset, part.bytes as u32, packed);
                sent.map_err(Error::at(self.index))?;
                (packed.len() as u64, held)
            }
            None => {
                let held = Self::hold(self.before, part.bytes);
                self.head(Kind::Part, part)?;
                let sent = memory::send(self.ram, part, self.stream);
                // The pages were read before, so it is the stream.
                sent.map_err(|error| broken(self.index, error))?;
                (part.bytes, held)
            }
        };
        let waited = held + self.stream.waited().saturating_sub(waited);
        self.packer.went(Span { bytes: part.bytes, sent_bytes, took: began.elapsed(), waited });
        Ok(())
    }

    /// Answers for how long.
    fn hold(before: &dyn Fn(u64), bytes: u64) -> Duration {
        let began = Instant::now();
        before(bytes);
        began.elapsed()
    }

    fn head(&mut self, kind: Kind, part: Extent) -> Result<(), Error> {
        let head = Head { kind, length: part.bytes as u32, offset: part.offset };
        head.write(self.stream).map_err(Error::at(self.index))
    }
}

/// A failure of a copy between a stream and guest memory.
fn broken(stream: usize, error: memory::Error) -> Error {
    let cause = wire::transfer::FrameError::Link(std::io::Error::other(error));
    Error::Frame { stream, cause }
}

/// Takes what an admitted head says of memory. `from` stands behind the head.
pub(super) fn take(
    ram: &Ram,
    head: &Head,
    from: &mut (impl io::Read + vm_memory::ReadVolatile),
    unpacker: &mut Unpacker,
    stream: usize,
) -> Result<(), Error> {
    let part = Extent { offset: head.offset, bytes: head.length.into() };
    match head.kind {
        Kind::Part => memory::receive(ram, part, from).map_err(|error| broken(stream, error)),
        Kind::Packed => {
            let packed = head.read_packed(from).map_err(Error::at(stream))?;
            unpacker.unpack(ram, head, &packed, stream)
        }
        Kind::Zero => Ok(memory::clear(ram, part)?),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
