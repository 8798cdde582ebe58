//! From the guest to the tap: one chain, one packet, one system call, straight out of guest memory behind a header that
//! was copied and checked. What the tap does not take is dropped, as on any wire.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::packet::{SendError, Sender};
use sys::tap::VNET_HEADER_BYTES;

use super::header::{FRAME_BYTES_MIN, on_wire, to_tap};
use super::service::{Shared, count};
use crate::limiter::Throttle;
use crate::limits::{NET_BATCH, NET_FRAME_BYTES_MAX, NET_HANDED_BACK_AT_ONCE};
use crate::virtio::{Chain, Fault, Progress, Queue, QueueWiring};

/// A packet that may go out: its header as the kernel gets it, and the length of its frame.
struct Packet {
    header: [u8; VNET_HEADER_BYTES],
    frame_bytes: u32,
}

/// One transmit queue at work.
pub(super) struct Transmitter {
    pub(super) throttle: Throttle,
    index: u16,
    queue: Queue,
    shared: Arc<Shared>,
    sender: Sender,
    /// Sent, and not yet handed back.
    sent: Vec<(Chain, u32)>,
}

impl Transmitter {
    pub(super) fn new(wiring: QueueWiring, throttle: Throttle, shared: Arc<Shared>) -> Transmitter {
        let QueueWiring { index, queue, .. } = wiring;
        let (sender, sent) = (Sender::default(), Vec::with_capacity(NET_HANDED_BACK_AT_ONCE));
        Transmitter { throttle, index, queue, shared, sender, sent }
    }

    /// The queue with its number.
    pub(super) fn queue(&self) -> (u16, &Queue) {
        (self.index, &self.queue)
    }

    /// Sends a batch.
    pub(super) fn run(&mut self) -> Result<Progress, Fault> {
        if self.throttle.is_waiting() {
            return Ok(Progress::Idle);
        }
        self.queue.silence_kicks()?;
        let outcome = self.send_batch();
        self.hand_back()?;
        if self.queue.wants_signal()? {
            self.shared.signals.queue_used(self.index);
        }
        outcome
    }

    fn send_batch(&mut self) -> Result<Progress, Fault> {
        for _ in 0..NET_BATCH {
            let Some(chain) = self.queue.pop()? else {
                self.hand_back()?;
                if self.queue.ask_for_kicks()? {
                    continue;
                }
                return Ok(Progress::Idle);
            };
            let packet = self.check(&chain);
            let (frames, bytes) =
                packet.as_ref().map_or((1, 0), |packet| on_wire(packet.header, packet.frame_bytes));
            if !self.throttle.allows_several(frames, bytes) {
                self.queue.give_back(chain);
                count(&self.shared.stats.throttled);
                return Ok(Progress::Idle);
            }
            match packet {
                Some(packet) => self.send(&chain, &packet),
                None => count(&self.shared.stats.malformed),
            }
            self.sent.push((chain, 0));
            if self.sent.len() >= NET_HANDED_BACK_AT_ONCE {
                self.hand_back()?;
            }
        }
        Ok(Progress::More)
    }

    /// Hands back what was sent. Several at once, since each time costs both sides the cache line of the used index, which a
    /// busy driver looks at all the time.
    fn hand_back(&mut self) -> Result<(), Fault> {
        self.queue.complete_all(self.sent.drain(..))
    }

    /// Reads what the chain holds, once.
    fn check(&self, chain: &Chain) -> Option<Packet> {
        let frame_bytes = chain.readable_bytes().checked_sub(VNET_HEADER_BYTES as u32)?;
        if chain.writable_bytes() != 0 || !(FRAME_BYTES_MIN..=NET_FRAME_BYTES_MAX).contains(&frame_bytes) {
            return None;
        }
        let mut header = [0; VNET_HEADER_BYTES];
        chain.read(&self.shared.memory, 0, &mut header).ok()?;
        Some(Packet { header: to_tap(header, frame_bytes, self.shared.features)?, frame_bytes })
    }

    fn send(&mut self, chain: &Chain, packet: &Packet) {
        let Shared { link, memory, stats, .. } = &*self.shared;
        let frame = chain.readable_at(VNET_HEADER_BYTES as u32, packet.frame_bytes);
        let pieces = frame.map(|piece| (piece.address, piece.length));
        match link.send(&mut self.sender, &packet.header, memory, pieces) {
            Ok(()) => {
                count(&stats.tx_packets);
                stats.tx_bytes.fetch_add(u64::from(packet.frame_bytes), Ordering::Relaxed);
            }
            Err(SendError::Gather(_)) => count(&stats.malformed),
            Err(SendError::Send(_)) => count(&stats.tx_dropped),
        }
    }
}
