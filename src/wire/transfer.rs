//! What two VMMs say to each other over the streams of a move: frames, each with its length before it. Reading is done
//! as if an attacker wrote: a head is checked before anything of its length is believed, and [`Order`] knows what may
//! follow what on which stream.
//!
//! ```text
//! kind 4 │ length 4 │ offset 8 ║ that many bytes          little-endian
//! stream 0:  Open  (Part │ Packed │ Zero │ Console │ Word)*  State  Word* source to target; Word* the other way
//! stream n:  Open  (Part │ Packed │ Zero)*  End
//! a disk's:  Open  (Block │ Hole │ Sync)*  End                            source to target; a Word for each Sync back
//! ```
//! A source that may owe memory says so as it opens, tells which pages with `Owed` before the `End` of the stream that they have, with
//! `Sync` among them, and answers each `Ask` for some of them behind that end, also on a stream that resumes one that broke:
//! ```text
//! stream n:  Open  (Part │ Packed │ Zero │ Owed │ Sync)*  End  (Part │ Packed │ Zero)*    Ask* the other way, and a Word for each Sync
//! ```
//! Memory is sharded: each piece of [`SHARD_BYTES`] has one stream, so that a page that is sent again never overtakes
//! itself.
use std::fs::File;
use std::io::{self, Read, Write};

use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::limits::{DOCUMENT_BYTES_MAX, STATE_BYTES_MAX, STREAMS_MAX};

/// Version of these frames. Both ends must speak the same one.
pub const VERSION: u32 = 1;

/// Length of a frame's head in bytes.
pub const HEAD_BYTES: usize = 16;

/// Memory that goes over one stream, and the longest [`Kind::Part`], in bytes.
pub const SHARD_BYTES: u64 = 2 << 20;

const PAGE_BYTES: u64 = 4096;

const SECTOR_BYTES: u64 = 512;

const MAGIC: &str = "toft-move";

/// The end of a frame's head: what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An [`Open`] as JSON. First on each stream.
    Open,
    /// Memory from `offset` on.
    Part,
    /// `length` bytes of memory from `offset` on are zero. Nothing follows.
    Zero,
    /// Output of the console; `offset` is the position of its first byte.
    Console,
    /// A [`Word`] as JSON.
    Word,
    /// The machine beside its memory, as a state file without a table of memory.
    State,
    /// No more of memory, or of the disk, on this stream. Nothing follows; `offset` is how many bytes of it it carried.
    End,
    /// A disk from `offset` on.
    Block,
    /// `length` bytes of a disk from `offset` on are zero. Nothing follows.
    Hole,
    /// `length` bytes of memory from `offset` on, packed: four bytes say how many follow, less than `length`, which are one frame of
    /// Zstandard (RFC 8878). Only on streams that were opened for it.
    Packed,
    /// What came of a disk is to be made durable, or what is owed of memory to be missing, and [`Word::Synced`] to be said then.
    /// Nothing follows.
    Sync,
    /// Pages of memory that will only come when they are asked for: eight bytes for 64 pages each, the first page lowest, from
    /// `offset` on.
    Owed,
    /// Target: send these `length` bytes of memory from `offset` on that are owed. Nothing follows.
    Ask,
}

const KINDS: [(u32, Kind); 13] = [
    (1, Kind::Open),
    (2, Kind::Part),
    (3, Kind::Zero),
    (4, Kind::Console),
    (5, Kind::Word),
    (6, Kind::State),
    (7, Kind::End),
    (8, Kind::Block),
    (9, Kind::Hole),
    (10, Kind::Sync),
    (11, Kind::Packed),
    (12, Kind::Owed),
    (13, Kind::Ask),
];

/// What a frame says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What follows.
    pub kind: Kind,
    /// How many bytes it is about, at most what its kind allows.
    pub length: u32,
    /// Where they belong.
    pub offset: u64,
}

/// The first frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Open {
    magic: String,
    version: u32,
    /// Which stream this is, from 0.
    pub stream: u16,
    /// How many there are.
    pub streams: u16,
    /// Bytes of the machine's memory, or of the disk.
    pub memory_bytes: u64,
    /// Whose stream it is, when it is a disk's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<u16>,
    /// The memory itself, when the target has it, so that none of it comes, nor what the console holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed: Option<Handed>,
    /// Whether memory may come packed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packs: bool,
    /// Whether some of memory may be owed when the machine runs at the target.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owes: bool,
    /// Whether it stands in for a stream that broke when the machine was the target's already and memory was owed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumes: bool,
}

