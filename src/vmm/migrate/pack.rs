//! Memory that is packed on its way, where the link is slower than this processor: Zstandard at its quickest, a piece at a
//! time, on the thread of its stream. What comes unpacked is bounded by what its head says, which was judged before.
use std::time::Duration;

use memory::{Extent, Ram};
use wire::transfer::{FrameError, Head, PACKED_BYTES_MAX};
use zstd_safe::{CCtx, DCtx};

use super::Error;

/// The quickest that still finds most.
const LEVEL: i32 = 1;

/// Memory after which it is judged again whether to pack, in bytes.
const SPAN_BYTES: u64 = 16 << 20;

/// Spans in which packing is not tried again once it has won nothing.
const SPANS_WITHOUT: u32 = 32;

/// Packs the memory of one stream.
pub(super) struct Packer {
    context: CCtx<'static>,
    memory: Vec<u8>,
    packed: Vec<u8>,
    gauge: Gauge,
}

/// Unpacks the memory of one stream.
pub(super) struct Unpacker {
    context: DCtx<'static>,
    memory: Vec<u8>,
}

/// Whether packing is worth it: pure arithmetic over what went.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Gauge {
    packs: bool,
    /// Spans for which it is not tried.
    without: u32,
    /// Bytes a second of memory that went as it is, in the last such span.
    plain_rate: u64,
    span: Span,
}

/// A stretch of one stream.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Memory that went.
    pub(super) bytes: u64,
    /// What it took on the stream.
    pub(super) sent_bytes: u64,
    /// Since it began.
    pub(super) took: Duration,
    /// Of that, how long was waited for the stream to take more, or for more to be allowed.
    pub(super) waited: Duration,
}

impl Gauge {
    /// Something has gone.
    fn went(&mut self, span: Span) {
        let Span { bytes, sent_bytes, took, waited } = &mut self.span;
        *bytes += span.bytes;
        *sent_bytes += span.sent_bytes;
        *took += span.took;
        *waited += span.waited;
        if *bytes < SPAN_BYTES {
            return;
        }
        let Span { bytes, sent_bytes, took, waited } = std::mem::take(&mut self.span);
        let rate = u64::try_from(u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1));
        let rate = rate.unwrap_or(u64::MAX);
        if self.packs {
            // One that is not smaller, or takes longer to pack than to send.
            if sent_bytes > bytes / 10 * 9 || rate < self.plain_rate {
                (self.packs, self.without) = (false, SPANS_WITHOUT);
            }
        } else {
            self.plain_rate = rate;
            self.without = self.without.saturating_sub(1);
            self.packs = self.without == 0 && waited > took / 2;
        }
    }
}

impl Packer {
    pub(super) fn new() -> Packer {
        Packer { context: CCtx::create(), memory: Vec::new(), packed: Vec::new(), gauge: Gauge::default() }
    }

    /// How many bytes of a part go at a time now.
    pub(super) fn piece_bytes(&self, part: Extent) -> u64 {
        if self.gauge.packs { PACKED_BYTES_MAX.into() } else { part.bytes }
    }

    /// What a piece is packed, if that is worth it now and makes it shorter.
    pub(super) fn pack(&mut self, ram: &Ram, part: Extent) -> Result<Option<&[u8]>, Error> {
        if !self.gauge.packs {
            return Ok(None);
        }
        self.memory.resize(part.bytes as usize, 0);
        memory::read(ram, part.offset, &mut self.memory)?;
        // Room for one that is shorter, and no more: what needs more goes as it is.
        self.packed.clear();
        self.packed.reserve(self.memory.len());
        let packed = self.context.compress(&mut self.packed, &self.memory, LEVEL).is_ok();
        Ok((packed && self.packed.len() < self.memory.len()).then_some(self.packed.as_slice()))
    }

    /// Something has gone, packed or as it is.
    pub(super) fn went(&mut self, span: Span) {
        self.gauge.went(span);
    }
}

impl Unpacker {
    pub(super) fn new() -> Unpacker {
        Unpacker { context: DCtx::create(), memory: Vec::new() }
    }

    /// Puts what came packed where it belongs. The head was admitted.
    pub(super) fn unpack(
        &mut self,
        ram: &Ram,
        head: &Head,
        packed: &[u8],
        stream: usize,
    ) -> Result<(), Error> {
        Ok(memory::fill(ram, head.offset, self.unpacked(head, packed, stream)?)?)
    }

