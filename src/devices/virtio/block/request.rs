//! Turns a descriptor chain into a block request (virtio 1.2, section 5.2.6). Nothing here touches the disk.
//! Input is written by the guest and may be anything; output is typed, copied and within the disk.
use memory::Ram;
use virtio_bindings::bindings::virtio_blk::*;

use super::Access;
use super::config::bit;
use crate::limits;
use crate::virtio::Chain;

/// The protocol's unit of position and length, whatever the disk's own.
pub(super) const SECTOR_BYTES: u32 = 512;

/// Length of the identity that VIRTIO_BLK_T_GET_ID reads.
pub(super) const IDENTITY_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

const HEADER_BYTES: usize = 16;
/// One range of a discard or write-zeroes request.
const RANGE_BYTES: u32 = 16;
type Range = [u8; RANGE_BYTES as usize];

/// What a request is judged by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) sectors: u64,
    pub(super) access: Access,
    /// What was agreed on.
    pub(super) features: u64,
}

/// A request within the disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill all of the chain's writable part but its last byte.
    Read {
        offset: u64,
        bytes: u32,
    },
    /// Store all of the chain's readable part behind the header.
    Write {
        offset: u64,
        bytes: u32,
    },
    Flush,
    Identity,
    Discard(Vec<Span>),
    WriteZeroes(Vec<Span>),
}

/// A range of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Whether the space may be given back.
    pub(super) unmap: bool,
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It breaks the protocol; IOERR.
    Malformed,
    /// It would change a disk that is read-only; IOERR.
    ReadOnly,
    /// The device does not know it; UNSUPP.
    Unsupported,
}

impl Refusal {
    pub(super) fn status(self) -> u8 {
        match self {
            Refusal::Malformed | Refusal::ReadOnly => VIRTIO_BLK_S_IOERR as u8,
            Refusal::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

impl Request {
    /// Reads what `chain` asks for. Everything is copied first, as the guest may rewrite it meanwhile.
    pub(super) fn parse(chain: &Chain, memory: &Ram, terms: &Terms) -> Result<Request, Refusal> {
        let mut header = [0; HEADER_BYTES];
        chain.read(memory, 0, &mut header).map_err(|_| Refusal::Malformed)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
        let payload_bytes =
            chain.readable_bytes().checked_sub(HEADER_BYTES as u32).ok_or(Refusal::Malformed)?;
        // The last writable byte is the status.
        let answer_bytes = chain.writable_bytes().checked_sub(1).ok_or(Refusal::Malformed)?;
        let no_answer = || if answer_bytes == 0 { Ok(()) } else { Err(Refusal::Malformed) };
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = terms.transfer(sector, answer_bytes)?;
                if payload_bytes != 0 {
                    return Err(Refusal::Malformed);
                }
                Ok(Request::Read { offset, bytes: answer_bytes })
            }
            VIRTIO_BLK_T_OUT => {
                terms.writable()?;
                no_answer()?;
                let offset = terms.transfer(sector, payload_bytes)?;
                Ok(Request::Write { offset, bytes: payload_bytes })
            }
            VIRTIO_BLK_T_FLUSH => no_answer().map(|()| Request::Flush),
            VIRTIO_BLK_T_GET_ID if answer_bytes as usize == IDENTITY_BYTES => Ok(Request::Identity),
            VIRTIO_BLK_T_GET_ID => Err(Refusal::Malformed),
            VIRTIO_BLK_T_DISCARD => {
                terms.agreed(VIRTIO_BLK_F_DISCARD)?;
                no_answer()?;
                let spans = terms.spans(chain, memory, payload_bytes, Ranges::Discard)?;
                Ok(Request::Discard(spans))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                terms.agreed(VIRTIO_BLK_F_WRITE_ZEROES)?;
                no_answer()?;
                let spans = terms.spans(chain, memory, payload_bytes, Ranges::WriteZeroes)?;
                Ok(Request::WriteZeroes(spans))
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Bytes that the request moves or may have to write, for limits and for what may be in flight.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Request::Read { bytes, .. } | Request::Write { bytes, .. } => u64::from(*bytes),
            Request::Flush | Request::Identity | Request::Discard(_) => 0,
            Request::WriteZeroes(spans) => spans.iter().fold(0, |sum, span| sum.saturating_add(span.bytes)),
        }
    }
}

/// The two requests that name ranges.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ranges {
    Discard,
    WriteZeroes,
}

/// One range as the guest wrote it.
struct Fields {
    sector: u64,
    count: u32,
    flags: u32,
}

impl Fields {
    fn read(range: &Range) -> Fields {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *range;
        Fields {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            count: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes(flags),
        }
    }
}

impl Terms {
    fn writable(&self) -> Result<(), Refusal> {
        if self.access == Access::ReadOnly { Err(Refusal::ReadOnly) } else { Ok(()) }
    }

