//! A split virtqueue that no guest can confuse, over `virtio_queue::Queue`. That crate checks addresses, the
//! available index, chain length in bytes and nested indirection, but ends a bad chain silently; here a bad chain
//! is an error, and so is a head that is already in flight. Each device's thread owns its queues.
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memory::Ram;
use serde::{Deserialize, Serialize};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::limits::{CHAIN_DESCRIPTORS_MAX, SPARE_SEGMENTS_MAX};

mod chain;

pub use chain::{BufferError, Chain, Segment};

/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, section 2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Layout of the used ring (virtio 1.2, section 2.7.8); the index lies at the same place in the available ring.
const RING_INDEX_OFFSET: u64 = 2;
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// Layout of a descriptor (virtio 1.2, section 2.7.5): after address and length come its flags and the next one's index.
const DESCRIPTOR_BYTES: u64 = 16;
const DESCRIPTOR_FLAGS_OFFSET: u64 = 12;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_INDIRECT: u16 = 4;

/// Storage kept per queue for chains to come: the usual depth, at a few hundred bytes each.
const SPARE_MAX: usize = 64;

/// What a driver did that a queue cannot recover from. The device is broken until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// More heads are said to be available than the queue holds, or the rings left guest memory.
    #[error("a ring cannot be used")]
    Ring(#[source] virtio_queue::Error),
    /// A head lies outside the descriptor table.
    #[error("head {head} is outside a queue of {size}")]
    HeadRange {
        /// The head.
        head: u16,
        /// The queue's size.
        size: u16,
    },
    /// A head was made available again before it was used.
    #[error("head {head} is already in flight")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A chain does not end: a loop, an index outside its table, a table outside memory, or bytes over 2³².
    #[error("the chain at head {head} is malformed after {descriptors} descriptors")]
    Chain {
        /// The head.
        head: u16,
        /// Descriptors that could be read.
        descriptors: usize,
    },
    /// A chain has more descriptors than [`CHAIN_DESCRIPTORS_MAX`].
    #[error("the chain at head {head} has more than {CHAIN_DESCRIPTORS_MAX} descriptors")]
    ChainTooLong {
        /// The head.
        head: u16,
    },
    /// A chain has an indirect table though the driver has not negotiated them (virtio 1.2, section 2.7.5.3.1).
    #[error("the chain at head {head} has an indirect table, which was not negotiated")]
    Indirect {
        /// The head.
        head: u16,
    },
    /// A device-readable descriptor follows a device-writable one (virtio 1.2, section 2.7.4.2).
    #[error("the chain at head {head} reads after it writes")]
    Order {
        /// The head.
        head: u16,
    },
    /// A rule of the device's own was broken beyond what a request can be answered with.
    #[error("{0}")]
    Protocol(&'static str),
}

/// One virtqueue in use.
#[derive(Debug)]
pub struct Queue {
    ring: virtio_queue::Queue,
    memory: Arc<Ram>,
    /// For each descriptor whether a chain that starts there was taken and not yet completed.
    in_flight: Box<[bool]>,
    /// How many entries of `in_flight` are set.
    taken: usize,
    /// The used index when [`Queue::wants_signal`] was last asked.
    signalled: u16,
    /// Whether the driver is asked for a kick with its next buffer.
    asks_for_kicks: bool,
    /// Whether chains may have indirect tables.
    takes_indirect: bool,
    /// Storage of completed chains, so that a busy queue does not allocate.
    spare: Vec<Vec<Segment>>,
}

/// How far a queue has got: all of it that is not in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Chains taken since the driver enabled the queue, modulo 2¹⁶. With nothing in flight as many were completed.
    pub next: u16,
    /// The used index when the driver was last thought of.
    pub signalled: u16,
}

impl Queue {
    /// Serves `ring`, which the caller has found valid in `memory`. Chains may have indirect tables.
    pub fn new(ring: virtio_queue::Queue, memory: Arc<Ram>) -> Queue {
        let in_flight = vec![false; usize::from(ring.size())].into_boxed_slice();
        let signalled = ring.next_used();
        let (taken, asks_for_kicks, takes_indirect, spare) = (0, true, true, Vec::new());
        Queue { ring, memory, in_flight, taken, signalled, asks_for_kicks, takes_indirect, spare }
    }