/// Which memory was handed over, as both ends see it on one host. A machine that was reset has another than it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handed {
    device: u64,
    inode: u64,
}

impl Handed {
    /// What tells the file of a memory from all others there are.
    pub fn of(memory: &File) -> io::Result<Handed> {
        let found = memory.metadata()?;
        Ok(Handed { device: found.dev(), inode: found.ino() })
    }
}

/// What the ends say about the move itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Word {
    /// Target: memory can come.
    Prepared,
    /// Source: a round begins.
    Round {
        /// Counted from 1.
        number: u32,
        /// Whether the guest stands still.
        last: bool,
    },
    /// Target: I could run it; what did you decide?
    Ready,
    /// Source: it is yours.
    Commit,
    /// Target: I have it, and it runs.
    Released,
    /// Target, on the stream of a [`Kind::Sync`]: it is done.
    Synced,
    /// Target: all that was owed is here.
    Whole,
    /// Source: it stays mine.
    Abort {
        /// Why, for people.
        detail: String,
    },
    /// Target: I do not take it and never will.
    Refused {
        /// Why, for people.
        detail: String,
    },
}

/// Why a stream is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The link.
    #[error("the stream broke")]
    Link(#[source] io::Error),
    /// Not of this protocol, or another version of it.
    #[error("the other end does not speak version {VERSION} of this protocol: {0}")]
    Version(String),
    /// No such kind.
    #[error("a frame of kind {0}, which does not exist")]
    Kind(u32),
    /// Longer, or elsewhere, than its kind allows.
    #[error("a {kind:?} of {length} bytes at {offset:#x} is not allowed")]
    Bounds {
        /// Of the frame.
        kind: Kind,
        /// Of the frame.
        length: u32,
        /// Of the frame.
        offset: u64,
    },
    /// Not at this point of this stream.
    #[error("a {0:?} has no place here")]
    Order(Kind),
    /// A document that is none.
    #[error("a {0:?} that cannot be read")]
    Document(Kind),
    /// A document that is too long to be sent.
    #[error("a {kind:?} of {bytes} bytes is too long to be sent")]
    TooLong {
        /// Of the frame.
        kind: Kind,
        /// Of the document.
        bytes: usize,
    },
}

impl Kind {
    fn number(self) -> u32 {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or(0, |(number, _)| *number)
    }

    /// Longest length, in bytes.
    fn length_max(self) -> u32 {
        match self {
            Kind::Open | Kind::Word => DOCUMENT_BYTES_MAX,
            Kind::Part | Kind::Zero => SHARD_BYTES as u32,
            Kind::Packed => PACKED_BYTES_MAX,
            Kind::Console => CONSOLE_PIECE_BYTES_MAX,
            Kind::State => STATE_BYTES_MAX as u32,
            Kind::Block => BLOCK_BYTES_MAX,
            Kind::Hole => HOLE_BYTES_MAX,
            Kind::Owed => OWED_BYTES_MAX,
            Kind::Ask => ASK_BYTES_MAX,
            Kind::End | Kind::Sync => 0,
        }
    }
}

/// Longest piece of memory in one packed frame, in bytes: both ends hold it twice.
pub const PACKED_BYTES_MAX: u32 = 256 << 10;

/// What says which pages of [`SHARD_BYTES`] are owed, in bytes.
pub const OWED_BYTES_MAX: u32 = (SHARD_BYTES / PAGE_BYTES / 8) as u32;

/// Most memory that is asked for at once, in bytes: whoever waits for another page waits for this to pass.
pub const ASK_BYTES_MAX: u32 = 64 << 10;

/// Longest piece of a disk in one frame, in bytes.
pub const BLOCK_BYTES_MAX: u32 = 64 << 10;

/// Longest hole of a disk in one frame, in bytes.
pub const HOLE_BYTES_MAX: u32 = 1 << 30;

/// Longest piece of console output in one frame, in bytes.
pub const CONSOLE_PIECE_BYTES_MAX: u32 = 64 << 10;

impl Head {
    /// The bytes of a head.
    pub fn bytes(&self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        let number =
            u128::from(self.kind.number()) | u128::from(self.length) << 32 | u128::from(self.offset) << 64;
        bytes.copy_from_slice(&number.to_le_bytes());
        bytes
    }

