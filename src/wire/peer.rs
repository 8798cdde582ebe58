//! What two daemons say to each other about a migration: frames of bounded length, each with the version of this
//! protocol, over a connection that is encrypted and authenticated below. Types and framing only; `host` speaks it.
//!
//! ```text
//!  source                                   target
//!    Greet { ticket } ────────────────────▶   the ticket is looked up and bound to who presents it
//!    ◀──────────────────────────── Welcome
//!    Ask(Offer) ──────────────────────────▶   looks at what it has
//!    ◀──────────────────── Verdict, or at any time Refuse
//!
//!    Take(Parcel) ────────────────────────▶   the ticket is used up, and what comes has a record
//!    ◀────────── Say(Copying), or a Verdict
//!    piece, piece … ──────────────────────▶
//!    Copied ──────────────────────────────▶   all of it is on the medium
//!    ◀──────────────────────── Say(Ready)
//!    Say(Commit) ─────────────────────────▶
//!    ◀──────────────────────── Say(Taken)
//!
//!    Again { transfer } ──────────────────▶   after a connection was lost, by the host that began
//!    ◀─────────────────────── Say(how far)
//! ```
//! A machine that moves while it runs goes from VMM to VMM, over connections of their own by the same two hosts:
//! ```text
//!    Take(Parcel { live }) ───────────────▶   a VMM is made for it
//!    ◀────────────────────── Say(Copying)
//!    Join { transfer, stream } ───────────▶   for each stream; from the answer on the connection is the VMMs'
//!    ◀────────────────────── Say(Copying)
//!    Say(Copying) … ──────────────────────▶   from time to time: the source is there
//!    ◀──────────────────────── Say(Ready)     as above
//! ```
//! Where some of its memory is still owed when it runs at the target, the last word comes later:
//! ```text
//!    Say(Commit) ─────────────────────────▶
//!    ◀────────────────────── Say(Holding) …   the source keeps what it has for it
//!    ◀──────────────────────── Say(Taken)     all of it is there
//!
//!    Again { transfer } ──────────────────▶   after a connection or a stream was lost meanwhile
//!    ◀────────────────────── Say(Holding)
//!    Join { transfer, stream } ───────────▶   for each stream of memory
//! ```
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::limits::{
    CONSOLE_RING_BYTES_MAX, DISKS_MAX, FRAME_BYTES_MAX, MEMORY_BYTES_MAX, NICS_MAX, STREAMS_MAX, VCPUS_MAX,
};
use crate::machine::{CpuTemplate, are_features};
use crate::saved::Digest;

/// Version of this protocol. Both ends must speak the same one.
pub const VERSION: u16 = 3;

/// Length of a frame's head in bytes: magic, version, kind and length, integers little endian.
pub const HEAD_BYTES: usize = 12;

const MAGIC: [u8; 4] = *b"TOFT";

/// Kind of the frames that hold one JSON document.
const DOCUMENT: u16 = 1;

/// Kind of the frames that hold a piece of a file.
const PIECE: u16 = 2;

/// What a piece has before its bytes: which file, and where in it, little endian.
pub const PIECE_HEAD_BYTES: usize = 10;

/// What follows a frame's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A [`Message`].
    Document,
    /// A [`Piece`].
    Piece,
}

/// Why bytes are no frame. The connection is of no use after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It does not begin as a frame does.
    #[error("the other side does not speak Toft's migration protocol")]
    Magic,
    /// Another version.
    #[error(
        "the other side speaks version {0} of the migration protocol and this one version {VERSION}; upgrade the older"
    )]
    Version(u16),
    /// A kind that this version does not have.
    #[error("the other side sent a frame of kind {0}, which version {VERSION} does not have")]
    Kind(u16),
    /// Longer than allowed.
    #[error("the other side sent a frame of {0} bytes, and {FRAME_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// Its document is not one of these messages.
    #[error("the other side sent a document that is no message")]
    Message,
}

