//! A driver made of bytes: descriptors, rings and buffers as right or wrong as the bytes say, and a judge of what the
//! device then did. It knows the specification's rules for chains and nothing of any device.
//!
//! ```text
//! 0     0x800           0x3000   0x4000     0x8000   0xC000     0x1_0000
//! │     │ rings, 2 KiB each │ buffers │ buffers │ nothing │ buffers │
//! └────────── region ───────────────┘└─ region ┘         └─ region ┘
//! ```
use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use arbitrary::Unstructured;
use memory::Ram;
use virtio_queue::QueueT;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::limits::CHAIN_DESCRIPTORS_MAX;
use crate::virtio::worker::by_hand::ByHand;
use crate::virtio::{Active, Begin, Queue, QueueWiring, Signals, VirtioDevice, Wiring};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
pub(super) const EVENT_IDX: u64 = 1 << 29;

pub(super) const RING_BYTES: u64 = 0x800;
pub(super) const AVAIL: u64 = 0x400;
pub(super) const USED: u64 = 0x500;
const RINGS_END: u64 = 0x3000;
const REGION_BYTES: u64 = 0x4000;
const REGIONS: [u64; 3] = [0, 0x4000, 0xC000];
const IMAGE_BYTES: usize = 3 * REGION_BYTES as usize;

/// What one input may ask of a device, so that none takes long.
const STEPS_MAX: usize = 96;

/// What the driver leaves to the target.
pub(super) enum Step {
    /// Queue `.0` is kicked.
    Kick(u16),
    Pause,
    Resume,
    /// Something of the device's own.
    Own(u8),
}

/// How a device may change guest memory besides its rings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// Buffers given for writing.
    Writes,
    /// The same, and only to zero.
    Discards,
    /// Anything, but only to zero.
    DiscardsAnything,
}

/// A buffer as a chain names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) writable: bool,
}

/// The guest: its memory and what it has said.
pub(super) struct Guest {
    pub(super) memory: Arc<Ram>,
    pub(super) size: u16,
    features: u64,
    rings: Vec<Ring>,
    /// Every buffer ever given for writing.
    given: Vec<Range<u64>>,
    /// Indirect tables of chains that were offered.
    tables: Vec<Range<u64>>,
    /// A device may write what it reads as rings or descriptors, so only its survival can be judged.
    pub(super) tangled: bool,
    steps: usize,
}

struct Ring {
    base: u64,
    kick: Arc<EventFd>,
    /// The available index.
    offered: u16,
    /// The used index as last judged.
    used: u16,
    /// Next descriptor of chains made properly.
    free: u16,
    /// Most bytes that a chain starting at this descriptor gave for writing.
    room: Vec<Option<u64>>,
}

thread_local! {
    /// Making memory costs more than a whole input does, so it is made once.
    static MEMORY: RefCell<Option<Arc<Ram>>> = const { RefCell::new(None) };
}

fn blank_memory() -> Arc<Ram> {
    let memory = MEMORY.with_borrow_mut(|kept| {
        let memory = kept.get_or_insert_with(|| {
            let file: File = sys::memfd::create("fuzz", IMAGE_BYTES as u64).unwrap();
            let file = Arc::new(file);
            let region = |(at, start): (usize, &u64)| {
                let offset = FileOffset::from_arc(Arc::clone(&file), at as u64 * REGION_BYTES);
                (GuestAddress(*start), REGION_BYTES as usize, Some(offset))
            };
            let regions = REGIONS.iter().enumerate().map(region);
            Arc::new(Ram::from_ranges_with_files(regions).unwrap())
        });
        Arc::clone(memory)
    });
    for start in REGIONS {
        memory.write_slice(&[0; REGION_BYTES as usize], GuestAddress(start)).unwrap();
    }
    memory
}

pub(super) fn byte(input: &mut Unstructured<'_>) -> u8 {
    input.arbitrary().unwrap_or_default()
}

pub(super) fn word(input: &mut Unstructured<'_>) -> u16 {
    input.arbitrary().unwrap_or_default()
}

