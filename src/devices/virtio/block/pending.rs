//! A request that the kernel works on, step by step: which range comes next, and which way when one is refused. It
//! knows no queue; `service` starts the steps and completes the chain.
use std::io;
use std::sync::Arc;

use memory::Ram;
use memory::ring::{Durability, Refused, Ring};
use vm_memory::GuestAddress;

use super::backend::{Disk, Zeroing};
use super::request::{Request, Span};
use crate::limits::{BLOCK_JOINED_BYTES_MAX, BLOCK_JOINED_SEGMENTS_MAX};
use crate::virtio::Chain;

/// A request that the kernel works on.
pub(super) struct Pending {
    pub(super) chain: Chain,
    pub(super) request: Request,
    /// The range of a discard or write-zeroes that is being worked on.
    range: usize,
    zeroing: Zeroing,
    durability: Durability,
    /// The last step of a write-zeroes that has to be durable.
    is_syncing: bool,
    /// Writes that go on where this one ends, in order, done as one with it.
    followers: Vec<Pending>,
}

impl Pending {
    /// A request of which no step is done.
    pub(super) fn new(chain: Chain, request: Request, durability: Durability, disk: &Disk) -> Pending {
        let zeroing = Zeroing::Write;
        let (range, is_syncing, followers) = (0, false, Vec::new());
        let mut pending = Pending { chain, request, range, zeroing, durability, is_syncing, followers };
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
    pub(super) fn start(&self, ring: &mut Ring, memory: &Arc<Ram>) -> Result<(), Refused> {
        let token = u64::from(self.chain.head());
        match &self.request {
            Request::Read { offset, bytes } => {
                let pieces = self.chain.writable_at(0, *bytes);
                ring.read(token, *offset, memory, pieces.map(|piece| (piece.address, piece.length)))
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
            Request::Discard(spans) | Request::WriteZeroes(spans) => spans.get(self.range).copied(),
            _ => None,
        }
    }

    fn choose_zeroing(&mut self, disk: &Disk) {
        if let Some(span) = self.span() {
            self.zeroing = disk.zeroing(span);
        }
    }

    /// Whether there is another step after one that worked.
    pub(super) fn goes_on(&mut self, disk: &Disk) -> bool {
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
