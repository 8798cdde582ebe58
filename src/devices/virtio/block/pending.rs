//! A request that the kernel works on, step by step: which range comes next, and which way when one is refused. It
//! knows no queue; `service` starts the steps and completes the chain.
use std::io;
use std::sync::Arc;

use memory::Ram;
use memory::ring::{Durability, Refused};
use vm_memory::GuestAddress;

use super::backend::{Disk, Lease, Zeroing};
use super::overlay::{BLOCK_BYTES, Place};
use super::request::{Request, Span};
use crate::limits::{BLOCK_JOINED_BYTES_MAX, BLOCK_JOINED_SEGMENTS_MAX};
use crate::virtio::Chain;

/// A request that the kernel works on.
pub(super) struct Pending {
    pub(super) chain: Chain,
    pub(super) request: Request,
    /// The range of a discard or write-zeroes that is being worked on.
    range: u16,
    zeroing: Zeroing,
    durability: Durability,
    /// The last step of a write-zeroes that has to be durable.
    is_syncing: bool,
    /// Bytes of a read that earlier steps have read.
    read: u32,
    /// Bytes that the step reads: what lies in one file.
    reading: u32,
    /// Writes that go on where this one ends, in order, done as one with it.
    followers: Vec<Pending>,
}

impl Pending {
    /// A request of which no step is done.
    pub(super) fn new(chain: Chain, request: Request, durability: Durability, disk: &Disk) -> Pending {
        let zeroing = Zeroing::Write;
        let (range, is_syncing, followers) = (0, false, Vec::new());
        let (read, reading) = (0, 0);
        let mut pending =
            Pending { chain, request, range, zeroing, durability, is_syncing, read, reading, followers };
        pending.choose_zeroing(disk);
        pending
    }

    /// Makes `next` a part of this write if it goes on where this ends; gives it back if not. A guest that writes a long
    /// piece of its disk has it cut into many requests, each of which may cost the kernel a switch between threads.
    pub(super) fn join(&mut self, next: Pending) -> Result<(), Pending> {
        let (Request::Write { offset, .. }, Request::Write { offset: at, .. }) =
            (&self.request, &next.request)
        else {
            return Err(next);
        };
        let (bytes, segments) = self.all().fold((0_u64, 0_usize), |(bytes, segments), write| {
            (bytes.saturating_add(write.request.bytes()), segments.saturating_add(write.chain.segments()))
        });
        let fits = bytes.saturating_add(next.request.bytes()) <= BLOCK_JOINED_BYTES_MAX
            && segments.saturating_add(next.chain.segments()) <= BLOCK_JOINED_SEGMENTS_MAX;
        if !fits || offset.checked_add(bytes) != Some(*at) || self.durability != next.durability {
            return Err(next);
        }
        self.followers.push(next);
        Ok(())
    }

    /// Whether it writes what the guest has sent.
    pub(super) fn is_write(&self) -> bool {
        matches!(self.request, Request::Write { .. })
    }

    /// Whether others are done with it.
    pub(super) fn is_joined(&self) -> bool {
        !self.followers.is_empty()
    }

    /// This one and those that are done with it.
    pub(super) fn all(&self) -> impl Iterator<Item = &Pending> {
        std::iter::once(self).chain(&self.followers)
    }

    /// Those that were done with it.
    pub(super) fn take_followers(&mut self) -> Vec<Pending> {
        std::mem::take(&mut self.followers)
    }