    /// Serves `ring` from where another queue has stopped. Whatever the numbers, only the guest's own rings are
    /// read and written by them.
    pub fn resume(mut ring: virtio_queue::Queue, memory: Arc<Ram>, position: Position) -> Queue {
        ring.set_next_avail(position.next);
        ring.set_next_used(position.next);
        Queue { signalled: position.signalled, ..Queue::new(ring, memory) }
    }

    /// The same queue for a driver that has not negotiated indirect tables.
    pub fn without_indirect(self) -> Queue {
        Queue { takes_indirect: false, ..self }
    }

    /// Where the queue stands; nothing while a chain is in flight.
    pub fn position(&self) -> Option<Position> {
        let next = self.ring.next_used();
        let is_whole = self.taken == 0 && self.ring.next_avail() == next;
        is_whole.then_some(Position { next, signalled: self.signalled })
    }

    /// The memory the queue and its buffers lie in.
    pub fn memory(&self) -> &Arc<Ram> {
        &self.memory
    }

    /// The size the driver chose.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Chains taken and not yet completed.
    pub fn in_flight(&self) -> usize {
        self.taken
    }

    /// Takes the next chain, or nothing when the driver has made no other available.
    pub fn pop(&mut self) -> Result<Option<Chain>, Fault> {
        let next = self.ring.iter(&*self.memory).map_err(Fault::Ring)?.next();
        let Some(descriptors) = next else { return Ok(None) };
        let head = descriptors.head_index();
        match self.in_flight.get_mut(usize::from(head)) {
            None => return Err(Fault::HeadRange { head, size: self.ring.size() }),
            Some(true) => return Err(Fault::HeadInFlight { head }),
            Some(entry) => *entry = true,
        }
        self.taken = self.taken.saturating_add(1);
        if !self.takes_indirect && self.has_table(head) {
            return Err(Fault::Indirect { head });
        }
        let storage = self.spare.pop().unwrap_or_default();
        Chain::parse(descriptors, storage).map(Some)
    }

    /// Whether the driver has made a buffer available that was not taken yet. One look at memory.
    pub fn has_next(&self) -> Result<bool, Fault> {
        let available = self.ring.avail_idx(&*self.memory, Ordering::Acquire).map_err(Fault::Ring)?;
        Ok(available.0 != self.ring.next_avail())
    }

    /// Undoes the last [`Queue::pop`], for a chain that cannot be served yet. Several are undone in the reverse
    /// of the order they were taken in, with no completion between.
    pub fn give_back(&mut self, chain: Chain) {
        self.forget(chain);
        self.ring.go_to_previous_position();
    }