/// Reads a frame's head and answers what follows it and how many bytes that has, at most [`FRAME_BYTES_MAX`].
pub fn head(bytes: [u8; HEAD_BYTES]) -> Result<(Kind, usize), FrameError> {
    let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3] = bytes;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(FrameError::Magic);
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let kind = match u16::from_le_bytes([k0, k1]) {
        DOCUMENT => Kind::Document,
        PIECE => Kind::Piece,
        other => return Err(FrameError::Kind(other)),
    };
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > FRAME_BYTES_MAX { Err(FrameError::TooLong(length)) } else { Ok((kind, length)) }
}

/// Bytes of a file that is moved, as they travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'b> {
    /// Which of the parcel's files.
    pub file: u16,
    /// Where in it.
    pub offset: u64,
    /// What belongs there.
    pub bytes: &'b [u8],
}

impl<'b> Piece<'b> {
    /// Reads what followed a head. Whether there is such a place in such a file is not looked at.
    pub fn read(body: &'b [u8]) -> Result<Piece<'b>, FrameError> {
        let Some(([f0, f1, offset @ ..], bytes)) = body.split_first_chunk::<PIECE_HEAD_BYTES>() else {
            return Err(FrameError::Message);
        };
        Ok(Piece { file: u16::from_le_bytes([*f0, *f1]), offset: u64::from_le_bytes(*offset), bytes })
    }

    /// What goes before the bytes.
    pub fn head(&self) -> Result<Vec<u8>, FrameError> {
        let too_long = FrameError::TooLong(self.bytes.len());
        let length = self.bytes.len().checked_add(PIECE_HEAD_BYTES).ok_or(too_long)?;
        let mut head = frame_head(PIECE, length)?;
        head.extend(self.file.to_le_bytes());
        head.extend(self.offset.to_le_bytes());
        Ok(head)
    }
}

/// Anything one daemon says to the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The source's first word.
    Greet {
        /// Name of the source's host, for people.
        host: String,
        /// Version of the daemon, for people.
        program: String,
        /// The secret of the target's ticket.
        ticket: String,
    },
    /// The ticket holds.
    Welcome {
        /// Name of the target's host, for people.
        host: String,
        /// Version of the daemon, for people.
        program: String,
        /// Whether memory can be owed here.
        may_owe: bool,
    },
    /// Could this server come?
    Ask(Box<Offer>),
    /// The answer: nothing is in the way when the list is empty.
    Verdict {
        /// Everything that is in the way, at most [`OBSTACLES_MAX`].
        blocked_by: Vec<Obstacle>,
    },
    /// Take this server; the ticket is for this and nothing else.
    Take(Box<Parcel>),
    /// Every piece was sent.
    Copied,
    /// The first word on a connection that follows one that was lost.
    Again {
        /// Which move, as in its [`Parcel`].
        transfer: String,
        /// Over how many streams it would go on with memory that is owed.
        streams: u16,
    },
    /// The first word on a connection that is to carry a stream between the two VMMs of a move. After [`Saying::Copying`] as
    /// the answer, nothing on it is a frame.
    Join {
        /// Which move, as in its [`Parcel`].
        transfer: String,
        /// Which stream: those of memory first, then one for each disk, in their order.
        stream: u16,
    },
    /// How far a move is.
    Say(Saying),
    /// No, and the connection ends.
    Refuse {
        /// Why, for people.
        detail: String,
    },
}

/// Most obstacles of one verdict: one a disk and a nic, and some for the whole.
pub const OBSTACLES_MAX: usize = DISKS_MAX + 3 * NICS_MAX + 16;

/// How far a move is at the end that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saying {
    /// The target: it is not all here. The source, while it sends: it goes on.
    Copying,
    /// The target: all is here; what did you decide?
    Ready,
    /// The source: it is yours.
    Commit,
    /// The target: I have it, and some of its memory is still to come from you.
    Holding,
    /// The source: what of its memory I owed is lost.
    Lost,
    /// The target: I have it.
    Taken,
    /// The source: it stays mine.
    Abort,
    /// The target: I do not take it, and never will.
    Dropped,
    /// The target: I have no record of it, which proves nothing.
    Unknown,
}

/// A server that moves, but for the bytes of its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parcel {
    /// Names the move, and no other.
    pub transfer: String,
    /// What was asked before.
    pub offer: Offer,
    /// The server's record, as `host` writes it.
    pub record: serde_json::Value,
    /// Length of the console's ring file in bytes, which follows the disks; 0 when there is none.
    pub console_bytes: u64,
    /// The files of its memory, which follow that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<SavedFiles>,
    /// Over how many streams its memory comes, if its machine comes with it. Of its files none follow then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_streams: Option<u16>,
    /// Whether some of that memory may still be owed when its machine runs at the target.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub may_owe: bool,
}

