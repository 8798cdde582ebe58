//! From the tap to the guest. A packet is read into a buffer of the device's and from there into as many of the
//! guest's as it needs; one that has to wait for buffers or tokens stays there, and the tap is left alone meanwhile.
//! The copy costs 0.2 µs for a packet of 1500 bytes. Reading straight into the guest's buffers would save at most that,
//! and first has to list room for 64 KiB, which with a Linux guest's buffers is 44 of them, for every packet.
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use sys::tap::VNET_HEADER_BYTES;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};

use super::config::bit;
use super::header::{FRAME_BYTES_MIN, is_segmented, to_guest};
use super::service::{Shared, count};
use crate::limiter::Throttle;
use crate::limits::{NET_BATCH, NET_BUFFERS_WAIT, NET_FRAME_BYTES_MAX};
use crate::virtio::{Chain, Fault, Queue, QueueWiring};

/// One byte more than the longest packet, by which longer ones are known.
const PACKET_BYTES_MAX: usize = VNET_HEADER_BYTES + NET_FRAME_BYTES_MAX as usize + 1;

/// Where a frame says what it carries, what says that a VLAN tag follows, and how long that is (IEEE 802.1Q).
const ETHERTYPE: std::ops::Range<usize> = 12..14;
const TAGS: [&[u8]; 2] = [&[0x81, 0x00], &[0x88, 0xA8]];
const TAG_BYTES: usize = 4;

/// Not the driver's doing, but the operator has to know.
const GONE: Fault = Fault::Protocol("the interface's tap has been taken away");

/// What has to happen before there is more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// The tap has another packet.
    Packets,
    /// The guest gives buffers. A flood meets a tap that nobody reads, not a busy thread.
    Buffers,
    /// The limits let another packet pass.
    Tokens,
    /// Nothing will: the interface has been taken away.
    Gone,
}

/// A packet in the device's buffer.
#[derive(Debug, Clone, Copy)]
struct Pending {
    /// With its header.
    length: usize,
    /// The limits have let it pass.
    is_paid: bool,
}

/// What came of a packet.
enum Fate {
    /// Delivered or dropped.
    Done,
    NoBuffers,
}

/// One receive queue at work.
pub(super) struct Receiver {
    pub(super) throttle: Throttle,
    pub(super) waiting: Waiting,
    index: u16,
    queue: Queue,
    shared: Arc<Shared>,
    packet: Box<[u8]>,
    pending: Option<Pending>,
    /// Chains for the next packet, the last that were taken from the queue.
    held: Vec<Chain>,
    /// What a packet was put into, empty between packets.
    filled: Vec<(Chain, u32)>,
    /// Whether the guest has given a buffer since the queue was last found empty.
    has_found: bool,
}

impl Receiver {
    pub(super) fn new(wiring: QueueWiring, throttle: Throttle, shared: Arc<Shared>) -> Receiver {
        let QueueWiring { index, queue, .. } = wiring;
        Receiver {
            throttle,
            waiting: Waiting::Packets,
            index,
            queue,
            shared,
            packet: vec![0; PACKET_BYTES_MAX].into_boxed_slice(),
            pending: None,
            held: Vec::new(),
            filled: Vec::new(),
            has_found: false,
        }
    }

    /// The queue with its number.
    pub(super) fn queue(&self) -> (u16, &Queue) {
        (self.index, &self.queue)
    }

    /// Delivers a batch; `waiting` says what then has to happen. A full batch waits for packets, which the tap, if it
    /// has them, says at once.
    pub(super) fn run(&mut self) -> Result<(), Fault> {
        match self.waiting {
            Waiting::Packets | Waiting::Buffers => {}
            Waiting::Tokens => return Ok(()),
            Waiting::Gone => return Err(GONE),
        }
        self.queue.silence_kicks()?;
        let outcome = self.deliver_batch();
        if self.queue.wants_signal()? {
            self.shared.signals.queue_used(self.index);
        }
        outcome
    }

    /// Puts the chains that are held back into the queue.
    pub(super) fn give_back(&mut self) {
        while let Some(chain) = self.held.pop() {
            self.queue.give_back(chain);
        }
    }