/// An address from 16 bits: buffers mostly, edges often, nonsense sometimes.
fn place(input: &mut Unstructured<'_>) -> u64 {
    let value = u64::from(word(input));
    let low = value & 0x1FFF;
    match value >> 13 {
        0 => RINGS_END + low % 0x1000,
        1 => low,
        2 => 0x4000 + low,
        3 => 0x8000 - 32 + low % 64,
        4 => 0xC000 + low,
        5 => 0x1_0000 - 32 + low % 64,
        6 => u64::MAX - low,
        _ => low << 32,
    }
}

/// A length from 16 bits: itself, or near the largest.
fn length(input: &mut Unstructured<'_>) -> u32 {
    match word(input) {
        value @ 0..0xF000 => u32::from(value),
        value => u32::MAX - u32::from(value & 0xFFF),
    }
}

impl Guest {
    /// Rings of up to 64 entries, as the input says.
    pub(super) fn new(input: &mut Unstructured<'_>, rings: usize) -> Guest {
        let size = 1 << (byte(input) % 7);
        let features = if byte(input) & 1 != 0 { EVENT_IDX } else { 0 };
        let ring = |index: usize| Ring {
            base: RING_BYTES * (index as u64 + 1),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            offered: 0,
            used: 0,
            free: 0,
            room: vec![None; usize::from(size)],
        };
        Guest {
            memory: blank_memory(),
            size,
            features,
            rings: (0..rings).map(ring).collect(),
            given: Vec::new(),
            tables: Vec::new(),
            tangled: false,
            steps: 0,
        }
    }