/// Lengths of the files of a memory that was saved, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedFiles {
    /// Everything of the machine but its memory.
    pub state_bytes: u64,
    /// Its memory, with holes.
    pub memory_bytes: u64,
}

/// A server that is to move, as far as the target must know before anything moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The server's id, which it keeps.
    pub server: String,
    /// Its name, which it keeps.
    pub name: String,
    /// The caller's own reference, which it keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_ref: Option<String>,
    /// Whether it has a machine, or a memory.
    pub power: Power,
    /// Whether its machine, if it has one, runs or is paused, and is the one that its record describes.
    #[serde(default)]
    pub runs: bool,
    /// Its machine's virtual CPUs.
    pub vcpus: u8,
    /// Its machine's memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of the disk that its saved memory takes.
    pub saved_bytes: u64,
    /// What its guest was told of the CPU.
    pub cpu: OfferedCpu,
    /// Digest of the image it was made from, which has its kernel.
    pub image: Digest,
    /// The image's name on the source, for people.
    pub image_name: String,
    /// Its disks, the root volume first.
    pub disks: Vec<OfferedDisk>,
    /// Its interfaces.
    pub nics: Vec<OfferedNic>,
}

/// What a server has besides its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// Nothing: it begins anew wherever it starts next.
    Off,
    /// A memory that was saved, with which it goes on.
    Saved,
    /// A machine.
    On,
}

/// A CPU that a guest may be using every feature of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferedCpu {
    /// The server's choice.
    pub template: CpuTemplate,
    /// Vendor of the source's processor, as that names it; empty when the source does not know.
    pub vendor: String,
    /// What the guest was shown, or would be on the source, by the names of `kvm::cpuid`.
    pub features: BTreeSet<String>,
    /// How fast the guest's time stamp counter runs, in thousands of ticks a second, if it has measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<u32>,
}

impl OfferedCpu {
    /// Whether its names are such, and no more than there may be.
    pub fn is_sound(&self) -> bool {
        let OfferedCpu { template, vendor, features, tsc_khz: _ } = self;
        vendor.len() <= TEXT_BYTES_MAX && are_features(features) && template.fault().is_none()
    }
}

/// A disk that is to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferedDisk {
    /// The volume's name, which it keeps.
    pub volume: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that were ever written.
    pub written_bytes: u64,
}

/// An interface that is to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferedNic {
    /// Name of the network it is on.
    pub network: String,
    /// The network's range.
    pub ipv4_cidr: String,
    /// Its address, which it keeps.
    pub ipv4: Ipv4Addr,
    /// Its hardware address, which it keeps.
    pub mac: String,
}

/// Something in a migration's way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Obstacle {
    /// For programs.
    pub kind: ObstacleKind,
    /// For people: what it is and what to do.
    pub detail: String,
}

/// Kinds of [`Obstacle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObstacleKind {
    /// The target's processor lacks something that the guest may use.
    CpuFeatures,
    /// The target's time stamp counter runs at another speed.
    Tsc,
    /// The target has not enough memory left.
    Memory,
    /// The target's disk has not enough room.
    Storage,
    /// The target has not the image that the server boots from.
    Image,
    /// The target's networks do not fit.
    Network,
    /// The target has a server of this id or name.
    Name,
    /// The target cannot run servers.
    Kvm,
    /// The server is in a state in which it does not move.
    State,
    /// Its memory is another version's than the target runs.
    Version,
    /// As many servers are on their way to the target as come at once.
    Busy,
}