    /// What came packed. The head was admitted.
    pub(super) fn unpacked(&mut self, head: &Head, packed: &[u8], stream: usize) -> Result<&[u8], Error> {
        let wanted = head.length.min(PACKED_BYTES_MAX) as usize;
        self.memory.resize(wanted, 0);
        // Into memory of exactly that length, beyond which nothing is written.
        let unpacked = self.context.decompress(self.memory.as_mut_slice(), packed);
        if unpacked != Ok(wanted) {
            return Err(Error::at(stream)(FrameError::Document(head.kind)));
        }
        Ok(&self.memory)
    }
}

#[cfg(test)]
mod tests {
    use wire::transfer::Kind;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn span(sent_bytes: u64, took_ms: u64, waited_ms: u64) -> Span {
        let [took, waited] = [took_ms, waited_ms].map(Duration::from_millis);
        Span { bytes: SPAN_BYTES, sent_bytes, took, waited }
    }

    #[test]
    fn it_packs_when_the_link_is_what_is_waited_for_and_as_long_as_that_is_quicker() {
        let mut gauge = Gauge::default();
        gauge.went(span(SPAN_BYTES, 100, 50));
        assert!(!gauge.packs, "half of the time");
        gauge.went(Span { bytes: SPAN_BYTES / 2, ..span(SPAN_BYTES / 2, 50, 49) });
        assert!(!gauge.packs, "it is not over");
        gauge.went(Span { bytes: SPAN_BYTES / 2, ..span(SPAN_BYTES / 2, 50, 20) });
        assert!(gauge.packs);
        gauge.went(span(SPAN_BYTES / 3, 60, 0));
        assert!(gauge.packs, "quicker, though nothing is waited for");
        gauge.went(span(SPAN_BYTES / 3, 101, 0));
        assert!(!gauge.packs, "slower than it was without");
    }

    #[test]
    fn what_does_not_get_smaller_is_left_alone_for_long() {
        let mut gauge = Gauge { packs: true, ..Gauge::default() };
        gauge.went(span(SPAN_BYTES, 100, 90));
        for span_number in 1..SPANS_WITHOUT {
            gauge.went(span(SPAN_BYTES, 100, 90));
            assert!(!gauge.packs, "{span_number}");
        }
        gauge.went(span(SPAN_BYTES, 100, 90));
        assert!(gauge.packs);
    }

    fn packed(data: &[u8]) -> Vec<u8> {
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(data.len()));
        zstd_safe::compress(&mut packed, data, LEVEL).unwrap();
        packed
    }

    #[test]
    fn what_was_packed_is_what_it_was_and_nothing_else_is_taken() {
        let ram = memory::new(8 * MIB).unwrap();
        let text: Vec<u8> = (0..3 * 4096_u32).flat_map(|number| number.to_le_bytes()).collect();
        let part = Extent { offset: 4096, bytes: text.len() as u64 };
        memory::fill(&ram, part.offset, &text).unwrap();
        let mut packer = Packer::new();
        assert_eq!(packer.pack(&ram, part).unwrap(), None);
        packer.gauge.packs = true;
        let sent = packer.pack(&ram, part).unwrap().unwrap().to_vec();
        assert!(sent.len() < text.len());
        let mut noise = vec![0; 4096];
        sys::random::fill(&mut noise).unwrap();
        memory::fill(&ram, MIB, &noise).unwrap();
        assert_eq!(packer.pack(&ram, Extent { offset: MIB, bytes: 4096 }).unwrap(), None);

        let mut unpacker = Unpacker::new();
        let head = |length| Head { kind: Kind::Packed, length, offset: 2 * MIB };
        unpacker.unpack(&ram, &head(text.len() as u32), &sent, 0).unwrap();
        let mut came = vec![0; text.len()];
        memory::read(&ram, 2 * MIB, &mut came).unwrap();
        assert!(came == text);
        // One that is longer than it says, or shorter, one of a gigabyte in a few bytes, a cut one, and none.
        let bomb = packed(&vec![0; 64 << 20]);
        assert!(bomb.len() < 64 << 10);
        for (length, bytes) in [
            (text.len() as u32 - 4096, sent.as_slice()),
            (text.len() as u32 + 4096, &sent),
            (PACKED_BYTES_MAX, &bomb),
            (text.len() as u32, &sent[..sent.len() - 1]),
            (4096, b"not packed at all"),
        ] {
            assert!(unpacker.unpack(&ram, &head(length), bytes, 0).is_err(), "{length}");
        }
        // And goes on after that.
        unpacker.unpack(&ram, &head(text.len() as u32), &sent, 0).unwrap();
    }
}