    /// The device's side of a ring.
    pub(super) fn queue(&self, index: usize) -> Queue {
        let base = self.rings[index].base;
        let mut queue = virtio_queue::Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(base as u32), Some(0));
        queue.set_avail_ring_address(Some((base + AVAIL) as u32), Some(0));
        queue.set_used_ring_address(Some((base + USED) as u32), Some(0));
        queue.set_event_idx(self.features & EVENT_IDX != 0);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        Queue::new(queue, Arc::clone(&self.memory))
    }

    /// Starts `device` for a driver that agreed to `features`, without a thread.
    pub(super) fn start(
        &self,
        device: &mut dyn VirtioDevice,
        features: u64,
        signals: Arc<dyn Signals>,
    ) -> (Box<dyn Active>, ByHand) {
        let wiring = |(index, ring): (usize, &Ring)| QueueWiring {
            index: index as u16,
            queue: self.queue(index),
            kick: Arc::clone(&ring.kick),
        };
        let wiring = Wiring {
            memory: Arc::clone(&self.memory),
            features: features | self.features,
            queues: self.rings.iter().enumerate().map(wiring).collect(),
            signals,
            threads: Arc::new(|_| {}),
            begin: Begin::Serving,
        };
        ByHand::catch(|| device.activate(wiring).unwrap())
    }

    /// Does as the input says up to the next thing that is not the driver's own; nothing at the end.
    pub(super) fn next(&mut self, input: &mut Unstructured<'_>) -> Option<Step> {
        while !input.is_empty() && self.steps < STEPS_MAX {
            self.steps += 1;
            let verb = byte(input) % 11;
            match verb {
                0 => {
                    let (ring, index) = (self.ring_of(input), u64::from(byte(input)) % u64::from(self.size));
                    let at = self.rings[ring].base + index * 16;
                    self.descriptor_at(at, input);
                }
                1 => {
                    let ring = self.ring_of(input);
                    let head = match byte(input) {
                        0xFF => 0xFFFF,
                        head => u16::from(head),
                    };
                    self.offer(ring, head);
                }
                2 => {
                    let ring = self.ring_of(input);
                    self.rings[ring].offered = word(input);
                    self.tell_offered(ring);
                }
                3 | 4 => return Some(Step::Kick(self.ring_of(input) as u16)),
                5 => {
                    let at = place(input);
                    let count = usize::from(byte(input) % 64).min(input.len());
                    let data = input.bytes(count).unwrap_or_default();
                    // Where that is no memory, the guest has written nothing.
                    let _ = self.memory.write_slice(data, GuestAddress(at));
                    self.reread();
                }
                6 => {
                    let ring = &self.rings[self.ring_of(input)];
                    let (flags, event) = (word(input), word(input));
                    let wish = ring.base + AVAIL + 4 + u64::from(self.size) * 2;
                    self.memory.write_obj(flags, GuestAddress(ring.base + AVAIL)).unwrap();
                    self.memory.write_obj(event, GuestAddress(wish)).unwrap();
                }
                7 => {
                    let (table, index) = (place(input), u64::from(byte(input) % 16));
                    self.descriptor_at(table.saturating_add(index * 16), input);
                    self.reread();
                }
                8 => return Some(if byte(input) & 1 == 0 { Step::Pause } else { Step::Resume }),
                9 => return Some(Step::Own(byte(input))),
                _ => {
                    let ring = self.ring_of(input);
                    self.offer_chain(ring, input);
                    return Some(Step::Kick(ring as u16));
                }
            }
        }
        None
    }

    fn ring_of(&self, input: &mut Unstructured<'_>) -> usize {
        usize::from(byte(input)) % self.rings.len()
    }

    fn descriptor_at(&self, at: u64, input: &mut Unstructured<'_>) {
        let (address, length) = (place(input), length(input));
        let (flags, next) = (u16::from(byte(input) & 7), u16::from(byte(input)));
        self.descriptor(at, address, length, flags, next);
    }

    fn descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let _ = self.memory.write_slice(&bytes, GuestAddress(at));
    }

    /// A proper chain of as many buffers as the input says.
    fn offer_chain(&mut self, ring: usize, input: &mut Unstructured<'_>) {
        let count = (u16::from(byte(input) % 8) + 1).min(self.size);
        let piece =
            |_| Piece { address: place(input), length: length(input), writable: byte(input) & 1 != 0 };
        let pieces: Vec<Piece> = (0..count).map(piece).collect();
        self.offer_pieces(ring, &pieces);
    }

    /// A proper chain of these buffers, as far as the queue has entries for them.
    pub(super) fn offer_pieces(&mut self, ring: usize, pieces: &[Piece]) {
        let (base, head) = (self.rings[ring].base, self.rings[ring].free);
        let count = pieces.len().min(usize::from(self.size));
        for (at, piece) in pieces.iter().take(count).enumerate() {
            let index = self.rings[ring].free;
            let next = (index + 1) % self.size;
            let flags = if piece.writable { WRITE } else { 0 } | if at + 1 < count { NEXT } else { 0 };
            self.descriptor(base + u64::from(index) * 16, piece.address, piece.length, flags, next);
            self.rings[ring].free = next;
        }
        self.offer(ring, head);
    }

    fn offer(&mut self, ring: usize, head: u16) {
        let entry = &mut self.rings[ring];
        let slot = entry.base + AVAIL + 4 + u64::from(entry.offered % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        entry.offered = entry.offered.wrapping_add(1);
        self.tell_offered(ring);
    }

    fn tell_offered(&self, ring: usize) {
        let entry = &self.rings[ring];
        self.memory.write_obj(entry.offered, GuestAddress(entry.base + AVAIL + 2)).unwrap();
    }

    /// Takes note of what the guest wrote over its own rings.
    fn reread(&mut self) {
        for ring in &mut self.rings {
            ring.offered = self.memory.read_obj(GuestAddress(ring.base + AVAIL + 2)).unwrap();
            let used: u16 = self.memory.read_obj(GuestAddress(ring.base + USED + 2)).unwrap();
            // From here on the index in memory does not say what the device has done.
            self.tangled |= used != ring.used;
        }
    }

    /// The entry of the used ring for chain number `at`.
    pub(super) fn used_element(&self, ring: usize, at: u16) -> u64 {
        let slot = u64::from(at % self.size);
        self.memory.read_obj(GuestAddress(self.rings[ring].base + USED + 4 + slot * 8)).unwrap()
    }

    /// The head that the device takes next when it has taken `taken`.
    pub(super) fn head_at(&self, ring: usize, taken: u16) -> u16 {
        let slot = self.rings[ring].base + AVAIL + 4 + u64::from(taken % self.size) * 2;
        self.memory.read_obj(GuestAddress(slot)).unwrap()
    }

    /// The chain at `head` as the specification reads it (virtio 1.2, section 2.7); nothing when it is malformed.
    pub(super) fn walk(&self, ring: usize, head: u16) -> Option<Vec<Piece>> {
        self.walk_noting(ring, head).map(|(pieces, _)| pieces)
    }

    fn walk_noting(&self, ring: usize, head: u16) -> Option<(Vec<Piece>, Option<Range<u64>>)> {
        let (mut table, mut entries) = (self.rings[ring].base, u64::from(self.size));
        let (mut index, mut left, mut indirect) = (u64::from(head), entries, None);
        let (mut bytes, mut pieces, mut count) = (0_u32, Vec::<Piece>::new(), 0);
        loop {
            if left == 0 || index >= entries {
                return None;
            }
            let at = GuestAddress(table.checked_add(index * 16)?);
            let mut raw = [0; 16];
            self.memory.read_slice(&mut raw, at).ok()?;
            let address = u64::from_le_bytes(raw[..8].try_into().ok()?);
            let length = u32::from_le_bytes(raw[8..12].try_into().ok()?);
            let flags = u16::from_le_bytes([raw[12], raw[13]]);
            if flags & INDIRECT != 0 {
                if indirect.is_some() || length % 16 != 0 || length / 16 > 0xFFFF {
                    return None;
                }
                (table, entries, index) = (address, u64::from(length / 16), 0);
                left = entries;
                indirect = Some(address..address.saturating_add(length.into()));
                continue;
            }
            bytes = bytes.checked_add(length)?;
            count += 1;
            let writable = flags & WRITE != 0;
            if count > CHAIN_DESCRIPTORS_MAX || (!writable && pieces.last().is_some_and(|last| last.writable))
            {
                return None;
            }
            if length > 0 {
                pieces.push(Piece { address, length, writable });
            }
            if flags & NEXT == 0 {
                return Some((pieces, indirect));
            }
            (index, left) = (u64::from(u16::from_le_bytes([raw[14], raw[15]])), left - 1);
        }
    }

    /// Takes note of every chain that the device may take.
    fn survey(&mut self) {
        for ring in 0..self.rings.len() {
            let entry = &self.rings[ring];
            let waiting = entry.offered.wrapping_sub(entry.used).min(self.size);
            for at in 0..waiting {
                let head = self.head_at(ring, self.rings[ring].used.wrapping_add(at));
                self.note(ring, head);
            }
        }
        let rings = RING_BYTES..RINGS_END;
        let crosses = |one: &Range<u64>, other: &Range<u64>| one.start < other.end && other.start < one.end;
        self.tangled |= self
            .given
            .iter()
            .any(|given| crosses(given, &rings) || self.tables.iter().any(|table| crosses(given, table)));
    }

    fn note(&mut self, ring: usize, head: u16) {
        let Some((pieces, table)) = self.walk_noting(ring, head) else { return };
        let given = pieces.iter().filter(|piece| piece.writable);
        let room = given.clone().map(|piece| u64::from(piece.length)).sum();
        for piece in given {
            let range = piece.address..piece.address.saturating_add(piece.length.into());
            if !self.given.contains(&range) {
                self.given.push(range);
            }
        }
        self.tables.extend(table.filter(|table| !self.tables.contains(table)));
        if let Some(entry) = self.rings[ring].room.get_mut(usize::from(head)) {
            *entry = (*entry).max(Some(room));
        }
    }

    fn image(&self) -> Vec<u8> {
        let mut image = vec![0; IMAGE_BYTES];
        for (part, start) in image.chunks_mut(REGION_BYTES as usize).zip(REGIONS) {
            self.memory.read_slice(part, GuestAddress(start)).unwrap();
        }
        image
    }

    /// Kicks a queue and judges what comes of it.
    pub(super) fn kick(&mut self, device: &mut ByHand, queue: u16, manner: Manner) {
        self.rings[usize::from(queue)].kick.write(1).unwrap();
        self.judged(device, manner, ByHand::turn);
    }

    /// Lets the device do something and judges what it did to memory.
    pub(super) fn judged<T>(
        &mut self,
        device: &mut ByHand,
        manner: Manner,
        act: impl FnOnce(&mut ByHand) -> T,
    ) -> T {
        self.survey();
        let (before, was_broken) = (self.image(), device.is_broken() && device.in_flight() == 0);
        let answer = act(device);
        self.judge(before, was_broken, manner);
        answer
    }

    fn judge(&mut self, mut expected: Vec<u8>, was_broken: bool, manner: Manner) {
        let found = self.image();
        if self.tangled {
            return;
        }
        assert!(!was_broken || expected == found, "a broken device went on");
        for ring in &self.rings {
            let offered: u16 = self.memory.read_obj(GuestAddress(ring.base + AVAIL + 2)).unwrap();
            if offered != ring.offered {
                assert!(manner == Manner::DiscardsAnything, "the device wrote an available ring");
                self.tangled = true;
                return;
            }
        }
        (0..self.rings.len()).for_each(|ring| self.judge_used(ring));
        let used = self.rings.iter().map(|ring| {
            let start = ring.base + USED;
            start..start + 6 + u64::from(self.size) * 8
        });
        used.for_each(|range| adopt(&mut expected, &found, range, Allowed::Anything));
        let everything = 0..u64::MAX;
        let (given, allowed) = match manner {
            Manner::Writes => (&self.given[..], Allowed::Anything),
            Manner::Discards => (&self.given[..], Allowed::Zero),
            Manner::DiscardsAnything => (std::slice::from_ref(&everything), Allowed::Zero),
        };
        given.iter().for_each(|range| adopt(&mut expected, &found, range.clone(), allowed));
        if expected != found {
            let at = expected.iter().zip(&found).position(|(one, other)| one != other);
            panic!("the device wrote byte {at:?} of memory's {IMAGE_BYTES}, which it was not given");
        }
    }

    fn judge_used(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let used: u16 = self.memory.read_obj(GuestAddress(ring.base + USED + 2)).unwrap();
        let (done, waiting) = (used.wrapping_sub(ring.used), ring.offered.wrapping_sub(ring.used));
        assert!(done <= self.size, "{done} chains came back from a queue of {}", self.size);
        assert!(waiting > self.size || done <= waiting, "{done} chains came back of {waiting} offered");
        for at in 0..done {
            let slot = u64::from(ring.used.wrapping_add(at) % self.size);
            let element: u64 = self.memory.read_obj(GuestAddress(ring.base + USED + 4 + slot * 8)).unwrap();
            let (head, written) = (element & 0xFFFF_FFFF, element >> 32);
            let room = usize::try_from(head).ok().and_then(|head| *ring.room.get(head)?);
            let room = room.unwrap_or_else(|| panic!("head {head} came back and was never offered"));
            assert!(written <= room, "{written} bytes are said to be written into {room}");
        }
        ring.used = used;
    }
}

