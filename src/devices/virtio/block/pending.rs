//! A request that the kernel works on, step by step: which range comes next, and which way when one is refused. It
//! knows no queue; `service` starts the steps and completes the chain.
use std::io;
use std::sync::Arc;

use memory::Ram;
use memory::ring::{Durability, Refused, Ring};

use super::backend::{Disk, Zeroing};
use super::request::{Request, Span};
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
}

impl Pending {
    /// A request of which no step is done.
    pub(super) fn new(chain: Chain, request: Request, durability: Durability, disk: &Disk) -> Pending {
        let zeroing = Zeroing::Write;
        let mut pending = Pending { chain, request, range: 0, zeroing, durability, is_syncing: false };
        pending.choose_zeroing(disk);
        pending
    }

    /// Hands the step to the ring.
    pub(super) fn start(&self, ring: &mut Ring, memory: &Arc<Ram>) -> Result<(), Refused> {
        let token = u64::from(self.chain.head());
        match &self.request {
            Request::Read { offset, bytes } => {
                let pieces = self.chain.writable_at(0, *bytes);
                ring.read(token, *offset, memory, pieces.map(|piece| (piece.address, piece.length)))
            }
            Request::Write { offset, bytes } => {
                let header_bytes = self.chain.readable_bytes().saturating_sub(*bytes);
                let pieces = self.chain.readable_at(header_bytes, *bytes);
                let pieces = pieces.map(|piece| (piece.address, piece.length));
                ring.write(token, *offset, memory, pieces, self.durability)
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