    /// Reads a head. Its kind exists, and its length is none that its kind does not allow; of memory, it is whole pages
    /// of one shard.
    pub fn parse(bytes: [u8; HEAD_BYTES]) -> Result<Head, FrameError> {
        let number = u128::from_le_bytes(bytes);
        let (kind, length, offset) = (number as u32, (number >> 32) as u32, (number >> 64) as u64);
        let found = KINDS.iter().find(|(number, _)| *number == kind);
        let (_, kind) = *found.ok_or(FrameError::Kind(kind))?;
        let refused = FrameError::Bounds { kind, length, offset };
        if length > kind.length_max() {
            return Err(refused);
        }
        let holds = match kind {
            Kind::Part | Kind::Zero | Kind::Packed | Kind::Ask => {
                let end = (offset % SHARD_BYTES).saturating_add(u64::from(length));
                let whole = offset.is_multiple_of(PAGE_BYTES) && u64::from(length).is_multiple_of(PAGE_BYTES);
                whole && length > 0 && end <= SHARD_BYTES
            }
            Kind::Console => length > 0 && offset.checked_add(u64::from(length)).is_some(),
            Kind::Block | Kind::Hole => {
                let whole = offset.is_multiple_of(SECTOR_BYTES);
                whole && u64::from(length).is_multiple_of(SECTOR_BYTES) && length > 0
            }
            Kind::Open | Kind::Word | Kind::State => offset == 0 && length > 0,
            Kind::Owed => offset.is_multiple_of(SHARD_BYTES) && length.is_multiple_of(8) && length > 0,
            Kind::Sync => offset == 0,
            Kind::End => true,
        };
        if holds { Ok(Head { kind, length, offset }) } else { Err(refused) }
    }

    /// Reads the next head of a stream.
    pub fn read(from: &mut impl Read) -> Result<Head, FrameError> {
        let mut bytes = [0; HEAD_BYTES];
        from.read_exact(&mut bytes).map_err(FrameError::Link)?;
        Head::parse(bytes)
    }

    /// Writes the head.
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        to.write_all(&self.bytes()).map_err(FrameError::Link)
    }

    /// Reads what follows the head into memory of its own: documents, console output and state; of memory, what was asked
    /// for.
    pub fn read_body(&self, from: &mut impl Read) -> Result<Vec<u8>, FrameError> {
        let has_none =
            matches!(self.kind, Kind::Packed | Kind::Zero | Kind::Hole | Kind::Sync | Kind::Ask | Kind::End);
        if has_none || (self.kind == Kind::Part && self.length > ASK_BYTES_MAX) {
            return Err(FrameError::Order(self.kind));
        }
        read_exactly(from, self.length.into())
    }

    /// Reads what follows the head of a [`Kind::Packed`]: a frame of Zstandard that is to unpack to as many bytes as the head says.
    pub fn read_packed(&self, from: &mut impl Read) -> Result<Vec<u8>, FrameError> {
        let mut count = [0; 4];
        from.read_exact(&mut count).map_err(FrameError::Link)?;
        let count = u32::from_le_bytes(count);
        if self.kind != Kind::Packed || count == 0 || count >= self.length {
            return Err(FrameError::Document(self.kind));
        }
        read_exactly(from, count.into())
    }
}

fn read_exactly(from: &mut impl Read, wanted: u64) -> Result<Vec<u8>, FrameError> {
    let mut body = Vec::new();
    // Grows with what comes, not with what was announced.
    let came = from.take(wanted).read_to_end(&mut body).map_err(FrameError::Link)?;
    if came as u64 == wanted { Ok(body) } else { Err(FrameError::Link(io::ErrorKind::UnexpectedEof.into())) }
}

/// Writes `length` bytes of memory from `offset` on that are `packed`, which is shorter.
pub fn write_packed(to: &mut impl Write, offset: u64, length: u32, packed: &[u8]) -> Result<(), FrameError> {
    let too_long = FrameError::TooLong { kind: Kind::Packed, bytes: packed.len() };
    let count = u32::try_from(packed.len()).ok().filter(|count| *count < length).ok_or(too_long)?;
    let head = Head { kind: Kind::Packed, length, offset };
    let frame = [&head.bytes(), &count.to_le_bytes()[..], packed].concat();
    to.write_all(&frame).map_err(FrameError::Link)
}