/// What may have been written somewhere.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Allowed {
    Anything,
    Zero,
}

/// Takes over from `found` what lies in `range` of guest memory and is `allowed`.
fn adopt(expected: &mut [u8], found: &[u8], range: Range<u64>, allowed: Allowed) {
    for (at, start) in REGIONS.iter().enumerate() {
        let end = range.end.min(start + REGION_BYTES);
        let first = range.start.max(*start);
        if first >= end {
            continue;
        }
        let offset = at as u64 * REGION_BYTES;
        let inside = (first - start + offset) as usize..(end - start + offset) as usize;
        let (to, from) = (&mut expected[inside.clone()], &found[inside]);
        if allowed == Allowed::Anything {
            to.copy_from_slice(from);
            continue;
        }
        // Whole pieces first: byte by byte, most of the time would go here.
        for (to, from) in to.chunks_mut(256).zip(from.chunks(256)) {
            if to != from {
                to.iter_mut().zip(from).filter(|(_, from)| **from == 0).for_each(|(to, _)| *to = 0);
            }
        }
    }
}

/// Signals that nobody hears.
pub(super) struct Unheard;

impl Signals for Unheard {
    fn queue_used(&self, _index: u16) {}
    fn config_changed(&self) {}
    fn broken(&self, detail: String) {
        assert!(!detail.is_empty(), "a fault without words");
    }
}