    /// Hands `chain` back to the driver with `written` bytes in its writable part, counted from its start.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), Fault> {
        self.complete_all([(chain, written)])
    }

    /// Hands several chains back at once: the driver sees all of them or none, as it must for a packet that lies in
    /// several (virtio 1.2, section 5.1.6.4).
    pub fn complete_all(&mut self, chains: impl IntoIterator<Item = (Chain, u32)>) -> Result<(), Fault> {
        let mut next = self.ring.next_used();
        for (chain, written) in chains {
            let written = written.min(chain.writable_bytes());
            let element = u64::from(written).wrapping_shl(32) | u64::from(chain.head());
            self.forget(chain);
            let slot = next.checked_rem(self.ring.size()).unwrap_or(0);
            let offset = u64::from(slot).saturating_mul(USED_ELEMENT_BYTES).saturating_add(USED_HEADER_BYTES);
            let place = GuestAddress(self.ring.used_ring().saturating_add(offset));
            self.memory.write_obj(element.to_le(), place).map_err(memory_fault)?;
            next = next.wrapping_add(1);
        }
        self.ring.set_next_used(next);
        let index = GuestAddress(self.ring.used_ring().saturating_add(RING_INDEX_OFFSET));
        self.memory.store(next.to_le(), index, Ordering::Release).map_err(memory_fault)
    }

    /// Whether the driver wants to hear of what was completed since this was last asked. Ask once after each
    /// batch of completions and signal when it is true.
    pub fn wants_signal(&mut self) -> Result<bool, Fault> {
        let next = self.ring.next_used();
        let signalled = std::mem::replace(&mut self.signalled, next);
        if next == signalled {
            return Ok(false);
        }
        // The driver sees the used index before its wish is read (virtio 1.2, section 2.7.10).
        fence(Ordering::SeqCst);
        let entries = u64::from(self.ring.size()).saturating_mul(2);
        let wish = if self.ring.event_idx_enabled() { entries.saturating_add(4) } else { 0 };
        let place = GuestAddress(self.ring.avail_ring().saturating_add(wish));
        let wish = u16::from_le(self.memory.load(place, Ordering::Relaxed).map_err(memory_fault)?);
        if !self.ring.event_idx_enabled() {
            return Ok(wish & AVAIL_NO_INTERRUPT == 0);
        }
        // Whether the index the driver waits for has been passed since the last time.
        Ok(next.wrapping_sub(wish).wrapping_sub(1) < next.wrapping_sub(signalled))
    }

    /// Tells the driver that kicks are not needed while the queue is being served.
    pub fn silence_kicks(&mut self) -> Result<(), Fault> {
        if !std::mem::replace(&mut self.asks_for_kicks, false) {
            return Ok(());
        }
        if !self.ring.event_idx_enabled() {
            return self.ring.disable_notification(&*self.memory).map_err(Fault::Ring);
        }
        // By the event index a driver kicks when it passes the one it is asked for (virtio 1.2, section 2.7.10), so it is
        // asked for one that it has passed, and that comes again only after 2¹⁶ buffers.
        let passed = self.ring.next_avail().wrapping_sub(1);
        let elements = u64::from(self.ring.size()).saturating_mul(USED_ELEMENT_BYTES);
        let offset = elements.saturating_add(USED_HEADER_BYTES);
        let place = GuestAddress(self.ring.used_ring().saturating_add(offset));
        self.memory.store(passed.to_le(), place, Ordering::Relaxed).map_err(memory_fault)
    }

    /// Asks for a kick with the next buffer. True when a buffer is already there, for which no kick may come.
    pub fn ask_for_kicks(&mut self) -> Result<bool, Fault> {
        self.asks_for_kicks = true;
        self.ring.enable_notification(&*self.memory).map_err(Fault::Ring)
    }

    /// Takes up to `batch` chains and completes each at once with the number of bytes that `answer` says it wrote.
    /// True when there may be more; else the driver kicks with the next.
    pub fn answer_each(
        &mut self,
        batch: usize,
        mut answer: impl FnMut(&Ram, &Chain) -> u32,
    ) -> Result<bool, Fault> {
        self.silence_kicks()?;
        for _ in 0..batch {
            match self.pop()? {
                Some(chain) => {
                    let written = answer(&self.memory, &chain);
                    self.complete(chain, written)?;
                }
                None if self.ask_for_kicks()? => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether a descriptor of the chain points to a table. A guest that rewrites the chain before it is parsed gets what a
    /// driver gets that has negotiated tables, which are checked like the rest.
    fn has_table(&self, head: u16) -> bool {
        let mut at = head;
        for _ in 0..self.ring.size() {
            let offset =
                u64::from(at).saturating_mul(DESCRIPTOR_BYTES).saturating_add(DESCRIPTOR_FLAGS_OFFSET);
            let place = GuestAddress(self.ring.desc_table().saturating_add(offset));
            // What cannot be read is found to be malformed when the chain is parsed.
            let Ok(tail) = self.memory.read_obj::<u32>(place) else { return false };
            let [flags, next] = [u32::from_le(tail) as u16, (u32::from_le(tail) >> 16) as u16];
            if flags & DESCRIPTOR_INDIRECT != 0 {
                return true;
            }
            if flags & DESCRIPTOR_NEXT == 0 || next >= self.ring.size() {
                return false;
            }
            at = next;
        }
        false
    }

    /// Descriptors for which storage is kept.
    #[cfg(test)]
    pub(crate) fn spare_segments(&self) -> usize {
        self.spare.iter().map(Vec::capacity).sum()
    }

    fn forget(&mut self, chain: Chain) {
        if let Some(entry) = self.in_flight.get_mut(usize::from(chain.head())) {
            *entry = false;
        }
        self.taken = self.taken.saturating_sub(1);
        let storage = chain.into_storage();
        if self.spare.len() < SPARE_MAX && storage.capacity() <= SPARE_SEGMENTS_MAX {
            self.spare.push(storage);
        }
    }
}

fn memory_fault(cause: vm_memory::GuestMemoryError) -> Fault {
    Fault::Ring(virtio_queue::Error::GuestMemory(cause))
}

#[cfg(test)]
mod tests;