    /// Hands the step to the ring.
    pub(super) fn start(&mut self, lease: &mut Lease, memory: &Arc<Ram>) -> Result<(), Refused> {
        let (Lease { ring, disk }, token) = (lease, u64::from(self.chain.head()));
        match &self.request {
            Request::Read { offset, bytes } => {
                let (offset, left) =
                    (offset.saturating_add(self.read.into()), bytes.saturating_sub(self.read));
                let (place, bytes) = match disk.overlay() {
                    None => (Place::Own, left),
                    Some(overlay) => {
                        let (place, bytes) = overlay.place(offset, left.into());
                        (place, u32::try_from(bytes).map_or(left, |bytes| bytes.min(left)))
                    }
                };
                self.reading = bytes;
                let pieces = self.chain.writable_at(self.read, bytes);
                let pieces = pieces.map(|piece| (piece.address, piece.length));
                match place {
                    Place::Own => ring.read(token, offset, memory, pieces),
                    Place::Backing => ring.read_backing(token, offset, memory, pieces),
                }
            }
            Request::Write { offset, .. } => {
                ring.write(token, *offset, memory, self.all().flat_map(Pending::data), self.durability)
            }
            Request::Discard(_) | Request::WriteZeroes(_) if !self.is_syncing => {
                let Some(Span { offset, bytes, .. }) = self.span() else { return ring.sync(token) };
                match (&self.request, self.zeroing) {
                    (Request::Discard(_), _) | (_, Zeroing::Punch) => ring.punch(token, offset, bytes),
                    (_, Zeroing::Zero) => ring.zero(token, offset, bytes),
                    (_, Zeroing::Write) => ring.write_zeroes(token, offset, bytes, self.durability),
                }
            }
            _ => ring.sync(token),
        }
    }

    /// Where what is written lies.
    fn data(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        // All of the readable part but the header.
        let bytes = u32::try_from(self.request.bytes()).unwrap_or(u32::MAX);
        let header_bytes = self.chain.readable_bytes().saturating_sub(bytes);
        self.chain.readable_at(header_bytes, bytes).map(|piece| (piece.address, piece.length))
    }

    fn span(&self) -> Option<Span> {
        match &self.request {
            Request::Discard(spans) | Request::WriteZeroes(spans) => {
                spans.get(usize::from(self.range)).copied()
            }
            _ => None,
        }
    }

    fn choose_zeroing(&mut self, disk: &Disk) {
        if let Some(span) = self.span() {
            self.zeroing = disk.zeroing(span);
        }
    }

    /// Whether what is written is on the medium when the step has worked.
    pub(super) fn is_durable(&self) -> bool {
        match self.request {
            Request::Write { .. } => self.durability == Durability::Durable,
            Request::WriteZeroes(_) => {
                self.is_syncing || (self.zeroing == Zeroing::Write && self.durability == Durability::Durable)
            }
            Request::Flush => true,
            Request::Read { .. } | Request::Identity | Request::Discard(_) => false,
        }
    }

    /// Whether the step may write to a block of an overlay.
    pub(super) fn writes_to(&self, block: u64) -> bool {
        let start = block.saturating_mul(BLOCK_BYTES);
        let end = start.saturating_add(BLOCK_BYTES);
        self.changes().is_some_and(|(offset, bytes)| offset < end && start < offset.saturating_add(bytes))
    }

    /// The range that the step changes, with those that are done with it.
    pub(super) fn changes(&self) -> Option<(u64, u64)> {
        match &self.request {
            Request::Write { offset, .. } => {
                let bytes = self.all().fold(0_u64, |sum, write| sum.saturating_add(write.request.bytes()));
                Some((*offset, bytes))
            }
            Request::Discard(_) | Request::WriteZeroes(_) if !self.is_syncing => {
                self.span().map(|span| (span.offset, span.bytes))
            }
            _ => None,
        }
    }

    /// Whether there is another step after one that worked.
    pub(super) fn goes_on(&mut self, disk: &Disk) -> bool {
        if let Request::Read { bytes, .. } = self.request {
            self.read = self.read.saturating_add(self.reading);
            return self.read < bytes;
        }
        self.range = self.range.saturating_add(1);
        if self.span().is_some() {
            self.choose_zeroing(disk);
            return true;
        }
        let is_last = self.is_syncing || self.durability == Durability::Cached;
        if is_last || !matches!(self.request, Request::WriteZeroes(_)) {
            return false;
        }
        // Unlike a write, fallocate cannot be told to be durable.
        self.is_syncing = true;
        true
    }

    /// Whether the step that failed can be done another way.
    pub(super) fn goes_another_way(&mut self, disk: &Disk, cause: &io::Error) -> bool {
        if self.is_syncing || !matches!(self.request, Request::WriteZeroes(_)) {
            return false;
        }
        match disk.zeroing_after(self.zeroing, cause) {
            Some(next) => {
                self.zeroing = next;
                true
            }
            None => false,
        }
    }
}