/// Why an offer is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the offer's {0} is not valid")]
pub struct OfferError(pub &'static str);

/// Longest text of an offer in bytes; names have at most 63.
const TEXT_BYTES_MAX: usize = 128;

/// Most that a ring file has before its ring, in bytes.
const CONSOLE_HEAD_BYTES_MAX: u64 = 1 << 20;

/// Longest state of a machine beside its memory, in bytes: some KiB a device, and a digest for each 2 MiB of memory.
const SAVED_STATE_BYTES_MAX: u64 = 64 << 20;

/// Longest reference in bytes: 255 characters.
const REFERENCE_BYTES_MAX: usize = 1024;

impl Offer {
    /// Checks every number and every length.
    pub fn check(&self) -> Result<(), OfferError> {
        let short = |text: &str| !text.is_empty() && text.len() <= TEXT_BYTES_MAX;
        let fail = |what| Err(OfferError(what));
        if !short(&self.server) || !short(&self.name) || !short(&self.image_name) {
            return fail("name");
        }
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return fail("number of CPUs");
        }
        if self.memory_bytes == 0 || self.memory_bytes > MEMORY_BYTES_MAX {
            return fail("memory");
        }
        if !self.cpu.is_sound() {
            return fail("CPU");
        }
        if self.disks.len() > DISKS_MAX || !self.disks.iter().all(|disk| short(&disk.volume)) {
            return fail("disks");
        }
        if self.external_ref.as_ref().is_some_and(|reference| reference.len() > REFERENCE_BYTES_MAX) {
            return fail("reference");
        }
        let nics = &self.nics;
        if nics.len() > NICS_MAX
            || !nics.iter().all(|nic| short(&nic.network) && short(&nic.ipv4_cidr) && short(&nic.mac))
        {
            return fail("interfaces");
        }
        Ok(())
    }
}

impl Parcel {
    /// Checks every number and every length but those of the record.
    pub fn check(&self) -> Result<(), OfferError> {
        self.offer.check()?;
        if self.transfer.len() > TEXT_BYTES_MAX {
            return Err(OfferError("move"));
        }
        let console_bytes_max = CONSOLE_RING_BYTES_MAX.saturating_add(CONSOLE_HEAD_BYTES_MAX);
        if self.console_bytes > console_bytes_max {
            return Err(OfferError("console"));
        }
        if self.saved.is_some_and(|SavedFiles { state_bytes, memory_bytes }| {
            state_bytes > SAVED_STATE_BYTES_MAX || memory_bytes > MEMORY_BYTES_MAX
        }) {
            return Err(OfferError("memory"));
        }
        if self.live_streams.is_some_and(|count| !(1..=STREAMS_MAX).contains(&usize::from(count))) {
            return Err(OfferError("number of streams"));
        }
        if self.may_owe && self.live_streams.is_none() {
            return Err(OfferError("memory"));
        }
        Ok(())
    }
}

/// A frame's head, with room for a document after it.
fn frame_head(kind: u16, length: usize) -> Result<Vec<u8>, FrameError> {
    let too_long = FrameError::TooLong(length);
    let short = u32::try_from(length).map_err(|_| too_long)?;
    if length > FRAME_BYTES_MAX {
        return Err(too_long);
    }
    let mut head = Vec::with_capacity(HEAD_BYTES.saturating_add(if kind == DOCUMENT {
        length
    } else {
        PIECE_HEAD_BYTES
    }));
    head.extend(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend(kind.to_le_bytes());
    head.extend(short.to_le_bytes());
    Ok(head)
}

impl Message {
    /// The frame that holds it. Fails when it would be longer than any reader takes.
    pub fn frame(&self) -> Result<Vec<u8>, FrameError> {
        let document = serde_json::to_vec(self).map_err(|_| FrameError::Message)?;
        let mut frame = frame_head(DOCUMENT, document.len())?;
        frame.extend(document);
        Ok(frame)
    }

    /// Reads what followed a head.
    pub fn read(document: &[u8]) -> Result<Message, FrameError> {
        let message = serde_json::from_slice(document).map_err(|_| FrameError::Message)?;
        match &message {
            Message::Ask(offer) if offer.check().is_err() => Err(FrameError::Message),
            Message::Take(parcel) if parcel.check().is_err() => Err(FrameError::Message),
            Message::Join { transfer, .. } if transfer.len() > TEXT_BYTES_MAX => Err(FrameError::Message),
            Message::Verdict { blocked_by } if blocked_by.len() > OBSTACLES_MAX => Err(FrameError::Message),
            _ => Ok(message),
        }
    }
}

#[cfg(test)]
mod tests;