/// Writes a frame with what follows it.
pub fn write(to: &mut impl Write, kind: Kind, offset: u64, body: &[u8]) -> Result<(), FrameError> {
    let too_long = FrameError::TooLong { kind, bytes: body.len() };
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= kind.length_max());
    let head = Head { kind, length: length.ok_or(too_long)?, offset };
    // In one write, so that no half of a short frame waits for the other end's acknowledgement.
    let frame = [&head.bytes(), body].concat();
    to.write_all(&frame).map_err(FrameError::Link)
}

impl Open {
    /// For stream `stream` of `streams`.
    pub fn new(stream: u16, streams: u16, memory_bytes: u64) -> Open {
        Open {
            magic: MAGIC.to_owned(),
            version: VERSION,
            stream,
            streams,
            memory_bytes,
            disk: None,
            handed: None,
            packs: false,
            owes: false,
            resumes: false,
        }
    }

    /// The same, and memory may come packed.
    pub fn packing(stream: u16, streams: u16, memory_bytes: u64) -> Open {
        Open { packs: true, ..Open::new(stream, streams, memory_bytes) }
    }

    /// The same, and some of it may be owed.
    pub fn owing(stream: u16, streams: u16, memory_bytes: u64) -> Open {
        Open { owes: true, ..Open::packing(stream, streams, memory_bytes) }
    }

    /// The same, in the place of one that broke.
    pub fn resuming(stream: u16, streams: u16, memory_bytes: u64) -> Open {
        Open { resumes: true, ..Open::owing(stream, streams, memory_bytes) }
    }

    /// Whether this is the stream that was waited for. To pack or not is the source's choice, and to owe where that is wanted.
    pub fn is_for(&self, wanted: &Open) -> bool {
        *self == Open { packs: self.packs, owes: self.owes && wanted.owes, ..wanted.clone() }
    }

    /// For the stream of a disk.
    pub fn of_disk(disk: u16, bytes: u64) -> Open {
        Open { disk: Some(disk), ..Open::new(0, 1, bytes) }
    }

    /// For the only stream of a machine whose memory the target has.
    pub fn of_handed(memory_bytes: u64, memory: Handed) -> Open {
        Open { handed: Some(memory), ..Open::new(0, 1, memory_bytes) }
    }

    /// Reads what follows the head of the first frame.
    pub fn parse(body: &[u8]) -> Result<Open, FrameError> {
        let open: Open = document(Kind::Open, body)?;
        if open.magic != MAGIC || open.version != VERSION {
            let magic: String = open.magic.chars().take(32).collect();
            return Err(FrameError::Version(format!("it speaks {magic:?} version {}", open.version)));
        }
        if usize::from(open.streams) > STREAMS_MAX || open.stream >= open.streams {
            return Err(FrameError::Document(Kind::Open));
        }
        Ok(open)
    }

    /// Writes it.
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        write(to, Kind::Open, 0, &json(Kind::Open, self)?)
    }
}

/// Longest reason in a word, in bytes.
const DETAIL_BYTES_MAX: usize = 2048;

impl Word {
    /// Reads what follows the head of a word.
    pub fn parse(body: &[u8]) -> Result<Word, FrameError> {
        match document(Kind::Word, body)? {
            Word::Abort { detail } | Word::Refused { detail } if detail.len() > DETAIL_BYTES_MAX => {
                Err(FrameError::Document(Kind::Word))
            }
            word => Ok(word),
        }
    }

    /// Writes it. A long reason is cut.
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        let mut word = self.clone();
        if let Word::Abort { detail } | Word::Refused { detail } = &mut word {
            let cut = detail.floor_char_boundary(DETAIL_BYTES_MAX);
            detail.truncate(cut);
        }
        write(to, Kind::Word, 0, &json(Kind::Word, &word)?)
    }
}

fn json<T: Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>, FrameError> {
    serde_json::to_vec(value).map_err(|_| FrameError::Document(kind))
}

fn document<T: for<'de> Deserialize<'de>>(kind: Kind, body: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(body).map_err(|_| FrameError::Document(kind))
}

/// Which stream a piece of memory has.
pub fn stream_of(offset: u64, streams: u64) -> u64 {
    let shard = offset.checked_div(SHARD_BYTES).unwrap_or(0);
    shard.checked_rem(streams).unwrap_or(0)
}

mod order;

pub use order::Order;

#[cfg(test)]
mod tests;