    fn deliver_batch(&mut self) -> Result<(), Fault> {
        self.waiting = Waiting::Packets;
        for _ in 0..NET_BATCH {
            let Some(pending) = self.next_packet()? else { return Ok(()) };
            let frame_bytes = pending.length.saturating_sub(VNET_HEADER_BYTES) as u64;
            if !pending.is_paid && !self.throttle.allows(frame_bytes) {
                count(&self.shared.stats.throttled);
                self.waiting = Waiting::Tokens;
                return Ok(());
            }
            self.pending = Some(Pending { is_paid: true, ..pending });
            match self.deliver(pending.length)? {
                Fate::Done => self.pending = None,
                Fate::NoBuffers => {
                    self.waiting = Waiting::Buffers;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The packet that waits, or the next of the tap.
    fn next_packet(&mut self) -> Result<Option<Pending>, Fault> {
        for _ in 0..NET_BATCH {
            if self.pending.is_some() {
                break;
            }
            match self.shared.link.receive(&mut self.packet) {
                Ok(0) => return self.has_gone(),
                Ok(length) if is_frame(length) && self.fits_mtu(length) => {
                    self.pending = Some(Pending { length, is_paid: false });
                }
                Ok(_) => count(&self.shared.stats.rx_dropped),
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The tap could not express the packet's header, or had no memory for it; the packet is lost.
                Err(cause) if is_passing(&cause) => count(&self.shared.stats.rx_dropped),
                Err(_) => return self.has_gone(),
            }
        }
        Ok(self.pending)
    }

    /// A driver that knows the MTU is passed no longer frame in one piece (virtio 1.2, section 5.1.4.1).
    fn fits_mtu(&self, length: usize) -> bool {
        let packet = self.packet.get(..length).unwrap_or_default();
        let Some((header, frame)) = packet.split_first_chunk() else { return false };
        let is_tagged = frame.get(ETHERTYPE).is_some_and(|kind| TAGS.contains(&kind));
        let link_bytes = (FRAME_BYTES_MIN as usize).saturating_add(if is_tagged { TAG_BYTES } else { 0 });
        let most = usize::from(self.shared.mtu).saturating_add(link_bytes);
        self.shared.features & bit(VIRTIO_NET_F_MTU) == 0 || frame.len() <= most || is_segmented(*header)
    }

    fn has_gone(&mut self) -> Result<Option<Pending>, Fault> {
        self.waiting = Waiting::Gone;
        Err(GONE)
    }

    fn deliver(&mut self, length: usize) -> Result<Fate, Fault> {
        let features = self.shared.features;
        let may_merge = features & bit(VIRTIO_NET_F_MRG_RXBUF) != 0;
        let held_max = if may_merge { usize::from(self.queue.size()) } else { 1 };
        let room = |held: &[Chain]| {
            held.iter().fold(0_usize, |sum, chain| sum.saturating_add(chain.writable_bytes() as usize))
        };
        while room(&self.held) < length {
            if self.held.len() >= held_max {
                count(&self.shared.stats.rx_dropped);
                return Ok(Fate::Done);
            }
            match self.queue.pop()? {
                Some(chain) if chain.readable_bytes() == 0 && chain.writable_bytes() > 0 => {
                    self.has_found = true;
                    self.held.push(chain)
                }
                Some(_) => return Err(Fault::Protocol("a receive buffer cannot be written")),
                None if self.looks_again_soon() => return Ok(Fate::NoBuffers),
                None if self.queue.ask_for_kicks()? => {}
                None => return Ok(Fate::NoBuffers),
            }
        }
        let buffers = u16::try_from(self.held.len()).unwrap_or(u16::MAX);
        let Some(packet) = self.packet.get_mut(..length) else { return Ok(Fate::Done) };
        let header = packet.first_chunk_mut::<VNET_HEADER_BYTES>();
        match header.and_then(|header| Some((to_guest(*header, buffers, features)?, header))) {
            Some((checked, header)) => *header = checked,
            None => {
                count(&self.shared.stats.rx_dropped);
                return Ok(Fate::Done);
            }
        }
        let mut rest = &*packet;
        let mut is_stored = true;
        for chain in self.held.drain(..) {
            let (piece, more) = rest.split_at(rest.len().min(chain.writable_bytes() as usize));
            is_stored &= chain.write(&self.shared.memory, 0, piece).is_ok();
            self.filled.push((chain, u32::try_from(piece.len()).unwrap_or(u32::MAX)));
            rest = more;
        }
        let stats = &self.shared.stats;
        if is_stored {
            count(&stats.rx_packets);
            let frame_bytes = length.saturating_sub(VNET_HEADER_BYTES) as u64;
            stats.rx_bytes.fetch_add(frame_bytes, Ordering::Relaxed);
        } else {
            // A buffer outside memory: no length is true of what the guest then has.
            count(&stats.malformed);
            count(&stats.rx_dropped);
            self.filled.iter_mut().for_each(|(_, written)| *written = 0);
        }
        self.queue.complete_all(self.filled.drain(..))?;
        Ok(Fate::Done)
    }

    /// Whether the thread is woken to look for buffers in a moment. A kick comes with the first buffer, and a guest that has
    /// used up all of them gives them back one by one: each would cost it an exit, and the thread a wake-up for one packet,
    /// most of all where both share a processor. So kicks are asked for only after a moment in which there was none.
    fn looks_again_soon(&mut self) -> bool {
        std::mem::take(&mut self.has_found) && self.throttle.wake_after(NET_BUFFERS_WAIT)
    }
}

fn is_frame(length: usize) -> bool {
    length < PACKET_BYTES_MAX && length >= VNET_HEADER_BYTES.saturating_add(FRAME_BYTES_MIN as usize)
}

fn is_passing(cause: &io::Error) -> bool {
    let number = cause.raw_os_error().map(Errno::from_raw);
    matches!(number, Some(Errno::EINTR | Errno::EINVAL | Errno::ENOMEM | Errno::ENOBUFS | Errno::EFAULT))
}