    /// A change that needs a feature: a disk that is read-only never offers one.
    fn agreed(&self, feature: u32) -> Result<(), Refusal> {
        self.writable()?;
        if self.features & bit(feature) == 0 { Err(Refusal::Unsupported) } else { Ok(()) }
    }

    /// The position in bytes of a transfer of `bytes`, which must be whole sectors of the disk.
    fn transfer(&self, sector: u64, bytes: u32) -> Result<u64, Refusal> {
        if bytes == 0 || bytes > limits::BLOCK_REQUEST_BYTES_MAX || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Refusal::Malformed);
        }
        self.span(sector, u64::from(bytes / SECTOR_BYTES)).map(|(offset, _)| offset)
    }

    /// Position and length in bytes of `count` sectors, if they are sectors of the disk.
    fn span(&self, sector: u64, count: u64) -> Result<(u64, u64), Refusal> {
        let end = sector.checked_add(count).ok_or(Refusal::Malformed)?;
        if end > self.sectors {
            return Err(Refusal::Malformed);
        }
        let bytes = |sectors: u64| sectors.checked_mul(u64::from(SECTOR_BYTES)).ok_or(Refusal::Malformed);
        Ok((bytes(sector)?, bytes(count)?))
    }

    fn spans(&self, chain: &Chain, memory: &Ram, bytes: u32, kind: Ranges) -> Result<Vec<Span>, Refusal> {
        let (count_max, sectors_max) = match kind {
            Ranges::Discard => (limits::DISCARD_RANGES_MAX, limits::DISCARD_SECTORS_MAX),
            Ranges::WriteZeroes => (limits::WRITE_ZEROES_RANGES_MAX, limits::WRITE_ZEROES_SECTORS_MAX),
        };
        let (count, rest) = (bytes / RANGE_BYTES, bytes % RANGE_BYTES);
        if rest != 0 || count == 0 || count > count_max {
            return Err(Refusal::Malformed);
        }
        let mut ranges = vec![0; bytes as usize];
        chain.read(memory, HEADER_BYTES as u32, &mut ranges).map_err(|_| Refusal::Malformed)?;
        let (ranges, _) = ranges.as_chunks();
        let ranges: Vec<Fields> = ranges.iter().map(Fields::read).collect();
        // Looked for in all of them first: nothing else may be said about a request with an unknown flag.
        let known = if kind == Ranges::WriteZeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if ranges.iter().any(|range| range.flags & !known != 0) {
            return Err(Refusal::Unsupported);
        }
        ranges.iter().map(|range| self.range(range, sectors_max)).collect()
    }

    fn range(&self, range: &Fields, sectors_max: u32) -> Result<Span, Refusal> {
        let Fields { sector, count, flags } = *range;
        if count == 0 || count > sectors_max {
            return Err(Refusal::Malformed);
        }
        let (offset, bytes) = self.span(sector, u64::from(count))?;
        Ok(Span { offset, bytes, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 })
    }
}
